"""The trainer's benchmark runs where there is no GPU, and counts what a step needs."""

import json

import pytest

from benchmarks import trainer_overlap
from benchmarks.trainer_cases import FULL, Case, needed_tflop
from benchmarks.trainer_step import main


def test_a_rehearsal_writes_a_result_for_every_case(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    cases = ["100:2x12", "500:1x20"]
    tiny = ["--device", "cpu", "--tiny", "--warmup", "0", "--repeats", "1", "--json", str(path)]
    monkeypatch.setattr("sys.argv", ["trainer_step", *tiny, "--cases", *cases])
    main()
    report = json.loads(path.read_text())
    assert [case["case"] for case in report["cases"]] == cases
    for case in report["cases"]:
        assert case["tokens_per_s"] > 0
        assert case["loss"] > 0


def test_the_products_of_a_step_are_six_per_weight_token_and_depth():
    """But for attention, the teachers, and what is shared between depths."""
    case = Case.parse("32000:1x4096")
    layer_and_head = 6 * 7 * (218e6 + 131e6) * 0.75 * case.num_tokens / 1e12
    assert needed_tflop(case, FULL, 3072) == pytest.approx(layer_and_head, rel=0.15)


def test_a_rehearsal_of_the_overlap_trains_every_step(capsys, monkeypatch):
    tiny = ["--device", "cpu", "--tiny", "--steps", "4", "--micro-batches", "2"]
    monkeypatch.setattr("sys.argv", ["trainer_overlap", *tiny, "--cases", "100:2x9"])
    trainer_overlap.main()
    assert "2 x 100:2x9" in capsys.readouterr().out


def test_a_copy_is_hidden_for_as_long_as_a_kernel_runs_beside_it():
    def events(*spans):
        return [{"cat": "kernel", "ts": a, "dur": b - a} for a, b in spans]

    kernels = trainer_overlap.spans_of(events((5, 8), (0, 2), (1, 4)), "kernel")
    assert kernels == [(0, 4), (5, 8)]
    copies = trainer_overlap.spans_of(events((3, 6), (9, 10)), "kernel")
    assert trainer_overlap.length(copies) == 4
    assert trainer_overlap.shared(kernels, copies) == trainer_overlap.shared(copies, kernels) == 2
