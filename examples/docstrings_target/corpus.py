"""Conversations about the Python functions that are installed here: their code and docstrings.

Every documented function gives two: one asks for the docstring of its code, the other for the
code to its docstring. Functions are held out by module, and no docstring occurs on both sides.
"""

import ast
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

from tqdm import tqdm

MIN_DOCSTRING, MAX_DOCSTRING, MAX_CODE = 60, 1_200, 1_600
"""Characters."""
MAX_FILE_BYTES = 1_000_000
HELDOUT_SHARE = 0.02
"""Of the modules."""
TASKS = {
    "document": "Write the docstring of this Python function.\n\n{code}",
    "implement": "Write this Python function.\n\n{signature}\n\n{docstring}",
}

Function = dict[str, str]
Conversation = dict[str, Any]


def python_files() -> list[Path]:
    """Modules of the standard library and of all installed packages, in a fixed order."""
    folders = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    return sorted({file for folder in folders for file in folder.rglob("*.py")})


def functions(files: list[Path]) -> tuple[list[Function], list[Function]]:
    """Documented functions for training and held-out ones, each docstring once, shuffled."""
    parts: tuple[dict[str, Function], dict[str, Function]] = ({}, {})
    with ProcessPoolExecutor() as pool:
        found = pool.map(functions_of, files, chunksize=64)
        for file, some in zip(tqdm(files, "reading modules", mininterval=1.0), found, strict=True):
            digest = hashlib.sha256(f"{file.parent.name}/{file.name}".encode()).digest()
            is_heldout = digest[0] < 256 * HELDOUT_SHARE
            parts[is_heldout].update((function["docstring"], function) for function in some)
    training, heldout = parts
    kept = [function for docstring, function in heldout.items() if docstring not in training]
    shuffled = list(training.values()), kept
    for number, one in enumerate(shuffled):
        Random(number).shuffle(one)
    return shuffled


def functions_of(file: Path) -> list[Function]:
    """The documented functions of a module; none if it isn't Python of today."""
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            return []
        source = file.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError, RecursionError):
        return []
    lines = source.splitlines()
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return [found for node in nodes if (found := _function(node, lines)) is not None]


def _function(node: ast.FunctionDef, lines: list[str]) -> Function | None:
    docstring = ast.get_docstring(node)
    if docstring is None or not MIN_DOCSTRING <= len(docstring) <= MAX_DOCSTRING:
        return None
    first, *rest = node.body
    if not rest or not docstring.isascii() or first.lineno == node.lineno:
        return None
    indent = " " * node.col_offset
    head = [line.removeprefix(indent) for line in lines[node.lineno - 1 : first.lineno - 1]]
    body = [line.removeprefix(indent) for line in lines[first.end_lineno or 0 : node.end_lineno]]
    code = "\n".join([*head, *body]).strip()
    if not code.isascii() or len(code) > MAX_CODE:
        return None
    return {"signature": "\n".join(head).strip(), "docstring": docstring.strip(), "code": code}


def conversations(
    some: list[Function], tasks: tuple[str, ...] = tuple(TASKS)
) -> Iterator[Conversation]:
    """Every function's, by turns."""
    for function in some:
        for task in tasks:
            answer = function["docstring" if task == "document" else "code"]
            question = TASKS[task].format(**function)
            yield {
                "category": task,
                "messages": [
                    {"role": "user", "content": question},
                    {"role": "assistant", "content": answer},
                ],
            }


def write_jsonl(path: Path, some: list[Conversation]) -> None:
    """One conversation a line."""
    path.write_text("".join(json.dumps(one) + "\n" for one in some), encoding="utf-8")
