"""What a draft is trained on: the target's whole next-token distribution."""

from torch import Tensor

from torchspec_lib.models.precision import at_least_fp32


def soft_cross_entropy(draft_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Forward KL up to a constant: ``-sum_v p(v) log q(v)`` of every row, in nats.

    Args:
        draft_logits: [N, Vd]; q is its softmax.
        teacher_logits: [N, Vd]; p is its softmax. No gradient flows into it.

    Returns:
        [N], float32 (float64 for float64 logits).
    """
    teacher_probs = at_least_fp32(teacher_logits.detach()).softmax(-1)
    return -(teacher_probs * at_least_fp32(draft_logits).log_softmax(-1)).sum(-1)
