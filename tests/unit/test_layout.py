"""The packed sample: sizes, and what is told apart from it."""

from dataclasses import replace

import pytest
import torch

from torchspec_lib.errors import SampleLostError
from torchspec_lib.plan import SAMPLE_OVERHEAD_BYTES
from torchspec_lib.transfer.mooncake.layout import ALIGNMENT, pack_into, packed_size, unpack
from torchspec_lib.types import SampleKey, SampleRef


def sample(num_tokens: int = 5, hidden: int = 24) -> dict[str, torch.Tensor]:
    return {
        "input_ids": torch.arange(num_tokens, dtype=torch.int32),
        "loss_mask": torch.arange(num_tokens) % 2 == 0,
        "aux_hidden_states": torch.randn(num_tokens, 3 * hidden).bfloat16(),
        "last_hidden_states": torch.randn(num_tokens, hidden).bfloat16(),
    }


def packed(
    tensors: dict[str, torch.Tensor], prompt_id: str = "p0"
) -> tuple[torch.Tensor, SampleRef]:
    buffer = torch.full((packed_size(tensors),), 0xAB, dtype=torch.uint8)
    return buffer, pack_into(buffer, SampleKey.first("run", 0, prompt_id), tensors)


def test_unpacking_gives_aligned_views_of_the_buffer_in_the_order_packed():
    tensors = sample()
    buffer, ref = packed(tensors)
    views = unpack(buffer, ref)
    assert list(views) == list(tensors)
    start = buffer.data_ptr()
    for name, view in views.items():
        assert torch.equal(view, tensors[name])
        assert (view.data_ptr() - start) % ALIGNMENT == 0
        assert start <= view.data_ptr() < start + len(buffer)


@pytest.mark.parametrize("num_tokens", [1, 63, 64, 65, 4097])
def test_a_samples_overhead_stays_within_what_the_plan_reserves(num_tokens: int):
    tensors = sample(num_tokens)
    payload = sum(tensor.nbytes for tensor in tensors.values())
    long_names = {f"{name}_{'x' * 100}": tensor for name, tensor in tensors.items()}
    assert packed_size(tensors) - payload < 1024
    assert packed_size(long_names) - payload <= SAMPLE_OVERHEAD_BYTES


def test_the_reference_tells_size_tokens_and_specs():
    buffer, ref = packed(sample(num_tokens=7))
    assert ref.num_bytes == len(buffer)
    assert ref.num_tokens == 7
    assert ref.tensors["aux_hidden_states"].shape == (7, 72)
    assert ref.tensors["loss_mask"].dtype == "bool"


def test_packing_into_a_larger_buffer_leaves_the_rest_alone():
    tensors = sample()
    size = packed_size(tensors)
    buffer = torch.full((size + 100,), 7, dtype=torch.uint8)
    pack_into(buffer, SampleKey.first("run", 0, "p0"), tensors)
    assert (buffer[size:] == 7).all()


@pytest.mark.parametrize("offset", [0, 8, 12, 16, 24, 40, 64, 80, -1, -16])
def test_a_changed_byte_in_header_table_or_trailer_is_recognised(offset: int):
    buffer, ref = packed(sample())
    buffer[offset] ^= 1
    with pytest.raises(SampleLostError, match="another object"):
        unpack(buffer, ref)


def test_another_sample_of_the_same_shape_is_recognised():
    ours, theirs = packed(sample()), packed(sample(), "p1")
    with pytest.raises(SampleLostError, match=r"p0.*another object"):
        unpack(theirs[0], ours[1])


def test_another_attempt_of_the_same_prompt_is_recognised():
    buffer, ref = packed(sample())
    with pytest.raises(SampleLostError, match="another object"):
        unpack(buffer, replace(ref, key=ref.key.next_attempt()))


@pytest.mark.parametrize("head_is_ours", [True, False])
def test_a_mixture_of_two_samples_is_recognised(head_is_ours: bool):
    (ours, ref), (theirs, _) = packed(sample()), packed(sample(), "p1")
    half = len(ours) // 2
    first, second = (ours, theirs) if head_is_ours else (theirs, ours)
    with pytest.raises(SampleLostError, match="another object"):
        unpack(torch.cat([first[:half], second[half:]]), ref)


@pytest.mark.parametrize("num_bytes", [0, 40, -1])
def test_a_truncated_sample_is_recognised(num_bytes: int):
    buffer, ref = packed(sample())
    with pytest.raises(SampleLostError, match="bytes came"):
        unpack(buffer[:num_bytes], ref)


def test_a_sample_of_another_shape_than_the_references_is_recognised():
    buffer, _ = packed(sample(num_tokens=6))
    _, ref = packed(sample(num_tokens=9))
    with pytest.raises(SampleLostError, match="bytes came"):
        unpack(buffer, ref)


def test_tensors_that_share_no_first_dimension_are_refused():
    with pytest.raises(ValueError, match=r"share their first dimension.*\(3,\).*\(4,\)"):
        packed_size({"a": torch.zeros(3), "b": torch.zeros(4)})


def test_a_dtype_that_no_sample_holds_is_refused_by_name():
    with pytest.raises(ValueError, match="'x' is complex64"):
        packed_size({"x": torch.zeros(3, dtype=torch.complex64)})
