"""The tiny target, and its tokenizer with its template."""

import pytest
import torch

from tests.integration.regeneration.cases import target
from tests.run_process import TINY
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.models.target_model import load_target


@pytest.fixture(scope="package")
def model() -> torch.nn.Module:
    return load_target(target(), "float32", torch.device("cpu"), trust_remote_code=False)


@pytest.fixture(scope="package")
def chat() -> ChatTokenizer:
    return ChatTokenizer.load(str(TINY))
