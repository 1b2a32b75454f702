"""What can go wrong, one class per cause that somebody can act on.

Every class hands all its constructor arguments to ``super().__init__``: Ray pickles an
exception by its ``args``, and one that can't be rebuilt arrives without its type.
"""

from collections.abc import Sequence


class TorchSpecError(Exception):
    """Base of everything this project raises on purpose."""


class UserError(TorchSpecError):
    """Something the user can mend: says what is wrong, where, and what to change."""


class ConfigError(UserError):
    """A setting that is impossible, alone or together with what is there."""

    def __init__(self, key: str, problem: str, remedy: str) -> None:
        super().__init__(key, problem, remedy)
        self.key, self.problem, self.remedy = key, problem, remedy

    def __str__(self) -> str:
        return f"{self.key}: {self.problem}. {self.remedy}"


class DataError(UserError):
    """Input data that can't be used. ``where`` is a file with line or a sample's id."""

    def __init__(self, where: str, problem: str, remedy: str) -> None:
        super().__init__(where, problem, remedy)
        self.where, self.problem, self.remedy = where, problem, remedy

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}. {self.remedy}"


class PlacementError(UserError):
    """The cluster can't hold what was asked for."""

    def __init__(self, asked: str, present: str, missing: str) -> None:
        super().__init__(asked, present, missing)
        self.asked, self.present, self.missing = asked, present, missing

    def __str__(self) -> str:
        return (
            f"can't place {self.asked}: the cluster has {self.present}, missing {self.missing}. "
            "Lower training.training_num_gpus_per_node or inference.inference_num_gpus, "
            "or add nodes; without any GPU set cluster.device to cpu"
        )


class DependencyError(UserError):
    """Something outside Python's packages is missing: a system library, a program."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy

    def __str__(self) -> str:
        return f"{self.what}. {self.remedy}"


class StoreFullError(TorchSpecError):
    """The store has no room for a sample. The caller waits or lowers its budget."""

    def __init__(self, key: str, num_bytes: int, capacity_bytes: int) -> None:
        super().__init__(key, num_bytes, capacity_bytes)
        self.key, self.num_bytes, self.capacity_bytes = key, num_bytes, capacity_bytes

    def __str__(self) -> str:
        return (
            f"no room for {self.key} ({self.num_bytes:,} of {self.capacity_bytes:,} bytes): "
            "raise transfer.segment_bytes or lower transfer.max_in_flight_bytes"
        )


class SampleLostError(TorchSpecError):
    """A sample isn't in the store any more, or isn't whole. Capture it again."""

    def __init__(self, key: str, cause: str) -> None:
        super().__init__(key, cause)
        self.key, self.cause = key, cause

    def __str__(self) -> str:
        return f"sample {self.key} is lost: {self.cause}"


class RecoverableError(TorchSpecError):
    """What another try can cure: Flyte's retries count these, and no others."""


class StoreUnavailableError(RecoverableError):
    """The store doesn't answer: its master, its client process or the network is gone."""

    def __init__(self, operation: str, cause: str) -> None:
        super().__init__(operation, cause)
        self.operation, self.cause = operation, cause

    def __str__(self) -> str:
        return f"the store didn't answer to {self.operation}: {self.cause}"


class EngineError(TorchSpecError):
    """An engine can't be used: it didn't start, failed its self-check, or died."""

    def __init__(self, engine: str, cause: str) -> None:
        super().__init__(engine, cause)
        self.engine, self.cause = engine, cause

    def __str__(self) -> str:
        return f"engine {self.engine}: {self.cause}"


class WorkerLostError(RecoverableError):
    """An actor or process of the run died, or hangs."""

    def __init__(self, role: str, cause: str) -> None:
        super().__init__(role, cause)
        self.role, self.cause = role, cause

    def __str__(self) -> str:
        return f"lost {self.role}: {self.cause}"


class HungError(WorkerLostError):
    """A part lives, and gets nowhere. It has to be ended before it is started again."""


class GivenUpError(RecoverableError):
    """A part of the run died again and again."""

    def __init__(self, part: str, cause: str) -> None:
        super().__init__(part, cause)
        self.part, self.cause = part, cause

    def __str__(self) -> str:
        return (
            f"{self.part} is given up: it was started again as often as recovery.max_restarts "
            f"allows, and got nowhere; the last time: {self.cause}"
        )


class RegistryError(TorchSpecError):
    """Something else was registered meanwhile than a draft was compared with."""


class LedgerError(TorchSpecError):
    """The accounts don't add up: a prompt was lost or counted twice."""


class TooManyFailuresError(TorchSpecError):
    """More captures failed than the run tolerates."""

    def __init__(
        self, num_failed: int, num_total: int, limit: float, reasons: Sequence[str]
    ) -> None:
        super().__init__(num_failed, num_total, limit, reasons)
        self.num_failed, self.num_total, self.limit = num_failed, num_total, limit
        self.reasons = reasons

    def __str__(self) -> str:
        reasons = "; ".join(self.reasons)
        if self.num_failed == self.num_total:
            return f"all {self.num_total} prompts were rejected: {reasons}"
        return (
            f"{self.num_failed} of {self.num_total} prompts were rejected, more than "
            f"inference.max_failed_fraction ({self.limit}): {reasons}"
        )


class CheckpointError(TorchSpecError):
    """A checkpoint can't be loaded. Never taken for an absent one."""

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        super().__init__(path, problem, remedy)
        self.path, self.problem, self.remedy = path, problem, remedy

    def __str__(self) -> str:
        return f"checkpoint {self.path}: {self.problem}. {self.remedy}"


class DraftFormatError(TorchSpecError):
    """A draft folder isn't what the serving engines read."""

    def __init__(self, folder: str, problems: Sequence[str]) -> None:
        super().__init__(folder, problems)
        self.folder, self.problems = folder, problems

    def __str__(self) -> str:
        return f"draft folder {self.folder}: " + "; ".join(self.problems)
