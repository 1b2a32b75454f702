"""The target whose tokenizer and template the conversations are prepared with."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.unit.dataset.cases import TEMPLATE, VOCAB_SIZE, chat, write


@pytest.fixture
def target(tmp_path):
    """A target's folder without weights; preparing data needs none."""
    folder = tmp_path / "target"
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|user|>", "<|assistant|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([turn["content"] for turn in chat(3)] * 5, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|end|>", chat_template=TEMPLATE
    ).save_pretrained(folder)
    sizes = {"num_hidden_layers": 8, "hidden_size": 16, "intermediate_size": 32}
    rest = {"num_attention_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    (folder / "config.json").write_text(
        json.dumps({**sizes, **rest, "vocab_size": VOCAB_SIZE, "eos_token_id": 2})
    )
    return folder


@pytest.fixture
def root(tmp_path):
    write(tmp_path / "train.jsonl", [chat(i) for i in range(10)])
    write(tmp_path / "heldout.jsonl", [chat(i) for i in range(100, 103)])
    return tmp_path
