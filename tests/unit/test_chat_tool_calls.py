"""Tool calls in public families of chat templates: supervised whole, and never their results."""
# ruff: noqa: RUF001 - the tokens are the families' own

import copy

import pytest

from tests.unit.chat_families import (
    ASKED,
    CALL,
    CALLED,
    END,
    FINAL,
    PLAIN,
    REASONED,
    STEPS,
    TOOLS,
    answers,
    make_tokenizer,
    supervised,
)
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.messages import Message, ToolCall
from torchspec_lib.errors import DataError

JSON = '{"city": "Rome", "days": 2}'
QWEN_CALL = f'<tool_call>\n{{"name": "weather", "arguments": {JSON}}}\n</tool_call>'
DEEPSEEK_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n"
    f"{JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)
KIMI_CALL = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
    f"<|tool_call_argument_begin|>{JSON}<|tool_call_end|><|tool_calls_section_end|>"
)
CALLS = {
    "qwen3": QWEN_CALL,
    "llama3": f'{{"name": "weather", "parameters": {JSON}}}',
    "deepseek v3": DEEPSEEK_CALL,
    "deepseek r1": DEEPSEEK_CALL,
    "deepseek v3.1": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{JSON}"
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
    "kimi k2": KIMI_CALL,
    "kimi k2 thinking": KIMI_CALL,
    "minimax m2": '\n<minimax:tool_call>\n<invoke name="weather">\n<parameter name="city">Rome'
    '</parameter>\n<parameter name="days">2</parameter>\n</invoke>\n</minimax:tool_call>',
}
CALLED_ANSWERS = {
    **{family: answers(family, call, "Yes.", "Welcome.") for family, call in CALLS.items()},
    "harmony": [
        f" to=functions.weather<|channel|>commentary json<|message|>{JSON}<|call|>",
        f"{FINAL}Yes.<|end|>",
        f"{FINAL}Welcome.<|return|>",
    ],
}


@pytest.mark.parametrize("family", CALLED_ANSWERS)
def test_a_tool_call_is_supervised_to_its_end_of_turn_and_its_result_is_not(family):
    assert supervised(family, CALLED, TOOLS) == CALLED_ANSWERS[family]


@pytest.mark.parametrize("family", CALLED_ANSWERS)
def test_a_second_tool_call_is_supervised_as_whole_as_the_first(family):
    if family in ("deepseek v3", "deepseek r1"):  # they end the results only before an answer
        with pytest.raises(DataError, match=r"doesn't ask for a tool call in the way"):
            supervised(family, STEPS, TOOLS)
        return
    first, second, answer = supervised(family, STEPS, TOOLS)
    repeated = second.replace("Oslo", "Rome").replace("weather:1", "weather:0")
    assert repeated.replace("Now Rome.", "Let me look.") == (
        first.replace(', "days": 2', "").replace('\n<parameter name="days">2</parameter>', "")
    )
    assert "weather" in second
    assert "Rome is." in answer


@pytest.mark.parametrize("family", CALLED_ANSWERS)
def test_what_only_python_writes_reaches_no_text(family):
    call = ToolCall("weather", {"city": "None of them"}, "functions.weather:0")
    messages = (*ASKED, Message("assistant", "", tool_calls=(call,)))
    chat = ChatTokenizer(make_tokenizer(family))
    token_ids, _, _ = chat.encode(messages, "here", TOOLS)
    text = make_tokenizer(family).decode(token_ids)
    assert "{'" not in text
    assert text.count("None") == 1


THOUGHT = "<think>\nLet me look.\n</think>\n\n"
UNFINISHED_CALLS = {  # nobody has asked on: the reasoning is still there
    "qwen3": answers("qwen3", THOUGHT + QWEN_CALL, "<think>\n30 is warm.\n</think>\n\nYes."),
    "minimax m2": answers(
        "minimax m2",
        "Let me look.\n</think>\n\n" + CALLS["minimax m2"],
        "30 is warm.\n</think>\n\nYes.",
    ),
}


@pytest.mark.parametrize("family", UNFINISHED_CALLS)
@pytest.mark.parametrize("last_turn_only", [False, True])
def test_reasoning_before_a_tool_call_belongs_to_the_turn_that_it_leads_to(family, last_turn_only):
    calls = UNFINISHED_CALLS[family]
    assert supervised(family, CALLED[:5], TOOLS, last_turn_only) == calls
    _, _, turns = ChatTokenizer(make_tokenizer(family)).encode(CALLED[:5], "here", TOOLS)
    assert turns == {"supervised": 2, "with_reasoning": 2, "with_tool_calls": 1}


def marked(shown):
    """Template text that shows ``shown``, marked as generated where the assistant says it."""
    text = f"{{% generation %}}{{{{ {shown} }}}}{{% endgeneration %}}"
    return f"{{% if m.role == 'assistant' %}}{text}{{% else %}}{{{{ {shown} }}}}{{% endif %}}"


MARKERS = {
    "chatml": [
        (
            " + m.content + '<|im_end|>\n' }}",
            " }}" + marked("m.content + '<|im_end|>'") + "{{ '\n' }}",
        )
    ],
    "qwen3": [
        ("assistant\n' }}\n    {%- if loop", "assistant\n' }}{% generation %}{%- if loop"),
        (
            "{{- '<|im_end|>\n' }}\n  {%- else",
            "{{- '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{%- else",
        ),
    ],
    "llama3": [
        (
            "{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}",
            marked("m.content | trim") + "{% endif %}" + marked("'<|eot_id|>'"),
        )
    ],
    "deepseek v3.1": [
        (
            "ns.asked = false %}\n    {%- if m.tool",
            "ns.asked = false %}{% generation %}{%- if m.tool",
        ),
        ("{{ '<｜end▁of▁sentence｜>' }}", "{{ '<｜end▁of▁sentence｜>' }}{% endgeneration %}"),
    ],
}


@pytest.mark.parametrize("family", MARKERS)
@pytest.mark.parametrize("called", [False, True])
def test_a_templates_own_marks_and_what_is_found_without_them_agree(family, called):
    has_calls = called and family in CALLS and family != "llama3"  # whose call isn't marked above
    messages = (*(CALLED if has_calls else PLAIN), *REASONED[1:])
    plain = make_tokenizer(family)
    template = plain.chat_template
    for old, new in MARKERS[family]:
        assert template.count(old) == 1
        template = template.replace(old, new)
    with_marks = copy.deepcopy(plain)
    with_marks.chat_template = template
    found = ChatTokenizer(plain).encode(messages, "here", TOOLS)
    own = ChatTokenizer(with_marks).encode(messages, "here", TOOLS)
    assert own.token_ids.tolist() == found.token_ids.tolist()
    assert own.loss_mask.tolist() == found.loss_mask.tolist()
    assert own.turns == found.turns


def test_harmony_keeps_the_analysis_before_a_call_that_is_the_last_thing():
    assert supervised("harmony", CALLED[:3], TOOLS) == [
        "<|channel|>analysis<|message|>Let me look.<|end|><|start|>assistant"
        f" to=functions.weather<|channel|>commentary json<|message|>{JSON}<|call|>"
    ]


@pytest.mark.parametrize("family", ["qwen3", "deepseek v3.1", "kimi k2", "minimax m2"])
def test_a_text_before_a_tool_call_is_supervised_with_it(family):
    turn = Message("assistant", "I look.", tool_calls=(CALL, CALL))
    (text,) = supervised(family, [*ASKED, turn])
    assert text.startswith("I look.")
    assert text.endswith(END[family])
    assert text.count("weather") == 2


def test_a_call_that_the_template_does_not_know_is_refused():
    turn = Message("assistant", "I look.", tool_calls=(CALL,))
    with pytest.raises(DataError, match="leaves one out"):
        supervised("chatml", [*ASKED, turn])


def calling(template, *messages):
    """The supervised texts of a conversation by a template of its own."""
    tokenizer = copy.deepcopy(make_tokenizer("kimi k2"))
    tokenizer.chat_template = template
    chat = ChatTokenizer(tokenizer)
    token_ids, mask, _ = chat.encode(messages, "chats.jsonl:1")
    return tokenizer.decode(token_ids[mask])


SHOWN = "{% for call in m.tool_calls or [] %}{{ call.function.name }}{{ ARGUMENTS }}{% endfor %}"
SIMPLE = (
    "{% for m in messages %}<|im_middle|>{{ m.content or '' }}" + SHOWN + "<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_middle|>{% endif %}"
)
TURN = Message("assistant", "", tool_calls=(CALL,))


def test_arguments_are_json_to_a_template_that_prints_what_it_gets():
    template = SIMPLE.replace("ARGUMENTS", "call.function.arguments")
    assert calling(template, *ASKED, TURN) == f"weather{JSON}<|im_end|>"


def test_a_call_that_is_shortened_once_it_is_old_is_refused():
    shortened = "call.function.arguments | tojson if m == messages[-1] else '...'"
    template = SIMPLE.replace("ARGUMENTS", shortened)
    assert calling(template, *ASKED, TURN) == f"weather{JSON}<|im_end|>"
    with pytest.raises(DataError, match=r"chats.jsonl:1: .* differently where it isn't the last"):
        calling(template, *ASKED, TURN, *ASKED)


def test_a_marked_call_ends_with_the_end_of_turn_behind_its_own_last_token():
    body = "{% generation %}{{ m.tool_calls[0].function.name }}<|tool_call_end|>{% endgeneration %}"
    template = (
        "{% for m in messages %}{% if m.tool_calls %}" + body + "{% else %}{{ m.content }}"
        "{% endif %}<|im_end|>{% endfor %}"
    )
    assert calling(template, *ASKED, TURN) == "weather<|tool_call_end|><|im_end|>"
