"""The recorder on a GPU: nothing is lost to memory that is used again, or to other streams."""

import pytest
import torch
from torch import nn

from tests.unit.test_sgl_recorder import check, forward, prompt
from torchspec_lib.inference.engine.sgl_recorder import Recorder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CUDA = torch.device("cuda", 0)


def use_memory() -> None:
    """Have whatever the allocator takes for free overwritten."""
    blocks = [torch.full((1 << 22,), -1.0, device=CUDA) for _ in range(8)]
    del blocks


@pytest.mark.parametrize("next_forward_begins", [False, True])
def test_states_arrive_whole_whoever_moves_them(next_forward_begins):
    recorder, long, other = Recorder(CUDA), prompt("long", 700), prompt("other", 300)
    busy = torch.randn(4096, 4096, device=CUDA)
    with torch.device(CUDA):
        for first, last in [(0, 300), (300, 700)]:
            for _ in range(20):
                busy = busy @ busy / busy.norm()
            forward(recorder, (long, first, last), *([(other, 0, 300)] if first else []))
            if next_forward_begins:
                recorder.start_moving(nn.Identity(), ())
            use_memory()
    use_memory()
    check(recorder.take("long", long), long)
    check(recorder.take("other", other), other)


def test_what_was_moved_leaves_no_memory_on_the_gpu():
    recorder, p = Recorder(CUDA), prompt("p", 2000)
    before = torch.cuda.memory_allocated()
    with torch.device(CUDA):
        forward(recorder, (p, 0, 2000))
    assert torch.cuda.memory_allocated() > before
    recorder.start_moving()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    recorder.forget("p")
