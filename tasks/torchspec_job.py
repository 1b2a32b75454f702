"""The Flyte plugin for joint training: a Ray job whose cluster is up while the task runs.

The task type stays ``ray``, so a stock Flyte backend with KubeRay runs it. KubeRay brings up
the nodes, ``TorchSpecJob.bring_up`` everything on them. It is entered in ``execute``: Flyte's
``pre_execute`` runs under test mocks too and reports a user's mistake as a system error, and
``post_execute`` is skipped when a task fails.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

from flytekit.configuration import SerializationSettings
from flytekit.core.context_manager import ExecutionParameters
from flytekit.extend import TaskPlugins
from flytekitplugins.ray import HeadNodeConfig, RayJobConfig, WorkerNodeConfig
from flytekitplugins.ray.task import RayFunctionTask

from tasks.ray_pods import WorkerGroup, head_template, worker_template
from tasks.stage import is_local, retryable, terminable

INJECTED_INPUT = "cluster"
LOG_RETENTION_S = 60
"""How long a finished cluster keeps its GPUs, for its logs to be collected. Flyte takes a missing
value for 0."""

BringUp = Callable[..., AbstractContextManager[Any]]


@dataclass
class TorchSpecJob(RayJobConfig):
    """Config of a task that trains on a cluster of engines and trainers.

    Locally the groups have no effect: the task's inputs say what ``bring_up`` starts.
    """

    worker_node_config: list[WorkerNodeConfig] = field(init=False, default_factory=list)
    _: KW_ONLY
    bring_up: BringUp
    """Called with the task's inputs; what it yields is the task's argument ``cluster``."""
    groups: tuple[WorkerGroup, ...]
    queue: str | None = None
    """Of Kueue, for all pods together."""

    def __post_init__(self) -> None:
        self.shutdown_after_job_finishes = True
        self.ttl_seconds_after_finished = LOG_RETENTION_S

    def describe_pods(self) -> None:
        """Fill in the pods for Flyte. Only then, since Kubernetes' client takes 2 s to import."""
        self.head_node_config = HeadNodeConfig(
            ray_start_params={"num-gpus": "0"}, pod_template=head_template(self.queue)
        )
        self.worker_node_config = [_worker_node(group, self.queue) for group in self.groups]


def _worker_node(group: WorkerGroup, queue: str | None) -> WorkerNodeConfig:
    """A group of fixed size: placement groups need all of their nodes, or none."""
    return WorkerNodeConfig(
        group_name=group.name,
        replicas=group.num_pods,
        min_replicas=group.num_pods,
        max_replicas=group.num_pods,
        ray_start_params={"num-gpus": str(group.num_gpus), "num-cpus": str(group.num_cpus)},
        pod_template=worker_template(group, queue),
    )


class TorchSpecTask(RayFunctionTask):
    """Runs a task function with the cluster that its ``TorchSpecJob`` brings up.

    The function's parameter ``cluster`` is no Flyte input. Whatever ends the function, an error,
    an interrupt or a preemption, what was brought up is taken down in reverse. What another
    try can cure becomes Flyte's recoverable error, which ``retries`` count; nothing else does.
    """

    def __init__(
        self, task_config: TorchSpecJob, task_function: Callable[..., Any], **kwargs: Any
    ) -> None:
        # Ray's token mode needs a secret on every pod, which Flyte's Ray job can't ask for.
        kwargs["environment"] = {"RAY_AUTH_MODE": "disabled", **(kwargs.get("environment") or {})}
        super().__init__(task_config, task_function, ignore_input_vars=[INJECTED_INPUT], **kwargs)

    def pre_execute(self, user_params: ExecutionParameters) -> ExecutionParameters:
        """Join KubeRay's cluster, which is up by now. Locally ``bring_up`` sees to Ray."""
        return user_params if is_local() else super().pre_execute(user_params)

    def get_custom(self, settings: SerializationSettings) -> dict[str, Any] | None:
        self._task_config.describe_pods()
        return super().get_custom(settings)

    def execute(self, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            stack.enter_context(terminable())
            stack.enter_context(retryable())
            cluster = stack.enter_context(self._task_config.bring_up(**kwargs))
            return super().execute(**kwargs, **{INJECTED_INPUT: cluster})


TaskPlugins.register_pythontask_plugin(TorchSpecJob, TorchSpecTask)
