"""A run's configuration as a command's input: what is wrong with it is said in one line."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import click
from pydantic import BaseModel, ModelWrapValidatorHandler, ValidationError, model_validator

from torchspec_lib.config.run import RunConfig

INPUT_NAME = "run"
"""What the workflow and all tasks call it, and so the root of every setting's path."""


class RunInput(RunConfig):
    """A ``RunConfig`` that Flyte reads from a command line or a file.

    flytekit would print pydantic's error with a traceback; of a ``ClickException`` it prints
    the message.
    """

    @model_validator(mode="wrap")
    @classmethod
    def _explain_errors(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            problems = [_explain(details) for details in error.errors(include_url=False)]
            raise click.ClickException("\n".join(problems)) from error


def with_full_paths(text: str) -> str:
    """A message whose settings have their paths from the command's input on.

    Example:
        >>> with_full_paths("data_root: not writable. Lower data.max_length, or set RAY_ADDRESS")
        'run.data_root: not writable. Lower run.data.max_length, or set RAY_ADDRESS'
    """
    return _SETTING.sub(rf"{INPUT_NAME}.\g<0>", text)


def _explain(details: Mapping[str, Any]) -> str:
    location: tuple[str | int, ...] = details["loc"]
    path = INPUT_NAME + "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in location)
    match details["type"]:
        case "extra_forbidden":
            return f"{path}: there is no such setting. {_suggest(location)}"
        case "missing":
            return f"{path}: this setting is required. Add it"
        case "value_error":
            problem = with_full_paths(str(details["ctx"]["error"]))
            return f"{path}: {problem}" if location else problem
    expected = details["msg"][:1].lower() + details["msg"][1:]
    return f"{path}: {expected}, not {details['input']!r}"


def _suggest(location: Sequence[str | int]) -> str:
    *parents, unknown = (str(name) for name in location)
    section: type[BaseModel] = RunConfig
    for parent in parents:
        inner = section.model_fields[parent].annotation
        assert isinstance(inner, type), f"{parent} is no section"
        assert issubclass(inner, BaseModel), f"{parent} is no section"
        section = inner
    names = list(section.model_fields)
    close = difflib.get_close_matches(unknown, names, n=1)
    return f"Did you mean {close[0]}?" if close else f"There are: {', '.join(names)}"


_SECTIONS: dict[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in RunConfig.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
_PATHS = [rf"{name}\.{key}" for name, model in _SECTIONS.items() for key in model.model_fields]
_SETTING = re.compile(
    rf"(?<![\w./])(?:{'|'.join(_PATHS)})\b|^(?:{'|'.join(RunConfig.model_fields)})(?=:)", re.M
)
"""``section.field`` wherever it stands, and a field of the run itself that begins a line."""
