"""Conversations and tokenizers of public families of chat templates, and their supervised text."""

from functools import cache

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.unit.chat_templates import FAMILIES
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.messages import Message, ToolCall

MODES = {"qwen3": "enable_thinking", "deepseek v3.1": "thinking"}
"""The setting that turns reasoning on and off."""
END = {name: tokens.split()[0] for name, (_, tokens) in FAMILIES.items()}

ASKED = (Message("system", "Be brief."), Message("user", "Is it warm in Rome?"))
PLAIN = (
    *ASKED,
    Message("assistant", "Yes: 30 °C.\n\nVery."),
    Message("user", "And in Oslo?"),
    Message("assistant", " No, not at all"),
)
REASONED = (
    *ASKED,
    Message("assistant", "Yes.", reasoning="In summer it is."),
    Message("user", "And in Oslo?"),
    Message("assistant", "No.", reasoning="Oslo lies far\nin the north."),
)
CALL = ToolCall("weather", {"city": "Rome", "days": 2}, "functions.weather:0")
RESULT = Message("tool", "30 °C", tool_call_id="functions.weather:0", name="weather")
CALLED = (
    *ASKED,
    Message("assistant", "", reasoning="Let me look.", tool_calls=(CALL,)),
    RESULT,
    Message("assistant", "Yes.", reasoning="30 is warm."),
    Message("user", "Thanks"),
    Message("assistant", "Welcome."),
)
STEPS = (
    *CALLED[:4],
    Message(
        "assistant",
        "",
        reasoning="Now Oslo.",
        tool_calls=(ToolCall("weather", {"city": "Oslo"}, "functions.weather:1"),),
    ),
    Message("tool", "3 °C", tool_call_id="functions.weather:1", name="weather"),
    Message("assistant", "Rome is."),
)
TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)


@cache
def make_tokenizer(family):
    """Byte-level BPE with the family's special tokens."""
    template, tokens = FAMILIES[family]
    special = tokens.split()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [m.content for m in (*PLAIN, *REASONED, *CALLED)]
    backend.train_from_iterator([*texts, "assistant\n<think>\n\n</think>\n\nYes."] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=special[0],
        bos_token=special[1],
        additional_special_tokens=special[2:],
        chat_template=template,
    )


def supervised(family, messages, tools=(), last_turn_only=False, **settings):
    """What the mask selects, decoded run by run."""
    tokenizer = make_tokenizer(family)
    chat = ChatTokenizer(tokenizer, settings, last_turn_only)
    token_ids, mask, _ = chat.encode(messages, "chats.jsonl:1", tools)
    cuts = np.flatnonzero(np.diff(mask)) + 1
    runs = zip(np.split(token_ids, cuts), np.split(mask, cuts), strict=True)
    return [tokenizer.decode(ids) for ids, run in runs if run[0]]


def answers(family, *texts):
    return [f"{text}{END[family]}" for text in texts]


FINAL = "<|channel|>final<|message|>"
PLAIN_ANSWERS = {
    **{family: answers(family, "Yes: 30 °C.\n\nVery.", " No, not at all") for family in FAMILIES},
    "llama3": answers("llama3", "Yes: 30 °C.\n\nVery.", "No, not at all"),
    "harmony": [f"{FINAL}Yes: 30 °C.\n\nVery.<|end|>", f"{FINAL} No, not at all<|return|>"],
}
