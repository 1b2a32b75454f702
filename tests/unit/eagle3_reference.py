"""EAGLE-3 written down naively, from the algorithm's description alone: the judge of the models.

Float64, position by position, every attention mask spelled out. Shares no code with the models
beyond the parameters' names. Also makes small random drafts, targets and samples.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from torchspec_lib.models.draft_config import DraftModelConfig
from torchspec_lib.models.eagle3 import Eagle3Draft
from torchspec_lib.models.target_head import TargetHead
from torchspec_lib.target import TargetSpec

HIDDEN, VOCAB, NUM_AUX = 16, 23, 3
DRAFT_VOCAB = np.array([0, 2, 3, 5, 8, 9, 13, 14, 17, 20, 22])
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 100.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def make_config(pruned: bool = True, rope: str = "default", **changes) -> DraftModelConfig:
    """Small and odd: grouped heads, and heads that don't add up to the hidden size."""
    fields = {
        "hidden_size": HIDDEN,
        "target_hidden_size": HIDDEN,
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "draft_vocab_size": len(DRAFT_VOCAB) if pruned else VOCAB,
        "max_position_embeddings": 128,
        "rope_parameters": ROPES[rope],
        "aux_layer_ids": (1, 3, 4),
        "dtype": "float32",
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    return DraftModelConfig.model_validate(fields | changes)


def make_target(**changes):
    fields = {
        "path": "/nowhere",
        "fingerprint": "0" * 16,
        "num_layers": 8,
        "hidden_size": HIDDEN,
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_parameters": ROPES["llama3"],
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
    }
    return TargetSpec.model_validate(fields | changes)


def make_draft(config: DraftModelConfig, dtype=torch.float64, seed: int = 0) -> Eagle3Draft:
    """Random everywhere, norms included, so that nothing is hidden by a weight of one."""
    draft = Eagle3Draft(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in draft.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm = parameter.ndim == 1
            scale = 0.3 if is_norm else 1.5 / math.sqrt(parameter.shape[-1])
            assert is_norm == ("norm" in name)
            parameter.copy_(noise * scale + is_norm)
    return draft


def make_head(pruned: bool = True, dtype=torch.float64, seed: int = 1) -> TargetHead:
    generator = torch.Generator().manual_seed(seed)
    embed, lm_head = torch.randn(2, VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    return TargetHead(embed.to(dtype), lm_head.to(dtype), DRAFT_VOCAB if pruned else None)


def make_sample(mask: str, seed: int, dtype=torch.float64) -> dict[str, Tensor]:
    """A sample as the store hands it out; ``mask`` like ``"00111"``."""
    length, generator = len(mask), torch.Generator().manual_seed(seed)

    def noise(width):
        values = torch.randn(length, width, generator=generator, dtype=torch.float64)
        return values.to(dtype)

    return {
        "input_ids": torch.randint(VOCAB, (length,), generator=generator, dtype=torch.int32),
        "loss_mask": torch.tensor([char == "1" for char in mask]),
        "aux_hidden_states": noise(NUM_AUX * HIDDEN),
        "last_hidden_states": noise(HIDDEN),
    }


@dataclass
class Reference:
    """Results of the naive computation; per-depth lists, sums over all samples."""

    loss_sums: list[Tensor]
    weight_sums: list[float]
    chains: list[int]
    matches: list[int]
    supervised: list[int]
    grads: dict[str, Tensor] = field(default_factory=dict)

    def total(self, decay: float) -> Tensor:
        """sum_k decay^k * (sum of l_k / count_k)."""
        terms = zip(self.loss_sums, self.weight_sums, strict=True)
        return sum(
            decay**k * loss / weight if weight else 0.0 * loss
            for k, (loss, weight) in enumerate(terms)
        )


class NaiveDraft:
    """The draft as plain functions over a dictionary of float64 parameters."""

    def __init__(self, draft: Eagle3Draft, head: TargetHead, inv_freq: Tensor, rope_scale: float):
        self.config = draft.config
        self.p = {
            name: value.detach().double().requires_grad_()
            for name, value in draft.state_dict().items()
        }
        self.embed = head.embed_VH.detach().double()
        self.lm_head = head.lm_head_VH.detach().double()
        self.inv_freq, self.rope_scale = inv_freq.double(), rope_scale
        pruned = self.config.draft_vocab_size < self.config.vocab_size
        self.target_ids = DRAFT_VOCAB.tolist() if pruned else list(range(VOCAB))

    def rms(self, x: Tensor, weight: str) -> Tensor:
        mean = sum(v * v for v in x) / len(x)
        return x / torch.sqrt(mean + self.config.rms_norm_eps) * self.p[weight]

    def project(self, aux: Tensor) -> Tensor:
        if self.config.fc_norm:
            parts = [aux[n * HIDDEN : (n + 1) * HIDDEN] for n in range(NUM_AUX)]
            aux = torch.cat([self.rms(x, f"fc_norm.{n}.weight") for n, x in enumerate(parts)])
        return self.p["fc.weight"] @ aux

    def rope(self, x: Tensor, position: int) -> Tensor:
        half = len(x) // 2
        turned = []
        for d in range(len(x)):
            angle = position * self.inv_freq[d % half]
            partner = -x[d + half] if d < half else x[d - half]
            turned.append(x[d] * torch.cos(angle) + partner * torch.sin(angle))
        return torch.stack(turned) * self.rope_scale

    def qkv(self, token: int, state: Tensor, position: int):
        """Heads of q, k and v as lists; rotated at ``position``."""
        e = self.rms(self.embed[token], "midlayer.input_layernorm.weight")
        s = self.rms(state, "midlayer.hidden_norm.weight")
        pair = torch.cat([e, s])
        q, k, v = (
            (self.p[f"midlayer.self_attn.{name}_proj.weight"] @ pair).reshape(
                -1, self.config.head_dim
            )
            for name in "qkv"
        )
        return [self.rope(x, position) for x in q], [self.rope(x, position) for x in k], list(v)

    def finish(self, q, keys, values, visible: list[bool], state: Tensor) -> Tensor:
        """Attention over the visible keys, MLP; gives the next state."""
        group = self.config.num_attention_heads // self.config.num_key_value_heads
        heads = []
        for h, query in enumerate(q):
            scores = torch.stack([query @ key[h // group] for key in keys])
            scores = scores / math.sqrt(self.config.head_dim)
            scores = torch.where(torch.tensor(visible), scores, torch.tensor(-1e300).double())
            probs = torch.softmax(scores, 0)
            heads.append(sum(p * v[h // group] for p, v in zip(probs, values, strict=True)))
        mid = state + self.p["midlayer.self_attn.o_proj.weight"] @ torch.cat(heads)
        x = self.rms(mid, "midlayer.post_attention_layernorm.weight")
        gate = self.p["midlayer.mlp.gate_proj.weight"] @ x
        up = self.p["midlayer.mlp.up_proj.weight"] @ x
        out = mid + self.p["midlayer.mlp.down_proj.weight"] @ (gate / (1 + torch.exp(-gate)) * up)
        return self.rms(out, "norm.weight") if self.config.norm_output else out

    def logits(self, out: Tensor) -> Tensor:
        normed = out if self.config.norm_output else self.rms(out, "norm.weight")
        return self.p["lm_head.weight"] @ normed

    def sample_depths(self, sample, ttt_steps: int) -> list[list[Tensor]]:
        """``[k][i]``: logits of chain i at depth k, where the token that it is fed exists."""
        ids = sample["input_ids"].tolist()
        states = [self.project(aux.double()) for aux in sample["aux_hidden_states"]]
        keys, values, owner, logits = [], [], [], []
        for depth in range(ttt_steps):
            rows = range(len(ids) - 1 - depth)
            fresh = [self.qkv(ids[i + 1 + depth], states[i], i + depth) for i in rows]
            keys += [k for _, k, _ in fresh]
            values += [v for _, _, v in fresh]
            owner += [(depth, i) for i in rows]
            states = [
                self.finish(
                    fresh[i][0],
                    keys,
                    values,
                    [(j <= i) if key_depth == 0 else (j == i) for key_depth, j in owner],
                    states[i],
                )
                for i in rows
            ]
            logits.append([self.logits(state) for state in states])
        return logits

    def loss(self, samples, ttt_steps: int, reduction: str) -> Reference:
        zero = torch.zeros((), dtype=torch.float64)
        result = Reference(
            [zero] * ttt_steps, [0.0] * ttt_steps, [0] * ttt_steps, [0] * ttt_steps, [0] * ttt_steps
        )
        for sample in samples:
            mask, last = sample["loss_mask"].tolist(), sample["last_hidden_states"].double()
            logits = self.sample_depths(sample, ttt_steps)
            broken = set()
            for k in range(ttt_steps):
                terms = []
                for i in range(len(mask)):
                    predicted = [i + 2 + d for d in range(k + 1)]
                    if predicted[-1] >= len(mask) or not all(mask[j] for j in predicted):
                        continue
                    result.supervised[k] += 1
                    target_logits = self.lm_head @ last[i + 1 + k]
                    choice = int(target_logits.argmax())
                    draft_choice = self.target_ids[int(logits[k][i].argmax())]
                    if i not in broken:
                        result.chains[k] += 1
                        result.matches[k] += draft_choice == choice
                    if draft_choice != choice:
                        broken.add(i)
                    if choice in self.target_ids:
                        p = torch.softmax(target_logits[self.target_ids], 0)
                        terms.append(-(p * torch.log_softmax(logits[k][i], 0)).sum())
                if terms:
                    weight = 1 / len(terms) if reduction == "sample" else 1.0
                    result.loss_sums[k] = result.loss_sums[k] + weight * sum(terms)
                    result.weight_sums[k] += weight * len(terms)
        return result

    def backward(self, loss: Tensor) -> dict[str, Tensor]:
        grads = torch.autograd.grad(loss, list(self.p.values()), allow_unused=True)
        return {
            name: torch.zeros_like(p) if grad is None else grad
            for (name, p), grad in zip(self.p.items(), grads, strict=True)
        }

    @torch.no_grad()
    def greedy_chain(self, sample, start: int, steps: int) -> tuple[list[int], list[Tensor]]:
        """Draft ``steps`` tokens after token ``start + 1``, without a cache or a mask.

        Gives the tokens, as target ids, and the logits that they were taken from.
        """
        ids = sample["input_ids"].tolist()
        rows = [
            (ids[j + 1], self.project(sample["aux_hidden_states"][j].double()))
            for j in range(start + 1)
        ]
        tokens, all_logits = [], []
        for _ in range(steps):
            heads = [self.qkv(token, state, j) for j, (token, state) in enumerate(rows)]
            keys, values = [k for _, k, _ in heads], [v for _, _, v in heads]
            out = self.finish(heads[-1][0], keys, values, [True] * len(rows), rows[-1][1])
            all_logits.append(self.logits(out))
            tokens.append(self.target_ids[int(all_logits[-1].argmax())])
            rows.append((tokens[-1], out))
        return tokens, all_logits


def naive(draft: Eagle3Draft, head: TargetHead) -> NaiveDraft:
    """The naive twin of a draft with the default rotary embedding."""
    exponents = torch.arange(0, draft.config.head_dim, 2) / draft.config.head_dim
    inv_freq = 1.0 / draft.config.rope_parameters["rope_theta"] ** exponents
    return NaiveDraft(draft, head, inv_freq, 1.0)
