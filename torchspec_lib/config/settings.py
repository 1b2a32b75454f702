"""What every section of the configuration is made of."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from torchspec_lib.errors import ConfigError

PROJECT_ROOT = Path(__file__).resolve().parents[2]

DType = Literal["float32", "bfloat16", "float16"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Settings(BaseModel):
    """Base of every config and report: immutable, and a misspelt key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def find_path(path: str, key: str) -> Path:
    """An existing input, looked up from the working directory, then from the project's folder.

    Raises:
        ConfigError: It is in neither. ``key`` is the setting's full path, for the message.
    """
    given = Path(path).expanduser()
    candidates = [given] if given.is_absolute() else [Path.cwd() / given, PROJECT_ROOT / given]
    for candidate in candidates:
        if candidate.exists():
            return candidate.resolve()
    tried = " and ".join(dict.fromkeys(str(candidate) for candidate in candidates))
    raise ConfigError(key, f"{path!r} doesn't exist (looked for {tried})", "Correct the path")
