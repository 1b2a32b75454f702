"""Targets of several families, random and tiny, with the configuration that real ones have."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
GROUPED = {"num_key_value_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **GROUPED))


def _qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, **GROUPED))


def _qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(**SIZES, **GROUPED, **EXPERTS, num_experts=4, norm_topk_prob=True)
    return Qwen3MoeForCausalLM(config)


def _deepseek_v2() -> PreTrainedModel:
    config = DeepseekV2Config(
        **SIZES,
        **EXPERTS,
        num_key_value_heads=4,
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        topk_method="greedy",
        routed_scaling_factor=1.0,
        norm_topk_prob=False,
        first_k_dense_replace=1,
        moe_layer_freq=1,
        scoring_func="softmax",
        # SGLang wants yarn on a CPU. Its and transformers' scales differ for other factors.
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 1.0,
            "original_max_position_embeddings": 256,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    )
    return DeepseekV2ForCausalLM(config)


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v2": _deepseek_v2,
}


def make_target(family: str, folder: Path) -> PreTrainedModel:
    """Save a target to ``folder``. Its norms aren't ones: that would hide a missing one."""
    torch.manual_seed(0)
    model = FAMILIES[family]().float().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)
    model.save_pretrained(folder)
    return model
