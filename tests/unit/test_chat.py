import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.conversations import Message
from torchspec_lib.errors import ConfigError, DataError

HEAD = "{% for m in messages %}"
TAIL = "{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = (
    HEAD + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{{ '\n' }}" + TAIL + ASK
)  # as most targets have it: no markers, and the content as it is
CHATML_STRIPPED = CHATML.replace("m.content", "m.content.strip()")
MARKED = (
    HEAD
    + "<|im_start|>{{ m.role }}\n"
    + "{% if m.role == 'assistant' %}{% generation %}%s{% endgeneration %}%s"
    + "{% else %}{{ m.content }}<|im_end|>{{ '\n' }}{% endif %}"
    + TAIL
    + ASK
)
CONTENT, END, NEWLINE = "{{ m.content }}", "<|im_end|>", "{{ '\n' }}"
MARKED_CONTENT = MARKED.replace("%s", CONTENT, 1).replace("%s", END + NEWLINE)
MARKED_TURN = MARKED.replace("%s", CONTENT + END, 1).replace("%s", NEWLINE)
MARKED_LINE = MARKED.replace("%s", CONTENT + END + NEWLINE, 1).replace("%s", "")
INST = (
    HEAD
    + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    + "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}"
    + TAIL
)
REASONING = (  # keeps the last turn's reasoning only, and writes an empty one where there is none
    HEAD
    + "<|im_start|>{{ m.role }}\n"
    + "{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    + "{% set own = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    + "{% if m.role == 'assistant' and loop.last %}<think>\n"
    + "{{ own if '</think>' in m.content else '' }}\n</think>\n\n{% endif %}"
    + "{{ text }}<|im_end|>{{ '\n' }}"
    + TAIL
    + ASK
)
CHAT = [
    Message("system", "Be brief."),
    Message("user", "four"),
    Message("assistant", "four is\n\neven, über 3."),
    Message("user", "yes"),
    Message("assistant", "yes"),
]
TEXTS = ["four is even, yes. Be brief. Q: four A: four\nabc four<|im_end|>"]


def make_tokenizer(template=CHATML, cut_words=True, trim_offsets=False, texts=TEXTS):
    """Byte-level BPE; without ``cut_words`` merges cross blanks, newlines and punctuation."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut_words)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts * 5, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<s>", chat_template=template
    )
    if trim_offsets:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def supervised(template, messages, **options):
    """What the mask selects, decoded run by run."""
    tokenizer = make_tokenizer(template, **options)
    token_ids, mask, _ = ChatTokenizer(tokenizer).encode(messages, "chats.jsonl:1")
    cuts = np.flatnonzero(np.diff(mask)) + 1
    runs = zip(np.split(token_ids, cuts), np.split(mask, cuts), strict=True)
    return [tokenizer.decode(ids) for ids, run in runs if run[0]]


@pytest.mark.parametrize(
    "template",
    [CHATML, CHATML_STRIPPED, MARKED_CONTENT, MARKED_TURN, MARKED_LINE, REASONING],
    ids=["chatml", "stripped", "content marked", "turn marked", "line marked", "reasoning"],
)
def test_supervised_are_the_answers_and_their_end_of_turn_and_nothing_else(template):
    assert supervised(template, CHAT) == [
        "four is\n\neven, über 3.<|im_end|>",
        "yes<|im_end|>",
    ]


def test_blanks_that_the_target_generates_around_an_answer_are_supervised_with_it():
    messages = [Message("user", "four"), Message("assistant", "3 is even")]
    assert supervised(INST, messages) == [" 3 is even <|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, MARKED_CONTENT])
def test_blanks_around_an_answer_are_its_own_where_the_template_keeps_them(template):
    messages = [Message("user", "four"), Message("assistant", "\n  yes \n")]
    assert supervised(template, messages) == ["\n  yes \n<|im_end|>"]


def test_blanks_around_an_answer_are_gone_where_the_template_strips_them():
    messages = [Message("user", "four"), Message("assistant", "\n  yes \n")]
    assert supervised(CHATML_STRIPPED, messages) == ["yes<|im_end|>"]


@pytest.mark.parametrize("trim_offsets", [False, True])
def test_a_token_across_the_beginning_of_an_answer_is_not_supervised(trim_offsets):
    template = (
        HEAD
        + "{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<|im_end|>{% endif %}"
        + TAIL
    )
    tokenizer = make_tokenizer(template, trim_offsets=trim_offsets)
    messages = [Message("user", "four"), Message("assistant", "four is even")]
    token_ids, mask, _ = ChatTokenizer(tokenizer).encode(messages, "here")
    tokens = [tokenizer.decode([i]) for i in token_ids]
    first = int(mask.argmax())
    assert tokens[first - 1] == " four", "the answer's first word isn't merged with the blank"
    assert "".join(tokens[first:]) == " is even<|im_end|>"
    assert mask[first:].all()


def test_a_token_across_the_end_of_an_answer_is_supervised_whole():
    template = HEAD + "{{ m.role }}:{{ m.content }}\nabc" + TAIL
    messages = [Message("user", "four"), Message("assistant", "yes")]
    options = {"cut_words": False, "texts": ["yes\nabc"]}
    assert supervised(template, messages, **options) == ["yes\nabc"]


def test_reasoning_is_supervised_in_the_turn_that_keeps_it_and_absent_from_the_others():
    messages = [
        Message("user", "four"),
        Message("assistant", "<think>is even</think>yes"),
        Message("user", "four"),
        Message("assistant", "<think>\nyes is four\n</think>\n\nyes"),
    ]
    assert supervised(REASONING, messages) == [
        "yes<|im_end|>",
        "<think>\nyes is four\n</think>\n\nyes<|im_end|>",
    ]


def test_an_empty_reasoning_that_the_template_puts_in_its_place_is_not_supervised():
    template = REASONING.replace("own if '</think>' in m.content else ''", "''")
    messages = [Message("user", "four"), Message("assistant", "<think>is even</think>yes")]
    assert supervised(template, messages) == ["yes<|im_end|>"]


def test_reasoning_is_plain_text_to_a_template_that_knows_none():
    messages = [Message("user", "four"), Message("assistant", "<think>is</think> yes")]
    assert supervised(CHATML, messages) == ["<think>is</think> yes<|im_end|>"]


def test_token_ids_are_those_of_the_tokenizers_own_chat_template():
    for template in (CHATML, MARKED_CONTENT, INST, REASONING):
        tokenizer = make_tokenizer(template, trim_offsets=True)
        chat = ChatTokenizer(tokenizer)
        dicts = [{"role": m.role, "content": m.content} for m in CHAT[1:]]
        own = tokenizer.apply_chat_template(dicts, return_dict=False)
        assert chat.encode(CHAT[1:], "here").token_ids.tolist() == own
        own = tokenizer.apply_chat_template(
            dicts[:-1], add_generation_prompt=True, return_dict=False
        )
        assert chat.prompt_ids(CHAT[1:-1], "here").tolist() == own


def test_a_prompt_ends_where_the_supervised_answer_begins():
    chat = ChatTokenizer(make_tokenizer())
    token_ids, mask, _ = chat.encode(CHAT, "here")
    prompt = chat.prompt_ids(CHAT[:-1], "here")
    assert token_ids[: len(prompt)].tolist() == prompt.tolist()
    assert not mask[len(prompt) - 1]
    assert mask[len(prompt)]


def test_a_template_that_tells_the_date_gives_the_same_tokens_every_day():
    template = "Today: {{ strftime_now('%d %b %Y') }}\n" + CHATML
    tokenizer = make_tokenizer(template)
    token_ids, _, _ = ChatTokenizer(tokenizer).encode(CHAT, "here")
    assert tokenizer.decode(token_ids).startswith("Today: 01 Jan 2025\n")


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m.content", "m.content[:3]"),
        CHATML.replace(HEAD, "{% for m in messages[:-1] %}"),
    ],
    ids=["cut short", "one left out"],
)
def test_a_template_that_changes_an_answer_is_refused_with_the_place_named(template):
    chat = ChatTokenizer(make_tokenizer(template))
    with pytest.raises(DataError, match=r"chats.jsonl:7: .* changes the text of an answer"):
        chat.encode(CHAT, "chats.jsonl:7")


def test_a_conversation_that_the_template_refuses_is_named_with_the_templates_reason():
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    )
    chat = ChatTokenizer(make_tokenizer(template + CHATML))
    with pytest.raises(DataError, match=r"chats.jsonl:7: .* refuses it: no system role"):
        chat.encode(CHAT, "chats.jsonl:7")


def test_a_tokenizer_without_a_chat_template_is_refused():
    with pytest.raises(ConfigError, match=r"model\.target: .* no default chat template"):
        ChatTokenizer(make_tokenizer(template=None))
