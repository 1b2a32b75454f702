"""Attention of the draft: rotary embedding, and who sees whom.

Shapes: ``T`` query rows, ``S`` key rows, ``N`` query heads, ``G`` key-value heads, ``D`` head
size, ``J`` depths after depth 0. Query head n reads key-value head n // (N // G).

Plain PyTorch, exact, memory quadratic in a document's length. A fused kernel replaces
``ttt_attention`` and keeps its signature.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.precision import at_least_fp32

_MINUS_INF = float("-inf")


class Rotary:
    """Rotary position embedding with transformers' own frequencies, at least in float32.

    No module: a cast of the draft to bf16 must not round the frequencies.
    """

    def __init__(self, config: DraftModelConfig) -> None:
        llama = LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=dict(config.rope_parameters),
        )
        with torch.device("cpu"):  # real numbers even where the draft is built on "meta"
            embedding = LlamaRotaryEmbedding(llama)
        self.inv_freq = embedding.inv_freq
        self.attention_scaling = embedding.attention_scaling

    def rotate(self, x_TND: Tensor, positions_T: Tensor) -> Tensor:
        """Turn the two halves of every head by the angles of its position."""
        x = at_least_fp32(x_TND)
        angles = positions_T[:, None].to(x.dtype) * self.inv_freq.to(x.device, x.dtype)
        cos = angles.cos()[:, None] * self.attention_scaling
        sin = angles.sin()[:, None] * self.attention_scaling
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        return turned.to(x_TND.dtype)


def ttt_attention(
    q_TND: Tensor,
    k0_TGD: Tensor,
    v0_TGD: Tensor,
    later_k: Sequence[Tensor],
    later_v: Sequence[Tensor],
    doc_starts: Sequence[int],
    scale: float,
) -> Tensor:
    """Attention of one depth of the training-time test (EAGLE-3, arXiv 2503.01840, figure 6).

    The query at position i sees the depth-0 keys of positions <= i of its own document, and
    of each later depth the key at i itself; one softmax over both, in float32.

    Args:
        q_TND: Queries of the newest depth, already rotated.
        k0_TGD: Keys of depth 0.
        v0_TGD: Values of depth 0.
        later_k: [T, G, D] for each depth from 1 to the newest, which comes last.
        later_v: Likewise.
        doc_starts: Where each document starts, and T.
        scale: Factor of the scores.

    Returns:
        [T, N, D].
    """
    documents = []
    for start, end in pairwise(doc_starts):
        rows = slice(start, end)
        own_k, own_v = [k[rows] for k in later_k], [v[rows] for v in later_v]
        documents.append(_attend(q_TND[rows], k0_TGD[rows], v0_TGD[rows], own_k, own_v, scale))
    return torch.cat(documents)


def causal_attention(q_TND: Tensor, k_SGD: Tensor, v_SGD: Tensor, scale: float) -> Tensor:
    """Ordinary attention of the last T of S rows over all before and themselves."""
    return _attend(q_TND, k_SGD, v_SGD, [], [], scale)


def _attend(
    q_TND: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    own_k: Sequence[Tensor],
    own_v: Sequence[Tensor],
    scale: float,
) -> Tensor:
    """Causal attention over ``k_SGD``, aligned at the end, and over ``own_k`` at the diagonal."""
    num_queries, num_keys, groups = len(q_TND), len(k_SGD), k_SGD.shape[1]
    q = at_least_fp32(q_TND).unflatten(1, (groups, -1)) * scale  # [T, G, N // G, D]
    scores = torch.einsum("tgnd,sgd->gnts", q, at_least_fp32(k_SGD))
    future = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device)
    future = future.triu(num_keys - num_queries + 1)
    scores = scores.masked_fill(future, _MINUS_INF)
    own = [torch.einsum("tgnd,tgd->gnt", q, at_least_fp32(k)) for k in own_k]
    probs = torch.cat([scores, *(score[..., None] for score in own)], dim=-1).softmax(-1)
    out = torch.einsum("gnts,sgd->tgnd", probs[..., :num_keys], at_least_fp32(v_SGD))
    for depth, v in enumerate(own_v):
        share = probs[..., num_keys + depth].permute(2, 0, 1)  # [T, G, N // G]
        out = out + share[..., None] * at_least_fp32(v)[:, :, None]
    return out.flatten(1, 2).to(q_TND.dtype)
