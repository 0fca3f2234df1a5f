"""Releases that come with dpdm: each packaged one keeps its promise, and the commands find them by name."""

import csv
import re
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.made_release import make_config, make_release

import dpdm
from dpdm import config as configs
from dpdm import pretrained
from dpdm.cli import run_command
from dpdm.errors import InputError
from dpdm.initial import open_initial
from dpdm.verify import verify

ROOT = Path(__file__).parent.parent
MAX_BYTES = 4_000_000


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of one pretrained release, squares_eps_1.0, in place of dpdm's own; the current folder is empty."""
    torch.set_num_threads(1)
    keys = ["sampler.num_steps=3", "sampler.num_images=5"]
    (tmp_path / "shipped").mkdir()
    shutil.copytree(make_release(tmp_path / "made", keys=keys, half=True), tmp_path / "shipped" / "squares_eps_1.0")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "shipped")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "shipped"


@pytest.mark.parametrize("name", pretrained.names())
def test_a_packaged_release_is_what_its_name_says(name: str, tmp_path: Path) -> None:
    folder = pretrained.folder(name)
    assert (folder / "model.safetensors").stat().st_size < MAX_BYTES
    found = verify(folder)
    assert found.problems == []
    parts = re.fullmatch(r"(\w+)_eps_([\d.]+)", name)
    assert parts
    # The budget is the name's; what was spent of it is at most that, and hardly less: training may have been cut short.
    budget = float(parts[2])
    assert 0.95 * budget < found.statement["epsilon"] <= budget * (1 + 1e-9)
    assert found.statement["delta"] == 1e-5
    workdir = ["--workdir", str(tmp_path), "--"]
    assert run_command(["sample", "--pretrained", name, *workdir, "sampler.num_images=2", "sampler.num_steps=2"]) == 0
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 2


def test_the_wheel_holds_all_of_the_package() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert build == {"targets": {"wheel": {"packages": ["src/dpdm"]}}}  # everything in it, but for what git ignores
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8")
    assert not re.search(r"safetensors|json|pretrained", ignored)


def test_a_name_is_enough_to_draw_images(shipped: Path) -> None:
    assert run_command(["sample", "--pretrained", "squares_eps_1.0", "--workdir", "out"]) == 0
    samples = Path("out/samples")
    assert {p.name for p in samples.iterdir()} == {*(f"{i:06d}.png" for i in range(5)), "labels.csv", "grid.png"}
    with (samples / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [f"{i:06d}.png" for i in range(5)]
    assert {row["label"] for row in rows} <= {"0", "1"}
    assert {path.name for path in Path("out").iterdir()} == {"samples"}
    # The release's own sampler, as if its folder had been given, and wishes on top.
    given = ["sample", "--workdir", "given", "--", f"model.ckpt={shipped / 'squares_eps_1.0'}"]
    assert run_command(given) == 0
    for name in ("000000.png", "000004.png", "labels.csv"):
        assert (samples / name).read_bytes() == (Path("given/samples") / name).read_bytes()
    wished = ["sample", "--pretrained", "squares_eps_1.0", "--workdir", "wished", "--", "sampler.num_images=2"]
    assert run_command(wished) == 0
    assert len(list(Path("wished/samples").glob("0*.png"))) == 2
    assert Image.open("wished/samples/000000.png").size == (8, 8)


@pytest.mark.parametrize("command", [["sample"], ["verify"]])
def test_list_prints_the_names(shipped: Path, command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(shipped / "squares_eps_1.0", shipped / "squares_eps_10.0")
    (shipped / "not_a_release").mkdir()
    assert run_command([*command, "--pretrained", "list"]) == 0
    assert capsys.readouterr().out == "squares_eps_1.0, squares_eps_10.0\n"


@pytest.mark.parametrize("command", [["sample", "--workdir", "out"], ["verify"]])
@pytest.mark.parametrize("name", ["mnist", "", "..", "squares_eps_1.0/", "../shipped/squares_eps_1.0"])
def test_an_unknown_name_is_answered_by_the_names(
    shipped: Path, command: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([*command, "--pretrained", name]) == 2
    err = capsys.readouterr().err
    assert err == f"dpdm: Expected a pretrained release, one of squares_eps_1.0, got {name!r}: choose one of these.\n"
    assert list(Path().iterdir()) == []


def test_without_any_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "none")
    with pytest.raises(InputError, match="one of none"):
        pretrained.folder("mnist_eps_1.0")


@pytest.mark.parametrize(
    "given", [["--", "model.ckpt=runs/mine"], ["--config", "mine.yaml"], ["--", "mine.yaml"]], ids=" ".join
)
def test_a_pretrained_release_brings_its_own_config(
    shipped: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("mine.yaml").write_text("sampler: {num_steps: 2}\n")
    assert run_command(["sample", "--pretrained", "squares_eps_1.0", "--workdir", "out", *given]) == 2
    assert "Expected no --config and no model.ckpt with --pretrained squares_eps_1.0" in capsys.readouterr().err
    assert not Path("out").exists()


def test_it_is_verified_by_name_and_by_path(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", "--pretrained", "squares_eps_1.0"]) == 0
    by_name = capsys.readouterr().out
    assert run_command(["verify", str(shipped / "squares_eps_1.0")]) == 0
    assert capsys.readouterr().out == by_name
    assert by_name.startswith("PRIVACY STATEMENT")
    for given in ([], [str(shipped / "squares_eps_1.0"), "--pretrained", "squares_eps_1.0"]):
        assert run_command(["verify", *given]) == 2
        assert "Expected RELEASE or --pretrained NAME, got both or neither" in capsys.readouterr().err


def test_from_python_images_are_those_that_sample_draws(shipped: Path, tmp_path: Path) -> None:
    keys = ["sampler.num_images=5", "sampler.seed=3", "sampler.num_steps=4", "setup.device=cpu"]
    images, labels = dpdm.draw_images("squares_eps_1.0", *keys)
    assert labels is not None
    out = tmp_path / "out"
    command = ["sample", "--pretrained", "squares_eps_1.0", "--workdir", str(out), "--", *keys, "sampler.output=npz"]
    assert run_command(command) == 0
    with np.load(out / "samples" / "images.npz") as drawn:
        assert any(np.array_equal(images, drawn[name].reshape(images.shape)) for name in drawn.files)
        assert any(np.array_equal(labels, drawn[name]) for name in drawn.files)
    with pytest.raises(InputError, match="keys of sampler and setup"):
        dpdm.draw_images("squares_eps_1.0", "train.seed=1")
    with pytest.raises(InputError, match="Expected a release at nowhere"):
        dpdm.draw_images("nowhere")


def test_a_config_of_another_model_is_refused_from_python_too(shipped: Path) -> None:
    config = configs.load([shipped / "squares_eps_1.0" / "config.json"], ["loss.sigma_data=0.3"])
    with pytest.raises(
        InputError, match=r"Expected loss\.sigma_data=0\.577.* as the release in .*squares_eps_1\.0 has"
    ):
        dpdm.load_denoiser("squares_eps_1.0", config)


def test_training_begins_with_one_by_its_name(shipped: Path) -> None:
    names = ("squares_eps_1.0", shipped / "squares_eps_1.0")
    by_name, by_path = (open_initial(make_config([f"model.init={name}"])) for name in names)
    assert by_name.sources == by_path.sources


def test_a_name_loads_the_denoiser_and_a_path_of_that_name_wins(shipped: Path) -> None:
    by_path, by_name = (dpdm.load_denoiser(given) for given in (shipped / "squares_eps_1.0", "squares_eps_1.0"))
    for ours, theirs in zip(by_name.network.parameters(), by_path.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == torch.float32
    Path("squares_eps_1.0").mkdir()
    with pytest.raises(InputError, match=r"release folder or a weights file at squares_eps_1\.0, found none"):
        dpdm.load_denoiser("squares_eps_1.0")
