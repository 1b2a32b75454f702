"""From what a target generates to a message, and which messages of a conversation it answers."""
# ruff: noqa: RUF001 - the tokens are the families' own

import doctest

import pytest
import torch

from tests.unit.chat_families import ASKED, CALL, CALLED, END, TOOLS, make_tokenizer
from torchspec_lib.config.regeneration import RegenerationConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.conversations import Conversation
from torchspec_lib.data.messages import Message
from torchspec_lib.errors import DataError
from torchspec_lib.regeneration import sampling
from torchspec_lib.regeneration.answer import Question
from torchspec_lib.regeneration.dialogue import Dialogue
from torchspec_lib.regeneration.sampling import draw

EOS = "<｜end▁of▁sentence｜>"
CHANNEL = "<|channel|>analysis<|message|>In summer.<|end|><|start|>assistant"


def asked(family, history=ASKED, tools=(), **settings):
    chat = ChatTokenizer(make_tokenizer(family), settings)
    question = Question(chat, history, tools, "here")

    def ids(text):
        return chat.tokenizer(text, add_special_tokens=False)["input_ids"]

    return chat, question, ids


@pytest.mark.parametrize(
    ("family", "settings", "text", "content", "reasoning"),
    [
        ("chatml", {}, "Yes:\n\n30 °C.<|im_end|>", "Yes:\n\n30 °C.", None),
        ("qwen3", {}, "<think>\nIn summer.\n</think>\n\nYes.<|im_end|>", "Yes.", "In summer."),
        ("qwen3", {}, "<think>\n\n</think>\n\nYes.<|im_end|>", "Yes.", None),
        ("qwen3", {"enable_thinking": False}, "Yes.<|im_end|>", "Yes.", None),
        ("llama3", {}, "Yes.<|eot_id|>", "Yes.", None),
        ("harmony", {}, "<|channel|>final<|message|>Yes.<|return|>", "Yes.", None),
        (
            "harmony",
            {},
            f"{CHANNEL}<|channel|>final<|message|>Yes.<|return|>",
            "Yes.",
            "In summer.",
        ),
        ("deepseek v3", {}, f"Yes.{EOS}", "Yes.", None),
        ("deepseek v3.1", {"thinking": False}, f"Yes.{EOS}", "Yes.", None),
        ("kimi k2", {}, "Yes.<|im_end|>", "Yes.", None),
        ("minimax m2", {}, "In summer.\n</think>\n\nYes.[e~[", "Yes.", "In summer."),
    ],
)
def test_what_was_generated_becomes_the_message_that_gives_its_very_tokens(
    family, settings, text, content, reasoning
):
    chat, question, ids = asked(family, **settings)
    message = question.message_of(ids(text))
    assert message is not None
    assert (message.content, message.reasoning) == (content, reasoning)
    whole = [*question.token_ids, *ids(text)]
    token_ids, mask, _ = chat.encode([*ASKED, message], "here")
    assert token_ids[: len(whole)].tolist() == whole
    assert mask[len(whole) - 1], "the end of the turn isn't supervised"
    assert not mask[: len(question.token_ids)].any()


@pytest.mark.parametrize(
    ("family", "settings", "text"),
    [
        ("llama3", {}, "Yes. <|eot_id|>"),  # the template trims
        ("deepseek r1", {}, f"In summer.\n</think>\n\nYes.{EOS}"),  # it drops the reasoning
        ("deepseek v3.1", {"thinking": True}, f"In summer.</think>Yes.{EOS}"),
    ],
)
def test_what_the_template_would_write_otherwise_is_of_no_use(family, settings, text):
    _, question, ids = asked(family, **settings)
    assert question.message_of(ids(text)) is None


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("chatml", ""),
        ("chatml", "<think>Hm.</think>"),
        ("qwen3", "<think>\nHm.\n</think>\n\n"),
        ("llama3", ""),
        ("kimi k2", ""),
    ],
)
def test_an_answer_of_nothing_is_an_empty_message(family, text):
    _, question, ids = asked(family)
    message = question.message_of(ids(text + END[family]))
    assert message is not None
    assert message.is_empty


def test_tokens_that_the_tokenizer_would_not_choose_are_of_no_use():
    _, question, ids = asked("chatml")
    whole = ids("Yes.<|im_end|>")
    by_letter = [token for letter in "Yes." for token in ids(letter)] + whole[-1:]
    assert by_letter != whole
    assert question.message_of(whole) is not None
    assert question.message_of(by_letter) is None


def test_tools_are_part_of_the_question():
    _, question, _ = asked("qwen3", CALLED[:4], TOOLS)
    _, without, _ = asked("qwen3", CALLED[:4])
    assert len(question.token_ids) > len(without.token_ids)


def talk(*messages):
    """A conversation of ``user: text`` lines."""
    pairs = (text.split(": ", 1) for text in messages)
    return Conversation("here", tuple(Message(role, text) for role, text in pairs), None)


def said(conversation, turns="all"):
    """What the history is before each answer."""
    dialogue, histories = Dialogue(conversation, turns), []
    while not dialogue.is_over:
        histories.append(" ".join(m.content or "call" for m in dialogue.history))
        dialogue.add(Message("assistant", f"[{len(histories)}]"))
    return histories


@pytest.mark.parametrize(
    ("messages", "histories"),
    [
        (["user: a"], ["a"]),
        (["user: a", "assistant: old"], ["a"]),
        (["system: s", "user: a", "user: b"], ["s a", "s a [1] b"]),
        (["user: a", "assistant: old", "user: b", "assistant: old"], ["a", "a [1] b"]),
        (["assistant: hello", "user: a"], ["a"]),
        (["user: a", "system: s", "assistant: old", "assistant: more"], ["a s"]),
        (["user: a", "assistant: old", "system: s", "user: b"], ["a", "a [1] s b"]),
    ],
)
def test_every_user_is_answered_in_order_after_the_new_answers(messages, histories):
    assert said(talk(*messages)) == histories


def test_recorded_tool_calls_stay_with_their_results():
    asked_first = " ".join(message.content for message in ASKED)
    result = CALLED[3].content
    histories = said(Conversation("here", CALLED, None))
    first = f"{asked_first} call {result}"
    assert histories == [first, f"{first} [1] Thanks"]


@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_recorded_tool_call_without_a_result_is_answered_anew(turns):
    calls = [Message("assistant", "", tool_calls=(CALL,))] * 2
    asked_for = Conversation("here", (*ASKED, *calls), None)
    assert said(asked_for, turns) == [" ".join(message.content for message in ASKED)]
    both = Conversation("here", (*ASKED, *calls, CALLED[3], CALLED[3]), None)
    assert said(both)[0].count("call") == 2, "calls of one turn, their results behind them"


def test_the_last_turn_alone_follows_the_conversation_as_it_is():
    messages = ["user: a", "assistant: old", "user: b", "assistant: old"]
    assert said(talk(*messages), "last") == ["a old b"]


@pytest.mark.parametrize("turns", ["all", "last"])
def test_a_conversation_without_a_question_is_refused(turns):
    with pytest.raises(DataError, match="here: asks nothing"):
        Dialogue(talk("system: s", "assistant: old"), turns)


def test_the_example_of_drawing_holds():
    failed, attempted = doctest.testmod(sampling)
    assert attempted
    assert not failed


def drawn(count=4000, **settings):
    """Shares of the tokens 0 to 3, whose probabilities are 0.1, 0.2, 0.3 and 0.4."""
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat(count, 1)
    numbers = (torch.arange(count) + 0.5) / count
    tokens = draw(logits, numbers, RegenerationConfig(**settings))
    return [round(share, 2) for share in (tokens.bincount(minlength=4) / count).tolist()]


def test_tokens_are_drawn_with_their_probability_within_the_limits():
    assert drawn(temperature=0.0) == [0, 0, 0, 1]
    assert drawn(temperature=1.0) == [0.1, 0.2, 0.3, 0.4]
    assert drawn(temperature=1.0, top_k=2) == [0, 0, 0.43, 0.57]
    assert drawn(temperature=1.0, top_p=0.8) == [0, 0.22, 0.33, 0.44]
    assert drawn(temperature=1.0, top_p=0.8, top_k=2) == [0, 0, 0.43, 0.57]
    assert drawn(temperature=1.0, top_p=0.01) == [0, 0, 0, 1]
    assert drawn(temperature=0.5) == [0.03, 0.13, 0.3, 0.53]


def test_the_largest_number_draws_a_token_within_the_limits():
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0))
    numbers = torch.full((64,), 1 - 2**-24)
    tokens = draw(logits, numbers, RegenerationConfig(temperature=1.0, top_k=10))
    ranks = (logits > logits.gather(1, tokens[:, None])).sum(-1)
    assert ranks.tolist() == [9] * 64
