"""The page of all settings: ``python -m torchspec_lib.config.reference > FILE``."""

import sys
from collections.abc import Iterator
from typing import Any

from torchspec_lib.config.run import RunConfig

_HEAD = """# Settings

A configuration is one YAML file, as under [configs/](../configs/): its sections stand below `run`.
Only `model.target`, `data.train` and `data.heldout` have no default. What is misspelt, or
contradicts itself, is refused before anything starts.

`python -m torchspec_lib.config.reference > docs/configuration.md` makes this page from
[torchspec_lib/config/](../torchspec_lib/config/), where the checks between settings stand too.
"""
_KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "`true` or `false`",
}
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def page() -> str:
    """Markdown: a table for each section."""
    schema = RunConfig.model_json_schema()
    return "\n".join([_HEAD, *_section("", schema, schema["$defs"])])


def _section(path: str, section: dict[str, Any], sections: dict[str, Any]) -> Iterator[str]:
    """A section's settings, and behind them those of the sections in it."""
    title = f"`{path}`" if path else "Of the run as a whole"
    about = f"{_text(section)}\n\n" if path else ""
    rows, inner = [], []
    required = section.get("required", ())
    for name, setting in section["properties"].items():
        reference = setting.get("$ref")
        if reference:
            inner.append((f"{path}.{name}".lstrip("."), sections[reference.rsplit("/", 1)[1]]))
        else:
            default = "must be set" if name in required else _default(setting.get("default"))
            rows.append(f"| `{name}` | {_kind(setting)} | {default} | {_text(setting)} |")
    table = "\n".join(["| setting | kind | default | meaning |", "|---|---|---|---|", *rows])
    yield f"## {title}\n\n{about}{table}\n"
    for inner_path, inner_section in inner:
        yield from _section(inner_path, inner_section, sections)


def _kind(schema: dict[str, Any]) -> str:
    """What may be written, in words."""
    if "anyOf" in schema:
        kinds = [_kind(one) for one in schema["anyOf"] if one.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if schema["type"] == "array":
        items = schema.get("items") or schema["prefixItems"][0]
        number = f"{len(schema['prefixItems'])} of: " if "prefixItems" in schema else "list of: "
        return number + _kind(items)
    if schema["type"] == "object":
        names = _kind(schema["propertyNames"]) if "propertyNames" in schema else "any name"
        patterns = schema.get("patternProperties", {})
        values = schema.get("additionalProperties") or next(iter(patterns.values()))
        return f"a mapping of {names} to: {_kind(values)}"
    bounds = [f"{words} {schema[key]:g}" for key, words in _BOUNDS.items() if key in schema]
    kind = (
        "date and time with its zone"
        if schema.get("format") == "date-time"
        else _KINDS[schema["type"]]
    )
    return " ".join([kind, " and ".join(bounds)]).strip()


def _default(value: object) -> str:
    if value is None or value in ("", {}):
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`"


def _text(schema: dict[str, Any]) -> str:
    """A description, on one line, as Markdown."""
    return " ".join(schema.get("description", "").split()).replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(page())
