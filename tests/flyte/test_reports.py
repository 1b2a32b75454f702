"""The reports: whole pages that need no network, and say what the figures say."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from flytekit import FlyteContextManager

from tasks import draft_reports, reports
from tests.flyte.records import ESTIMATE, SUMMARY
from torchspec_lib.config.models import DataConfig, ModelConfig
from torchspec_lib.config.run import RunConfig
from torchspec_lib.data.chat import ChatTokenizer
from torchspec_lib.data.dataset import prepare_dataset
from torchspec_lib.plan import ClusterPlan, make_plan
from torchspec_lib.registry.candidate import Candidate
from torchspec_lib.results import (
    Cost,
    DatasetManifest,
    EvalReport,
    PromptResult,
    RegisteredDraft,
)
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.target import TargetSpec, read_target
from torchspec_lib.types import Recovery, StepMetrics

VOID_TAGS = {"img", "meta", "br"}


class PageCheck(HTMLParser):
    """Raises where a tag is closed that wasn't opened last, or a resource lies elsewhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open_tags: list[str] = []
        self.marked: list[str] = []
        self.feed(html)
        assert self.open_tags == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "src":
                assert (value or "").startswith("data:image/svg+xml;base64,")
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag

    def handle_data(self, data: str) -> None:
        if "mark" in self.open_tags:
            self.marked.append(data)


def plots(html: str) -> list[str]:
    """The texts in each plot."""
    images = [base64.b64decode(data) for data in re.findall(r"base64,([^\"]+)", html)]
    return [" ".join("".join(ElementTree.fromstring(image).itertext()).split()) for image in images]


def run_in(folder: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(target="examples/tiny_target", dtype="float32"),
        data=DataConfig(
            train=("examples/tiny_target/train.jsonl",),
            heldout=("examples/tiny_target/heldout.jsonl",),
            max_length=512,
            max_prompts=20,
        ),
        data_root=str(folder),
    )


@pytest.fixture(scope="module")
def target() -> TargetSpec:
    return read_target(ModelConfig(target="examples/tiny_target"))


@pytest.fixture(scope="module")
def tokenizer(target: TargetSpec):
    return ChatTokenizer.load(target.path).tokenizer


@pytest.fixture(scope="module")
def dataset(target: TargetSpec, tmp_path_factory: pytest.TempPathFactory):
    return prepare_dataset(run_in(tmp_path_factory.mktemp("data")), target)


@pytest.fixture
def plan(target: TargetSpec, tmp_path: Path) -> ClusterPlan:
    run = run_in(tmp_path)
    training = run.training.model_copy(update={"training_num_gpus_per_node": 2})
    cluster = run.cluster.model_copy(update={"device": "cpu"})
    run = run.model_copy(update={"training": training, "cluster": cluster})
    return make_plan(run, target, num_prompts=300, longest=200)


def steps(count: int) -> list[StepMetrics]:
    return [
        StepMetrics(
            step=step,
            loss=20.0 / step,
            learning_rate=1e-3,
            grad_norm=1.0,
            chains=(100, 50, 0),
            matches=(50, step % 10, 0),
            num_samples=5,
            num_tokens=400,
            num_loss_tokens=300,
            step_s=0.1,
            wait_s=0.01,
        )
        for step in range(1, count + 1)
    ]


def evaluated(prompts: tuple[PromptResult, ...]) -> EvalReport:
    return EvalReport(
        engine="hf",
        draft_steps=2,
        temperature=0.0,
        prompt_set="heldout-abc (1 prompts)",
        max_new_tokens=96,
        num_prompts=1,
        num_lossless=1,
        accept_length=2.5,
        accept_rates=(0.75, 0.5),
        num_new_tokens=6,
        num_target_forwards=3,
        plain_s=2.0,
        speculative_s=1.0,
        draft_step_s=0.001,
        target_step_s=0.004,
        prompts=prompts,
    )


def answer(text: str, accepted: tuple[int, ...], num_new_tokens: int) -> PromptResult:
    return PromptResult(
        prompt_id="p0",
        text="What is it?",
        output_text=text,
        accepted=accepted,
        num_new_tokens=num_new_tokens,
        lossless=True,
    )


def test_the_data_report_marks_what_is_supervised(
    dataset: tuple[DatasetManifest, Path], tokenizer
) -> None:
    manifest, folder = dataset
    html = reports.data_report(manifest, folder, tokenizer)
    page = PageCheck(html)
    assert len(page.marked) >= reports.NUM_SAMPLES
    assert all("<|user|>" not in text for text in page.marked)
    assert all(text.endswith("<|end|>") for text in page.marked)
    assert "num_loss_tokens" in html
    assert len(plots(html)) == 1


def test_the_plan_report_draws_every_actor(plan: ClusterPlan) -> None:
    html = reports.plan_report(plan, ESTIMATE)
    PageCheck(html)
    for actor in ("engine 0", "Mooncake store", "trainer rank 0", "trainer rank 1"):
        assert html.count(actor) == 1
    assert "trainer rank 2" not in html


def test_the_plan_report_shows_engines_beside_trainers_in_colocation(plan: ClusterPlan) -> None:
    shared = plan.model_copy(update={"placement": "colocate", "inference_bundles": ()})
    html = reports.plan_report(shared, ESTIMATE)
    assert html.count("beside a trainer rank") == shared.num_engines


def test_the_plan_report_says_what_it_will_take(plan: ClusterPlan) -> None:
    html = reports.plan_report(plan, ESTIMATE)
    assert "2.5 h" in html
    assert "run c0ffee took 5 tokens a second" in html


@pytest.mark.parametrize(
    ("trainers_s", "engines_s", "expected"),
    [
        (4.92, 0.5, "Engines are the bottleneck: trainers waited 41% of the time"),
        (0.5, 3.0, "Trainers are the bottleneck: capturing stood still 25% of the time"),
        (1.0, 1.0, "Well balanced"),
    ],
)
def test_the_training_report_says_who_waited_for_whom(
    trainers_s: float, engines_s: float, expected: str
) -> None:
    waits = {"trainer_wait_s": trainers_s, "capture_wait_s": engines_s}
    html = draft_reports.training_report(SUMMARY.model_copy(update=waits), steps(7))
    PageCheck(html)
    assert expected in html


@pytest.mark.parametrize("num_steps", [1, 7, 300])
def test_the_training_report_shows_its_curves(num_steps: int) -> None:
    html = draft_reports.training_report(SUMMARY, steps(num_steps))
    PageCheck(html)
    assert "299 + 1 = 300 prompts" in html
    assert "rejected: too long" in html
    learning, throughput = plots(html)
    assert "loss in nats" in learning
    assert "accept rate by depth" in learning
    assert "tokens per second" in throughput


def test_the_training_report_tells_what_was_lost_and_replaced() -> None:
    lost = Recovery("engine 0", "no answer for <300> s", 17.25)
    html = draft_reports.training_report(
        SUMMARY.model_copy(update={"recoveries": (lost,)}), steps(7)
    )
    PageCheck(html)
    assert "Lost and replaced" in html
    assert "17.2 s" in html
    assert "&lt;300&gt;" in html
    assert "Lost and replaced" not in draft_reports.training_report(SUMMARY, steps(7))


def test_the_evaluation_report_marks_the_tokens_that_the_draft_got_right(tokenizer) -> None:
    text = "It is red."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first, *others = [tokenizer.decode([i]) for i in ids]
    accepted = len(others) - 1  # all but the first and the last, which are the target's own
    html = draft_reports.evaluation_report(
        evaluated((answer(text, (accepted,), len(ids)),)), None, tokenizer
    )
    assert PageCheck(html).marked == others[:-1]
    assert first not in PageCheck(html).marked


def test_the_evaluation_report_shows_the_champion_beside_the_draft(tokenizer) -> None:
    draft = evaluated((answer("It is red.", (2, 1), 6),))
    champion = draft.model_copy(update={"accept_length": 2.25, "accept_rates": (0.5, 0.25)})
    html = draft_reports.evaluation_report(draft, champion, tokenizer)
    PageCheck(html)
    assert "2.25" in html
    (acceptance,) = plots(html)
    assert "the champion" in acceptance
    assert "25%" in acceptance
    (alone,) = plots(draft_reports.evaluation_report(draft, None, tokenizer))
    assert "the champion" not in alone


def test_an_answer_whose_tokens_are_uncertain_is_left_unmarked(tokenizer) -> None:
    html = draft_reports.evaluation_report(
        evaluated((answer("It is red.", (2, 2, 2), 40),)), None, tokenizer
    )
    assert PageCheck(html).marked == []
    assert "It is red." in html


def test_the_registration_report_escapes_what_it_quotes(target: TargetSpec, dataset) -> None:
    outcome = RegisteredDraft(
        registered=False,
        model_name="<b>draft</b>",
        version="",
        is_champion=False,
        is_new=False,
        decision="accept length 1.2 is 0.8 below <2.0>",
        tracking_uri="sqlite:///x.db",
        summary="not registered <script>",
    )
    report = evaluated((answer("It.", (), 1),))
    candidate = Candidate(
        draft_dir=Path("draft"),
        target=target,
        manifest=dataset[0],
        training=SUMMARY,
        report=report,
        step_metrics=Path("metrics.jsonl"),
        stage_s={"prepare": 1.0, "train": 30.0},
        cost=Cost(gpu_hours=1.25, num_gpus=8, num_workers=8, num_tokens=24_000, wall_s=31.0),
    )
    html = reports.registration_report(outcome, candidate, run_in(Path("data")))
    PageCheck(html)
    assert "0.8 below &lt;2.0&gt;" in html
    assert "<script>" not in html
    assert "30.0 s" in html
    assert "1.25 on 8 GPU(s)" in html


def test_a_report_is_a_deck_and_a_file_with_links_to_its_siblings(tmp_path: Path) -> None:
    context = FlyteContextManager.current_context()
    assert context.user_space_params is not None
    reports.publish("plan", "<p>drawn</p>", RunFolder(tmp_path))
    assert context.user_space_params.decks[-1].name == "plan"
    html = (tmp_path / "reports" / "plan.html").read_text()
    assert "<p>drawn</p>" in html
    assert all(f'href="{name}.html"' in html for name in reports.NAMES)
