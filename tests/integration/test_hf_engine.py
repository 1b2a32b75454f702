"""The Hugging Face engine on a random tiny model, with the reference store."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from torchspec_lib.config.models import ModelConfig
from torchspec_lib.errors import EngineError
from torchspec_lib.inference.engine.hf_engine import HFEngine
from torchspec_lib.target import read_target
from torchspec_lib.transfer.memory import MemoryStore
from torchspec_lib.types import CaptureFailure, CaptureRequest, Prompt, SampleKey, SampleRef

AUX = (0, 2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("target")
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    nn.init.uniform_(model.model.norm.weight, 0.5, 2.0)  # a norm of ones hides a missing one
    model.save_pretrained(folder)
    return read_target(ModelConfig(target=str(folder), dtype="float32"))


@pytest.fixture(scope="module")
def model(target):
    return AutoModelForCausalLM.from_pretrained(target.path, dtype=torch.float32).eval()


@pytest.fixture
def store():
    return MemoryStore(capacity_bytes=1 << 20)


@pytest.fixture
def engine(model, target, store):
    return HFEngine(model, target, AUX, store)


def request(ids, mask=None) -> CaptureRequest:
    ids = np.asarray(ids, np.int32)
    mask = np.ones(len(ids), np.bool_) if mask is None else np.asarray(mask, np.bool_)
    return CaptureRequest(SampleKey.first("run", 0, "p"), Prompt("p", ids, mask))


def test_a_sample_holds_the_targets_own_states_in_layer_order(engine, model, store):
    wanted = request([5, 9, 2, 40, 7], [0, 0, 1, 1, 1])
    (ref,) = engine.capture([wanted])
    sample = store.get(ref, CPU)
    with torch.inference_mode():
        own = model(torch.tensor([[5, 9, 2, 40, 7]]), output_hidden_states=True).hidden_states
    assert torch.equal(sample["aux_hidden_states"], torch.cat([own[1][0], own[3][0]], dim=-1))
    assert torch.equal(sample["last_hidden_states"], own[-1][0])
    assert sample["input_ids"].tolist() == [5, 9, 2, 40, 7]
    assert sample["loss_mask"].tolist() == [False, False, True, True, True]


def test_results_come_in_the_order_of_the_requests(engine):
    requests = [request([1, 2, 3]), request([]), request([4] * 7)]
    results = engine.capture(requests)
    assert [result.key for result in results] == [r.key for r in requests]
    assert [type(result) for result in results] == [SampleRef, CaptureFailure, SampleRef]


def test_a_prompt_longer_than_the_target_allows_is_refused_for_good(engine):
    (failure,) = engine.capture([request([1] * 65)])
    assert failure.fault == "prompt"
    assert "max_position_embeddings" in failure.reason


@pytest.mark.parametrize("bad_id", [-1, 97])
def test_ids_outside_the_vocabulary_are_refused_for_good(engine, bad_id):
    (failure,) = engine.capture([request([1, bad_id])])
    assert failure.fault == "prompt"
    assert "vocabulary" in failure.reason


def test_a_full_store_is_a_failure_that_may_be_retried(model, target):
    engine = HFEngine(model, target, AUX, MemoryStore(capacity_bytes=64))
    (failure,) = engine.capture([request([1, 2, 3])])
    assert failure.fault == "store"
    assert "no room" in failure.reason


def test_a_prompt_that_breaks_the_forward_does_not_take_the_others_with_it(engine, model):
    def explode(_module, args, kwargs):
        if kwargs["input_ids"][0, 0] == 13:
            raise RuntimeError("kernel failed")

    handle = model.model.register_forward_pre_hook(explode, with_kwargs=True)
    try:
        bad, good = engine.capture([request([13, 1]), request([1, 13])])
    finally:
        handle.remove()
    assert isinstance(bad, CaptureFailure)
    assert bad.reason == "the target's forward failed: RuntimeError"
    assert isinstance(good, SampleRef)


def test_the_self_check_passes_on_the_right_states(engine, store):
    check = engine.self_check()
    assert check.max_relative_error < 1e-5
    assert check.argmax_agreement == 1.0


def test_the_self_check_catches_a_layer_off_by_one(engine):
    engine._layers = nn.ModuleList([*engine._layers[1:], engine._layers[0]])
    with pytest.raises(EngineError, match="layer 0"):
        engine.self_check()


def test_the_self_check_catches_a_missing_final_norm(engine):
    engine._final_norm = engine._layers[-1]
    with pytest.raises(EngineError, match="final norm"):
        engine.self_check()


def test_a_model_without_decoder_layers_is_refused_by_name(target, store):
    with pytest.raises(EngineError, match="Linear has no model"):
        HFEngine(nn.Linear(2, 2), target, AUX, store)
