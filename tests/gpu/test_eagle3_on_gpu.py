"""What runs on a GPU alone: the kernels, the compiled stretches, and that nothing waits."""

import gc
from dataclasses import replace

import pytest
import torch

from tests.unit.eagle3_reference import make_config, make_draft, make_sample
from torchspec_lib.config.training import FORWARD_KL
from torchspec_lib.models.attention import ttt_attention
from torchspec_lib.models.batch import empty_batch, pack
from torchspec_lib.models.chains import find_chains
from torchspec_lib.models.head_loss import loss_of_rows_
from torchspec_lib.models.target_head import TargetHead
from torchspec_lib.models.ttt import Eagle3Model, supervise

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

STEPS = 4
WIDE = {
    "hidden_size": 256,
    "target_hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


@pytest.fixture
def random():
    return torch.Generator().manual_seed(0)


def relative_error(ours, exact):
    return float((ours.cpu().double() - exact.cpu()).norm() / exact.norm())


def random_masks(lengths, share, random):
    return [torch.rand(length, generator=random) < share for length in lengths]


@pytest.mark.parametrize(
    ("lengths", "share", "heads", "dtype", "tolerance"),
    [
        ([300, 1, 511, 20], 0.7, (8, 2, 128), torch.bfloat16, 5e-3),
        ([65, 64, 63, 2, 200], 0.9, (7, 1, 64), torch.bfloat16, 5e-3),
        ([257], 1.0, (4, 4, 96), torch.bfloat16, 5e-3),
        ([150, 130], 0.8, (4, 2, 256), torch.bfloat16, 5e-3),
        ([300, 1, 130], 0.7, (4, 2, 128), torch.float32, 1e-5),
        ([40], 0.2, (2, 2, 16), torch.bfloat16, 5e-3),
    ],
)
def test_fused_attention_and_all_its_gradients_equal_the_plain_one(
    lengths, share, heads, dtype, tolerance, random
):
    from torchspec_lib.models.fused_attention import FusedAttention

    (num_heads, groups, size), scale = heads, heads[2] ** -0.5
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    chains = find_chains(torch.cat(random_masks(lengths, share, random)), tuple(starts))
    num_chains = chains.num_chains

    def noise(rows, width):
        return torch.randn(rows, width, size, generator=random).to(dtype)

    queries = [noise(num_chains, num_heads) for _ in range(STEPS)]
    kept = [
        [noise(starts[-1] if depth == 0 else num_chains, groups) for depth in range(STEPS)]
        for _ in "kv"
    ]
    factors = [noise(num_chains, num_heads) for _ in range(STEPS)]

    def run(device, dtype, make_attend):
        leaves = [x.to(device, dtype).requires_grad_() for x in [*queries, *kept[0], *kept[1]]]
        q, k, v = leaves[:STEPS], leaves[STEPS : 2 * STEPS], leaves[2 * STEPS :]
        attend, outs, carried = make_attend(k, v), [], 0.0
        for depth in range(STEPS):  # each depth's queries depend on the one before, as in a draft
            outs.append(attend(q[depth] + carried, depth))
            carried = 0.5 * outs[-1]
        total = sum((out * w.to(out)).sum() for out, w in zip(outs, factors, strict=True))
        total.backward()
        return [*outs, *(leaf.grad for leaf in leaves)]

    def plain(k, v):
        return lambda q, depth: ttt_attention(
            q, k[: depth + 1], v[: depth + 1], chains, starts, scale
        )

    def fused(k, v):
        attention = FusedAttention(chains.to(torch.device("cuda")), STEPS, scale)
        return lambda q, depth: attention(q, k[depth], v[depth])

    exact = run("cpu", torch.float64, plain)
    for ours, theirs in zip(run("cuda", dtype, fused), exact, strict=True):
        assert relative_error(ours.detach(), theirs.detach()) < tolerance


@pytest.mark.parametrize("vocab", [11, 8192, 32_001, 151_936])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("loss", [FORWARD_KL, {"lk_hybrid": 1.0}, {"kl": 0.5, "tv": 2.0}])
def test_the_loss_kernels_equal_float64_for_every_vocabulary(loss, vocab, dtype, random):
    from torchspec_lib.models.loss_kernels import fused_loss_of_rows_

    teacher = (3 * torch.randn(5, vocab, generator=random)).to(dtype)
    logits = (teacher + 0.3 * torch.randn(5, vocab, generator=random)).to(dtype)
    weights = torch.tensor([1.0, 0.25, 0.0, 3.0, 1e-4])
    exact = logits.double()
    losses, choices = loss_of_rows_(exact, teacher.double(), weights.double(), loss)
    ours = logits.cuda()
    our_losses, our_choices = fused_loss_of_rows_(ours, teacher.cuda(), weights.cuda(), loss)
    assert relative_error(our_losses, losses) < 1e-5
    assert torch.equal(logits.gather(1, our_choices.cpu()[:, None])[:, 0], logits.amax(1))
    assert choices.shape == our_choices.shape
    for row in (0, 1, 3, 4):
        assert relative_error(ours[row], exact[row]) < (4e-3 if dtype == torch.bfloat16 else 1e-4)
    assert not ours[2].any()


def wide_case(masks, dtype, **changes):
    """A draft of widths that kernels are made for, its target's head, and a pack; on the CPU."""
    random = torch.Generator().manual_seed(0)
    config = make_config(pruned=False, **WIDE, **changes)
    draft = make_draft(config, dtype)
    with torch.no_grad():  # as tame as trained ones are: wild weights blow up what rounding does
        for parameter in draft.parameters():
            parameter.mul_(0.6 if parameter.ndim > 1 else 1.0)
    embed, lm_head = torch.randn(2, config.vocab_size, 256, generator=random, dtype=torch.float64)
    # Its whole vocabulary: which choices lie outside a pruned one hangs on ties, in bf16.
    head = TargetHead(embed.to(dtype), lm_head.to(dtype) / 16, None)
    samples = []
    for i, mask in enumerate(masks):
        sample = make_sample(mask, seed=i)
        for name, width in (("aux_hidden_states", 768), ("last_hidden_states", 256)):
            states = torch.randn(len(mask), width, generator=random, dtype=torch.float64)
            sample[name] = states.to(dtype)
        samples.append(sample)
    return draft, head, pack(samples)


def gradients(draft, head, batch):
    """Of a whole step's loss; the total, the sums, and every parameter's."""
    model = Eagle3Model(draft, STEPS)
    supervised = supervise(batch, head, STEPS, "token")
    scale_K = 0.8 ** torch.arange(STEPS, device=batch.input_ids_T.device).double()
    scale_K = scale_K / supervised.weight_sums_K.clamp(min=1)
    loss, sums = model(batch, head, supervised, scale_K)
    loss.backward()
    return loss.item(), sums, {name: p.grad for name, p in draft.named_parameters()}


MASKS = ["0" * 30 + "1" * 170, "1", "001110" * 21, "0" * 64, "0" + "1" * 99]


def exact_gradients(masks, dtype, **changes):
    """The same numbers as ``dtype`` holds, computed on the CPU in float64."""
    draft, head, batch = wide_case(masks, dtype, **changes)
    batch = replace(
        batch,
        aux_states_TA=batch.aux_states_TA.double(),
        last_states_TH=batch.last_states_TH.double(),
    )
    return gradients(draft.double(), head.double(), batch)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)])
def test_a_step_on_the_gpu_has_the_loss_and_gradients_of_float64(dtype, tolerance):
    loss, sums, exact = exact_gradients(MASKS, dtype)
    draft, head, batch = wide_case(MASKS, dtype)
    device = torch.device("cuda")
    ours = gradients(draft.to(device), head.to(device), batch.to(device))
    assert ours[0] == pytest.approx(loss, rel=tolerance / 2)
    assert ours[1].chains_K[0] == sums.chains_K[0] > 0
    everything = [
        torch.cat([grad.cpu().double().flatten() for grad in grads.values()])
        for grads in (ours[2], exact)
    ]
    assert relative_error(*everything) < tolerance
    for name, grad in ours[2].items():
        assert relative_error(grad, exact[name]) < 1.5 * tolerance, name


def test_a_batch_without_supervision_leaves_zeros():
    draft, head, batch = wide_case(["0000", "01"], torch.bfloat16)
    placeholder = empty_batch(768, 256, torch.bfloat16)
    device = torch.device("cuda")
    for unsupervised in (batch, placeholder):
        draft.zero_grad()
        loss, sums, grads = gradients(draft.to(device), head.to(device), unsupervised.to(device))
        assert loss == 0
        assert all(bool((grad == 0).all()) for grad in grads.values())
        assert sums.chains_K.tolist() == [0] * STEPS


def test_a_step_never_waits_for_the_device_and_compiles_nothing_for_another_length():
    device = torch.device("cuda")
    draft, head, batch = wide_case(MASKS, torch.bfloat16)
    model = Eagle3Model(draft.to(device), STEPS)
    head.to(device)
    others = [wide_case([mask], torch.bfloat16)[2] for mask in ("0" * 9 + "1" * 55, "1" * 401)]
    packs = [pinned.to(device) for pinned in (b.pin_memory() for b in [batch, *others])]
    ones_K = torch.ones(STEPS, device=device)

    def step(packed):
        supervised = supervise(packed, head, STEPS, "sample")
        loss, _ = model(packed, head, supervised, ones_K)
        loss.backward()

    step(packs[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch._dynamo.config.patch(error_on_recompile=True):
            for packed in packs:
                step(packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_of_a_step_grows_with_the_tokens_not_with_their_square():
    device = torch.device("cuda")
    draft, head, _ = wide_case(["01"], torch.bfloat16)
    draft.to(device)
    head.to(device)
    peaks = []
    for length in (4096, 8192, 16384):
        batch = wide_case(["0" * (length // 4) + "1" * (length - length // 4)], torch.bfloat16)[2]
        batch = batch.to(device)
        gradients(draft, head, batch)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        gradients(draft, head, batch)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del batch
    assert peaks[2] - peaks[1] < 2.5 * (peaks[1] - peaks[0])


def test_memory_of_a_step_is_free_again_without_the_garbage_collector():
    device = torch.device("cuda")
    draft, head, batch = wide_case(MASKS, torch.bfloat16)
    draft, head, batch = draft.to(device), head.to(device), batch.to(device)
    gradients(draft, head, batch)
    gc.collect()
    gc.disable()
    try:
        before = torch.cuda.memory_allocated()
        for _ in range(3):
            gradients(draft, head, batch)
        assert torch.cuda.memory_allocated() <= before + 2**20
    finally:
        gc.enable()


def test_the_fc_norms_and_the_normed_output_work_on_the_gpu():
    changes = {"fc_norm": True, "norm_output": True}
    loss, _, exact = exact_gradients(MASKS, torch.float32, **changes)
    draft, head, batch = (part.to("cuda") for part in wide_case(MASKS, torch.float32, **changes))
    ours, _, grads = gradients(draft, head, batch)
    assert ours == pytest.approx(loss, rel=1e-5)
    for name, grad in grads.items():
        assert relative_error(grad, exact[name]) < 1e-3, name
