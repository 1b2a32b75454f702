"""Tasks of a night: choose what to train on, or say that there is nothing new."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from flytekit import Deck, task

from tasks.report_page import decision, facts, page, section
from tasks.resources import CPU_IMAGE, POD_TEMPLATE, RETRIES, SHORT, TINY
from tasks.run_input import RunInput
from tasks.stage import stage, tell
from torchspec_lib.results import RegisteredDraft

MAX_FILES = 50
"""More files than these are counted only."""


class Chosen(NamedTuple):
    """Tonight's run, and whether there is anything to train on."""

    run: RunInput
    has_prompts: bool


@task(
    container_image=CPU_IMAGE,
    requests=TINY,
    pod_template_name=POD_TEMPLATE,
    retries=RETRIES,
    timeout=SHORT,
    enable_deck=True,
    deck_fields=(),
)
def choose_prompts(run: RunInput, kickoff: datetime) -> Chosen:
    """Take the conversations that arrived since the champion's, and start from the champion.

    Args:
        run: The standing configuration. Folders in ``run.data.train`` are where they arrive.
        kickoff: When the night begins: what is written later is the next one's.
    """
    with stage("choose_prompts"):
        from torchspec_lib.nightly import plan_night

        # Flyte's times are UTC, with or without saying so.
        begins = kickoff if kickoff.tzinfo is not None else kickoff.replace(tzinfo=UTC)
        night = plan_night(run, begins)
        since = "" if night.since is None else f" since {night.since:%Y-%m-%d %H:%M} UTC"
        tell(f"{night.num_files} new file(s) with conversations{since}")
        if night.run.training.continual_from is not None:
            tell(f"starting from {night.run.training.continual_from}")
        Deck("night", night_report(night.run.data.train, since, begins))
        tonight = RunInput.model_validate(night.run.model_dump())
        return Chosen(tonight, night.num_files > 0)


def night_report(train: Sequence[str], since: str, begins: datetime) -> str:
    """What a night trains on."""
    rows = {str(number + 1): source for number, source in enumerate(train[:MAX_FILES])}
    if len(train) > MAX_FILES:
        rows["..."] = f"{len(train) - MAX_FILES:,} more"
    lead = f"what arrived{since} until {begins:%Y-%m-%d %H:%M} UTC"
    return page("Tonight's conversations", lead, section("Files", facts(rows)))


@task(
    container_image=CPU_IMAGE,
    requests=TINY,
    pod_template_name=POD_TEMPLATE,
    retries=RETRIES,
    timeout=SHORT,
    enable_deck=True,
    deck_fields=(),
)
def report_quiet_night(run: RunInput) -> RegisteredDraft:
    """Nothing arrived, so nothing is trained; the champion stays."""
    with stage("report_quiet_night"):
        from torchspec_lib.registry.registry import tracking_uri

        why = "no new conversations have arrived"
        Deck("night", page("A quiet night", run.registry.model_name, decision(True, why)))
        return RegisteredDraft(
            registered=False,
            model_name=run.registry.model_name,
            version="",
            is_champion=False,
            is_new=False,
            decision=why,
            tracking_uri=tracking_uri(run),
            summary=f"not trained    {why}",
        )
