"""The pipeline, night after night: on what arrived, from the champion, for a better one."""

from datetime import datetime

from flytekit import conditional, workflow

from tasks import choose_prompts as choosing_task
from tasks.run_input import RunInput
from torchspec_lib.results import RegisteredDraft
from workflows import train_draft as pipeline


@workflow
def train_nightly(run: RunInput, kickoff: datetime) -> RegisteredDraft:
    """Train the champion on with the conversations that arrived; register only a better draft.

    A failure is the inner pipeline's to report.

    Args:
        run: The standing configuration; folders in ``run.data.train`` are where conversations
            arrive. See ``configs/nightly.yaml``.
        kickoff: When the night begins; the schedule says so, ``now`` by hand.

    Returns:
        What was registered, or why nothing was.
    """
    tonight, has_prompts = choosing_task.choose_prompts(run=run, kickoff=kickoff)
    return (
        conditional("night")
        .if_(has_prompts.is_true())
        .then(pipeline.train_draft(run=tonight))
        .else_()
        .then(choosing_task.report_quiet_night(run=tonight))
    )
