"""The training task as KubeRay runs it: a Ray cluster that stands, a job that is submitted to it.

All but Kubernetes is real: ``ray start``, ``ray job submit``, Flyte's entry point with its files of
inputs and outputs. The first attempt is killed; Flyte's second one is told of its checkpoint.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from flyteidl.core import literals_pb2
from flytekit import FlyteContextManager
from flytekit.core.type_engine import TypeEngine
from flytekit.models.literals import LiteralMap
from flytekit.types.directory import FlyteDirectory

from tasks.outputs import PreparedData, ProvisionedCluster, TrainedDraft
from tasks.run_input import RunInput
from tests.run_process import config, wait_for
from torchspec_lib.config.settings import PROJECT_ROOT
from torchspec_lib.cost import estimate
from torchspec_lib.data.dataset import prepare_dataset
from torchspec_lib.pipeline import preflight, provision

pytestmark = [pytest.mark.ray, pytest.mark.mooncake, pytest.mark.timeout(480)]

BIN = Path(sys.executable).parent
RESOLVER = "flytekit.core.python_auto_container.default_task_resolver"


class Cluster:
    """Ray as KubeRay leaves it: a head, no authentication, a port for jobs."""

    def __init__(self, temp: Path) -> None:
        gcs, jobs, agent, clients = free_ports(4)
        self.jobs, self.clients = f"http://127.0.0.1:{jobs}", f"ray://127.0.0.1:{clients}"
        self.env = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_")
        } | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        self.env |= {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(PROJECT_ROOT)}
        self.env |= {"FLYTE_INTERNAL_EXECUTION_ID": "f0123"}
        self.env["RAY_TMPDIR"] = str(temp)  # else runs beside this one would join it unasked
        options = {
            "--port": gcs,
            "--dashboard-port": jobs,
            "--dashboard-agent-listen-port": agent,
            "--ray-client-server-port": clients,
            "--num-cpus": 8,
            "--num-gpus": 0,
            "--object-store-memory": 200 << 20,
            "--temp-dir": temp,
        }
        arguments = [str(part) for option in options.items() for part in option]
        self._log = (temp / "start.txt").open("w")
        command = [BIN / "ray", "start", "--head", "--block", "--node-ip-address", "127.0.0.1"]
        self._process = subprocess.Popen(
            [*command, *arguments], env=self.env, stdout=self._log, stderr=subprocess.STDOUT
        )
        self._ports = jobs, clients

    def is_up(self) -> bool:
        """Wait until it is, or has ended."""
        ended = self._process.poll
        wait_for(lambda: all(map(answers, self._ports)) or ended() is not None, "Ray", 120)
        return ended() is None

    def submit(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BIN / "ray", "job", "submit", "--address", self.jobs, "--", *command],
            cwd=PROJECT_ROOT,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def stop(self) -> None:
        parts = psutil.Process(self._process.pid).children(recursive=True)
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(timeout=60)
        self._log.close()
        for process in psutil.wait_procs(parts, timeout=10)[1]:
            process.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("r"))
    if not cluster.is_up():  # it gives up on a machine that is too busy; once more, then
        cluster = Cluster(tmp_path_factory.mktemp("r"))
        assert cluster.is_up()
    yield cluster
    cluster.stop()


def write_inputs(run: RunInput, file: Path) -> PreparedData:
    """The literals that Flyte leaves for the task."""
    target = preflight(run)
    manifest, folder = prepare_dataset(run, target)
    plan = provision(run, manifest)
    data = PreparedData(
        target=target, manifest=manifest, folder=FlyteDirectory(str(folder)), wall_s=1.0
    )
    values = {
        "run": run,
        "data": data,
        "provisioned": ProvisionedCluster(
            plan=plan, estimate=estimate(run, plan, manifest), wall_s=1.0
        ),
    }
    context = FlyteContextManager.current_context()
    literals = {
        name: TypeEngine.to_literal(
            context, value, type(value), TypeEngine.to_literal_type(type(value))
        )
        for name, value in values.items()
    }
    file.write_bytes(LiteralMap(literals).to_flyte_idl().SerializeToString())
    return data


def execute_task(inputs: Path, attempt: Path, previous: Path | None) -> list[str]:
    """The container's command, as Flyte writes it for an attempt."""
    handed_over = [] if previous is None else ["--prev-checkpoint", str(previous / "checkpoint")]
    return [
        str(BIN / "pyflyte-execute"),
        *("--inputs", str(inputs)),
        *("--output-prefix", str(attempt / "out")),
        *("--raw-output-data-prefix", str(attempt / "raw")),
        *("--checkpoint-path", str(attempt / "checkpoint")),
        *handed_over,
        *("--resolver", RESOLVER, "--"),
        *("task-module", "tasks.train_draft", "task-name", "train_draft"),
    ]


def drivers(attempt: Path) -> list[psutil.Process]:
    """The task's own processes, not the shell or the submitter that name it too."""
    marks = (str(attempt / "out"), "pyflyte-execute")
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if all(any(mark in word for word in process.info["cmdline"] or ()) for mark in marks)
        and "python" in (process.info["cmdline"] or [""])[0]
        and "job" not in process.info["cmdline"]
    ]


def test_a_second_attempt_goes_on_where_the_killed_first_one_was(
    cluster: Cluster, tmp_path: Path
) -> None:
    quick = {
        "training_num_gpus_per_node": 2,
        "global_batch_size": 5,
        "learning_rate": 5e-3,
        "compute_dtype": "float32",
        "checkpoint_interval": 5,
    }
    plain = config(tmp_path / "data", num_prompts=300, training=quick)
    fresh = {"fresh": True}  # the execution's first attempt starts over, its second one goes on
    run = RunInput.model_validate(plain.model_dump() | fresh)
    data = write_inputs(run, tmp_path / "inputs.pb")
    folder = data.run_folder(run)
    first, second = tmp_path / "1", tmp_path / "2"
    for attempt in (first, second):
        (attempt / "out").mkdir(parents=True)

    submitted = cluster.submit(*execute_task(tmp_path / "inputs.pb", first, None))
    wait_for(lambda: list(folder.checkpoints.glob("step_*/meta.json")), "checkpoint", 240)
    for process in drivers(first):
        process.kill()
    said, _ = submitted.communicate(timeout=120)
    assert submitted.returncode != 0, said[-3000:]
    assert not (first / "out" / "outputs.pb").exists()
    assert folder.finished() is None

    command = execute_task(tmp_path / "inputs.pb", second, first)
    submitted = cluster.submit(*command)
    said, _ = submitted.communicate(timeout=300)
    assert submitted.returncode == 0, said[-3000:]
    assert not (second / "out" / "error.pb").exists(), said[-3000:]
    draft = read_output(second / "out" / "outputs.pb")
    assert draft.summary.resumed_from_step >= 5
    assert draft.summary.num_trained + draft.summary.num_rejected == 300
    assert (second / "out" / "deck.html").is_file()


def read_output(file: Path) -> TrainedDraft:
    literals = LiteralMap.from_flyte_idl(literals_pb2.LiteralMap.FromString(file.read_bytes()))
    context = FlyteContextManager.current_context()
    draft = TypeEngine.to_python_value(context, literals.literals["o0"], TrainedDraft)
    assert isinstance(draft, TrainedDraft)
    return draft


def test_a_cluster_that_is_there_can_be_joined_from_outside(
    cluster: Cluster, tmp_path: Path
) -> None:
    """RAY_ADDRESS=ray://..., the alternative to KubeRay."""
    quick = {"global_batch_size": 5, "compute_dtype": "float32"}
    run = config(tmp_path / "data", num_prompts=20, training=quick)
    run = run.model_copy(
        update={"evaluation": run.evaluation.model_copy(update={"max_prompts": 2})}
    )
    inputs = tmp_path / "run.json"
    inputs.write_text(json.dumps({"run": run.model_dump(mode="json")}))
    command = ["run", "workflows/train_draft.py", "train_draft", "--inputs-file", str(inputs)]
    finished = subprocess.run(
        [BIN / "pyflyte", *command],
        cwd=PROJECT_ROOT,
        env=cluster.env | {"RAY_ADDRESS": cluster.clients},
        capture_output=True,
        text=True,
        timeout=240,
    )
    said = finished.stdout + finished.stderr
    assert finished.returncode == 0, said[-3000:]
    assert "20 trained, 0 rejected" in said
