"""The Hugging Face Hub: where the champion's files go, if ``registry.push_to_hub`` names a place.

The token is ``HF_TOKEN``, or what ``hf auth login`` has left on this machine.
"""

import logging
from pathlib import Path

from torchspec_lib.config.outcome import RegistryConfig
from torchspec_lib.errors import ConfigError, RecoverableError

logger = logging.getLogger(__name__)

_REFUSED = (401, 403)


def check_access(registry: RegistryConfig) -> None:
    """Refuse to start what couldn't be pushed at its end.

    Raises:
        ConfigError: Something is to be pushed, and no repository may be called so, or there is no
            token, or no way out.
    """
    if registry.push_to_hub is None:
        return
    from huggingface_hub import get_token, is_offline_mode
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(registry.push_to_hub)
    except HFValidationError as error:
        raise ConfigError("registry.push_to_hub", str(error), "Correct it") from error
    if registry.push_dry_run:
        return

    if is_offline_mode():
        raise ConfigError(
            "registry.push_to_hub",
            "HF_HUB_OFFLINE keeps the hub out of reach",
            "Unset it, set registry.push_dry_run, or leave registry.push_to_hub out",
        )
    if get_token() is None:
        raise ConfigError(
            "registry.push_to_hub",
            f"there is no token to push to {registry.push_to_hub!r} with",
            "Set HF_TOKEN (on a cluster the key 'token' of the secret 'huggingface') to one that "
            "may write, set registry.push_dry_run, or leave registry.push_to_hub out",
        )


def push(draft: Path, registry: RegistryConfig, version: str) -> str:
    """Make a folder's files those of the repository; what is there already isn't sent again.

    Args:
        draft: A registered draft with its model card.
        registry: ``push_to_hub`` names the repository, which is made if need be.
        version: The draft's, for the commit's message.

    Returns:
        What was done, in a sentence.

    Raises:
        ConfigError: The token isn't allowed to.
        RecoverableError: The hub didn't answer, or didn't take it.
    """
    repository = registry.push_to_hub
    assert repository is not None, "nowhere to push to"
    files = sorted(path for path in draft.rglob("*") if path.is_file())
    names = [path.relative_to(draft).as_posix() for path in files]
    listing = ", ".join(
        f"{name} ({path.stat().st_size:,} bytes)" for name, path in zip(names, files, strict=True)
    )
    if registry.push_dry_run:
        return f"dry run, nothing sent: {repository} would hold {listing}"
    from httpx import HTTPError
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="torchspec-flyte")
    additions = [CommitOperationAdd(name, path) for name, path in zip(names, files, strict=True)]
    message = f"{registry.model_name} version {version}"
    try:
        api.create_repo(repository, private=registry.push_private, exist_ok=True)
        commit = api.create_commit(repository, additions, commit_message=message)
    except HfHubHTTPError as error:
        if error.response.status_code in _REFUSED:
            raise ConfigError(
                "registry.push_to_hub",
                f"the hub refuses to let this token write to {repository!r}: {error}",
                "Use a token with write access, or correct the repository's name",
            ) from error
        raise RecoverableError(f"pushing to {repository} failed: {error}") from error
    except HTTPError as error:
        raise RecoverableError(f"the hub at {api.endpoint} can't be reached: {error}") from error
    logger.info("event=pushed repository=%s commit=%s files=%s", repository, commit.oid, listing)
    return f"{api.endpoint}/{repository} at commit {commit.oid[:12]}"
