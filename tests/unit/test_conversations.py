import json
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchspec_lib.data.conversations import Message, open_source
from torchspec_lib.data.messages import ToolCall
from torchspec_lib.errors import ConfigError, DataError

OPENAI = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT = [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]
MESSAGES = (Message("user", "2 + 2?"), Message("assistant", "4"))


def read(path):
    return list(open_source(str(path), "train", "data.train[0]").conversations())


def write_lines(path, *rows):
    path.write_text("".join(r if isinstance(r, str) else json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("key", ["messages", "conversations"])
@pytest.mark.parametrize("turns", [OPENAI, SHAREGPT])
@pytest.mark.parametrize("form", ["jsonl", "json array", "json lines", "parquet"])
def test_every_file_format_holds_both_forms_under_either_key(tmp_path, form, turns, key):
    rows = [{key: turns, "id": "a"}, {key: turns}]
    path = tmp_path / f"chats.{form.split()[0]}"
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif form == "json array":
        path.write_text(json.dumps(rows, indent=2))
    else:
        write_lines(path, *rows)
    first, second = read(path)
    assert first.messages == second.messages == MESSAGES
    assert (first.source_id, second.source_id) == ("a", None)
    place = ":2" if form in ("jsonl", "json lines") else " row 2"
    assert second.where == f"{path}{place}"


def test_a_row_may_leave_the_other_key_empty(tmp_path):
    rows = [
        {"messages": OPENAI, "conversations": None},
        {"messages": None, "conversations": SHAREGPT},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "chats.parquet")
    assert [c.messages for c in read(tmp_path / "chats.parquet")] == [MESSAGES, MESSAGES]


def test_a_broken_line_is_named_by_its_number_blank_lines_included(tmp_path):
    path = write_lines(tmp_path / "chats.jsonl", {"messages": OPENAI}, "\n", '{"messages": [}\n')
    with pytest.raises(DataError, match=rf"{path}:3: is not valid JSON: .* column 15"):
        read(path)


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5000], ids=["nested", "digits"])
def test_a_line_that_python_cannot_read_is_named_too(tmp_path, line):
    path = write_lines(tmp_path / "chats.jsonl", {"messages": OPENAI}, line + "\n")
    with pytest.raises(DataError, match=rf"{path}:2: is more than Python's json reads"):
        read(path)
    call = {"name": "f", "arguments": line}
    path = write_lines(
        tmp_path / "calls.jsonl", {"messages": [{**OPENAI[1], "tool_calls": [call]}]}
    )
    with pytest.raises(DataError, match="arguments: is not valid JSON"):
        read(path)


def test_a_broken_array_is_named_by_its_line(tmp_path):
    path = tmp_path / "chats.json"
    path.write_text('[\n{"messages": []},\n{"messages" []}\n]')
    with pytest.raises(DataError, match=r"not valid JSON: .* line 3 column 13"):
        read(path)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([1, 2], "is a list, not an object"),
        ({"text": "hi"}, r"neither a list 'messages' .* \(its keys: text\)"),
        ({"prompt": "hi"}, "has no assistant turn .* regeneration.enabled"),
        ({}, "its keys: none"),
        ({"messages": "hi"}, "neither a list"),
        ({"messages": []}, "holds no message of a user"),
        ({"conversations": []}, "holds no message of a user"),
        ({"messages": ["hi"]}, "message 0: is a str, not an object"),
        (
            {"messages": [{"role": "robot", "content": "x"}]},
            "message 0: has the unknown role 'robot'",
        ),
        ({"messages": [OPENAI[0], {"role": "assistant"}]}, "message 1: has no content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "content that is no text",
        ),
        (
            {"messages": [{**OPENAI[1], "tool_calls": [{"id": "1"}]}]},
            "message 0, tool call 0: names no function",
        ),
        (
            {
                "messages": [
                    {**OPENAI[1], "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}
                ]
            },
            "message 0, tool call 0, arguments: is not valid JSON",
        ),
        (
            {"messages": [{**OPENAI[1], "tool_calls": [{"name": "f", "arguments": "[1]"}]}]},
            "message 0, tool call 0: has arguments that are no object",
        ),
        ({"messages": [{**OPENAI[1], "function_call": {"name": "f"}}]}, "carries 'function_call'"),
        ({"messages": [{"from": "function_call", "value": "f("}]}, "message 0.*not valid JSON"),
        ({"messages": [{"role": "user", "text": "hi"}]}, "message 0: has no content"),
        ({"messages": [{**OPENAI[1], "tool_calls": 3}]}, "message 0: .* that are no list"),
        ({"messages": OPENAI, "system": 3}, "system: has content that is no text"),
        ({"messages": OPENAI, "tools": "{}{"}, "tools: is not valid JSON"),
        ({"messages": OPENAI, "tools": {"name": "f"}}, "'tools' that are no list"),
        ({"messages": [{"role": "system", "content": "Be brief."}]}, "no message of a user"),
        ({"messages": OPENAI[:1]}, "has no assistant turn"),
    ],
)
def test_a_row_that_is_no_conversation_is_named_with_its_line(tmp_path, row, problem):
    path = write_lines(tmp_path / "chats.jsonl", {"messages": OPENAI}, row)
    with pytest.raises(DataError, match=rf"{path}:2.*({problem})"):
        read(path)


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(json.dumps({"messages": OPENAI}).encode() + b'\n{"messages": "\xe9"}\n')
    with pytest.raises(DataError, match=rf"{path}:2: is not UTF-8"):
        read(path)


def test_raw_prompts_are_conversations_for_whoever_needs_no_answer(tmp_path):
    path = write_lines(tmp_path / "raw.jsonl", {"prompt": "2 + 2?"}, {"messages": OPENAI[:1]})
    source = open_source(str(path), "train", "data.train[0]")
    assert [c.messages for c in source.conversations(answered=False)] == [MESSAGES[:1]] * 2


CALL = {"id": "call_1", "type": "function"}
TOOL_CHAT = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "warm?"}],
    },
    {
        "role": "assistant",
        "content": None,
        "thinking": "Let me look.",
        "tool_calls": [{**CALL, "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
    },
    {"role": "tool", "tool_call_id": "call_1", "name": "weather", "content": "30"},
    {"role": "assistant", "content": "Yes.", "reasoning_content": "30 is warm."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_their_calls_and_results_and_reasoning_are_read_and_written_back(
    tmp_path, form, as_text
):
    row = {"messages": TOOL_CHAT, "tools": json.dumps(TOOLS) if as_text else TOOLS}
    path = tmp_path / f"chats.{form}"
    if form == "parquet":
        row["messages"] = [{**m, "content": m["content"]} for m in TOOL_CHAT[1:]]
        pq.write_table(pa.Table.from_pylist([row]), path)
    else:
        write_lines(path, row)
    (conversation,) = read(path)
    *asked, call, result, answer = conversation.messages
    assert [m.content for m in asked] == (["Is it warm?"] if form == "jsonl" else [])
    assert call.tool_calls == (ToolCall("weather", {"city": "Rome"}, "call_1"),)
    assert (call.content, call.reasoning) == ("", "Let me look.")
    assert (result.role, result.content, result.tool_call_id) == ("tool", "30", "call_1")
    assert (answer.content, answer.reasoning) == ("Yes.", "30 is warm.")
    assert list(conversation.tools) == TOOLS
    rows = [message.as_row() for message in conversation.messages]
    again = write_lines(tmp_path / "again.jsonl", {"messages": rows, "tools": TOOLS})
    assert read(again)[0].messages == conversation.messages


def test_sharegpts_system_prompt_tools_and_calls_are_read(tmp_path):
    call = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    row = {
        "system": "Be brief.",
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "Is it warm?"},
            {"from": "function_call", "value": call},
            {"from": "observation", "value": "30"},
            {"from": "gpt", "value": "Yes."},
        ],
    }
    (conversation,) = read(write_lines(tmp_path / "chats.jsonl", row))
    assert conversation.messages == (
        Message("system", "Be brief."),
        Message("user", "Is it warm?"),
        Message("assistant", "", tool_calls=(ToolCall("weather", {"city": "Rome"}),)),
        Message("tool", "30"),
        Message("assistant", "Yes."),
    )
    assert list(conversation.tools) == TOOLS


def test_an_empty_system_prompt_is_none(tmp_path):
    path = write_lines(
        tmp_path / "chats.jsonl",
        {"messages": [{"role": "system", "content": ""}, *OPENAI]},
        {"system": "", "conversations": SHAREGPT},
    )
    assert [conversation.messages for conversation in read(path)] == [MESSAGES] * 2


def test_other_models_in_sharegpt_are_assistants(tmp_path):
    turns = [SHAREGPT[0], {"from": "chatgpt", "value": "4"}]
    (conversation,) = read(write_lines(tmp_path / "chats.jsonl", {"conversations": turns}))
    assert conversation.messages == MESSAGES


def test_an_empty_message_is_read_and_known_as_such(tmp_path):
    turns = [OPENAI[0], {"role": "assistant", "content": None}, {"role": "tool", "content": ""}]
    (conversation,) = read(write_lines(tmp_path / "chats.jsonl", {"messages": turns}))
    assert [message.is_empty for message in conversation.messages] == [False, True, False]
    assert Message("assistant", "<think>a</think>\n").is_empty
    assert Message("assistant", "", reasoning="a").is_empty
    assert not Message("assistant", "", tool_calls=(ToolCall("f", {}),)).is_empty


def test_a_null_that_was_written_in_json_stays(tmp_path):
    calls = [{"name": "f", "arguments": '{"a": null, "b": 1}'}]
    tools = json.dumps([{"name": "f", "parameters": {"default": None}}])
    row = {"messages": [OPENAI[0], {"role": "assistant", "tool_calls": calls}], "tools": tools}
    (conversation,) = read(write_lines(tmp_path / "chats.jsonl", row))
    assert conversation.messages[1].tool_calls[0].arguments == {"a": None, "b": 1}
    assert list(conversation.tools) == json.loads(tools)


def test_an_argument_that_parquet_fills_with_null_is_left_out(tmp_path):
    calls = [
        [{"function": {"name": "f", "arguments": {"a": 1}}}],
        [{"function": {"name": "g", "arguments": {"b": 2}}}],
    ]
    turns = [OPENAI[0], *({"role": "assistant", "tool_calls": call} for call in calls)]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "chats.parquet")
    (conversation,) = read(tmp_path / "chats.parquet")
    assert [m.tool_calls[0].arguments for m in conversation.messages[1:]] == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json"])
def test_a_file_without_conversations_is_refused(tmp_path, name):
    (tmp_path / name).write_text("\n")
    with pytest.raises(DataError, match="holds no conversation"):
        read(tmp_path / name)


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    (tmp_path / "chats.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="not readable as Parquet"):
        read(tmp_path / "chats.parquet")


def test_a_parquet_file_without_conversations_is_refused_with_its_columns(tmp_path):
    pq.write_table(pa.table({"text": ["hi"]}), tmp_path / "chats.parquet")
    with pytest.raises(DataError, match=r"chats.parquet row 1: .* \(its keys: text\)"):
        read(tmp_path / "chats.parquet")


@pytest.mark.parametrize("name", ["chats.csv", "chats", "folder.jsonl"])
def test_an_unknown_kind_of_file_is_refused(tmp_path, name):
    path = tmp_path / name
    path.mkdir() if name.startswith("folder") else path.write_text("a,b\n")
    with pytest.raises(DataError, match=r"not \.json, \.jsonl, \.parquet"):
        read(path)


def test_a_missing_file_is_named_with_its_setting():
    with pytest.raises(ConfigError, match=r"data\.train\[0\]: 'nowhere/chats.jsonl' doesn't exist"):
        read("nowhere/chats.jsonl")


@pytest.mark.parametrize("source", ["nobody/no-such-data", "no id/at/all"])
def test_what_is_neither_a_file_nor_reachable_is_named_with_its_setting(source):
    with pytest.raises(
        ConfigError, match=r"data\.train\[0\]: .* is no file here, and Hugging Face"
    ):
        read(source)


def test_a_digest_follows_the_bytes_and_not_the_name(tmp_path):
    one, same, other = (tmp_path / f"{name}.jsonl" for name in ("one", "same", "other"))
    write_lines(one, {"messages": OPENAI})
    write_lines(same, {"messages": OPENAI})
    write_lines(other, {"messages": OPENAI}, "\n")
    digests = [open_source(str(p), "train", "data.train[0]").digest() for p in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


def test_neither_reading_nor_preparing_imports_torch_or_transformers():
    code = (
        "import sys, torchspec_lib.data.conversations, torchspec_lib.data.dataset\n"
        "print(sorted({'torch', 'transformers', 'ray', 'datasets'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
