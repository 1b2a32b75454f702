"""Which answers of a shard are kept, and what is said about the others."""

from tests.integration.regeneration.cases import run_of
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.conversations import Conversation
from torchspec_lib.data.messages import Message
from torchspec_lib.regeneration.generator import Generated, GenerationRequest
from torchspec_lib.regeneration.shard import Shard, answer_shard


class Scripted:
    """Answers what it is told to."""

    def __init__(self, chat: ChatTokenizer, texts: list[str]) -> None:
        self._chat, self._texts = chat, texts
        self.asked: list[GenerationRequest] = []

    def generate(self, asked: list[GenerationRequest]) -> list[Generated]:
        self.asked += asked
        texts = [self._texts.pop(0) for _ in asked]
        ids = [self._chat.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
        return [
            Generated(one, text.endswith("<|end|>")) for one, text in zip(ids, texts, strict=True)
        ]

    def close(self) -> None:
        pass


def talk(number: int, *questions: str) -> Conversation:
    messages = tuple(Message("user", question) for question in questions)
    return Conversation(f"q.jsonl:{number}", messages, None)


def test_answers_that_are_of_no_use_are_counted_by_their_reason_with_examples(chat, tmp_path):
    conversations = (
        talk(1, "One?", "Two?"),
        talk(2, "Cut?"),
        talk(3, "Empty?"),
        talk(4, "w " * 600),
        talk(5, "Fine?"),
        talk(6, "Bad in the end?", "Now?"),
        Conversation("q.jsonl:7", (Message("assistant", "Nobody asked."),), None),
        Conversation("q.jsonl:8", (Message("system", "S."), Message("user", "Refused?")), None),
        talk(9, " "),
    )
    first_round = ["A.<|end|>", "B and so on", "<|end|>", "C.<|end|>", "D.<|end|>"]
    generator = Scripted(chat, [*first_round, "E.<|end|>", "F"])
    run = run_of(tmp_path, max_new_tokens=50)
    report, rows = answer_shard(Shard(3, conversations), run, chat, generator)
    assert report.rejected == {
        "answer_too_long": 2,
        "asks_nothing": 1,
        "empty_answer": 1,
        "empty_message": 1,
        "prompt_too_long": 1,
        "unfit_for_template": 1,
    }
    assert [(e.where, e.reason) for e in report.examples] == [
        ("q.jsonl:7", "asks_nothing"),
        ("q.jsonl:4", "prompt_too_long"),
        ("q.jsonl:8", "unfit_for_template"),
        ("q.jsonl:9", "empty_message"),
        ("q.jsonl:2", "answer_too_long"),
        ("q.jsonl:3", "empty_answer"),
        ("q.jsonl:6", "answer_too_long"),
    ]
    assert "knows user and assistant turns only" in report.examples[2].text
    assert (report.num_conversations, report.num_answered) == (9, 2)
    assert [row["id"] for row in rows] == ["q.jsonl:1", "q.jsonl:5"]
    assert [m["content"] for m in rows[0]["messages"]] == ["One?", "A.", "Two?", "E."]
    assert {request.max_new_tokens for request in generator.asked} == {50}
    assert len({request.seed for request in generator.asked}) == len(generator.asked)


def test_no_answer_outgrows_the_longest_conversation(chat, tmp_path):
    generator = Scripted(chat, ["A.<|end|>"])
    question = talk(1, "How many? " * 150)
    answer_shard(Shard(0, (question,)), run_of(tmp_path), chat, generator)
    (request,) = generator.asked
    assert len(request.token_ids) + request.max_new_tokens == 512
