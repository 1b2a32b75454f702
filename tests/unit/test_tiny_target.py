"""The tiny target as shipped, and the corpus and script that made it."""

import json
import re
from itertools import islice
from pathlib import Path
from random import Random

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig, LlamaForCausalLM

from examples.tiny_target import corpus, families
from examples.tiny_target.make_target import batches, build_model, rescale_residual
from examples.tiny_target.measure_target import greedy_answers

FOLDER = Path(corpus.__file__).parent


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model():
    return LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_seed_names_one_corpus():
    first, again, other = (list(islice(corpus.conversations(s), 200)) for s in (5, 5, 6))
    assert first == again
    assert first != other


def test_excluded_questions_never_come():
    excluded = corpus.questions(list(islice(corpus.conversations(5), 50)))
    chats = list(islice(corpus.conversations(5, excluded), 500))
    assert not excluded & corpus.questions(chats)


def test_about_fifteen_percent_of_chats_have_two_turns_with_different_questions():
    chats = list(islice(corpus.conversations(5), 2000))
    two_turn = [chat for chat in chats if len(chat["messages"]) == 4]
    assert 0.12 < len(two_turn) / len(chats) < 0.18
    assert all(len(corpus.questions([chat])) == 2 for chat in two_turn)


def test_every_question_has_one_answer():
    answers = {}
    for chat in islice(corpus.conversations(5), 5000):
        texts = [message["content"] for message in chat["messages"]]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            assert answers.setdefault(question, answer) == answer


@pytest.mark.parametrize(
    ("family", "result"),
    [
        (families.addition, lambda a, b: a + b),
        (families.subtraction, lambda a, b: abs(a - b)),
        (families.multiplication, lambda a, b: a * b),
    ],
)
def test_every_arithmetic_answer_and_each_step_of_its_working_is_right(family, result):
    for seed in range(300):
        question, answer = family(Random(seed))
        a, b = map(int, re.findall(r"\d+", question))
        assert re.findall(r"\d+", answer)[-1] == str(result(a, b))
        for left, right in re.findall(r"(\d+(?: [-+*] \d+)+) = (\d+)", answer):
            assert eval(left) == int(right)


def test_shipped_prompts_are_those_that_the_corpus_generates(tmp_path):
    heldout = corpus.heldout_conversations()
    train = corpus.conversations(corpus.TRAIN_SEED, corpus.questions(heldout))
    shipped = list(islice(train, corpus.NUM_TRAIN))
    corpus.write_jsonl(tmp_path / "train.jsonl", shipped)
    corpus.write_jsonl(tmp_path / "questions.jsonl", map(corpus.unanswered, shipped))
    corpus.write_jsonl(tmp_path / "heldout.jsonl", heldout)
    for name in ("train.jsonl", "questions.jsonl", "heldout.jsonl"):
        assert (tmp_path / name).read_text() == (FOLDER / name).read_text()


def test_no_heldout_question_is_in_the_shipped_training_prompts():
    heldout = read_jsonl(FOLDER / "heldout.jsonl")
    assert len(heldout) == len(corpus.questions(heldout)) == 100
    assert not corpus.questions(heldout) & corpus.questions(read_jsonl(FOLDER / "train.jsonl"))


def test_the_folder_is_small_enough_to_ship():
    files = [file for file in FOLDER.iterdir() if file.is_file()]
    assert (FOLDER / "model.safetensors").stat().st_size <= 4_000_000
    assert sum(file.stat().st_size for file in files) <= 8_000_000


def test_digits_are_tokens_of_their_own_and_text_survives_the_tokenizer(tokenizer):
    for chat in read_jsonl(FOLDER / "heldout.jsonl"):
        for message in chat["messages"]:
            token_ids = tokenizer(message["content"])["input_ids"]
            assert tokenizer.decode(token_ids) == message["content"]
            tokens = tokenizer.convert_ids_to_tokens(token_ids)
            assert all(len(token) == 1 for token in tokens if re.search(r"\d", token))


def test_the_templates_mask_holds_answers_with_their_end_of_turn_and_nothing_else(tokenizer):
    messages = [
        {"role": "user", "content": "What is 1 + 2?"},
        {"role": "assistant", "content": "It is 3."},
        {"role": "user", "content": "And then?"},
        {"role": "assistant", "content": "No more."},
    ]
    encoded = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    kept = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    assert tokenizer.decode([i for i, mask in kept if mask]) == "It is 3.<|end|>No more.<|end|>"


def test_the_generation_prompt_is_where_an_answer_begins(tokenizer):
    question, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}
    prompt = tokenizer.apply_chat_template([question], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([question, answer], tokenize=False)
    assert whole == prompt + "Yes.<|end|>\n"


def test_generation_stops_at_the_end_of_turn(tokenizer, model):
    config = GenerationConfig.from_pretrained(FOLDER)
    assert config.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert model.config.eos_token_id == config.eos_token_id
    assert config.pad_token_id == tokenizer.pad_token_id == model.config.pad_token_id


def test_heldout_sums_and_differences_are_answered_rightly(tokenizer, model):
    heldout = read_jsonl(FOLDER / "heldout.jsonl")
    pairs = [[message["content"] for message in chat["messages"]] for chat in heldout]
    sums = [pair for pair in pairs if pair[1].startswith(("Add the ones", "Subtract the ones"))]
    answers = greedy_answers(model, tokenizer, [question for question, _ in sums])
    assert len(sums) >= 5
    assert answers == [answer for _, answer in sums]


def test_rescaling_the_residual_stream_changes_no_logit(tokenizer):
    torch.manual_seed(0)
    untrained = build_model(tokenizer)
    (batch,) = batches(iter(corpus.heldout_conversations()[:4]), tokenizer, 10_000, seed=0)
    before = untrained(batch.token_ids).logits
    rms = rescale_residual(untrained, batch, target_rms=3.0)
    torch.testing.assert_close(untrained(batch.token_ids).logits, before, rtol=1e-3, atol=1e-4)
    assert sum(rms[1:]) / len(rms[1:]) == pytest.approx(3.0, rel=1e-4)
