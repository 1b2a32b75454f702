"""The shipped files are valid, and say what they promise."""

import doctest
import re
from pathlib import Path

import pytest
import yaml
from flytekit.configuration import Config, ImageConfig

from tasks import run_input
from tasks.resources import POD_TEMPLATE
from tasks.run_input import RunInput
from torchspec_lib.config.settings import PROJECT_ROOT, find_path

CONFIGS = sorted((PROJECT_ROOT / "configs").glob("*.yaml"))


def load(path: Path) -> RunInput:
    inputs = yaml.safe_load(path.read_text())
    assert list(inputs) == ["run"]
    return RunInput.model_validate(inputs["run"])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_a_valid_input(path: Path) -> None:
    run = load(path)
    for source in (run.model.target, *run.data.train, *run.data.heldout):
        if source.startswith("examples/"):
            find_path(source, source)


def test_the_demo_s_variants_differ_in_ranks_only() -> None:
    two, one = (load(PROJECT_ROOT / f"configs/{name}.yaml") for name in ("tiny", "tiny_one_rank"))
    training = two.training.model_copy(update={"training_num_gpus_per_node": 1})
    assert two.model_copy(update={"training": training}) == one


def test_the_flyte_config_names_the_cluster_the_project_and_both_images() -> None:
    path = str(PROJECT_ROOT / "flyte.config.yaml")
    platform = Config.auto(path).platform
    assert platform.endpoint == "localhost:30080"
    assert platform.insecure
    images = {image.name: image.full for image in ImageConfig.auto(path).images}
    assert images == {"default": "torchspec-flyte:cpu", "gpu": "torchspec-flyte:gpu"}
    assert yaml.safe_load(Path(path).read_text())["task"] == {
        "project": "torchspec",
        "domain": "development",
    }


def test_the_examples_in_docstrings_hold() -> None:
    failed, attempted = doctest.testmod(run_input)
    assert attempted
    assert not failed


def test_the_readmes_settings_are_a_valid_run() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", (PROJECT_ROOT / "README.md").read_text(), re.DOTALL)
    run = RunInput.model_validate(yaml.safe_load(block)["run"])
    assert run.model.target == "Qwen/Qwen3-8B"


def test_the_readmes_commands_are_targets_of_the_makefile() -> None:
    readme, makefile = ((PROJECT_ROOT / name).read_text() for name in ("README.md", "Makefile"))
    commands = set(re.findall(r"^make (\w+)", readme, re.MULTILINE))
    assert commands == {"demo", "test"}
    assert commands <= set(re.findall(r"^(\w+):", makefile, re.MULTILINE))


def test_the_cluster_s_pod_template_is_the_one_that_the_tasks_name() -> None:
    objects = list(yaml.safe_load_all((PROJECT_ROOT / "deploy/torchspec.yaml").read_text()))
    claim, template = objects
    assert [o["kind"] for o in objects] == ["PersistentVolumeClaim", "PodTemplate"]
    assert template["metadata"]["name"] == POD_TEMPLATE
    (container,) = template["template"]["spec"]["containers"]
    (mount,) = container["volumeMounts"]
    (volume,) = template["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert mount["name"] == volume["name"]
    (token,) = container["env"]
    assert token["name"] == "HF_TOKEN"
    assert token["valueFrom"]["secretKeyRef"]["optional"]  # public targets need none
    for name in ("single_node", "three_nodes", "nightly"):
        assert load(PROJECT_ROOT / f"configs/{name}.yaml").data_root == mount["mountPath"]


def test_the_commands_of_the_flyte_page_are_targets_of_the_makefile() -> None:
    page, makefile = ((PROJECT_ROOT / name).read_text() for name in ("docs/flyte.md", "Makefile"))
    commands = set(re.findall(r"^make ([\w-]+)", page, re.MULTILINE))
    assert {"package", "register", "run-remote", "images"} <= commands
    assert commands <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))


def test_the_images_copy_what_is_there() -> None:
    dockerfile = (PROJECT_ROOT / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+)$", dockerfile, re.MULTILINE):
        *sources, _ = line.split()
        assert all((PROJECT_ROOT / source).exists() for source in sources)
