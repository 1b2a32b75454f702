"""What transformers generates, in batches: each answer is its question's and its seed's alone."""

import json

import torch

from tests.integration.regeneration.cases import QUESTIONS, target
from torchspec_lib.config.regeneration import RegenerationConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.messages import Message
from torchspec_lib.evaluation.speculative import decode_plain
from torchspec_lib.evaluation.verification import TargetChoice
from torchspec_lib.regeneration.generator import GenerationRequest
from torchspec_lib.regeneration.hf_generator import HFBatch, HFGenerator


def requests(chat: ChatTokenizer, count: int, max_new_tokens: int = 160) -> list[GenerationRequest]:
    rows = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    texts = [row["messages"][0]["content"] for row in rows][:count]
    return [
        GenerationRequest(
            chat.prompt_ids([Message("user", text)], "here").tolist(), max_new_tokens, seed=i
        )
        for i, text in enumerate(texts)
    ]


def test_a_batch_gives_what_decoding_one_by_one_gives(model, chat):
    eos = target().eos_token_ids
    asked = requests(chat, 6)
    settings = RegenerationConfig(batch_size=4)
    answers = HFGenerator(model, settings, eos).generate(asked)
    alone = [decode_plain(model, one.token_ids, TargetChoice(0.0, 160), eos) for one in asked]
    assert [answer.token_ids for answer in answers] == alone
    assert all(answer.is_finished for answer in answers)


def test_padding_changes_nothing_but_rounding(model, chat):
    prompts = [one.token_ids for one in requests(chat, 12)]
    assert len({len(prompt) for prompt in prompts}) > 5
    with torch.inference_mode():
        together = HFBatch(model, prompts)
        first = together.logits()
        together.extend([0, 3, 7], [5, 6, 7])
        second = together.logits()
        alone = [model(torch.tensor([prompt])).logits[0, -1] for prompt in prompts]
        behind = [
            model(torch.tensor([[*prompts[i], new]])).logits[0, -1]
            for i, new in ((0, 5), (3, 6), (7, 7))
        ]
    assert torch.allclose(first, torch.stack(alone), atol=1e-4)
    assert torch.allclose(second, torch.stack(behind), atol=1e-4)


def test_drawn_answers_depend_on_their_own_seed_and_not_on_their_batch(model, chat):
    eos = target().eos_token_ids
    asked = requests(chat, 12, max_new_tokens=30)
    settings = RegenerationConfig(temperature=1.5, batch_size=5)
    answers = HFGenerator(model, settings, eos).generate(asked)
    apart = RegenerationConfig(temperature=1.5, batch_size=1)
    assert HFGenerator(model, apart, eos).generate(asked[::-1])[::-1] == answers
    others = [GenerationRequest(r.token_ids, r.max_new_tokens, r.seed + 100) for r in asked]
    assert HFGenerator(model, settings, eos).generate(others) != answers


def test_an_answer_that_is_cut_off_is_told_from_one_that_ends(model, chat):
    answers = HFGenerator(model, RegenerationConfig(), target().eos_token_ids).generate(
        requests(chat, 12, max_new_tokens=40)
    )
    assert {answer.is_finished for answer in answers} == {True, False}
    assert all((answer.token_ids[-1] == 3) == answer.is_finished for answer in answers)
    assert max(len(answer.token_ids) for answer in answers) == 40
