from typing import Any

import pytest

from tests.flyte.serialized import Package
from torchspec_lib.config.models import ModelConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.target import TargetSpec, read_target


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return Package(tmp_path_factory.mktemp("package"))


@pytest.fixture(scope="session")
def target() -> TargetSpec:
    return read_target(ModelConfig(target="examples/tiny_target"))


@pytest.fixture(scope="session")
def tokenizer(target: TargetSpec) -> Any:
    return ChatTokenizer.load(target.path).tokenizer
