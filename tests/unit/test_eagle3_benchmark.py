"""The trainer's benchmark runs where there is no GPU, and counts what a step needs."""

import json

import pytest

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
