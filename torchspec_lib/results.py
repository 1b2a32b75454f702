"""What the stages of a pipeline hand each other and the user: Flyte outputs, so pydantic."""

from pydantic import Field

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
    turns: dict[str, int]
    """How many of the assistant's turns are supervised and how, as ``EncodedChat.turns``."""
    rejected: dict[str, int]
    """Conversations that were filtered out, by reason."""
    draft_vocab_size: int
    vocab_coverage: float
    """Share of supervised tokens that lie in the draft vocabulary."""


class SnapshotResult(Settings):
    """Real, greedy speculative decoding with the draft as it was after a step."""

    step: int
    accept_length: float
    """New tokens per target forward, the target's own included."""
    accept_rates: tuple[float, ...]
    """As ``EvalReport.accept_rates``."""
    num_prompts: int
    num_new_tokens: int
    seconds: float
    """That the decoding took, beside the training."""


class TrainSummary(Settings):
    """What a training run did.

    ``num_trained + num_rejected + num_not_trained == num_prompts * num_epochs``.
    """

    run_id: str
    draft_dir: str
    num_steps: int
    num_prompts: int
    num_epochs: int
    num_trained: int
    num_rejected: int
    rejected: dict[str, int]
    """Rejected samples by reason."""
    num_not_trained: int = 0
    """Left when the training was stopped early."""
    num_set_aside: int = 0
    """Further prompts, which snapshots were decoded with and nothing was trained on."""
    snapshots: tuple[SnapshotResult, ...] = ()
    """In the order of their steps."""
    snapshot_problem: str | None = None
    """Why snapshots couldn't be decoded to the end."""
    exported_step: int | None = None
    """The step whose draft was exported, where snapshots were to choose it."""
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
    in_order: bool = True
    """Whether ``accepted`` is in the order of the answer. SGLang tells how many, but not when."""
    num_new_tokens: int
    lossless: bool


class SetResult(Settings):
    """How the draft fared on a named set of prompts, or on one of its categories."""

    name: str
    """``heldout``, or a name of ``evaluation.sets``."""
    category: str | None
    """None for the whole set."""
    prompt_set: str
    """Names the prompts by their tokens; see ``prompt_set`` of the evaluation."""
    num_prompts: int
    num_lossless: int
    accept_length: float
    accept_rates: tuple[float, ...]
    num_new_tokens: int
    plain_s: float
    speculative_s: float

    @property
    def measured_speedup(self) -> float:
        return self.plain_s / self.speculative_s


class EvalReport(Settings):
    """Real speculative decoding, with the conditions that a figure is worthless without.

    The figures are those of the held-out prompts; ``sets`` has others beside them. Fields with a
    default are missing in older records.
    """

    engine: str
    """As ``EvaluationConfig.engine``."""
    draft_steps: int
    draft_topk: int = 1
    """1 for chains; see ``EvaluationConfig``."""
    num_draft_tokens: int | None = None
    """Rows of a verification; None for chains, which have ``draft_steps + 1``."""
    temperature: float
    prompt_set: str
    max_new_tokens: int
    num_prompts: int
    num_lossless: int
    num_ties: int = 0
    """Greedy answers that differ from plain decoding's, and first where rounding chose between
    two tokens that are as good as equal to the target."""
    accept_length: float
    """New tokens per target forward after the prompt's, the target's own token included."""
    accept_rates: tuple[float, ...]
    """``[k]``: share of verifications right up to k-1 whose draft token k is accepted too."""
    num_new_tokens: int
    num_target_forwards: int
    """One for every prompt, and one for every verification."""
    plain_s: float
    speculative_s: float
    draft_step_s: float | None
    """Measured cost of one draft forward; None where SGLang decoded, which doesn't tell it."""
    target_step_s: float | None
    """Measured cost of one target forward of one token; None as ``draft_step_s``."""
    target_rows_s: dict[int, float] = Field(default_factory=dict)
    """Measured cost of one target forward of so many rows: for chains up to ``num_rows``."""
    sets: tuple[SetResult, ...] = ()
    """By set and category, the held-out prompts' own first."""
    chain: SetResult | None = None
    """The held-out prompts with chains of as many steps, where ``hf`` decoded them with trees."""
    prompts: tuple[PromptResult, ...]
    """The held-out ones."""

    @property
    def num_rows(self) -> int:
        """Of a verification: the newest token and what the draft proposes behind it."""
        return self.num_draft_tokens or self.draft_steps + 1

    @property
    def drafting(self) -> str:
        """``chains of 5``, or ``trees of 5 steps, top-k 4, 16 tokens``."""
        if self.draft_topk == 1:
            return f"chains of {self.draft_steps}"
        return f"trees of {self.draft_steps} steps, top-k {self.draft_topk}, {self.num_rows} tokens"

    @property
    def measured_speedup(self) -> float:
        return self.plain_s / self.speculative_s

    @property
    def projected_speedup(self) -> float | None:
        """Speed-up by the measured costs of the models' forwards, without the loop around them.

        Plain decoding takes ``t(1)`` a token, t(R) being the cost of a target forward of R rows.
        A verification takes K draft forwards of cost d and t(R), and gives ``accept_length``
        tokens: so the ratio is ``accept_length * t(1) / (K d + t(R))``. Leviathan et al. 2023
        (arXiv 2211.17192), theorem 3.8, has it with t(R) = t(1), as do records without t(R).
        None where these costs aren't known.
        """
        if self.draft_step_s is None or self.target_step_s is None:
            return None
        verify_s = self.target_rows_s.get(self.num_rows, self.target_step_s)
        cycle_s = self.draft_steps * self.draft_step_s + verify_s
        return self.accept_length * self.target_step_s / cycle_s

    @property
    def lossless(self) -> bool:
        return self.num_lossless == self.num_prompts

    @property
    def num_changed(self) -> int:
        """Answers that the draft is to blame for."""
        return self.num_prompts - self.num_lossless - self.num_ties

    @property
    def lossless_text(self) -> str:
        """Such as ``97 of 100 prompts; 3 part where two tokens tie``."""
        ties = f"; {self.num_ties} part where two tokens tie" if self.num_ties else ""
        return f"{self.num_lossless} of {self.num_prompts} prompts{ties}"


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
    hub: str = ""
    """What was pushed to the Hugging Face Hub, in a sentence; empty where nothing was to be."""
    summary: str
    """What a person reads last: all figures of the run, in a few lines."""

    def __str__(self) -> str:
        return self.summary
