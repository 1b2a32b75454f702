"""What the tasks hand each other: a record with its files, and how long it took to make."""

from collections.abc import Mapping

from flytekit.types.directory import FlyteDirectory
from flytekit.types.file import FlyteFile

from torchspec_lib.config.run import RunConfig
from torchspec_lib.config.settings import Settings
from torchspec_lib.plan import ClusterPlan
from torchspec_lib.results import DatasetManifest, EvalReport, TrainSummary
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.target import TargetSpec


class PreparedData(Settings):
    """A prepared data set, and the target that it was tokenized for."""

    target: TargetSpec
    manifest: DatasetManifest
    folder: FlyteDirectory
    wall_s: float

    def run_folder(self, run: RunConfig) -> RunFolder:
        """Where the run that trains on this data keeps its files."""
        return RunFolder.of(run, self.manifest, self.target)


class ProvisionedCluster(Settings):
    """A plan that was checked against what is there."""

    plan: ClusterPlan
    wall_s: float


class TrainedDraft(Settings):
    """A draft in the format that serving engines read, and how its training went."""

    summary: TrainSummary
    draft: FlyteDirectory
    metrics: FlyteFile
    """JSON lines, one step each."""
    wall_s: float


class Evaluation(Settings):
    """The draft's figures, and the champion's where they had to be measured anew."""

    report: EvalReport
    champion_report: EvalReport | None
    wall_s: float


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
