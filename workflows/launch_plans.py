"""Launch plans: the pipeline as people start it, as schedules do, and for machines of some size.

What varies from place to place stands in ``launch_plans.yaml`` beside this file.
"""

from pathlib import Path
from typing import Literal

import yaml
from flytekit import CronSchedule, Email, LaunchPlan, PagerDuty, Slack
from flytekit.models.common import Labels, Notification
from flytekit.models.concurrency import ConcurrencyLimitBehavior, ConcurrencyPolicy
from flytekit.models.core.execution import WorkflowExecutionPhase

from tasks.ray_pods import QUEUE_LABEL
from tasks.run_input import RunInput
from torchspec_lib.config.settings import Settings, find_path
from workflows import train_draft as pipeline
from workflows import train_nightly as nightly_pipeline

ONE_AT_A_TIME = ConcurrencyPolicy(1, ConcurrencyLimitBehavior.SKIP)
"""While a night lasts no other begins: what arrived meanwhile is the next one's."""
Phase = Literal["SUCCEEDED", "FAILED", "TIMED_OUT", "ABORTED"]


class Notify(Settings):
    """Who is told by mail, of which ends of an execution."""

    when: tuple[Phase, ...]
    emails: tuple[str, ...] = ()
    slack: tuple[str, ...] = ()
    pagerduty: tuple[str, ...] = ()

    @property
    def notifications(self) -> list[Notification]:
        """As Flyte wants them: one for each kind of recipient that there is."""
        phases = [getattr(WorkflowExecutionPhase, name) for name in self.when]
        kinds = ((Email, self.emails), (Slack, self.slack), (PagerDuty, self.pagerduty))
        return [kind(phases, list(people)) for kind, people in kinds if phases and people]


class Nightly(Settings):
    """When the nights begin, and what they run."""

    schedule: str
    config: str


class LaunchSettings(Settings):
    """What ``launch_plans.yaml`` holds."""

    notify: Notify
    nightly: Nightly
    profiles: dict[str, str]

    @classmethod
    def load(cls, path: Path) -> "LaunchSettings":
        """Read it; an unknown key is an error."""
        return cls.model_validate(yaml.safe_load(path.read_text()))


def read_run(config: str) -> RunInput:
    """The run of a file under ``configs/``."""
    inputs = yaml.safe_load(find_path(config, "launch_plans").read_text())
    return RunInput.model_validate(inputs["run"])


def profile(name: str, config: str, notify: Notify) -> LaunchPlan:
    """The pipeline with a configuration that can be changed when it is launched."""
    run = read_run(config)
    return LaunchPlan.get_or_create(
        pipeline.train_draft,
        name=name,
        default_inputs={"run": run},
        notifications=notify.notifications,
        labels=queue_labels(run),
    )


def nightly(settings: Nightly, notify: Notify) -> LaunchPlan:
    """The nights. Every input is bound: the schedule itself gives ``kickoff``."""
    run = read_run(settings.config)
    return LaunchPlan.get_or_create(
        nightly_pipeline.train_nightly,
        name="train_draft_nightly",
        fixed_inputs={"run": run},
        schedule=CronSchedule(schedule=settings.schedule, kickoff_time_input_arg="kickoff"),
        concurrency=ONE_AT_A_TIME,
        notifications=notify.notifications,
        labels=queue_labels(run),
    )


def queue_labels(run: RunInput) -> Labels | None:
    """Kueue looks for its label on the Ray job, which gets the execution's."""
    return Labels({QUEUE_LABEL: run.cluster.queue}) if run.cluster.queue else None


SETTINGS = LaunchSettings.load(Path(__file__).with_name("launch_plans.yaml"))

train_draft_default = LaunchPlan.get_or_create(
    pipeline.train_draft, name="train_draft", notifications=SETTINGS.notify.notifications
)
"""The run is an input."""
train_draft_nightly = nightly(SETTINGS.nightly, SETTINGS.notify)
PROFILES = {
    name: profile(name, config, SETTINGS.notify) for name, config in SETTINGS.profiles.items()
}
"""A launch plan each, by name."""
