"""An exported draft, and how it is to draft, in the hands of SGLang."""

import json
import re
import subprocess
import sys
from datetime import date
from importlib.util import find_spec

import pytest
import torch

from tests.candidates import make_candidate, make_run
from tests.run_process import config as run_config
from tests.unit.eagle3_reference import DRAFT_VOCAB, make_config, make_draft
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.errors import EngineError
from torchspec_lib.evaluation.acceptance import ServedCounts
from torchspec_lib.evaluation.served import accepted_counts, serve
from torchspec_lib.models.export import save_draft
from torchspec_lib.registry.model_card import model_card
from torchspec_lib.target import read_target

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.skipif(find_spec("sglang") is None, reason="make sglang installs it"),
]


VARIANTS = {
    "pruned": make_config(),
    "whole": make_config(pruned=False),
    "eagle31": make_config(fc_norm=True, norm_output=True),
    "one layer": make_config(aux_layer_ids=[6]),
    "five layers": make_config(aux_layer_ids=[0, 2, 3, 5, 6], fc_norm=True),
}


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What SGLang says of itself, and of each variant."""
    root = tmp_path_factory.mktemp("drafts")
    for name, config in VARIANTS.items():
        vocab = DRAFT_VOCAB if config.is_pruned else None
        draft = make_draft(config, torch.float32, seed=0)
        save_draft(root / name, draft.state_dict(), config, vocab)
    folders = [str(root / name) for name in VARIANTS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.sglang_draft", *folders],
        cwd=PROJECT_ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def test_sglang_has_every_flag_that_a_model_card_names(said, tmp_path):
    card = model_card(make_run(), make_candidate(tmp_path), "abc123", date(2026, 1, 2))
    serve = card.partition("SGLang:")[2].partition("vLLM")[0]
    named = set(re.findall(r"--[a-z-]+", serve))
    assert "--speculative-draft-model-path" in named
    assert named <= set(said[0]["flags"])


def test_sglang_knows_our_arguments_and_takes_the_shape_of_the_proposals_from_them(said):
    assert said[0]["shape"] == [5, 4, 6]


def test_what_sglang_tells_of_an_answer_is_read(said):
    assert accepted_counts(said[0]["told"], 8) == ServedCounts((0, 2, 5), 8)


def test_sglang_fills_every_parameter_of_its_class_from_an_export_and_uses_every_tensor(said):
    # The target's embedding is shared, and the mask of the vocabulary is for trainers.
    shared = ["model.embed_tokens.weight"]
    assert dict(zip(VARIANTS, said[1:], strict=True)) == {
        "pruned": {"unfilled": shared, "unused": ["t2d"]},
        "whole": {"unfilled": shared, "unused": []},
        "eagle31": {"unfilled": shared, "unused": ["t2d"]},
        "one layer": {"unfilled": shared, "unused": ["t2d"]},
        "five layers": {"unfilled": shared, "unused": ["t2d"]},
    }


def test_an_evaluation_names_why_sglang_did_not_start(tmp_path):
    run, draft = run_config(tmp_path), tmp_path / "short"
    weights = make_draft(VARIANTS["pruned"], torch.float32, seed=0).state_dict()
    save_draft(draft, weights, VARIANTS["pruned"], DRAFT_VOCAB)
    target = read_target(run.model)
    with pytest.raises(EngineError, match=r"didn't start: ValueError.*context_length \(128\)"):
        next(serve(run, target, draft, [[1, 2, 3]]))
