"""Attention of the draft: rotary embedding, and who sees whom.

Shapes: ``T`` tokens of a pack, ``C`` chains, ``S`` key rows of one document, ``N`` query heads,
``G`` key-value heads, ``D`` head size. Query head n reads key-value head n // (N // G).
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from torchspec_lib.models.chains import Chains
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

    def tables(self, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines [T, D / 2], for heads of ``dtype``."""
        exact = torch.promote_types(dtype, torch.float32)
        inv_freq = self.inv_freq.to(positions_T.device, exact, non_blocking=True)
        angles = positions_T[:, None].to(exact) * inv_freq
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling

    def rotate(self, x_TND: Tensor, positions_T: Tensor) -> Tensor:
        """Turn the two halves of every head by the angles of its position."""
        return rotated(x_TND, *self.tables(positions_T, x_TND.dtype))


def rotated(x_TND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the two halves of every head by angles given as [T, D / 2]."""
    first, second = at_least_fp32(x_TND).chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x_TND.dtype)


def ttt_attention(
    q_CND: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    chains: Chains,
    doc_starts: Sequence[int],
    scale: float,
) -> Tensor:
    """Attention of one depth of the training-time test (EAGLE-3, arXiv 2503.01840, figure 6).

    The query of a chain at position i sees the depth-0 keys of positions <= i of its own
    document, and of each later depth the chain's own key; one softmax over both, in float32.

    Plain PyTorch, exact, memory quadratic in a document's length: what ``fused_attention``
    computes on a GPU.

    Args:
        q_CND: Queries of the newest depth, already rotated.
        keys: [T, G, D] of depth 0, then [C, G, D] of each depth up to the newest.
        values: Likewise.
        chains: Where the queries are.
        doc_starts: Where each document starts, and T.
        scale: Factor of the scores.

    Returns:
        [C, N, D].
    """
    (k0, *own_k), (v0, *own_v) = keys, values
    visible = chains.positions_C - chains.starts_C + 1
    documents = []
    for (start, end), bounds in zip(pairwise(doc_starts), pairwise(chains.bounds), strict=True):
        rows = slice(*bounds)
        own = [k[rows] for k in own_k], [v[rows] for v in own_v]
        documents.append(
            _attend(q_CND[rows], k0[start:end], v0[start:end], visible[rows], own, scale)
        )
    return torch.cat(documents)


def causal_attention(q_TND: Tensor, k_SGD: Tensor, v_SGD: Tensor, scale: float) -> Tensor:
    """Ordinary attention of the last T of S rows over all before and themselves."""
    num_queries, num_keys = len(q_TND), len(k_SGD)
    visible = torch.arange(num_keys - num_queries, num_keys, device=q_TND.device) + 1
    return _attend(q_TND, k_SGD, v_SGD, visible, ([], []), scale)


def branch_attention(
    q_KND: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    own: tuple[Sequence[Tensor], Sequence[Tensor]],
    scale: float,
) -> Tensor:
    """Attention of a row on each of K branches over the S rows that all of them follow.

    And over the rows of its own branch: ``own`` has their keys and values [K, G, D], by depth.
    """
    visible = torch.full((len(q_KND),), len(k_SGD), device=q_KND.device)
    return _attend(q_KND, k_SGD, v_SGD, visible, own, scale)


def _attend(
    q_TND: Tensor,
    k_SGD: Tensor,
    v_SGD: Tensor,
    visible_T: Tensor,
    own: tuple[Sequence[Tensor], Sequence[Tensor]],
    scale: float,
) -> Tensor:
    """Attention of each row over the first ``visible_T`` keys, and over its own keys."""
    num_keys, groups = len(k_SGD), k_SGD.shape[1]
    own_k, own_v = own
    q = at_least_fp32(q_TND).unflatten(1, (groups, -1)) * scale  # [T, G, N // G, D]
    scores = torch.einsum("tgnd,sgd->gnts", q, at_least_fp32(k_SGD))
    future = torch.arange(num_keys, device=q.device) >= visible_T[:, None]
    scores = scores.masked_fill(future, _MINUS_INF)
    own_scores = [torch.einsum("tgnd,tgd->gnt", q, at_least_fp32(k)) for k in own_k]
    probs = torch.cat([scores, *(score[..., None] for score in own_scores)], dim=-1).softmax(-1)
    out = torch.einsum("gnts,sgd->tgnd", probs[..., :num_keys], at_least_fp32(v_SGD))
    for depth, v in enumerate(own_v):
        share = probs[..., num_keys + depth].permute(2, 0, 1)  # [T, G, N // G]
        out = out + share[..., None] * at_least_fp32(v)[:, :, None]
    return out.flatten(1, 2).to(q_TND.dtype)
