"""An exported draft in the hands of SGLang's own EAGLE-3 class."""

import json
import re
import subprocess
import sys
from datetime import date
from importlib.util import find_spec

import pytest
import torch

from tests.run_process import TINY
from tests.unit.eagle3_reference import DRAFT_VOCAB, make_config, make_draft
from tests.unit.test_gate import make_candidate, make_run
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.models.export import save_draft
from torchspec_lib.registry.model_card import model_card

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(find_spec("sglang") is None, reason="make sglang installs it"),
]


def test_sglang_fills_every_parameter_of_its_class_from_an_export_and_uses_every_tensor(tmp_path):
    variants = {
        "pruned": make_config(),
        "whole": make_config(pruned=False),
        "eagle31": make_config(fc_norm=True, norm_output=True),
        "one layer": make_config(aux_layer_ids=[6]),
        "five layers": make_config(aux_layer_ids=[0, 2, 3, 5, 6], fc_norm=True),
    }
    for name, config in variants.items():
        vocab = DRAFT_VOCAB if config.is_pruned else None
        draft = make_draft(config, torch.float32, seed=0)
        save_draft(tmp_path / name, draft.state_dict(), config, vocab)
    folders = [str(tmp_path / name) for name in variants]
    done = subprocess.run(
        [sys.executable, "-m", "tests.sglang_draft", str(TINY), *folders],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    flags, *found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    card = model_card(make_run(), make_candidate(tmp_path), "abc123", date(2026, 1, 2))
    serve = card.partition("SGLang:")[2].partition("vLLM")[0]
    named = set(re.findall(r"--[a-z-]+", serve))
    assert "--speculative-draft-model-path" in named
    assert named <= set(flags["flags"])
    # The target's embedding is shared, and the mask of the vocabulary is for trainers.
    shared = ["model.embed_tokens.weight"]
    assert dict(zip(variants, found, strict=True)) == {
        "pruned": {"unfilled": shared, "unused": ["t2d"]},
        "whole": {"unfilled": shared, "unused": []},
        "eagle31": {"unfilled": shared, "unused": ["t2d"]},
        "one layer": {"unfilled": shared, "unused": ["t2d"]},
        "five layers": {"unfilled": shared, "unused": ["t2d"]},
    }
