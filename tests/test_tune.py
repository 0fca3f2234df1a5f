"""``dpdm tune`` without private images: the recipe for public facts, and a choice on public stand-in images."""

from pathlib import Path

import pytest
import yaml

from dpdm import config as configs
from dpdm.cli import run_command
from dpdm.errors import InputError
from dpdm.plan import make_plan
from dpdm.recipes import recipe
from dpdm.tune import Facts, recommend

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
