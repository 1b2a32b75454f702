"""The draft's layer arranged for training: every depth of every chain of a pack, nothing else.

It computes what ``Eagle3Draft.layer`` does, with less work and memory:

- Positions without a chain give a key and a value at depth 0, and take part in nothing else.
- The projections read an embedding beside a state. The embedding's half of the products is one
  for all depths, which read it shifted; only the state's half is computed at each.
- Gradients of weights are summed over the depths in float32, by the products themselves.
- The MLP's wide activations are kept for its backward, or computed again where memory is short.

Shapes: ``T`` tokens, ``C`` chains, ``K`` depths, ``H`` hidden size, ``I`` the MLP's width, ``N``
query and ``G`` key-value heads, ``D`` head size, ``P`` = (N + 2 G) D, the projections' width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from torchspec_lib.models.attention import rotated, ttt_attention
from torchspec_lib.models.batch import PackedBatch
from torchspec_lib.models.compiled import compiled_on_gpu
from torchspec_lib.models.eagle3 import MLP, Attend, Eagle3Draft
from torchspec_lib.models.shared import Shared, add_product_, shared_linear, shared_rows


class TrainingLayer:
    """One forward of a draft's layer over a pack: ``first``, then ``later`` for each depth."""

    def __init__(
        self, draft: Eagle3Draft, batch: PackedBatch, embeds_TH: Tensor, ttt_steps: int
    ) -> None:
        """``embeds_TH``: of the token that follows each position."""
        layer, self._draft, self._chains = draft.midlayer, draft, batch.chains
        attention = layer.self_attn
        projections = [attention.q_proj, attention.k_proj, attention.v_proj]
        self._widths = [projection.out_features for projection in projections]
        by_embed, by_state = torch.cat([p.weight for p in projections]).chunk(2, dim=1)
        self._by_state = Shared(by_state)
        self._out_weight = Shared(attention.o_proj.weight)
        recompute = _short_of_memory(draft, batch, ttt_steps)
        self._mlp = SharedMLP(layer.mlp, recompute)
        self._attend = _attention(draft, batch, ttt_steps)
        embeds_TH = layer.input_layernorm(embeds_TH.to(draft.dtype))
        self._from_embeds_TP = F.linear(embeds_TH, by_embed)
        rows = self._chains.extended(ttt_steps - 1)
        self._from_embeds = Shared(self._from_embeds_TP[rows])

    def first(self, states_TH: Tensor) -> Tensor:
        """Depth 0, from ``draft.project``'s states of all positions.

        Returns:
            [C, H]: what ``draft.head_input`` and ``draft.next_states`` read.
        """
        rows, positions_T = self._chains.positions_C, self._chains.token_positions_T
        q, k, v = self._project(states_TH, self._from_embeds_TP, positions_T)
        return self._finish(self._attend(q[rows], k, v), states_TH[rows])

    def later(self, depth: int, states_CH: Tensor) -> Tensor:
        """Another depth, from the states that the one before left; likewise [C, H]."""
        offset_CP = shared_rows(self._from_embeds, depth, len(states_CH))
        positions_C = self._chains.positions_C - self._chains.starts_C + depth
        q, k, v = self._project(states_CH, offset_CP, positions_C)
        return self._finish(self._attend(q, k, v), states_CH)

    def _project(
        self, states: Tensor, from_embeds: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Heads of q, k and v, the first two rotated."""
        layer = self._draft.midlayer
        from_states = shared_linear(layer.hidden_norm(states), self._by_state)
        cos, sin = layer.self_attn.rotary.tables(positions, states.dtype)
        size = self._draft.config.head_dim
        return _heads(from_states, from_embeds, cos, sin, self._widths, size)

    def _finish(self, attended_CND: Tensor, states_CH: Tensor) -> Tensor:
        out_CH = shared_linear(attended_CND.flatten(1), self._out_weight)
        mid_CH = states_CH + out_CH
        return mid_CH + self._mlp(self._draft.midlayer.post_attention_layernorm(mid_CH))


@compiled_on_gpu
def _heads(
    from_states: Tensor,
    from_embeds: Tensor,
    cos: Tensor,
    sin: Tensor,
    widths: list[int],
    size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Add the two halves of the projections, cut the sum into heads, rotate those of q and k."""
    q, k, v = (
        (x + y).unflatten(1, (-1, size))
        for x, y in zip(from_states.split(widths, 1), from_embeds.split(widths, 1), strict=True)
    )
    return rotated(q, cos, sin), rotated(k, cos, sin), v.contiguous()


class SharedMLP:
    """The MLP with weights that all depths share."""

    def __init__(self, mlp: MLP, recompute: bool) -> None:
        self.gate, self.up = Shared(mlp.gate_proj.weight), Shared(mlp.up_proj.weight)
        self.down, self.act = Shared(mlp.down_proj.weight), mlp.act
        self.recompute = recompute

    def __call__(self, x_CH: Tensor) -> Tensor:
        tokens = self.gate.token, self.up.token, self.down.token
        out: Tensor = _MLPFunction.apply(x_CH, self, *tokens)  # type: ignore[no-untyped-call]
        return out

    def wide(self, x_CH: Tensor) -> tuple[Tensor, Tensor]:
        """[C, I] twice: what is gated, and what it is multiplied with."""
        return F.linear(x_CH, self.gate.value), F.linear(x_CH, self.up.value)


class _MLPFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_CH: Tensor, mlp: SharedMLP, *_tokens: Tensor) -> Tensor:
        wide = mlp.wide(x_CH)
        ctx.save_for_backward(x_CH, *(() if mlp.recompute else wide))
        ctx.mlp = mlp
        return F.linear(_gated(*wide, mlp.act), mlp.down.value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mlp: SharedMLP = ctx.mlp
        x_CH, *kept = ctx.saved_tensors
        gate, up = (x.detach().requires_grad_() for x in (kept or mlp.wide(x_CH)))
        with torch.enable_grad():
            gated = _gated(gate, up, mlp.act)
        add_product_(mlp.down.grad, grad.T, gated.detach())
        dgate, dup = torch.autograd.grad(gated, (gate, up), grad @ mlp.down.value)
        add_product_(mlp.gate.grad, dgate.T, x_CH)
        add_product_(mlp.up.grad, dup.T, x_CH)
        dx_CH = torch.addmm(dgate @ mlp.gate.value, dup, mlp.up.value)
        return dx_CH, None, None, None, None


@compiled_on_gpu
def _gated(gate: Tensor, up: Tensor, act: Any) -> Tensor:
    out: Tensor = act(gate) * up
    return out


def _attention(draft: Eagle3Draft, batch: PackedBatch, ttt_steps: int) -> Attend:
    """What attends from depth 0, then from depth 1, and so on."""
    chains, scale = batch.chains, draft.attention_scale
    if batch.input_ids_T.is_cuda:
        # Triton comes with torch's CUDA builds alone.
        from torchspec_lib.models.fused_attention import FusedAttention

        return FusedAttention(chains, ttt_steps, scale)
    keys: list[Tensor] = []
    values: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys.append(k)
        values.append(v)
        return ttt_attention(q, keys, values, chains, batch.doc_starts, scale)

    return attend


def _short_of_memory(draft: Eagle3Draft, batch: PackedBatch, ttt_steps: int) -> bool:
    """Whether keeping the MLPs' wide activations would take more than half of what is free."""
    if not batch.input_ids_T.is_cuda:
        return False
    width = 2 * draft.config.intermediate_size
    num_bytes = ttt_steps * batch.chains.num_chains * width * draft.dtype.itemsize
    device = batch.input_ids_T.device
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return num_bytes > (torch.cuda.mem_get_info(device)[0] + cached) // 2
