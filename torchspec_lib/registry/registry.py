"""The registry of drafts: MLflow's, in an SQLite file under ``data_root`` or wherever it runs.

One registered model holds the drafts of one target, a version each, known by their content.
The alias ``champion`` is on the one with the longest accept length; what serves drafts follows
it. A version is created when all its files and figures are there, so it is whole.
"""

import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from torchspec_lib.config.run import RunConfig
from torchspec_lib.errors import ConfigError, RegistryError
from torchspec_lib.registry.candidate import Candidate, content_hash
from torchspec_lib.registry.gate import GateDecision, check_champion, check_draft, conditions
from torchspec_lib.registry.hub import push
from torchspec_lib.registry.mlflow_store import DraftVersion, MlflowStore
from torchspec_lib.registry.model_card import run_summary
from torchspec_lib.results import EvalReport, RegisteredDraft
from torchspec_lib.target import TargetSpec

logger = logging.getLogger(__name__)

SERVERS = ("http", "https", "databricks")


def tracking_uri(run: RunConfig) -> str:
    """Where drafts are registered: ``registry.tracking_uri``, else a file under ``data_root``."""
    return run.registry.tracking_uri or f"sqlite:///{_database(run)}"


def champion(run: RunConfig, target: TargetSpec) -> DraftVersion | None:
    """The best draft so far, if there is one; cheap where nothing was ever registered.

    Raises:
        ConfigError: It is a draft for another target.
    """
    if run.registry.tracking_uri is None and not _database(run).is_file():
        return None
    found = _open(run).champion()
    if found is not None and found.target_fingerprint != target.fingerprint:
        raise ConfigError(
            "registry.model_name",
            f"{run.registry.model_name!r} holds drafts for another target (its champion's has the "
            f"fingerprint {found.target_fingerprint}, {target.path} has {target.fingerprint})",
            "Name another model for this target's drafts",
        )
    return found


def champion_files(run: RunConfig, best: DraftVersion) -> Path:
    """The champion's draft under ``data_root``, by its content; downloaded if it isn't there."""
    folder = run.data_path / "champions" / best.content[:16]
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder.parent) as staging:
            _open(run).download(best, Path(staging)).rename(folder)
    return folder


def other_champion(run: RunConfig, target: TargetSpec, draft_dir: Path) -> DraftVersion | None:
    """The champion, unless ``draft_dir`` is this very draft.

    Raises:
        ConfigError: It is a draft for another target.
    """
    best = champion(run, target)
    return None if best is None or best.content == content_hash(draft_dir) else best


def champion_evaluation(
    run: RunConfig, best: DraftVersion, report: EvalReport
) -> EvalReport | None:
    """A champion's evaluation, where it was made under the conditions of ``report``.

    Where it wasn't, what ``evaluate_draft`` says of ``champion_files`` is the candidate's
    ``champion_report``.
    """
    return _open(run).evaluation(best) if best.conditions == conditions(report) else None


def register_draft(run: RunConfig, candidate: Candidate) -> RegisteredDraft:
    """Register a draft that passes the gate; make it the champion if it is the best.

    The same content registered again is the version that it was, with its newest figures.
    A draft that fails the gate changes nothing. A champion is pushed to the hub, where that is
    asked for; should it fail, doing all of this again does what is missing.

    Raises:
        ConfigError: The champion is a draft for another target, or the hub refuses it.
        RecoverableError: The hub didn't take it.
        RegistryError: The champion isn't the one that the candidate was compared with, and its
            figure can't be compared with the candidate's.
        ValueError: That figure can't be compared, and the candidate brings no
            ``champion_report`` under the same conditions.
    """
    start = time.perf_counter()
    gate = judge(run, candidate)
    outcome = _register(run, candidate) if gate.passed else _refusal(run, gate)
    if outcome.registered and run.registry.push_to_hub is not None:
        outcome = outcome.model_copy(update={"hub": _publish(run, outcome)})
    stage_s = {**candidate.stage_s, "register": time.perf_counter() - start}
    logger.info(
        "event=gate registered=%s version=%s champion=%s decision=%r",
        outcome.registered,
        outcome.version,
        outcome.is_champion,
        outcome.decision,
    )
    summary = run_summary(replace(candidate, stage_s=stage_s), outcome)
    return outcome.model_copy(update={"summary": summary})


def judge(run: RunConfig, candidate: Candidate) -> GateDecision:
    """Whether ``register_draft`` will register a draft, and why.

    Raises:
        ConfigError: The champion is a draft for another target.
        RegistryError: As ``register_draft``.
        ValueError: As ``register_draft``.
    """
    gate = check_draft(candidate.report, run.registry.min_accept_length)
    if gate.passed and run.registry.only_better:
        return _title(candidate, champion(run, candidate.target))
    return gate


def _title(candidate: Candidate, best: DraftVersion | None) -> GateDecision:
    """Whether a draft is to be the champion."""
    if best is not None and best.content == content_hash(candidate.draft_dir):
        return GateDecision(True, "this very draft is the champion already")
    return check_champion(candidate.report, _accept_length(best, candidate))


def _register(run: RunConfig, candidate: Candidate) -> RegisteredDraft:
    best = champion(run, candidate.target)
    store, content = _open(run), content_hash(candidate.draft_dir)
    is_champion = best is not None and best.content == content
    title = _title(candidate, best)
    version = store.find(content)
    is_new = version is None
    if version is None:
        version = store.add(run, candidate, content)
    else:
        store.update(version, run, candidate)
    if title.passed and not is_champion:
        store.make_champion(version)
    return RegisteredDraft(
        registered=True,
        model_name=run.registry.model_name,
        version=version,
        is_champion=title.passed,
        is_new=is_new,
        decision=title.reason,
        tracking_uri=store.tracking_uri,
        summary="",
    )


def _publish(run: RunConfig, outcome: RegisteredDraft) -> str:
    """Push the champion as it was registered, model card included; no other draft."""
    store = _open(run)
    best = store.champion()
    if best is None or best.version != outcome.version:
        return "not pushed: it isn't the champion"
    with tempfile.TemporaryDirectory(prefix="hub-") as folder:
        return push(store.download(best, Path(folder)), run.registry, best.version)


def _refusal(run: RunConfig, gate: GateDecision) -> RegisteredDraft:
    return RegisteredDraft(
        registered=False,
        model_name=run.registry.model_name,
        version="",
        is_champion=False,
        is_new=False,
        decision=gate.reason,
        tracking_uri=tracking_uri(run),
        summary="",
    )


def _accept_length(best: DraftVersion | None, candidate: Candidate) -> float | None:
    """The champion's, under the candidate's conditions."""
    if best is None:
        return None
    wanted, anew = conditions(candidate.report), candidate.champion_report
    if best.conditions == wanted:
        return best.accept_length
    if anew is None or conditions(anew) != wanted:
        raise ValueError(
            f"champion version {best.version} was measured with {best.conditions!r}, the candidate "
            f"with {wanted!r}: evaluate the champion's draft too (champion_evaluation)"
        )
    if candidate.champion_content != best.content:
        raise RegistryError(
            f"version {best.version} became the champion while this draft was compared with the "
            "one before it. Run again: the draft will be compared with that version"
        )
    return anew.accept_length


def _database(run: RunConfig) -> Path:
    return run.data_path / "registry" / "mlflow.db"


def _open(run: RunConfig) -> MlflowStore:
    """A server keeps files where it likes; beside a database they lie under ``data_root``."""
    uri, artifacts = tracking_uri(run), None
    if urlsplit(uri).scheme not in SERVERS:
        artifacts = _database(run).with_name("artifacts")
        artifacts.mkdir(parents=True, exist_ok=True)
    return MlflowStore(uri, run.registry.model_name, artifacts)
