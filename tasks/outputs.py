"""What the tasks hand each other: a record with its files, and how long it took to make."""

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from flytekit.types.directory import FlyteDirectory
from flytekit.types.file import FlyteFile

from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import Settings
from torchspec_lib.plan import ClusterPlan
from torchspec_lib.results import DatasetManifest, Estimate, EvalReport, TrainSummary
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.target import TargetSpec


class CheckedRun(Settings):
    """What the results of stages are cached under: contents, where a path would say nothing."""

    data_key: str
    """Of the conversations, how they are prepared, and the target."""
    answers_key: str
    """Of the target's own answers to them; empty where none are wanted, or the data prepared."""
    evaluation_key: str
    """Of everything that an evaluation depends on beside the draft."""


class PreparedData(Settings):
    """A prepared data set, and the target that it was tokenized for."""

    target: TargetSpec
    manifest: DatasetManifest
    folder: FlyteDirectory
    wall_s: float

    def run_folder(self, run: RunConfig) -> RunFolder:
        """Where the run that trains on this data keeps its files."""
        return RunFolder.of(run, self.manifest, self.target)

    def shared_folder(self, run: RunConfig) -> Path:
        """Where every node finds the data: under ``data_root``, put there if it isn't."""
        folder = run.data_path / "datasets" / self.manifest.dataset_id
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".copy-", dir=folder.parent) as staging:
                copy = Path(staging) / folder.name
                shutil.copytree(self.folder.download(), copy)
                copy.rename(folder)
        return folder


class ProvisionedCluster(Settings):
    """A plan that was checked against what is there."""

    plan: ClusterPlan
    estimate: Estimate
    wall_s: float


class TrainedDraft(Settings):
    """A draft in the format that serving engines read, and how its training went."""

    summary: TrainSummary
    draft: FlyteDirectory
    sha256: str
    """Of the draft's files: what its evaluation is cached under."""
    metrics: FlyteFile
    """JSON lines, one step each."""
    wall_s: float


class Evaluation(Settings):
    """The draft's figures."""

    report: EvalReport
    wall_s: float


class Verdict(Settings):
    """Whether the draft is to be registered, and the champion it was compared with."""

    reason: str
    champion_report: EvalReport | None
    """Under the same conditions; None without a champion, or where this draft is it."""
    champion_content: str | None
    """Which draft that is."""


def stage_times(
    data: PreparedData, cluster: ProvisionedCluster, draft: TrainedDraft, evaluation: Evaluation
) -> Mapping[str, float]:
    """Seconds that each stage took, in the pipeline's order."""
    return {
        "prepare": data.wall_s,
        "provision": cluster.wall_s,
        "train": draft.wall_s,
        "evaluate": evaluation.wall_s,
    }
