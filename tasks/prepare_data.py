"""Task: conversations -> a prepared data set."""

from flytekit import Cache, task
from flytekit.types.directory import FlyteDirectory

from tasks.outputs import PreparedData
from tasks.resources import (
    CPU_IMAGE,
    DATA_PREPARATION,
    POD_TEMPLATE,
    PREPARATION_TIMEOUT,
    RETRIES,
)
from tasks.run_input import RunInput
from tasks.stage import stage

CACHE_VERSION = "2"
"""Raise it when ``PreparedData`` changes; what the data depend on is in the key."""


@task(
    container_image=CPU_IMAGE,
    requests=DATA_PREPARATION,
    pod_template_name=POD_TEMPLATE,
    cache=Cache(version=CACHE_VERSION, ignored_inputs=("run", "answers"), serialize=True),
    retries=RETRIES,
    timeout=PREPARATION_TIMEOUT,
    enable_deck=True,
    deck_fields=(),
)
def prepare_data(
    run: RunInput,
    key: str,  # noqa: ARG001 - the cache's key
    answers: str = "",  # noqa: ARG001 - what it waits for
) -> PreparedData:
    """Tokenize the conversations, or find them prepared.

    Args:
        run: What to prepare. Flyte's cache would know the conversations by their path.
        key: ``CheckedRun.data_key``, which knows them by their content.
        answers: The id of the target's own answers, if these are trained on.
    """
    with stage("prepare_data") as watch:
        from tasks import reports
        from torchspec_lib.data.dataset import prepare_dataset
        from torchspec_lib.target import read_target

        target = read_target(run.model)
        manifest, folder = prepare_dataset(run, target)
        data = PreparedData(
            target=target, manifest=manifest, folder=FlyteDirectory(str(folder)), wall_s=0.0
        )
        reports.publish_data(run, target, manifest, folder)
        return data.model_copy(update={"wall_s": watch.elapsed_s})
