"""What ``benchmarks/serving.py`` starts SGLang with, where there is no GPU to start it on."""

import subprocess
import sys
from importlib.util import find_spec

import pytest

from benchmarks.serving import comparison, main
from tests.run_process import TINY
from tests.unit.test_projection import report
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.errors import ConfigError

CONSTRUCT = """
from torchspec_lib.inference.engine.sgl_cpu import choose_cpu
choose_cpu(1)
from pathlib import Path
from sglang.srt.server_args import ServerArgs
from benchmarks.serving import plain_arguments, speculative_arguments
from tests.run_process import config
from torchspec_lib.target import read_target
run = config(Path("unused"), evaluation={"draft_topk": 4, "num_draft_tokens": 6})
target = read_target(run.model)
for arguments in (plain_arguments(run, target), speculative_arguments(run, target, Path("draft"))):
    made = ServerArgs(**arguments)
print([getattr(made, "speculative_" + n) for n in ("num_steps", "eagle_topk", "num_draft_tokens")])
"""


@pytest.mark.sglang
@pytest.mark.skipif(find_spec("sglang") is None, reason="make sglang installs it")
def test_sglang_knows_every_argument_and_takes_the_shape_of_the_proposals():
    done = subprocess.run(
        [sys.executable, "-c", CONSTRUCT],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[5, 4, 6]" in done.stdout


def test_the_accept_length_of_sglang_is_counted_as_ours():
    plain = {"seconds": 4.0, "tokens": [[1, 2, 3, 4, 5, 6, 7]], "verifications": 0}
    drafted = {"seconds": 2.0, "tokens": [[1, 2, 3, 4, 5, 6, 7]], "verifications": 3}
    found = comparison(plain, drafted, report())
    assert found["accept_length_sglang"] == 2.0
    assert found["speedup_sglang"] == 2.0
    assert found["same_answers"] == 1


def test_a_machine_without_a_gpu_is_refused_at_once(tmp_path, monkeypatch):
    config = f"run: {{model: {{target: {TINY}}}, data: {{train: [a.jsonl], heldout: [b.jsonl]}}"
    (tmp_path / "run.yaml").write_text(config + ", cluster: {device: cpu}}\n")
    monkeypatch.setattr(sys, "argv", ["serving", str(tmp_path / "run.yaml"), "draft"])
    with pytest.raises(ConfigError, match="no EAGLE-3 on a CPU"):
        main()
