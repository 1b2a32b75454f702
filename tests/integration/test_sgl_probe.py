"""The capability probe, as its users run it."""

import re
import subprocess
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import Starcoder2Config, Starcoder2ForCausalLM

from tests.tiny_targets import SIZES
from torchspec_lib.config.settings import PROJECT_ROOT

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.mooncake,
    pytest.mark.skipif(find_spec("sglang") is None, reason="make sglang installs it"),
]


def probe(target: Path) -> tuple[int, dict[str, str]]:
    """Its exit code, and what it says of each thing."""
    command = [sys.executable, "-m", "torchspec_lib.inference.probe", "--device", "cpu"]
    done = subprocess.run(
        [*command, str(target)], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=200
    )
    return done.returncode, {line[:20].strip(): line[20:] for line in done.stdout.splitlines()}


def test_the_demos_target_passes():
    code, found = probe(PROJECT_ROOT / "examples/tiny_target")
    assert (code, found["verdict"]) == (0, "yes")
    assert found["auxiliary layers"] == "1, 3, 4"
    assert found["chat template"] == "chat_template.jinja"
    assert found["in transformers"] == "LlamaForCausalLM: 8 of LlamaDecoderLayer, then LlamaRMSNorm"
    compared = [key for key in found if key.endswith("tokens")]
    assert compared == [f"off by, {length} tokens" for length in (1, 32, 177, 500)]


def unmapped_shared_memory() -> set[str]:
    """SGLang's files there that no process has mapped: what a start, or an end, left."""
    mapped: set[str] = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):  # it has ended meanwhile
            mapped |= set(re.findall("/dev/shm/.*", maps.read_text()))
    return {str(path) for path in Path("/dev/shm").glob("sgl*")} - mapped


@pytest.mark.slow
def test_a_target_without_auxiliary_states_does_not_and_the_reason_is_said(tmp_path):
    left_before = unmapped_shared_memory()
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = Starcoder2Config(
        **SIZES | {"num_hidden_layers": 8}, num_key_value_heads=2, rms_norm_eps=1e-5, **ends
    )
    Starcoder2ForCausalLM(config).save_pretrained(tmp_path)
    code, found = probe(tmp_path)
    assert code == 1
    assert found["verdict"].startswith("no: ")
    assert "Starcoder2ForCausalLM.set_eagle3_layers_to_capture" in found["verdict"]
    assert unmapped_shared_memory() <= left_before
