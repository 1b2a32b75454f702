"""A small data set of conversations, and runs that prepare it."""

import json

from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.dataset import (
    prepare_dataset,
)
from torchspec_lib.target import read_target

VOCAB_SIZE = 320


TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{{ mode }}{% endif %}"
)


def chat(number, answer=None):
    return [
        {"role": "user", "content": f"What is {number} and one more?"},
        {"role": "assistant", "content": answer or f"One more than {number} is {number + 1}."},
    ]


def write(path, chats):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))


def make_run(root, target, **changes):
    """A run over ``train.jsonl`` and ``heldout.jsonl``; changes are ``section__field``."""
    settings = {
        "model": {"target": str(target)},
        "data": {
            "train": [str(root / "train.jsonl")],
            "heldout": [str(root / "heldout.jsonl")],
            "max_length": 256,
        },
        "data_root": str(root / "data"),
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        settings.setdefault(section, {})[field] = value
    return RunConfig.model_validate(settings)


def prepare(run):
    return prepare_dataset(run, read_target(run.model))


def folders(root):
    datasets = root / "data" / "datasets"
    return sorted(path.name for path in datasets.iterdir()) if datasets.exists() else []
