"""The package that a Flyte cluster gets, made offline and parsed."""

import subprocess
import sys
import tarfile
from pathlib import Path

from flyteidl.admin import launch_plan_pb2, task_pb2, workflow_pb2
from flyteidl.core import tasks_pb2
from google.protobuf.message import Message

from torchspec_lib.config.settings import PROJECT_ROOT

MESSAGES: dict[str, type[Message]] = {
    "1": task_pb2.TaskSpec,
    "2": workflow_pb2.WorkflowSpec,
    "3": launch_plan_pb2.LaunchPlan,
}


class Package:
    """Every file of a package, by kind and name."""

    def __init__(self, folder: Path) -> None:
        path = folder / "package.tgz"
        images = ["--image", "default=torchspec-flyte:cpu", "--image", "gpu=torchspec-flyte:gpu"]
        pyflyte = Path(sys.executable).with_name("pyflyte")
        subprocess.run(
            [pyflyte, "--pkgs", "workflows", "package", *images, "--output", str(path)],
            cwd=PROJECT_ROOT,
            capture_output=True,
            check=True,
            timeout=120,
        )
        self._parsed: dict[str, Message] = {}
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                file = archive.extractfile(member)
                assert file is not None
                entity = Path(member.name).stem.split("_", 1)[1]
                self._parsed[entity] = MESSAGES[entity[-1]].FromString(file.read())

    def names(self, kind: str) -> list[str]:
        return sorted(entity[:-2] for entity in self._parsed if entity[-1] == kind)

    def task(self, name: str) -> tasks_pb2.TaskTemplate:
        spec = self._parsed[f"tasks.{name}_1"]
        assert isinstance(spec, task_pb2.TaskSpec)
        return spec.template

    def workflow(self, name: str) -> workflow_pb2.WorkflowSpec:
        spec = self._parsed[f"workflows.{name}_2"]
        assert isinstance(spec, workflow_pb2.WorkflowSpec)
        return spec

    def launch_plan(self, name: str) -> launch_plan_pb2.LaunchPlan:
        plan = self._parsed[f"{name}_3"]
        assert isinstance(plan, launch_plan_pb2.LaunchPlan)
        return plan
