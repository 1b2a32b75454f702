"""The loss mask of public families of chat templates: what is supervised, read as text."""
# ruff: noqa: RUF001 - the tokens are the families' own

import copy

import pytest
from tokenizers import AddedToken
from transformers import ByT5Tokenizer

from tests.unit.chat_families import (
    ASKED,
    END,
    FINAL,
    MODES,
    PLAIN,
    PLAIN_ANSWERS,
    REASONED,
    answers,
    make_tokenizer,
    supervised,
)
from tests.unit.chat_templates import CHATML, FAMILIES
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.messages import Message
from torchspec_lib.errors import ConfigError, DataError


@pytest.mark.parametrize("family", FAMILIES)
def test_every_answer_and_its_end_of_turn_is_supervised_and_nothing_else(family):
    assert supervised(family, PLAIN) == PLAIN_ANSWERS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_last_answer_is_supervised_where_that_is_asked_for(family):
    assert supervised(family, PLAIN, last_turn_only=True) == PLAIN_ANSWERS[family][1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_supervised_begins_where_the_target_is_asked(family):
    chat = ChatTokenizer(make_tokenizer(family))
    token_ids, mask, _ = chat.encode(PLAIN, "here")
    prompt = chat.prompt_ids(PLAIN[:2], "here").tolist()
    first = int(mask.argmax())
    if family in ("deepseek r1", "minimax m2"):  # their prompt opens a reasoning
        assert make_tokenizer(family).decode(prompt[first:]).strip() == "<think>"
    assert token_ids[: len(prompt)].tolist()[:first] == prompt[:first]
    unasked = make_tokenizer(family).decode(token_ids[len(prompt) : first])
    assert unasked == ("<think></think>" if family == "kimi k2 thinking" else "")


QWEN_THOUGHT = "<think>\nOslo lies far\nin the north.\n</think>\n\nNo."
REASONED_ANSWERS = {
    "chatml": answers("chatml", "Yes.", "No."),
    "qwen3": answers("qwen3", "Yes.", QWEN_THOUGHT),
    "harmony": [
        f"{FINAL}Yes.<|end|>",
        "<|channel|>analysis<|message|>Oslo lies far\nin the north.<|end|>"
        f"<|start|>assistant{FINAL}No.<|return|>",
    ],
    # Its prompt ends with an opened reasoning.
    "minimax m2": answers("minimax m2", "Yes.", "Oslo lies far\nin the north.\n</think>\n\nNo."),
}


@pytest.mark.parametrize("family", REASONED_ANSWERS)
def test_reasoning_is_supervised_where_the_template_keeps_it(family):
    assert supervised(family, REASONED) == REASONED_ANSWERS[family]


@pytest.mark.parametrize("family", REASONED_ANSWERS)
def test_turns_tell_whose_reasoning_is_supervised_and_whose_was_left_out(family):
    _, _, turns = ChatTokenizer(make_tokenizer(family)).encode(REASONED, "here")
    kept = 0 if family == "chatml" else 1
    expected = {"supervised": 2, "with_reasoning": kept, "reasoning_left_out": 2 - kept}
    assert turns == {key: count for key, count in expected.items() if count}


def in_content(messages):
    return [
        m
        if m.reasoning is None
        else Message("assistant", f"<think>\n{m.reasoning}\n</think>\n\n{m.content}")
        for m in messages
    ]


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("qwen3", ["Yes.", QWEN_THOUGHT]),
        ("deepseek r1", ["\n\nYes.", "\n\nNo."]),  # it drops reasoning from every turn
        ("deepseek v3.1", ["\n\nYes.", "\n\nNo."]),
        (
            "chatml",  # to which it is text like any other
            ["<think>\nIn summer it is.\n</think>\n\nYes.", QWEN_THOUGHT],
        ),
    ],
)
@pytest.mark.parametrize("thinking", [False, True])
def test_reasoning_inside_the_content_is_what_the_template_takes_it_for(family, expected, thinking):
    settings = {MODES[family]: thinking} if family in MODES else {}
    assert supervised(family, in_content(REASONED), **settings) == answers(family, *expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_reasoning_without_an_answer_is_no_obstacle(family, end):
    """Targets generate it, and whoever asks learns that there is no answer."""
    messages = [*PLAIN[:2], Message("assistant", f"<think>Hm.</think>{end}")]
    if (family, end) == ("qwen3", "\n"):  # its template strips that line
        with pytest.raises(DataError, match="changes the text"):
            supervised(family, messages)
        return
    (text,) = supervised(family, messages)
    assert text.endswith(END[family])


@pytest.mark.parametrize("family", MODES)
@pytest.mark.parametrize("thinking", [None, False, True])
def test_an_empty_reasoning_of_the_templates_own_is_never_supervised(family, thinking):
    settings = {} if thinking is None else {MODES[family]: thinking}
    assert supervised(family, PLAIN[:3], **settings) == PLAIN_ANSWERS[family][:1]


@pytest.mark.parametrize(
    ("family", "thinking", "end"),
    [
        ("qwen3", False, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        ("qwen3", True, "<|im_start|>assistant\n"),
        ("deepseek v3.1", False, "<｜Assistant｜></think>"),
        ("deepseek v3.1", True, "<｜Assistant｜><think>"),
    ],
)
def test_the_target_is_asked_in_the_thinking_mode_that_is_set(family, thinking, end):
    tokenizer = make_tokenizer(family)
    chat = ChatTokenizer(tokenizer, {MODES[family]: thinking})
    assert tokenizer.decode(chat.prompt_ids(ASKED, "here")).endswith(end)


def test_a_setting_that_the_template_does_not_read_is_refused():
    with pytest.raises(ConfigError, match=r"chat_template_kwargs: .* read enable_thinkin\. "):
        ChatTokenizer(make_tokenizer("qwen3"), {"enable_thinkin": False})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_turn_is_the_last_that_is_answered(family):
    messages = (*PLAIN, Message("user", "And in Bergen?"))
    texts = supervised(family, messages, last_turn_only=True)
    assert texts == [PLAIN_ANSWERS[family][1].replace("<|return|>", "<|end|>")]
    _, _, turns = ChatTokenizer(make_tokenizer(family), last_turn_only=True).encode(PLAIN, "here")
    assert turns == {"supervised": 1, "left_out": 1}


@pytest.mark.parametrize("family", FAMILIES)
def test_token_ids_are_those_of_the_tokenizers_own_chat_template(family):
    tokenizer = make_tokenizer(family)
    rows = [{"role": m.role, "content": m.content} for m in PLAIN]
    settings = {MODES[family]: True} if family in MODES else {}
    own = tokenizer.apply_chat_template(rows, return_dict=False, **settings)
    if family != "harmony":  # which tells today's date
        chat = ChatTokenizer(tokenizer, settings)
        assert chat.encode(PLAIN, "here").token_ids.tolist() == own


def test_a_tokenizer_without_offsets_masks_the_same_text():
    tokenizer = ByT5Tokenizer(
        eos_token=AddedToken("<|im_end|>", normalized=False, special=True),
        extra_special_tokens=["<|im_start|>"],
        chat_template=CHATML,
    )
    token_ids, mask, _ = ChatTokenizer(tokenizer).encode(PLAIN, "here")
    assert tokenizer.decode(token_ids[mask]) == "".join(PLAIN_ANSWERS["chatml"])
    assert tokenizer.apply_chat_template(
        [{"role": m.role, "content": m.content} for m in PLAIN], return_dict=False
    ) == [*token_ids]


class WordTokenizer(ByT5Tokenizer):
    """A token for every word and the blank before it, so that tokens reach across cuts."""

    def _tokenize(self, text, **kwargs):
        return [chr(len(word)) for word in text.split(" ")]


def test_a_token_across_an_answers_edge_is_refused_where_there_are_no_offsets():
    template = "{% for m in messages %}{{ m.role }} says{{ m.content }} {% endfor %}"
    chat = ChatTokenizer(WordTokenizer(chat_template=template))
    with pytest.raises(DataError, match=r"a token reaches across .* tokenizer\.json"):
        chat.encode(PLAIN[1:], "here")


def test_reasoning_inside_the_content_counts_as_reasoning():
    _, _, turns = ChatTokenizer(make_tokenizer("chatml")).encode(in_content(REASONED), "here")
    assert turns == {"supervised": 2, "with_reasoning": 2}
    _, _, turns = ChatTokenizer(make_tokenizer("deepseek r1")).encode(in_content(REASONED), "here")
    assert turns == {"supervised": 2, "reasoning_left_out": 2}


def test_an_answer_before_any_user_message_needs_no_prompt():
    """Some templates refuse a conversation in which nobody has asked."""
    template, _ = FAMILIES["chatml"]
    refusing = (
        "{% if messages | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
        "{{ raise_exception('No user query') }}{% endif %}"
    )
    tokenizer = copy.deepcopy(make_tokenizer("chatml"))
    tokenizer.chat_template = refusing + template
    greeted = (Message("assistant", "How can I help?"), *PLAIN[1:])
    token_ids, mask, _ = ChatTokenizer(tokenizer).encode(greeted, "here")
    expected = answers("chatml", "How can I help?", *(m.content for m in PLAIN[2::2]))
    assert tokenizer.decode(token_ids[mask]) == "".join(expected)


def test_the_last_turn_is_told_where_the_template_changes_what_was_asked():
    tokenizer = copy.deepcopy(make_tokenizer("chatml"))
    asked = "{{- '(asked)' if m.role == 'user' and loop.last }}{{ '<|im_start|>'"
    tokenizer.chat_template = FAMILIES["chatml"][0].replace("{{- '<|im_start|>'", asked)
    token_ids, mask, _ = ChatTokenizer(tokenizer, last_turn_only=True).encode(PLAIN, "here")
    assert [tokenizer.decode(token_ids[mask])] == answers("chatml", PLAIN[-1].content)


def test_the_last_turn_by_markers_is_refused_where_the_template_changes_what_was_asked():
    tokenizer = copy.deepcopy(make_tokenizer("chatml"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '(asked)' if m.role == 'user' and loop.last }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}"
    )
    assert len(ChatTokenizer(tokenizer).encode(PLAIN, "here").token_ids)
    with pytest.raises(DataError, match=r"here: .* writes the last user message differently"):
        ChatTokenizer(tokenizer, last_turn_only=True).encode(PLAIN, "here")
