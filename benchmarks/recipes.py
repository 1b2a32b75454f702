"""What each lever is worth: drafts for the tiny target, trained with it and without, three seeds.

``python -m benchmarks.recipes [--only NAME ...] [--seeds N]`` trains, decodes the held-out prompts
for real, and prints accept lengths with their spread; a draft takes a minute or two on two cores.
Every row is the demo's run of EAGLE-3 as published, by AdamW, with a change or two; "eagle-3.1,
muon" is the demo's own. What the output has isn't done again.
"""

import argparse
import json
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from tests.run_process import TINY, Driver
from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.data.dataset import prepare_dataset
from torchspec_lib.evaluation.evaluate import evaluate_draft
from torchspec_lib.pipeline import preflight
from torchspec_lib.regeneration.regenerate import regenerate

FOREIGN = "foreign.jsonl"
PLAIN = {"fc_norm": False, "norm_output": False}
NORMS = {"fc_norm": True, "norm_output": True}
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "eagle-3.1": {"draft": NORMS},
    "muon": {"training": {"optimizer": "muon"}},
    "eagle-3.1, muon": {"draft": NORMS, "training": {"optimizer": "muon"}},
    "eagle-3.1, twice the rate": {"draft": NORMS, "training": {"learning_rate": 0.01}},
    "fc_norm": {"draft": {"fc_norm": True}},
    "norm_output": {"draft": {"norm_output": True}},
    "lk_hybrid": {"training": {"loss": {"lk_hybrid": 1.0}}},
    "lk_alpha": {"training": {"loss": {"lk_alpha": 1.0}}},
    "kl + tv": {"training": {"loss": {"kl": 0.5, "tv": 0.5}}},
    "tv": {"training": {"loss": {"tv": 1.0}}},
    "eagle-3.1, lk_alpha": {"draft": NORMS, "training": {"loss": {"lk_alpha": 1.0}}},
    "eagle-3.1, muon, lk_alpha": {
        "draft": NORMS,
        "training": {"optimizer": "muon", "loss": {"lk_alpha": 1.0}},
    },
    "wsd": {"training": {"lr_schedule": "wsd"}},
    "by sample": {"training": {"loss_reduction": "sample"}},
    "no depth decay": {"training": {"depth_decay": 1.0}},
    "half the vocabulary": {"draft": {"vocab_size": 256}},
    "whole vocabulary": {"draft": {"vocab_size": None}},
    # The same questions in another model's style, and with the target's own answers in its place.
    # In "plain" they are as the target was taught them, which is hardly foreign.
    "foreign answers": {"data": {"train": [FOREIGN]}},
    "regenerated": {
        "data": {"train": [str(TINY / "questions.jsonl")]},
        "regeneration": {"enabled": True, "max_new_tokens": 160, "batch_size": 32},
    },
}
PATIENCE_S = 3600.0


def recipe(name: str, seed: int, data_root: Path) -> RunConfig:
    """The demo's run with a recipe's changes."""
    run = yaml.safe_load((PROJECT_ROOT / "configs" / "tiny.yaml").read_text())["run"]
    run["draft"] |= PLAIN
    run["training"] |= {"optimizer": "adamw"}
    for section, changes in RECIPES[name].items():
        run[section] = run.get(section, {}) | changes
    if run["data"]["train"] == [FOREIGN]:
        run["data"]["train"] = [str(foreign_answers(data_root))]
    return RunConfig.model_validate(run | {"seed": seed, "data_root": str(data_root)})


def foreign_answers(folder: Path) -> Path:
    """The demo's conversations as if another model had answered: what comes last, first."""
    rows = [json.loads(line) for line in (TINY / "train.jsonl").read_text().splitlines()]
    for message in (message for row in rows for message in row["messages"]):
        if message["role"] == "assistant":
            sentences = re.split(r"(?<=\.)\s", message["content"])
            message["content"] = " ".join(reversed(sentences))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FOREIGN
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def accept_length(run: RunConfig, folder: Path) -> float:
    """Train a draft and decode with it.

    Raises:
        AssertionError: It changed an answer.
    """
    folder.mkdir()
    target = preflight(run)
    if run.regeneration.enabled:
        regenerate(run, target)
    draft = Path(Driver(run, folder).summary(PATIENCE_S)["draft_dir"])
    _, dataset = prepare_dataset(run, target)
    report = evaluate_draft(run, target, draft, dataset)
    assert report.lossless, "an answer differs from plain decoding's"
    return report.accept_length


def main() -> None:
    """Train them all, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("recipes.json"))
    options = parser.parse_args()
    done: dict[str, dict[str, float]] = {}
    if options.output.exists():
        done = json.loads(options.output.read_text())
    runs = [(seed, name) for seed in range(options.seeds) for name in options.only]
    runs = [(seed, name) for seed, name in runs if str(seed) not in done.get(name, {})]
    with tempfile.TemporaryDirectory(prefix="recipes-") as scratch:
        for seed, name in tqdm(runs, "drafts"):
            run = recipe(name, seed, Path(scratch) / "data")
            length = accept_length(run, Path(scratch) / f"{name}-{seed}")
            done.setdefault(name, {})[str(seed)] = length
            tqdm.write(f"{name}, seed {seed}: {length:.3f}")
            options.output.write_text(json.dumps(done, indent=2) + "\n")
    print("| recipe | accept length | lowest | highest |\n|---|---|---|---|")
    for name in options.only:
        values = [done[name][str(seed)] for seed in range(options.seeds)]
        mean = statistics.mean(values)
        print(f"| {name} | {mean:.3f} | {min(values):.3f} | {max(values):.3f} |")


if __name__ == "__main__":
    main()
