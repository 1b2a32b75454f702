"""Make the docstrings target: a model of 100 million parameters, from nothing in some minutes.

From the repository's root, ``python -m examples.docstrings_target.make_target --output FOLDER``
on a GPU reads the Python functions that are installed there, trains a tokenizer and a Llama on
most of them, and writes both with the conversations that ``run.yaml`` trains and measures a draft
with. Legend of shapes: ``B`` rows, ``T`` tokens.
"""

import argparse
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from examples.docstrings_target.corpus import (
    Conversation,
    conversations,
    functions,
    python_files,
    write_jsonl,
)
from examples.tiny_target.make_target import build_optimizers, save, train_tokenizer

ROW_TOKENS = 1_024
MAX_CONVERSATION_TOKENS = 1_000
WARMUP_SHARE, DECAY_SHARE = 0.03, 0.5
SIZES = {
    "100m": {
        "hidden_size": 768,
        "intermediate_size": 2_048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
    },
    "rehearsal": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
}


def build_model(tokenizer: PreTrainedTokenizerFast, size: str) -> LlamaForCausalLM:
    """The untrained target, in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=4_096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **SIZES[size],
    )
    model = LlamaForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.5)  # as the tiny target's
    return model


def rows(tokenizer: PreTrainedTokenizerFast, chats: list[Conversation]) -> torch.Tensor:
    """All conversations one behind the other, cut into rows: int64 (B, T)."""
    texts = [tokenizer.apply_chat_template(chat["messages"], tokenize=False) for chat in chats]
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    fitting = [one.ids for one in encoded if len(one.ids) <= MAX_CONVERSATION_TOKENS]
    flat = np.concatenate([np.array(ids, dtype=np.int64) for ids in fitting])
    count = len(flat) // ROW_TOKENS
    return torch.from_numpy(flat[: count * ROW_TOKENS].reshape(count, ROW_TOKENS))


def batches(rows_BT: torch.Tensor, size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Rows in an order that the seed fixes, epoch after epoch."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for chosen in torch.randperm(len(rows_BT), generator=generator).split(size):
            if len(chosen) == size or len(rows_BT) < size:
                yield rows_BT[chosen].to(device, non_blocking=True)


def next_token_loss(model: LlamaForCausalLM, rows_BT: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over all tokens, in nats."""
    with torch.autocast(rows_BT.device.type, torch.bfloat16):
        hidden = model.model(input_ids=rows_BT[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return functional.cross_entropy(logits.flatten(0, 1).float(), rows_BT[:, 1:].flatten())


def train(
    model: LlamaForCausalLM,
    training: Iterator[torch.Tensor],
    heldout_BT: torch.Tensor,
    seconds: float,
) -> None:
    """Train for a while; the learning rate falls with the time that is left."""
    optimizers = build_optimizers(model, muon_lr=0.02, adamw_lr=2e-3)
    start, share = time.monotonic(), 0.0

    def share_of_lr(_step: int) -> float:
        return min(1.0, share / WARMUP_SHARE + 1e-3, max(0.02, (1.0 - share) / DECAY_SHARE))

    schedules = [LambdaLR(optimizer, share_of_lr) for optimizer in optimizers]
    num_tokens = 0
    with tqdm(total=round(seconds), desc="train", unit="s", mininterval=1.0) as progress:
        for step, batch_BT in enumerate(training):
            loss = next_token_loss(model, batch_BT)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            num_tokens += batch_BT.numel()
            share = (time.monotonic() - start) / seconds
            if step % 100 == 0 or share >= 1.0:
                progress.n = min(round(share * seconds), round(seconds))
                progress.set_postfix(step=step, loss=f"{loss.item():.3f}", tokens=f"{num_tokens:,}")
            if share >= 1.0:
                break
    with torch.no_grad():
        losses = [next_token_loss(model, part_BT).item() for part_BT in heldout_BT.split(16)]
    print(
        f"{step + 1} steps, {num_tokens:,} tokens, {num_tokens / (time.monotonic() - start):,.0f} "
        f"tokens/s; held-out loss {np.mean(losses):.3f} nats a token"
    )


def main() -> None:
    """Make the whole folder."""
    options = _parse_arguments()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = python_files()[:: options.every_file]
    training, heldout = functions(files)
    if not heldout:
        raise SystemExit("no documented function is held out: --every-file leaves too few modules")
    options.output.mkdir(parents=True, exist_ok=True)
    chats = list(conversations(training[: options.max_functions]))
    heldout_chats = list(conversations(heldout))
    print(f"{len(files):,} modules; functions: {len(training):,}, held out {len(heldout):,}")
    write_jsonl(options.output / "train.jsonl", chats[: options.draft_conversations])
    write_jsonl(options.output / "heldout.jsonl", heldout_chats[: options.heldout_conversations])
    tokenizer = train_tokenizer(islice(chats, options.tokenizer_conversations), options.vocab_size)
    rows_BT = rows(tokenizer, chats)
    print(f"{rows_BT.numel():,} tokens")
    model = build_model(tokenizer, options.size).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    if device.type == "cuda":
        rows_BT = rows_BT.pin_memory()
        for layer in model.model.layers:
            layer.compile()
    heldout_BT = rows(tokenizer, heldout_chats)[:128].to(device)
    train(model, batches(rows_BT, options.batch_rows, device), heldout_BT, options.seconds)
    save(model.cpu(), tokenizer, options.output)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=180.0, help="of training")
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--batch-rows", type=int, default=64, help=f"of {ROW_TOKENS} tokens")
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--max-functions", type=int, default=150_000)
    parser.add_argument("--tokenizer-conversations", type=int, default=30_000)
    parser.add_argument("--draft-conversations", type=int, default=30_000)
    parser.add_argument("--heldout-conversations", type=int, default=100)
    parser.add_argument("--every-file", type=int, default=1, help="for a rehearsal: take every Nth")
    return parser.parse_args()


if __name__ == "__main__":
    main()
