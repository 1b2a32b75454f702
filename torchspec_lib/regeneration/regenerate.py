"""Has the target answer the training conversations, once for all runs that need the same."""

import logging
import os
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path

from tqdm import tqdm

from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.conversations import Conversation
from torchspec_lib.data.regenerated import RegeneratedAnswers, RegeneratedFolder
from torchspec_lib.data.sources import Sources
from torchspec_lib.errors import PlacementError
from torchspec_lib.regeneration.shard import Shard
from torchspec_lib.regeneration.workers import WorkerSpec, answer_all
from torchspec_lib.target import TargetSpec

logger = logging.getLogger(__name__)


def regenerate(run: RunConfig, target: TargetSpec) -> tuple[RegeneratedAnswers, RegeneratedFolder]:
    """Answer ``run.data.train`` as ``run.regeneration`` says, or find it done.

    Shards that an interrupted call has written are kept: it goes on behind them. Two calls for the
    same answers don't get into each other's way, the second waits.

    Returns:
        What was answered, and the folder where the conversations lie.

    Raises:
        ConfigError: A source doesn't exist, or SGLang refuses its settings.
        DataError: A row is no conversation.
        PlacementError: This machine's GPUs hold no engine.
        WorkerLostError: An engine's process died.
    """
    sources = Sources.open(run.data)
    folder = sources.answers(run, target)
    assert folder is not None, "the run is to have none"
    answers = folder.answers()
    if answers is not None:
        return answers, folder
    sources.check_files(answered=False)
    total = _count(sources, run)
    with folder.claim():
        todo = (shard for shard in _shards(sources, run) if not folder.has_shard(shard.index))
        num_done = sum(report.num_conversations for report in folder.reports())
        title, unit = "answering", " conversations"
        with tqdm(desc=title, total=total, initial=num_done, unit=unit, mininterval=1.0) as bar:
            for report in answer_all(todo, _workers(run, target, folder)):
                bar.update(report.num_conversations)
                rate = f"{report.num_generated / report.seconds:,.0f}"
                bar.set_postfix({"tokens/s of an engine": rate}, refresh=False)
        answers = folder.finish()
    logger.info(
        "event=regenerated id=%s conversations=%d answered=%d tokens=%d",
        answers.regeneration_id,
        answers.num_conversations,
        answers.num_answered,
        answers.num_tokens,
    )
    return answers, folder


def _count(sources: Sources, run: RunConfig) -> int | None:
    """How many conversations will be answered; None where only downloading would tell."""
    if any(source.path is None for source in sources.train):
        return run.regeneration.max_conversations
    return sum(1 for _ in _conversations(sources, run))


def _conversations(sources: Sources, run: RunConfig) -> Iterator[Conversation]:
    everything = chain.from_iterable(one.conversations(answered=False) for one in sources.train)
    return islice(everything, run.regeneration.max_conversations)


def _shards(sources: Sources, run: RunConfig) -> Iterator[Shard]:
    conversations = _conversations(sources, run)
    for index in count():
        part = tuple(islice(conversations, run.regeneration.shard_size))
        if not part:
            return
        yield Shard(index, part)


def _workers(run: RunConfig, target: TargetSpec, folder: RegeneratedFolder) -> Iterator[WorkerSpec]:
    """An engine for each of this machine's groups of GPUs, up to ``inference``'s number of them."""
    num_engines = run.inference.num_engines
    if run.cluster.device == "cpu":
        return (WorkerSpec(run, target, folder, rank) for rank in range(num_engines))
    size, gpus = run.inference.num_gpus_per_engine, visible_gpus()
    groups = [gpus[begin : begin + size] for begin in range(0, len(gpus) - size + 1, size)]
    if not groups:
        raise PlacementError(f"an engine on {size} GPUs", f"{len(gpus)}", f"{size - len(gpus)}")
    return (
        WorkerSpec(run, target, folder, rank, tuple(group))
        for rank, group in enumerate(groups[:num_engines])
    )


def visible_gpus() -> list[str]:
    """This machine's GPUs, as CUDA_VISIBLE_DEVICES names them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    return [str(index) for index, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]
