"""What the trainer's benchmark runs: sizes, packs, and the arithmetic that each needs."""

from dataclasses import dataclass

TTT_STEPS = 7
SUPERVISED = 0.75
"""Of the tokens of every document: its end, as an answer is."""


@dataclass(frozen=True)
class Model:
    """Sizes of the draft and of its target."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


FULL = Model(hidden=4096, intermediate=12288, heads=32, kv_heads=8, vocab=151_936)
TINY = Model(hidden=64, intermediate=96, heads=4, kv_heads=2, vocab=500)


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    draft_vocab: int
    num_documents: int
    length: int

    @property
    def num_tokens(self) -> int:
        return self.num_documents * self.length

    def __str__(self) -> str:
        return f"{self.draft_vocab}:{self.num_documents}x{self.length}"

    @classmethod
    def parse(cls, text: str) -> "Case":
        vocab, shape = text.split(":")
        documents, length = shape.split("x")
        return cls(int(vocab), int(documents), int(length))


SWEEP = ["32000:1x4096", "32000:4x2048", "32000:1x16384", "151936:1x4096", "151936:1x8192"]
TINY_SWEEP = ["100:1x64", "100:3x21", "500:1x40"]


def needed_tflop(case: Case, model: Model, num_chains: int) -> float:
    """Matrix products of one step, in 1e12 operations; recomputation isn't counted."""
    width, kv_width = model.hidden, model.kv_heads * model.head_dim
    tokens, depths = case.num_tokens, TTT_STEPS
    half_projection = width * (model.heads * model.head_dim + 2 * kv_width)
    layer = half_projection + width * width + 3 * width * model.intermediate
    per_chain = depths * (layer + width * case.draft_vocab)
    # Once: the embeddings' half of the projections, and fc, whose input needs no gradient.
    products = 6 * (num_chains * per_chain + tokens * half_projection)
    products += 4 * tokens * 3 * width * width
    teachers = case.draft_vocab + (model.vocab if case.draft_vocab < model.vocab else 0)
    products += 2 * num_chains * width * teachers
    first = case.length - num_chains // case.num_documents
    keys = num_chains * (first + case.length) / 2
    attention = 14 * depths * keys * model.heads * model.head_dim
    return (products + attention) / 1e12
