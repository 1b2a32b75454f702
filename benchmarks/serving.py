"""A draft in the engine that serves it: SGLang's figures beside those of the plain evaluation.

``python -m benchmarks.serving CONFIG DRAFT`` takes a configuration (YAML, as for ``pyflyte run``)
and an exported draft, evaluates it as ``evaluation`` says with ``engine: hf`` and then with
``engine: sglang``, and prints a line of JSON for each engine, prompt set and category.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.dataset import prepare_dataset
from torchspec_lib.evaluation.evaluate import evaluate_draft
from torchspec_lib.pipeline import preflight
from torchspec_lib.results import EvalReport


def with_engine(run: RunConfig, engine: str) -> RunConfig:
    """The same run, evaluated by another engine."""
    values = run.model_dump()
    values["evaluation"]["engine"] = engine
    return RunConfig.model_validate(values)


def rows(report: EvalReport) -> list[dict[str, Any]]:
    """An evaluation's figures, set by set."""
    return [
        {
            "engine": report.engine,
            "drafting": report.drafting,
            "set": one.prompt_set,
            "category": one.category,
            "lossless": f"{one.num_lossless} of {one.num_prompts}",
            "accept_length": one.accept_length,
            "accept_rates": one.accept_rates,
            "plain_tokens_per_s": one.num_new_tokens / one.plain_s,
            "speedup": one.measured_speedup,
        }
        for one in report.sets
    ]


def main() -> None:
    """Evaluate with both, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("draft", type=Path)
    options = parser.parse_args()
    run = RunConfig.model_validate(yaml.safe_load(options.config.read_text())["run"])
    runs = [with_engine(run, engine) for engine in ("hf", "sglang")]
    target, _ = [preflight(one) for one in runs]
    _, dataset = prepare_dataset(run, target)
    for one in runs:
        for row in rows(evaluate_draft(one, target, options.draft, dataset)):
            print(json.dumps(row))


if __name__ == "__main__":
    main()
