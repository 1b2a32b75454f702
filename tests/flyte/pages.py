"""What the tests of reports look at pages with, and the run that they report on."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

from torchspec_lib.config.models import DataConfig, ModelConfig
from torchspec_lib.config.run import RunConfig

VOID_TAGS = {"img", "meta", "br"}


class PageCheck(HTMLParser):
    """Raises where a tag is closed that wasn't opened last, or a resource lies elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.marked: list[str] = []
        self.feed(html)
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "src":
                assert (value or "").startswith("data:image/svg+xml;base64,")
            assert tag not in ("script", "link", "iframe")
            assert name != "href" or "/" not in (value or "")
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if "mark" in self.open_tags:
            self.marked.append(data)


def plots(html: str) -> list[str]:
    """The texts in each plot."""
    images = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", html)]
    return [" ".join("".join(ElementTree.fromstring(image).itertext()).split()) for image in images]


def run_in(folder: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(target="examples/tiny_target", dtype="float32"),
        data=DataConfig(
            train=("examples/tiny_target/train.jsonl",),
            heldout=("examples/tiny_target/heldout.jsonl",),
            max_length=512,
            max_prompts=20,
        ),
        data_root=str(folder),
    )
