"""How often the tiny target answers held-out questions exactly as the corpus does.

From the repository's root: ``python -m examples.tiny_target.measure_target``.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 256
BATCH_SIZE = 20


@torch.inference_mode()
def greedy_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: Sequence[str]
) -> list[str]:
    """The target's greedy answer to each of ``questions``, asked as one batch."""
    batch: Any = tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        tokenizer_kwargs={"padding_side": "left"},
    )
    output = model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    answers = output[:, batch["input_ids"].shape[1] :]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def main() -> None:
    """Print the share of exact answers, and every wrong one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().target
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (folder / "heldout.jsonl").read_text().splitlines()
    pairs = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]

    num_right = 0
    for start in tqdm(range(0, len(pairs), BATCH_SIZE), desc="answer", unit="batch"):
        batch = pairs[start : start + BATCH_SIZE]
        answers = greedy_answers(model, tokenizer, [question for question, _ in batch])
        for (question, expected), answer in zip(batch, answers, strict=True):
            num_right += answer == expected
            if answer != expected:
                tqdm.write(f"Q {question}\nexpected {expected}\nanswered {answer}\n")
    print(f"exact answers: {num_right} of {len(pairs)}")


if __name__ == "__main__":
    main()
