"""Checkpoints of the original on the command line: sampled, converted, and never taken for a guarantee."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dpdm
from dpdm import config as configs
from dpdm.account import compose
from dpdm.cli import run_command
from dpdm.config import build_denoiser
from dpdm.errors import InputError
from dpdm.evaluation.guarantee import Guarantee
from dpdm.reference_checkpoint import original_names
from dpdm.verify import verify

CONFIG = """
data: {name: squares, num_channels: 1, resolution: 8, n_classes: 3}
model:
  denoiser_name: edm
  denoiser_network: song
  network: {image_size: 8, nf: 4, ch_mult: [1, 2], num_res_blocks: 1, attn_resolutions: [4], label_dim: 3}
sampler: {num_steps: 3, labels: 3, batch_size: 4}
test: {n_samples: 5, seed: 2}
setup: {device: cpu}
dp: {epsilon: 1., delta: 1e-6}
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``config.yaml`` and ``tiny_1.0.pth``, in the original's format."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("theirs")
    (folder / "config.yaml").write_text(CONFIG)
    network = build_denoiser(configs.load([folder / "config.yaml"])).network
    generator = torch.Generator().manual_seed(3)
    shapes = {
        name: p.t().shape if name.endswith(".W") else p.shape
        for name, p in zip(original_names(network), network.parameters(), strict=True)
    }
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    content = {
        "model": {f"module.model.{name}": value + 1 for name, value in weights.items()},
        "ema": {"decay": 0.999, "num_updates": 3, "shadow_params": list(weights.values())},
        "optimizer": {"state": {}, "param_groups": []},
        "step": 3,
    }
    torch.save(content, folder / "tiny_1.0.pth")
    return folder


@pytest.fixture(scope="module")
def converted(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("converted")
    command = ["release", "--from", str(files / "tiny_1.0.pth"), "--config", str(files / "config.yaml")]
    assert run_command([*command, "--workdir", str(workdir)]) == 0
    return workdir


def sample(workdir: Path, *arguments: str) -> list[np.ndarray]:
    assert run_command(["sample", "--workdir", str(workdir), *arguments]) == 0
    return [np.asarray(Image.open(path)) for path in sorted((workdir / "samples").glob("0*.png"))]


def same(first: list[np.ndarray], second: list[np.ndarray]) -> bool:
    return len(first) == len(second) and all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_checkpoint_is_sampled_as_its_readme_shows(files: Path, tmp_path: Path) -> None:
    ckpt = f"model.ckpt={files / 'tiny_1.0.pth'}"
    theirs = ["--config", str(files / "config.yaml"), "--", ckpt]
    images = sample(tmp_path / "a", *theirs)
    assert len(images) == 5
    assert images[0].shape == (8, 8)
    one = sample(tmp_path / "b", *theirs, "sampler.labels=1")
    rows = (tmp_path / "b" / "samples" / "labels.csv").read_text().split()
    assert [row[-2:] for row in rows[1:]] == [",1"] * 5
    random = {row[-2:] for row in (tmp_path / "a" / "samples" / "labels.csv").read_text().split()[1:]}
    assert len(random) > 1
    assert not same(one, images)
    assert not same(sample(tmp_path / "c", *theirs, "sampler.num_steps=2"), images)
    assert not same(sample(tmp_path / "d", *theirs, "sampler.guid_scale=2"), images)
    assert not same(sample(tmp_path / "e", *theirs, "model.use_ema=false"), images)
    churn = ["sampler.type=edm", "sampler.s_churn=100.", "sampler.s_min=0.05", "sampler.s_max=50."]
    assert not same(sample(tmp_path / "f", *theirs, *churn, "sampler.num_steps=6"), images)


def test_raw_weights_are_released_and_drawn_from(files: Path, tmp_path: Path) -> None:
    config = ["--config", str(files / "config.yaml"), "--", "model.use_ema=false"]
    words = ["--from", str(files / "tiny_1.0.pth"), "--workdir", str(tmp_path / "raw")]
    assert run_command(["release", *words, *config]) == 0
    assert json.loads((tmp_path / "raw" / "release" / "privacy.json").read_text())["weights"] == "raw"
    drawn = sample(
        tmp_path / "a", "--", f"model.ckpt={tmp_path / 'raw' / 'release'}", "sampler.num_images=5", "sampler.seed=2"
    )
    assert same(drawn, sample(tmp_path / "b", *config, f"model.ckpt={files / 'tiny_1.0.pth'}"))


def test_a_checkpoint_does_not_take_up_another_files_config(files: Path, tmp_path: Path) -> None:
    """A config.json beside it is another model's, or another program's."""
    shutil.copy(files / "tiny_1.0.pth", tmp_path / "tiny.pth")
    (tmp_path / "config.json").write_text('{"architectures": ["UNet"]}')
    config = ["--config", str(files / "config.yaml")]
    assert len(sample(tmp_path / "w", *config, "--", f"model.ckpt={tmp_path / 'tiny.pth'}", "test.n_samples=1")) == 1


def test_a_converted_checkpoint_draws_the_same_images(files: Path, converted: Path, tmp_path: Path) -> None:
    theirs = ["--config", str(files / "config.yaml"), "--", f"model.ckpt={files / 'tiny_1.0.pth'}"]
    expected = sample(tmp_path / "a", *theirs)
    release = f"model.ckpt={converted / 'release'}"
    assert same(sample(tmp_path / "b", "--", release, "sampler.seed=2", "sampler.num_images=5"), expected)
    ours, original = dpdm.load_denoiser(converted / "release"), dpdm.load_denoiser(*paths(files))
    for a, b in zip(ours.parameters(), original.parameters(), strict=True):
        assert torch.equal(a, b)


def paths(files: Path) -> tuple[Path, Path]:
    return files / "tiny_1.0.pth", files / "config.yaml"


def statement_of(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / "release" / "privacy.json").read_text())


def test_a_converted_checkpoint_gives_no_guarantee(files: Path, converted: Path) -> None:
    release = converted / "release"
    assert {path.name for path in release.iterdir()} == {
        *("model.safetensors", "config.json", "privacy.json", "README.md")
    }
    statement = statement_of(converted)
    assert (statement["epsilon"], statement["delta"], statement["mechanisms"]) == (None, None, [])
    assert statement["guarantee"].startswith("none")
    assert (statement["claim"]["epsilon"], statement["claim"]["delta"]) == (1.0, 1e-6)
    assert "nothing in the checkpoint supports it" in statement["claim"]["source"]
    card = (release / "README.md").read_text()
    assert "No privacy guarantee of this model can be verified" in card
    assert "claims epsilon 1 at delta 1e-06" in card
    assert "private)" not in card
    config = json.loads((release / "config.json").read_text())
    assert set(config) == {"data", "model", "loss", "sampler"}  # dp.epsilon would be read as a promise
    for path in release.iterdir():
        assert str(files) not in path.read_text(errors="replace")


def test_without_a_claim_none_is_made_up(files: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.replace("dp: {epsilon: 1., delta: 1e-6}", ""))
    command = ["release", "--from", str(files / "tiny_1.0.pth"), "--config", str(config)]
    assert run_command([*command, "--workdir", str(tmp_path / "w")]) == 0
    claim = statement_of(tmp_path / "w")["claim"]
    assert (claim["epsilon"], claim["delta"]) == (None, None)
    assert "without a claim" in (tmp_path / "w" / "release" / "README.md").read_text()


def test_verify_says_that_the_claim_cannot_be_recomputed(converted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["verify", str(converted / "release")]) == 1
    out, err = capfd.readouterr()
    assert "claim (epsilon 1.0, delta 1e-06) cannot be recomputed: there is no guarantee" in err
    assert "gives no verifiable guarantee" in err
    assert out == ""


@pytest.fixture
def forged(converted: Path, tmp_path: Path) -> Path:
    """A copy whose claim somebody has written where the guarantee stands."""
    shutil.copytree(converted / "release", tmp_path / "forged")
    path = tmp_path / "forged" / "privacy.json"
    statement = json.loads(path.read_text())
    statement |= {"epsilon": 1.0, "delta": 1e-6, "unit": "one image", "adjacency": "add or remove one record"}
    path.write_text(json.dumps(statement))
    return tmp_path / "forged"


def test_a_claim_is_never_verified(forged: Path) -> None:
    problems = verify(forged).problems
    assert any("cannot be recomputed" in problem for problem in problems)
    (forged / "README.md").write_text("another")
    assert any("README.md differs" in problem for problem in verify(forged).problems)


def test_a_claim_is_not_shown_as_a_guarantee(forged: Path, converted: Path) -> None:
    for statement in (json.loads((forged / "privacy.json").read_text()), statement_of(converted)):
        with pytest.raises(InputError, match="no guarantee to show"):
            Guarantee.from_statement(statement)


def test_a_claim_is_not_added_up(forged: Path, converted: Path) -> None:
    for folder in (forged, converted / "release"):
        with pytest.raises(InputError, match="what its weights give away is unknown"):
            compose([folder / "privacy.json"], None)


def test_the_folder_is_named_after_the_file_unless_told(files: Path, tmp_path: Path) -> None:
    shutil.copy(files / "tiny_1.0.pth", tmp_path)
    command = ["release", "--from", str(tmp_path / "tiny_1.0.pth"), "--config", str(files / "config.yaml")]
    assert run_command(command) == 0
    assert (tmp_path / "tiny_1.0" / "release" / "model.safetensors").exists()
    assert run_command(command) == 2  # there is a release now


def test_nothing_converted_enters_the_folder_of_a_run(files: Path, tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "ledger.jsonl").write_text("{}\n")
    command = ["release", "--from", str(files / "tiny_1.0.pth"), "--config", str(files / "config.yaml")]
    assert run_command([*command, "--workdir", str(tmp_path)]) == 2
    assert not (tmp_path / "release").exists()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "--workdir"),
        (["--workdir", "W", "--config", "C"], "without --from"),
        (["--workdir", "W", "--", "dp.epsilon=1"], "without --from"),
        (["--from", "F"], "Expected --config"),
        (["--from", "nothing.pth", "--config", "C"], "Expected a checkpoint of the original at nothing.pth"),
        (["--from", "C", "--config", "C"], "damaged file"),
        (["--from", "F", "--config", "C", "--", "model.network.nf=8"], "another network's"),
        (["--from", "F", "--config", "C", "--", "model.network.use_cfg=false"], "use_cfg"),
    ],
)
def test_wrong_usage_is_one_line_and_writes_nothing(
    arguments: list[str], hint: str, files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    names = {"F": str(files / "tiny_1.0.pth"), "C": str(files / "config.yaml"), "W": str(tmp_path / "w")}
    before = set(files.iterdir())
    assert run_command(["release", *(names.get(word, word) for word in arguments)]) == 2
    error = capfd.readouterr().err
    assert hint in error
    assert error.count("\n") == 1
    assert (set(files.iterdir()), list(tmp_path.iterdir())) == (before, [])


def test_a_release_has_no_raw_weights(converted: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    keys = [f"model.ckpt={converted / 'release'}", "model.use_ema=false"]
    assert run_command(["sample", "--workdir", str(tmp_path / "w"), "--", *keys]) == 2
    assert "got model.use_ema=False: leave it out" in capfd.readouterr().err


def test_a_notice_appears_once(files: Path, converted: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(CONFIG.replace("setup: {", "setup: {runner: generate, "))
    capfd.readouterr()
    sample(tmp_path / "w", "--config", str(config), "--", f"model.ckpt={converted / 'release'}", "test.n_samples=1")
    assert capfd.readouterr().err.count("setup.runner") == 1
