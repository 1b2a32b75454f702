"""Runs whose prompts the tiny target answers itself."""

from pathlib import Path

from tests.run_process import TINY, config
from torchspec_lib.config.regeneration import RegenerationConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.target import TargetSpec, read_target

QUESTIONS = TINY / "questions.jsonl"


def run_of(tmp_path: Path, num: int = 24, engine: str = "hf", **regeneration) -> RunConfig:
    run = config(
        tmp_path / "data",
        data={
            "train": [str(QUESTIONS)],
            "heldout": [str(TINY / "heldout.jsonl")],
            "max_length": 512,
        },
        inference={"engine": engine},
    )
    settings = {"enabled": True, "max_conversations": num, "shard_size": 8, "max_new_tokens": 160}
    values = RegenerationConfig.model_validate(settings | regeneration)
    return run.model_copy(update={"regeneration": values})


def target() -> TargetSpec:
    return read_target(config(Path("data")).model)
