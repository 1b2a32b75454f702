"""Task: conversations -> a prepared data set."""

from flytekit import task
from flytekit.types.directory import FlyteDirectory

from tasks.outputs import PreparedData
from tasks.resources import CPU_IMAGE, DATA_PREPARATION, cluster_nodes
from tasks.run_input import RunInput
from tasks.stage import stage


@task(container_image=CPU_IMAGE, requests=DATA_PREPARATION, enable_deck=True, deck_fields=())
def prepare_data(run: RunInput) -> PreparedData:
    """Check the run, then tokenize its conversations, or find them prepared.

    Flyte's cache is left out on purpose: it would know the conversations by their path, while
    a data set is found by their content.
    """
    with stage("prepare_data") as watch:
        from torchspec_lib import pipeline

        # Before anything is imported that takes seconds: a mistake is told at once.
        target = pipeline.preflight(run, cluster_nodes())

        from tasks import reports
        from torchspec_lib.data.chat import ChatTokenizer
        from torchspec_lib.data.dataset import prepare_dataset

        manifest, folder = prepare_dataset(run, target)
        data = PreparedData(
            target=target, manifest=manifest, folder=FlyteDirectory(str(folder)), wall_s=0.0
        )
        tokenizer = ChatTokenizer.load(target.path, run.model.trust_remote_code).tokenizer
        page = reports.data_report(manifest, folder, tokenizer)
        reports.publish("data", page, data.run_folder(run))
        return data.model_copy(update={"wall_s": watch.elapsed_s})
