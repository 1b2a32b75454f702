"""Files of one JSON object a line outlast kills and full disks."""

import logging
import resource
from contextlib import contextmanager

import pytest

from torchspec_lib import json_lines


@pytest.fixture
def path(tmp_path):
    return tmp_path / "rows.jsonl"


def rows(*numbers):
    return [{"number": number, "words": "x" * 40} for number in numbers]


@contextmanager
def no_file_beyond(num_bytes):
    """A disk as it behaves when it gets full: the last write is cut short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_lines_come_back_and_a_file_that_is_not_there_has_none(path):
    assert json_lines.read(path) == []
    json_lines.append(path, rows(1, 2))
    json_lines.append(path, rows(3))
    assert json_lines.read(path) == rows(1, 2, 3)


@pytest.mark.parametrize("num_whole", [0, 2])
def test_a_line_that_a_kill_has_cut_off_is_passed_over_and_written_over(path, num_whole):
    whole = rows(*range(num_whole))
    json_lines.append(path, whole)
    with path.open("a") as file:
        file.write('{"number": 9, "wor')
    assert json_lines.read(path) == whole
    json_lines.append(path, rows(7))
    assert json_lines.read(path) == [*whole, *rows(7)]


def test_a_full_disk_costs_what_it_has_no_room_for_with_a_warning(path, caplog):
    json_lines.append(path, rows(1))
    with no_file_beyond(path.stat().st_size + 20), caplog.at_level(logging.WARNING):
        json_lines.append(path, rows(2))
    assert "event=not_noted" in caplog.text
    assert "rows.jsonl" in caplog.text
    assert json_lines.read(path) == rows(1)
    json_lines.append(path, rows(3))
    assert json_lines.read(path) == rows(1, 3)


def test_a_file_is_replaced_whole_or_not_at_all(path):
    json_lines.append(path, rows(1, 2, 3))
    with no_file_beyond(20), pytest.raises(OSError, match="File too large"):
        json_lines.replace(path, rows(1, 2))
    assert json_lines.read(path) == rows(1, 2, 3)
    json_lines.replace(path, rows(1))
    assert json_lines.read(path) == rows(1)
