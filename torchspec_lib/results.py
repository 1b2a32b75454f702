"""What the stages of a pipeline hand each other and the user: Flyte outputs, so pydantic."""

from torchspec_lib.config.settings import Settings
from torchspec_lib.types import Recovery


class DatasetManifest(Settings):
    """A prepared data set, addressed by the hash of everything that went into it.

    Lies as ``<data_root>/datasets/<dataset_id>/`` with ``manifest.json``, ``prompts.parquet``
    (prompt_id, token_ids, loss_mask, num_tokens, source), ``heldout.parquet`` (prompt_id,
    prompt_token_ids, text, reference) and, for a pruned draft vocabulary, ``vocab.json``
    (``draft_to_target``: ascending ids).
    """

    dataset_id: str
    num_prompts: int
    num_heldout: int
    num_tokens: int
    num_loss_tokens: int
    longest: int
    """Tokens of the longest prompt."""
    rejected: dict[str, int]
    """Conversations that were filtered out, by reason."""
    draft_vocab_size: int
    vocab_coverage: float
    """Share of supervised tokens that lie in the draft vocabulary."""


class TrainSummary(Settings):
    """What a training run did. ``num_trained + num_rejected == num_prompts * num_epochs``."""

    run_id: str
    draft_dir: str
    num_steps: int
    num_prompts: int
    num_epochs: int
    num_trained: int
    num_rejected: int
    rejected: dict[str, int]
    """Rejected samples by reason."""
    num_tokens: int
    loss: float
    """Of the last step, in nats."""
    accept_length: float
    """Simulated, over the last tenth of the steps, the target's own token included."""
    bytes_streamed: int
    """Since the trainers were started last."""
    resumed_from_step: int
    recoveries: tuple[Recovery, ...] = ()
    """Parts that were lost and replaced, in all the processes that worked on this run."""
    wall_s: float
    trainer_wait_s: float
    """Time that trainer rank 0 spent waiting for samples."""
    capture_wait_s: float
    """Time that capturing stood still for bytes in flight, since the trainers were started last."""


class Estimate(Settings):
    """What a training will take, before it starts."""

    train_s: float
    gpu_hours: float
    basis: str
    """Where the figures come from, in a few words."""


class Cost(Settings):
    """What a draft has cost, with all the stages of its pipeline."""

    gpu_hours: float
    """Of the GPUs held, used or not: all of them while training, one while evaluating."""
    num_gpus: int
    num_workers: int
    """Trainer ranks and engines; without GPUs each has a core."""
    num_tokens: int
    wall_s: float


class PromptResult(Settings):
    """One held-out prompt, decoded plainly and speculatively."""

    prompt_id: str
    text: str
    output_text: str
    accepted: tuple[int, ...]
    """Draft tokens accepted in each verification; each adds one token of the target's own."""
    num_new_tokens: int
    lossless: bool


class EvalReport(Settings):
    """Real speculative decoding, with the conditions that a figure is worthless without."""

    engine: str
    draft_steps: int
    temperature: float
    prompt_set: str
    max_new_tokens: int
    num_prompts: int
    num_lossless: int
    accept_length: float
    """New tokens per target forward after the prompt's, the target's own token included."""
    accept_rates: tuple[float, ...]
    """``[k]``: share of verifications right up to k-1 whose draft token k is accepted too."""
    num_new_tokens: int
    num_target_forwards: int
    """One for every prompt, and one for every verification."""
    plain_s: float
    speculative_s: float
    draft_step_s: float
    """Measured cost of one draft forward."""
    target_step_s: float
    """Measured cost of one target forward of one token."""
    prompts: tuple[PromptResult, ...]

    @property
    def measured_speedup(self) -> float:
        return self.plain_s / self.speculative_s

    @property
    def projected_speedup(self) -> float:
        """Speed-up without the Python loop around it: Leviathan et al. 2023, theorem 3.8."""
        return self.accept_length / (1 + self.draft_steps * self.draft_step_s / self.target_step_s)

    @property
    def lossless(self) -> bool:
        return self.num_lossless == self.num_prompts


class RegisteredDraft(Settings):
    """How a pipeline ended: what was registered, or why nothing was."""

    registered: bool
    model_name: str
    version: str
    """Empty where nothing was registered."""
    is_champion: bool
    is_new: bool
    """False where this very content was registered before."""
    decision: str
    """The gate's or the champion's comparison, in a sentence with its figures."""
    tracking_uri: str
    summary: str
    """What a person reads last: all figures of the run, in a few lines."""

    def __str__(self) -> str:
        return self.summary
