"""``dpdm tune`` without private images: the recipe for public facts, and a choice on public stand-in images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from dpdm import config as configs
from dpdm import tune
from dpdm.cli import run_command
from dpdm.data.archive import ArchiveWriter
from dpdm.errors import InputError
from dpdm.plan import make_plan
from dpdm.recipes import recipe
from dpdm.tune import Facts, PublicChoice, choose_on_public, recommend

MNIST = ["--dataset-size", "60000", "--resolution", "28", "--channels", "1", "--classes", "10", "--epsilon", "1"]


def test_the_recipe_is_printed_as_yaml_that_train_takes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["tune", *MNIST, "--delta", "1e-5"]) == 0
    text = capfd.readouterr().out
    (tmp_path / "found.yaml").write_text(text)
    loaded = configs.load([tmp_path / "found.yaml"])
    values = recipe(dataset_size=60_000, resolution=28, num_channels=1, num_classes=10, epsilon=1.0, delta=1e-5)
    facts = ["data.resolution=28", "data.num_channels=1", "data.num_classes=10", "dp.epsilon=1", "dp.delta=1e-5"]
    assert loaded == configs.load([], [*values, *facts])
    plan = make_plan(loaded, 60_000)
    assert f"{plan.num_iterations} steps on batches of {plan.expected_batch_size}" in text
    assert f"noise multiplier {plan.noise_multiplier:g}" in text
    assert "no image was read" in text


def test_with_unit_group_it_is_the_recipe_for_persons(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["tune", *MNIST, "--delta", "1e-5", "--unit", "group"]) == 0
    text = capfd.readouterr().out
    assert "# The recipe for 60000 groups" in text
    (tmp_path / "found.yaml").write_text(text)
    loaded = configs.load([tmp_path / "found.yaml"])
    assert loaded.data.unit == "group"
    assert "from the number of groups" in loaded.dp.selection
    assert run_command(["tune", "digits", "--dataset-size", "500", "--epsilon", "1", "--unit", "group"]) == 2
    assert "Expected no --unit with SOURCE" in capfd.readouterr().err


def test_it_can_be_written_to_a_new_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    assert run_command(["tune", *MNIST, "--yaml", str(path)]) == 0
    assert capfd.readouterr().out == ""
    assert set(yaml.safe_load(path.read_text())) >= {"data", "model", "loss", "optim", "dp", "train"}
    assert configs.load([path]).dp.delta == 1e-6
    before = path.read_text()
    assert run_command(["tune", *MNIST, "--yaml", str(path)]) == 2
    assert "Expected no file" in capfd.readouterr().err
    assert path.read_text() == before


def test_images_without_classes_and_in_colour() -> None:
    text = recommend(Facts(5000, 32, 3, 0, 10.0))
    assert "5000 images, 32 x 32 pixels, colour, no classes" in text
    assert yaml.safe_load(text)["data"] == {"unit": "image", "resolution": 32, "num_channels": 3, "num_classes": 0}


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"dataset_size": 0}, "--dataset-size"),
        ({"resolution": 0}, "data.resolution"),
        ({"channels": 2}, "--channels"),
        ({"classes": -1}, "data.num_classes"),
        ({"epsilon": 0.0}, "--epsilon"),
        ({"delta": 0.1}, "delta < 1/N"),
    ],
)
def test_facts_out_of_range_are_named(changes: dict[str, float], hint: str) -> None:
    values: dict[str, float] = {"dataset_size": 1000, "resolution": 8, "channels": 1, "classes": 2, "epsilon": 1.0}
    with pytest.raises(InputError, match=hint):
        Facts(**{**values, **changes})  # type: ignore[arg-type]


def test_missing_facts_are_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["tune", "--dataset-size", "100", "--epsilon", "1"]) == 2
    assert "got no --resolution, --channels, --classes" in capfd.readouterr().err
    assert run_command(["tune", *MNIST, "--resolution", "28x30"]) == 2
    assert "square" in capfd.readouterr().err
    assert run_command(["tune", *MNIST, "--public"]) == 2
    assert "Expected no --public without SOURCE" in capfd.readouterr().err
    assert run_command(["tune", *MNIST, "--", "optim.learning_rate=1"]) == 2
    assert "Expected no keys without SOURCE" in capfd.readouterr().err


FEW_STEPS = (
    "train.num_epochs=null",
    "train.num_iterations=2",
    "train.expected_batch_size=50",
    "loss.noise_multiplicity=1",
    "model.network.width=4",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
    "model.network.attention_resolutions=[]",
    "train.warmup.num_iterations=2",
    "sampler.num_steps=2",
    "setup.device=cpu",
    "setup.num_threads=1",
)
CANDIDATES = ((), ("optim.learning_rate=0.02",), ("train.warmup.noise_multiplier=30",))
ADAPTERS = ("model.trainable=[norm,bias]", "model.lora_rank=1")


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setattr(tune, "SCORE_IMAGES", 40)


@pytest.mark.usefixtures("few_images")
def test_a_choice_on_public_images_is_one_for_the_private_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    trained: list[configs.Config] = []
    real_train, scores = tune.train, iter([0.2, 0.7, 0.5])

    def spy(config: configs.Config, *arguments: Any, **named: Any) -> Any:
        trained.append(config)
        return real_train(config, *arguments, **named)

    def score(*arguments: Any) -> float:
        assert 0 <= found(*arguments) <= 1
        return next(scores)

    found = tune._utility
    monkeypatch.setattr(tune, "train", spy)
    monkeypatch.setattr(tune, "_utility", score)
    (tmp_path / "list.yaml").write_text(json.dumps(CANDIDATES))
    words = ["digits", "--dataset-size", "400", "--epsilon", "1", "--candidates", str(tmp_path / "list.yaml")]
    path = tmp_path / "found.yaml"
    assert run_command(["tune", *words, "--yaml", str(path), "--", *FEW_STEPS]) == 0
    chosen = configs.load([path])
    assert chosen.optim.learning_rate == 0.02
    assert (
        "chosen among 3 candidates (a list that the user gave, which is not accounted for) on public images digits"
        in chosen.dp.selection
    )
    assert (chosen.dp.epsilon, chosen.dp.delta, chosen.data.path) == (1.0, 1e-5, None)
    assert "2 of 3: accuracy 0.7  optim.learning_rate=0.02" in capfd.readouterr().err
    plan = make_plan(chosen, 400)
    assert plan.epsilon <= 1
    for config, warmup in zip(trained, (None, None, 30.0), strict=True):  # 400 of the 1,497 digits: the same batch
        assert (config.train.expected_batch_size, config.train.num_iterations) == (50, 2)
        assert warmup is None or config.train.warmup.noise_multiplier == warmup
    assert trained[1].dp.noise_multiplier == plan.noise_multiplier


@pytest.mark.usefixtures("few_images")
def test_a_small_stand_in_without_labels_by_the_frechet_distance(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    with ArchiveWriter(tmp_path / "lakes.zip") as writer:
        for _ in range(90):
            writer.add(random.integers(0, 256, (1, 8, 8), np.uint8))
    asked = {"source": str(tmp_path / "lakes.zip"), "dataset_size": 500, "epsilon": 1.0, "overrides": FEW_STEPS}
    with pytest.raises(InputError, match="known by name, or --public"):
        PublicChoice(public=False, **asked)
    with pytest.raises(InputError, match="labels"):
        choose_on_public(PublicChoice(public=True, **asked))
    text = choose_on_public(
        PublicChoice(public=True, utility="frechet", candidates=(*CANDIDATES[:2], ADAPTERS), **asked)
    )
    assert "public images lakes" in yaml.safe_load(text)["dp"]["selection"]
    assert str(tmp_path) not in text
    assert "noise weighs more here" in capfd.readouterr().err
    with pytest.raises(InputError, match=r"dp\.epsilon"):
        PublicChoice(public=True, **{**asked, "overrides": ("dp.epsilon=3",)})


def test_built_in_candidates_can_be_loaded_and_differ() -> None:
    base = [*Facts(1497, 8, 1, 10, 10.0).overrides()]
    config = configs.load([], base)
    for same_cost in (True, False):
        found = [configs.load([], [*base, *values]) for values in tune.built_in_candidates(config, same_cost=same_cost)]
        assert found[0] == config
        assert all(a != b for i, a in enumerate(found) for b in found[:i])
        costs = {(c.train.warmup.noise_multiplier, c.train.expected_batch_size) for c in found}
        assert (len(costs) == 1) == same_cost


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_size": -4}, "--dataset-size >= 1"),
        ({"epsilon": float("nan")}, "--epsilon"),
        ({"delta": 0.5}, "delta < 1/N"),
        ({"overrides": ("dp={epsilon: 3}",)}, "Expected no dp here"),
        ({"overrides": ("data={public: true}",)}, "Expected no data here"),
        ({"overrides": ("dp.enabled=false",)}, r"Expected no dp\.enabled here"),
        ({"candidates": ((), ("data.name=x",))}, r"Expected no data\.name here"),
    ],
)
def test_what_the_options_say_is_not_said_otherwise_and_is_looked_at_first(
    changes: dict[str, Any], message: str
) -> None:
    """No image was read, or fetched, for any of these."""
    with pytest.raises(InputError, match=message):
        PublicChoice(**{"source": "digits", "public": False, "dataset_size": 400, "epsilon": 1.0, **changes})


def test_a_file_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="make it first"):
        tune.check_new(tmp_path / "none" / "x.yaml")
