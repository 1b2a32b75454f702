"""The reports up to training: whole pages that need no network, and say what the figures say."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from flytekit import FlyteContextManager

from tasks import data_report, draft_reports, plan_drawing, report_page, reports
from tests.flyte.pages import PageCheck, plots, run_in
from tests.flyte.records import ESTIMATE, SUMMARY
from torchspec_lib.data.dataset import prepare_dataset
from torchspec_lib.plan import ClusterPlan, make_plan
from torchspec_lib.results import DatasetManifest
from torchspec_lib.run_folder import RunFolder
from torchspec_lib.target import TargetSpec
from torchspec_lib.types import Recovery, StepMetrics


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


def test_the_data_report_marks_what_is_supervised(
    dataset: tuple[DatasetManifest, Path], tokenizer
) -> None:
    manifest, folder = dataset
    html = reports.data_report(manifest, folder, tokenizer)
    page = PageCheck(html)
    assert len(page.marked) >= data_report.NUM_SAMPLES
    assert all("<|user|>" not in text for text in page.marked)
    assert all(text.endswith("<|end|>") for text in page.marked)
    assert "of them supervised" in html
    assert len(plots(html)) == 1


def test_the_data_report_tells_what_is_supervised_in_plain_words(
    dataset: tuple[DatasetManifest, Path], tokenizer
) -> None:
    manifest, folder = dataset
    html = reports.data_report(manifest, folder, tokenizer)
    count = f"{manifest.turns['supervised']:,}"
    assert f">supervised</td><td>{count}</td>" in html
    assert "last_turn_only" not in html, "what there is none of"
    turns = {"supervised": 1234, "left_out": 77, "without_end_of_turn": 5}
    html = reports.data_report(manifest.model_copy(update={"turns": turns}), folder, tokenizer)
    assert "left out by data.last_turn_only</td><td>77</td>" in html
    assert "end-of-turn token</td><td>5</td>" in html


def test_of_a_prompt_that_is_too_long_to_look_at_the_ends_are_shown() -> None:
    text = "begin " + "x" * 20_000 + " end"
    html = report_page.highlighted([(text, False), ("<b>the answer</b>", True)])
    assert len(html) < 1500
    assert "begin x" in html
    assert "x end" in html
    assert "&lt;b&gt;the answer&lt;/b&gt;" in html


def test_of_an_answer_of_many_tokens_the_first_are_shown_and_the_rest_counted() -> None:
    html = report_page.highlighted([("tok ", True)] * (report_page.MAX_SPANS + 250))
    assert len(PageCheck(html).marked) == report_page.MAX_SPANS
    assert "1,000 characters" in html


def test_the_data_report_escapes_prompts(target: TargetSpec, tokenizer, tmp_path: Path) -> None:
    evil = "<script>alert('x')</script> </div></mark> 世界 <img src=http://a.b/c.png>"
    turns = [{"role": "user", "content": evil}, {"role": "assistant", "content": evil}]
    file = tmp_path / "train.jsonl"
    file.write_text(json.dumps({"conversations": turns}))
    run = run_in(tmp_path)
    run = run.model_copy(
        update={"data": run.data.model_copy(update={"train": (str(file),), "max_prompts": None})}
    )
    html = reports.data_report(*prepare_dataset(run, target), tokenizer)
    assert "世界" in "".join(PageCheck(html).marked)
    assert "<script>" not in html


def test_the_plan_report_draws_every_actor(plan: ClusterPlan) -> None:
    html = reports.plan_report(plan, ESTIMATE)
    PageCheck(html)
    for actor in ("engine 0", "Mooncake store", "trainer rank 0", "trainer rank 1"):
        assert html.count(actor) == 1
    assert "trainer rank 2" not in html


def test_the_plan_report_draws_trainers_and_engines_on_one_node_in_colocation(
    plan: ClusterPlan,
) -> None:
    changes = {"placement": "colocate", "inference_bundles": (), "num_engines": 2}
    html = reports.plan_report(plan.model_copy(update=changes), ESTIMATE)
    PageCheck(html)
    assert html.count("rank 0 + engine 0") == html.count("rank 1 + engine 1") == 1
    assert html.count('class="node"') == 1


def test_the_plan_report_draws_an_engine_over_several_nodes_in_parts(plan: ClusterPlan) -> None:
    (engine,) = plan.inference_bundles
    changes = {"inference_bundles": (engine, engine), "inference_num_nodes": 2}
    html = reports.plan_report(plan.model_copy(update=changes), ESTIMATE)
    assert html.index("inference node 1") < html.index("engine 0, part 1 of 2")
    assert html.index("inference node 2") < html.index("engine 0, part 2 of 2")


def test_the_plan_report_of_64_engines_draws_some_nodes_and_says_what_is_on_the_others(
    plan: ClusterPlan,
) -> None:
    changes = {
        "inference_bundles": plan.inference_bundles * 64,
        "num_engines": 64,
        "inference_num_nodes": 8,
    }
    html = reports.plan_report(plan.model_copy(update=changes), ESTIMATE)
    PageCheck(html)
    assert html.count("inference node ") == plan_drawing.MAX_NODES - 1
    assert "5 more like these, with engine 24 to engine 63" in html


def test_the_plan_report_says_what_it_will_take(plan: ClusterPlan) -> None:
    html = reports.plan_report(plan, ESTIMATE)
    assert "2.5 h" in html
    assert "run c0ffee took 5 tokens a second" in html


@pytest.mark.parametrize(
    ("trainers_s", "engines_s", "expected"),
    [
        (4.92, 0.5, "Engines are the bottleneck: trainers waited 41% of the time"),
        (0.5, 3.0, "Trainers are the bottleneck: engines waited 25% of the time"),
        (0.5, 20.0, "Trainers are the bottleneck: engines waited 100% of the time"),
        (3.6, 3.0, "Both sides wait in turns: trainers waited 30% of the time, engines 25%"),
        (1.0, 1.0, "Well balanced: trainers waited 8% of the time, engines 8%"),
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
    assert "too long" in html
    learning, throughput = plots(html)
    assert "loss in nats" in learning
    assert "accept rate by position" in learning
    assert "tokens per second" in throughput


def test_the_training_report_stays_small_and_quick_with_50_000_steps() -> None:
    many, start = steps(50_000), time.perf_counter()
    html = draft_reports.training_report(SUMMARY, many)
    assert time.perf_counter() - start < 3  # 0.3 s on a machine that does nothing else
    assert len(html) < 300_000


@pytest.mark.filterwarnings("error")
def test_a_loss_of_zero_is_drawn_without_a_complaint() -> None:
    flat = [replace(step, loss=0.0) for step in steps(7)]
    assert plots(draft_reports.training_report(SUMMARY, flat))


def test_the_training_report_leaves_out_rejections_where_there_are_none() -> None:
    none = {"num_trained": 300, "num_rejected": 0, "rejected": {}}
    html = draft_reports.training_report(SUMMARY.model_copy(update=none), steps(7))
    assert "300 + 0 = 300 prompts" in html
    assert ">Rejected<" not in html


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


def test_a_report_is_a_deck_and_a_file_with_links_to_those_that_are_there(tmp_path: Path) -> None:
    context = FlyteContextManager.current_context()
    assert context.user_space_params is not None
    reports.publish("plan", "<p>drawn</p>", RunFolder(tmp_path))
    assert context.user_space_params.decks[-1].name == "plan"
    reports.publish("training", "<p>trained</p>", RunFolder(tmp_path))
    html = (tmp_path / "reports" / "plan.html").read_text()
    assert "<p>drawn</p>" in html
    assert '<nav><b>plan</b> · <a href="training.html">training</a></nav>' in html
    assert html.count("<nav>") == 1
