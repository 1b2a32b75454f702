"""Make the tiny target: its tokenizer, its prompts, and its weights from nothing.

From the repository's root, ``python -m examples.tiny_target.make_target`` remakes what is
shipped. Legend of shapes: ``B`` conversations, ``T`` tokens, ``H`` hidden.
"""

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from torch.optim import AdamW, Muon, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from examples.tiny_target.corpus import (
    NUM_TRAIN,
    TRAIN_SEED,
    Conversation,
    conversations,
    heldout_conversations,
    questions,
    unanswered,
    write_jsonl,
)

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
# Inside {% generation %}: what the model writes itself, its end-of-turn token included.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '<|user|>\\n' + message['content'] + '<|end|>\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|assistant|>\\n' -}}
        {%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
        {{- '\\n' -}}
    {%- else -%}
        {{- raise_exception('the tiny target knows user and assistant turns only') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""

NUM_TOKENIZER_CONVERSATIONS = 4_000
POOL_SIZE = 2_000
"""Conversations sorted by length at a time, so that a batch holds little padding."""
PROMPT_WEIGHT = 0.1
"""Weight of a prompt token in the loss: the model should know questions, but mostly answer."""
WARMUP_STEPS, DECAY_SHARE = 30, 0.5


@dataclass(frozen=True)
class Batch:
    """Padded conversations, with the weight of every token as a label."""

    token_ids: torch.Tensor  # int64 (B, T)
    weights: torch.Tensor  # float32 (B, T): 1 answer, PROMPT_WEIGHT prompt, 0 padding


def train_tokenizer(chats: Iterable[Conversation], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE with every digit its own token, and the chat template."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (message["content"] + "\n" for chat in chats for message in chat["messages"])
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """The untrained target, in fp32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # Embeddings on the scale of what the layers add: with the default 0.02 the first layers drown
    # them, and training is slower.
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)
    return model


def batches(
    chats: Iterator[Conversation], tokenizer: PreTrainedTokenizerBase, num_tokens: int, seed: int
) -> Iterator[Batch]:
    """Batches of at most ``num_tokens`` tokens with padding, of similar lengths, shuffled."""
    rng = Random(seed)
    while pool := list(islice(chats, POOL_SIZE)):
        encoded = sorted((encode(chat, tokenizer) for chat in pool), key=lambda pair: len(pair[0]))
        groups: list[list[tuple[list[int], list[int]]]] = [[]]
        for token_ids, mask in encoded:
            if (len(groups[-1]) + 1) * len(token_ids) > num_tokens:
                groups.append([])
            groups[-1].append((token_ids, mask))
        rng.shuffle(groups)
        yield from map(_pad, groups)


def encode(chat: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids, and the template's own mask of the assistant's tokens."""
    encoded: Any = tokenizer.apply_chat_template(
        chat["messages"], return_dict=True, return_assistant_tokens_mask=True
    )
    return encoded["input_ids"], encoded["assistant_masks"]


def build_optimizers(model: LlamaForCausalLM, muon_lr: float, adamw_lr: float) -> list[Optimizer]:
    """Muon for the layers' matrices, AdamW for embedding, head and norms."""
    layers = model.model.layers
    matrices = [p for p in layers.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    return [
        Muon(matrices, lr=muon_lr, weight_decay=0.1),
        AdamW(rest, lr=adamw_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(
    model: LlamaForCausalLM,
    training: Iterator[Batch],
    heldout: list[Batch],
    optimizers: list[Optimizer],
    num_steps: int,
) -> float:
    """Train for ``num_steps`` and give the held-out loss."""

    def share_of_lr(step: int) -> float:
        warmup = min(1.0, (step + 1) / WARMUP_STEPS)
        return warmup * min(1.0, max(0.02, (num_steps - step) / (DECAY_SHARE * num_steps)))

    schedules = [LambdaLR(optimizer, share_of_lr) for optimizer in optimizers]
    progress = tqdm(islice(training, num_steps), total=num_steps, desc="train", unit="step")
    for step, batch in enumerate(progress, start=1):
        losses, weights = token_losses(model, batch)
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 100 == 0:
            tqdm.write(f"step {step}: held-out loss {answer_loss(model, heldout):.4f}")
    return answer_loss(model, heldout)


def token_losses(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and weight of every label that counts, each of shape ``(labels,)``."""
    hidden = model.model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
    labels, weights = batch.token_ids[:, 1:], batch.weights[:, 1:]
    counts = weights > 0
    logits = model.lm_head(hidden[:, :-1][counts])
    return functional.cross_entropy(logits, labels[counts], reduction="none"), weights[counts]


@torch.no_grad()
def answer_loss(model: LlamaForCausalLM, heldout: list[Batch]) -> float:
    """Mean cross-entropy of the answers' tokens, in nats."""
    pairs = [token_losses(model, batch) for batch in heldout]
    losses = torch.cat([loss[weights == 1] for loss, weights in pairs])
    return losses.mean().item()


@torch.no_grad()
def rescale_residual(model: LlamaForCausalLM, batch: Batch, target_rms: float) -> list[float]:
    """Scale the residual stream to ``target_rms`` without changing what the model computes.

    Every layer starts with an RMS norm, so scaling all that is written to the stream (the
    embedding, each layer's two output projections) by one factor cancels. Hidden states of
    moderate size keep a draft's first training steps well conditioned.

    Returns:
        The rms after every layer but the last, from embedding on.
    """
    factor = target_rms / torch.tensor(_rms_by_layer(model, batch)[1:]).mean().item()
    model.model.embed_tokens.weight.mul_(factor)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.mul_(factor)
        layer.mlp.down_proj.weight.mul_(factor)
    return _rms_by_layer(model, batch)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write fp16 weights, configs and tokenizer; ``folder`` changes only once all is written."""
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        model.half().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for file in Path(temporary).iterdir():
            file.chmod(0o644)  # safetensors writes for its owner alone
            file.replace(folder / file.name)


def main() -> None:
    """Make the whole folder."""
    options = _parse_arguments()
    torch.manual_seed(options.seed)
    heldout_chats = heldout_conversations()
    excluded = questions(heldout_chats)
    options.output.mkdir(parents=True, exist_ok=True)
    shipped = list(islice(conversations(TRAIN_SEED, excluded), NUM_TRAIN))
    write_jsonl(options.output / "train.jsonl", shipped)
    write_jsonl(options.output / "questions.jsonl", map(unanswered, shipped))
    write_jsonl(options.output / "heldout.jsonl", heldout_chats)

    # The shipped conversations' seed is used for them alone: the target trains on others.
    chats = conversations(options.seed, excluded)
    tokenizer = train_tokenizer(islice(chats, NUM_TOKENIZER_CONVERSATIONS), options.vocab_size)
    model = build_model(tokenizer)
    heldout = list(batches(iter(heldout_chats), tokenizer, options.tokens_per_step, options.seed))
    loss = train(
        model,
        batches(chats, tokenizer, options.tokens_per_step, options.seed),
        heldout,
        build_optimizers(model, options.muon_lr, options.adamw_lr),
        options.steps,
    )
    rms = rescale_residual(model, heldout[0], options.rms)
    print(f"held-out loss {loss:.4f}, rms by layer {[round(value, 2) for value in rms]}")
    save(model, tokenizer, options.output)


def _pad(group: list[tuple[list[int], list[int]]]) -> Batch:
    longest = max(len(token_ids) for token_ids, _ in group)
    token_ids = torch.zeros(len(group), longest, dtype=torch.int64)
    weights = torch.zeros(len(group), longest)
    for row, (ids, mask) in enumerate(group):
        token_ids[row, : len(ids)] = torch.tensor(ids)
        weights[row, : len(ids)] = torch.tensor(mask).float().clamp(min=PROMPT_WEIGHT)
    return Batch(token_ids, weights)


def _rms_by_layer(model: LlamaForCausalLM, batch: Batch) -> list[float]:
    # transformers puts the last layer's output through the final norm, so it is left out.
    states = model.model(input_ids=batch.token_ids, output_hidden_states=True).hidden_states[:-1]
    return [state[batch.weights > 0].pow(2).mean().sqrt().item() for state in states]


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--tokens-per-step", type=int, default=1_900)
    parser.add_argument("--vocab-size", type=int, default=1_024)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adamw-lr", type=float, default=3e-3)
    parser.add_argument("--rms", type=float, default=3.0, help="of the rescaled hidden states")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
