"""Rows of SGLang's forwards, cut into prompts. The forwards are made up, the recorder is real."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchspec_lib.errors import EngineError
from torchspec_lib.inference.engine.sgl_capture import arm, find
from torchspec_lib.inference.engine.sgl_recorder import IncompleteError, Recorder
from torchspec_lib.types import Prompt

HIDDEN = 4
NUM_AUX = 2
CPU = torch.device("cpu")


def prompt(name: str, num_tokens: int) -> Prompt:
    ids = np.random.default_rng(num_tokens).integers(0, 99, num_tokens).astype(np.int32)
    return Prompt(name, ids, np.arange(num_tokens) % 2 == 1)


def states(p: Prompt, layer: int) -> Tensor:
    """[T, H]: tell apart prompt, position and layer."""
    positions = torch.arange(p.num_tokens)[:, None] * 10.0
    return positions + layer + torch.arange(HIDDEN) / 10 + float(p.num_tokens) * 1000


def forward(
    recorder: Recorder, *spans: tuple[Prompt, int, int], packed: bool = False, padding: int = 0
) -> None:
    """Run tokens ``first`` to ``last`` of each prompt in one forward."""

    def rows(layer: int) -> Tensor:
        parts = [states(p, layer)[first:last] for p, first, last in spans]
        return torch.cat([*parts, torch.full((padding, HIDDEN), -1.0)])

    ids = [torch.tensor(p.token_ids[first:last]).long() for p, first, last in spans]
    aux = [rows(layer) for layer in range(NUM_AUX)]
    batch = SimpleNamespace(
        rids=[p.prompt_id for p, _, _ in spans],
        forward_mode=SimpleNamespace(is_extend=lambda: True),
        extend_seq_lens_cpu=[last - first for _, first, last in spans],
        extend_prefix_lens_cpu=[first for _, first, _ in spans],
    )
    ids_N = torch.cat([*ids, torch.zeros(padding, dtype=torch.long)])
    args = (ids_N, rows(NUM_AUX), None, batch)
    captured = torch.cat(aux, dim=-1) if packed else aux
    recorder.hook(nn.Identity(), args, {"aux_hidden_states": captured}, None)


def check(sample: dict[str, Tensor], p: Prompt) -> None:
    assert sample["input_ids"].tolist() == p.token_ids.tolist()
    assert sample["input_ids"].dtype == torch.int32
    assert sample["loss_mask"].tolist() == p.loss_mask.tolist()
    aux = torch.cat([states(p, layer) for layer in range(NUM_AUX)], dim=-1)
    assert torch.equal(sample["aux_hidden_states"], aux)
    assert torch.equal(sample["last_hidden_states"], states(p, NUM_AUX))


@pytest.mark.parametrize("packed", [False, True])
def test_each_prompt_gets_its_own_rows_of_a_forward(packed):
    recorder, a, b, c = Recorder(CPU), prompt("a", 3), prompt("b", 1), prompt("c", 5)
    forward(recorder, (a, 0, 3), (b, 0, 1), (c, 0, 5), packed=packed, padding=7)
    for p in (c, a, b):
        check(recorder.take(p.prompt_id, p), p)


@pytest.mark.parametrize("cuts", [(1,), (4,), (1, 2, 3, 4, 5), (2, 6)])
def test_pieces_of_a_prompt_are_put_together_wherever_it_is_cut(cuts):
    recorder, long, other = Recorder(CPU), prompt("long", 7), prompt("other", 2)
    edges = [0, *cuts, 7]
    for first, last in pairwise(edges):
        others = [(other, 0, 2)] if first == 0 else []
        forward(recorder, (long, first, last), *others)
    check(recorder.take("long", long), long)
    check(recorder.take("other", other), other)


def test_tokens_that_a_cache_spared_are_missed():
    recorder, p, other = Recorder(CPU), prompt("p", 6), prompt("other", 3)
    forward(recorder, (p, 4, 6), (other, 0, 3))
    with pytest.raises(IncompleteError, match="tokens 0 to 4 weren't computed"):
        recorder.take("p", p)
    check(recorder.take("other", other), other)


def test_a_prompt_that_was_not_run_to_its_end_is_incomplete():
    recorder, p = Recorder(CPU), prompt("p", 6)
    forward(recorder, (p, 0, 4))
    with pytest.raises(IncompleteError, match="4 of 6"):
        recorder.take("p", p)
    with pytest.raises(IncompleteError, match="0 of 6"):
        recorder.take("p", p)


def test_rows_of_other_tokens_are_not_taken_for_the_prompts():
    recorder, p = Recorder(CPU), prompt("p", 6)
    forward(recorder, (p, 0, 6))
    other = Prompt("p", p.token_ids[::-1].copy(), p.loss_mask)
    with pytest.raises(IncompleteError, match="other tokens"):
        recorder.take("p", other)


def test_what_was_recorded_does_not_change_with_the_forwards_memory():
    recorder, p = Recorder(CPU), prompt("p", 2)
    rows = [states(p, layer) for layer in range(NUM_AUX + 1)]
    batch = SimpleNamespace(
        rids=["p"],
        forward_mode=SimpleNamespace(is_extend=lambda: True),
        extend_seq_lens_cpu=[2],
        extend_prefix_lens_cpu=[0],
    )
    ids = torch.tensor(p.token_ids).long()
    aux = {"aux_hidden_states": torch.cat(rows[:NUM_AUX], dim=-1)}
    recorder.hook(nn.Identity(), (ids, rows[NUM_AUX], None, batch), aux, None)
    for tensor in (*rows, ids, *aux.values()):
        tensor.zero_()
    check(recorder.take("p", p), p)


def test_a_forward_that_draws_a_token_adds_no_rows():
    recorder, p = Recorder(CPU), prompt("p", 2)
    forward(recorder, (p, 0, 2))
    batch = SimpleNamespace(rids=["p"], forward_mode=SimpleNamespace(is_extend=lambda: False))
    aux = {"aux_hidden_states": [torch.zeros(1, HIDDEN)]}
    recorder.hook(nn.Identity(), (torch.zeros(1), torch.zeros(1, HIDDEN), None, batch), aux, None)
    check(recorder.take("p", p), p)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers_to_capture: list[int] = []


class Target(nn.Module):
    """Turns layers into boundaries, as most of SGLang's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Decoder()

    def set_eagle3_layers_to_capture(self, layer_ids: list[int]) -> None:
        self.model.layers_to_capture = [layer_id + 1 for layer_id in layer_ids]


class DeepseekTarget(Target):
    """Takes lists that don't begin with 1 for boundaries."""

    def set_eagle3_layers_to_capture(self, layer_ids: list[int]) -> None:
        shift = layer_ids[0] == 1
        self.model.layers_to_capture = [layer_id + shift for layer_id in layer_ids]


@pytest.mark.parametrize("target", [Target, DeepseekTarget])
@pytest.mark.parametrize("layer_ids", [(1, 13, 24), (0, 2, 4), (2, 5, 8)])
def test_the_outputs_of_the_asked_layers_are_captured(target, layer_ids):
    model = target()
    arm(model, layer_ids)
    assert model.model.layers_to_capture == [layer_id + 1 for layer_id in layer_ids]


def test_a_model_without_auxiliary_states_is_refused_with_what_it_lacks():
    with pytest.raises(EngineError, match=r"Identity\.set_eagle3_layers_to_capture"):
        arm(nn.Identity(), (1,))


def test_an_internal_that_was_renamed_is_named():
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace())
    with pytest.raises(EngineError, match=r"tp_worker\.model_runner\.model"):
        find(scheduler, "tp_worker.model_runner.model")
