"""What a draft gains in the engine that serves it: SGLang with it and without, on a GPU.

``python -m benchmarks.serving CONFIG DRAFT`` takes a configuration (YAML, as for ``pyflyte run``)
and an exported draft, and answers the held-out prompts and those of ``evaluation.sets`` one at a
time, first by SGLang alone, then with the draft. Prints the accept length that SGLang reports
beside the one that this project's evaluation measures, and the speed-up of the wall clock.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.dataset import prepare_dataset
from torchspec_lib.errors import ConfigError
from torchspec_lib.evaluation.evaluate import evaluate_draft
from torchspec_lib.evaluation.prompt_sets import heldout_set, named_sets
from torchspec_lib.pipeline import preflight
from torchspec_lib.results import EvalReport
from torchspec_lib.target import TargetSpec


def plain_arguments(run: RunConfig, target: TargetSpec) -> dict[str, Any]:
    """SGLang's ``ServerArgs`` for the target alone: its own kernels and graphs, no prefix cache."""
    return {
        "model_path": target.path,
        "dtype": run.model.dtype,
        "device": run.cluster.device,
        "trust_remote_code": run.model.trust_remote_code,
        "skip_tokenizer_init": True,
        "disable_radix_cache": True,  # else the second pass over a prompt would be cheaper
        "random_seed": run.seed,
        "log_level": "error",
    }


def speculative_arguments(run: RunConfig, target: TargetSpec, draft: Path) -> dict[str, Any]:
    """The same with the draft, which proposes as ``evaluation`` says."""
    settings = run.evaluation
    return {
        **plain_arguments(run, target),
        "speculative_algorithm": "EAGLE3",
        "speculative_draft_model_path": str(draft),
        "speculative_num_steps": settings.draft_steps,
        "speculative_eagle_topk": settings.draft_topk,
        "speculative_num_draft_tokens": settings.num_rows,
    }


def sampling(run: RunConfig, target: TargetSpec) -> dict[str, Any]:
    """As the evaluation decodes."""
    return {
        "max_new_tokens": run.evaluation.max_new_tokens,
        "temperature": run.evaluation.temperature,
        "stop_token_ids": list(target.eos_token_ids),
    }


def served(
    arguments: dict[str, Any], prompts: Sequence[list[int]], options: dict[str, Any]
) -> dict[str, Any]:
    """Answer ``prompts`` one after the other; the first one twice, unmeasured at first."""
    import sglang

    engine = sglang.Engine(**arguments)
    try:
        engine.generate(input_ids=prompts[0], sampling_params=options)
        start = time.perf_counter()
        answers = [engine.generate(input_ids=ids, sampling_params=options) for ids in prompts]
        seconds = time.perf_counter() - start
    finally:
        engine.shutdown()
    return {
        "seconds": seconds,
        "tokens": [answer["output_ids"] for answer in answers],
        "verifications": sum(a["meta_info"].get("spec_verify_ct", 0) for a in answers),
    }


def comparison(
    plain: dict[str, Any], drafted: dict[str, Any], report: EvalReport
) -> dict[str, Any]:
    """SGLang's figures beside ours. As ours, its accept length leaves out each first token."""
    counts = [sum(len(ids) for ids in side["tokens"]) for side in (plain, drafted)]
    pairs = zip(plain["tokens"], drafted["tokens"], strict=True)
    num_behind_first = counts[1] - len(drafted["tokens"])
    return {
        "drafting": report.drafting,
        "temperature": report.temperature,
        "prompts": len(drafted["tokens"]),
        "accept_length_sglang": num_behind_first / drafted["verifications"],
        "accept_length_evaluation": report.accept_length,
        "tokens_per_s_plain": counts[0] / plain["seconds"],
        "tokens_per_s_drafted": counts[1] / drafted["seconds"],
        "speedup_sglang": counts[1] / drafted["seconds"] / (counts[0] / plain["seconds"]),
        "speedup_projected": report.projected_speedup,
        "same_answers": sum(a == b for a, b in pairs),
    }


def main() -> None:
    """Measure each set of prompts, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("draft", type=Path)
    options = parser.parse_args()
    run = RunConfig.model_validate(yaml.safe_load(options.config.read_text())["run"])
    if run.cluster.device == "cpu":
        raise ConfigError(
            "cluster.device",
            "SGLang has no EAGLE-3 on a CPU: its torch_native attention can't draft",
            "Use a GPU machine and set it to cuda, or measure with evaluate_checkpoint",
        )
    target = preflight(run)
    _, dataset = prepare_dataset(run, target)
    chat = ChatTokenizer.load(
        target.path, run.model.trust_remote_code, run.data.chat_template_kwargs
    )
    report = evaluate_draft(run, target, options.draft, dataset)
    for one in (heldout_set(run, dataset), *named_sets(run, chat)):
        prompts = [prompt.prompt_token_ids.tolist() for prompt in one.prompts]
        ours = next(s for s in report.sets if s.name == one.name and s.category is None)
        expected = report.model_copy(update={"accept_length": ours.accept_length})
        decoding = sampling(run, target)
        plain = served(plain_arguments(run, target), prompts, decoding)
        drafted = served(speculative_arguments(run, target, options.draft), prompts, decoding)
        print(json.dumps({"set": ours.prompt_set, **comparison(plain, drafted, expected)}))


if __name__ == "__main__":
    main()
