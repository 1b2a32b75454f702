"""The EAGLE-3 draft (arXiv 2503.01840): what is trained, and exported under these very names.

Shapes: ``T`` rows, ``A`` width of the concatenated auxiliary states, ``H`` hidden size, ``N``
query heads, ``G`` key-value heads, ``D`` head size, ``Vd`` draft vocabulary. The row of
position i holds the state g_i and the embedding of token i+1, and predicts token i+2.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from torchspec_lib.models.attention import Rotary, branch_attention, causal_attention
from torchspec_lib.models.compiled import compiled_on_gpu
from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.precision import at_least_fp32

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Takes rotated q [T, N, D], k [T, G, D] and v [T, G, D] of the new rows, gives [T, N, D]."""


class RMSNorm(nn.Module):
    """Root-mean-square norm; the mean in float32, the weight in its own dtype, as Llama does."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _rms_norm(x, self.weight, self._eps)


@compiled_on_gpu
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    exact = at_least_fp32(x)
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


class _SelfAttention(nn.Module):
    """Projections of a Llama attention whose input is an embedding beside a state."""

    def __init__(self, config: DraftModelConfig) -> None:
        super().__init__()
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(2 * config.hidden_size, heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, groups * config.head_dim, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, groups * config.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * config.head_dim, config.hidden_size, bias=False)
        self.head_dim = config.head_dim
        self.rotary = Rotary(config)

    def forward(self, pairs_T2H: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        split = (-1, self.head_dim)
        q = self.q_proj(pairs_T2H).unflatten(-1, split)
        k = self.k_proj(pairs_T2H).unflatten(-1, split)
        v = self.v_proj(pairs_T2H).unflatten(-1, split)
        q, k = self.rotary.rotate(q, positions_T), self.rotary.rotate(k, positions_T)
        out: Tensor = self.o_proj(attend(q, k, v).flatten(1))
        return out


class MLP(nn.Module):
    """Llama's gated MLP."""

    def __init__(self, config: DraftModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x_TH: Tensor) -> Tensor:
        out: Tensor = self.down_proj(self.act(self.gate_proj(x_TH)) * self.up_proj(x_TH))
        return out


class _DecoderLayer(nn.Module):
    """A Llama layer over pairs; its residual is the state before ``hidden_norm``."""

    def __init__(self, config: DraftModelConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = _SelfAttention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(width, eps)
        self.hidden_norm = RMSNorm(width, eps)
        self.post_attention_layernorm = RMSNorm(width, eps)

    def forward(
        self, embeds_TH: Tensor, states_TH: Tensor, positions_T: Tensor, attend: Attend
    ) -> Tensor:
        pairs_T2H = torch.cat([self.input_layernorm(embeds_TH), self.hidden_norm(states_TH)], -1)
        mid_TH = states_TH + self.self_attn(pairs_T2H, positions_T, attend)
        out: Tensor = mid_TH + self.mlp(self.post_attention_layernorm(mid_TH))
        return out


class KeyValueCache:
    """Keys and values of one document's rows so far, for chains at evaluation."""

    def __init__(self) -> None:
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self._keys is None else len(self._keys)

    def append(self, k_TGD: Tensor, v_TGD: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows; gives all keys and values, these included."""
        if self._keys is None or self._values is None:
            self._keys, self._values = k_TGD, v_TGD
        else:
            self._keys = torch.cat([self._keys, k_TGD])
            self._values = torch.cat([self._values, v_TGD])
        return self._keys, self._values

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """All keys and values; there must be some."""
        assert self._keys is not None
        assert self._values is not None
        return self._keys, self._values

    def truncate(self, length: int) -> None:
        """Forget all rows from ``length`` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"can't truncate {self.length} rows to {length}")
        if self._keys is not None and self._values is not None:
            self._keys, self._values = self._keys[:length], self._values[:length]


class Branches:
    """Keys and values of K branches that part behind a document's cached rows, by depth."""

    def __init__(self, trunk: KeyValueCache) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self.trunk = trunk

    @property
    def next_position(self) -> int:
        return self.trunk.length + len(self._keys)

    def follow(self, branch_K: Tensor) -> None:
        """Let branch k go on from where branch ``branch_K[k]`` has got to."""
        self._keys = [k[branch_K] for k in self._keys]
        self._values = [v[branch_K] for v in self._values]

    def append(self, k_KGD: Tensor, v_KGD: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Add a row to every branch; gives all their own rows, by depth."""
        self._keys.append(k_KGD)
        self._values.append(v_KGD)
        return self._keys, self._values


class Eagle3Draft(nn.Module):
    """The trained part of a draft. The embedding is the target's, and stays outside."""

    def __init__(self, config: DraftModelConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(config.aux_width, config.hidden_size, bias=False)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(
                RMSNorm(config.target_hidden_size, config.rms_norm_eps)
                for _ in config.aux_layer_ids
            )
        self.midlayer = _DecoderLayer(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.attention_scale = 1 / math.sqrt(config.head_dim)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in; under FSDP's mixed precision only right inside a forward."""
        return self.fc.weight.dtype

    @torch.no_grad()
    def init_weights(self, target_lm_head_rows_VdH: Tensor, generator: torch.Generator) -> None:
        """Kaiming-uniform as ``nn.Linear``'s default; the head starts as the target's rows."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            elif isinstance(module, RMSNorm):
                module.weight.fill_(1.0)
        self.lm_head.weight.copy_(target_lm_head_rows_VdH)

    def project(self, aux_TA: Tensor) -> Tensor:
        """The states g [T, H] that depth 0 reads. Once per token, never per depth."""
        aux_TA = aux_TA.to(self.dtype)
        if self.config.fc_norm:
            chunks = aux_TA.chunk(len(self.fc_norm), dim=-1)
            normed = [norm(x) for norm, x in zip(self.fc_norm, chunks, strict=True)]
            aux_TA = torch.cat(normed, dim=-1)
        states_TH: Tensor = self.fc(aux_TA)
        return states_TH

    def layer(
        self, embeds_TH: Tensor, states_TH: Tensor, positions_T: Tensor, attend: Attend
    ) -> Tensor:
        """One depth: the states that both ``logits`` and the next depth read, [T, H]."""
        states_TH = states_TH.to(self.dtype)
        out_TH = self.midlayer(embeds_TH.to(self.dtype), states_TH, positions_T, attend)
        return self.next_states(out_TH)

    def next_states(self, out_TH: Tensor) -> Tensor:
        """What the next depth reads of the decoder layer's output."""
        return self._normed(out_TH) if self.config.norm_output else out_TH

    def head_input(self, out_TH: Tensor) -> Tensor:
        """What lm_head reads: ``layer``'s output after the norm."""
        return out_TH if self.config.norm_output else self._normed(out_TH)

    def logits(self, out_TH: Tensor) -> Tensor:
        """Over the draft vocabulary, [T, Vd]."""
        logits_TVd: Tensor = self.lm_head(self.head_input(out_TH))
        return logits_TVd

    def decode(
        self, embeds_TH: Tensor, states_TH: Tensor, positions_T: Tensor, cache: KeyValueCache
    ) -> Tensor:
        """Run T new rows of one document, which see the cache and each other causally.

        A chain starts with rows whose states are ``project``'s, and goes on a row at a time,
        each reading this method's last output as its state.

        Returns:
            [T, H]: what ``logits`` and the next row's state are made of. The cache has grown.
        """

        def attend(q_TND: Tensor, k_TGD: Tensor, v_TGD: Tensor) -> Tensor:
            return causal_attention(q_TND, *cache.append(k_TGD, v_TGD), self.attention_scale)

        return self.layer(embeds_TH, states_TH, positions_T, attend)

    def decode_branches(self, embeds_KH: Tensor, states_KH: Tensor, branches: Branches) -> Tensor:
        """Run a row on each of K branches, which see what they follow and nothing of each other.

        Returns:
            [K, H], as ``decode``. The branches have grown.
        """
        position = torch.tensor(branches.next_position, device=embeds_KH.device)

        def attend(q_KND: Tensor, k_KGD: Tensor, v_KGD: Tensor) -> Tensor:
            own = branches.append(k_KGD, v_KGD)
            return branch_attention(q_KND, *branches.trunk.rows, own, self.attention_scale)

        return self.layer(embeds_KH, states_KH, position.expand(len(embeds_KH)), attend)

    def _normed(self, out_TH: Tensor) -> Tensor:
        normed_TH: Tensor = self.norm(out_TH)
        return normed_TH
