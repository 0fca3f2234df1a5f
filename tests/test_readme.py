"""The README's commands work as written, with few steps."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpdm.cli import run_command

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TINY = [
    "train.num_iterations=2",
    "train.expected_batch_size=20",
    "loss.noise_multiplicity=1",
    "model.network.width=4",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
    "model.network.attention_resolutions=[]",
]

CHEAP = "1"  # of the README's epsilon of 10: so few steps under it take half a minute to account for


def commands() -> list[list[str]]:
    return [shlex.split(line)[1:] for line in re.findall(r"^    (dpdm .*)$", README, flags=re.MULTILINE)]


def folder_of_images(root: Path, side: int, count: int) -> None:
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(root / name / f"{index}.png")


def test_the_readme_has_the_commands() -> None:
    names = ["synthesize", "account", "train", "release", "sample", "verify", "audit"]
    assert [command[0] for command in commands()] == names


def test_every_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    folder_of_images(tmp_path / "path/to/images", side=8, count=60)
    # MNIST cannot be downloaded here: a small set of ten classes stands for it.
    folder = tmp_path / "digits"
    rng = np.random.default_rng(1)
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
        for index in range(10):
            Image.fromarray(rng.integers(0, 256, (28, 28), dtype=np.uint8)).save(folder / str(label) / f"{index}.png")
    for command in commands():
        extra: list[str] = []
        if command[0] == "synthesize":
            few = [*TINY, "train.warmup.num_iterations=2", "sampler.num_steps=2"]
            extra = ["--epsilon", CHEAP, "--num-images", "20", "--", *few]
        if command[0] == "train":
            command[command.index("data.path=mnist")] = f"data.path={folder}"
            extra = [*TINY, "dp.epsilon=null", "dp.noise_multiplier=1"]
        if command[0] == "sample":
            extra = ["sampler.num_steps=2"]
        if command[0] == "audit":
            extra = ["--trials", "100", "--confidence", "0.999999"]
        assert run_command([*command, *extra]) == 0, command
    assert (tmp_path / "runs/mine/report.html").exists()
    assert len(list((tmp_path / "runs/mnist/samples").glob("0*.png"))) == 100


def test_the_python_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, "train.warmup.num_iterations=2", "sampler.num_steps=2"]
    assert run_command(["demo", "--epsilon", CHEAP, "--", *tiny]) == 0
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert code is not None
    values: dict[str, object] = {}
    exec(code.group(1), values)  # the README's own text
    for name in ("images", "denoised"):
        assert values[name].shape == (10, 1, 8, 8)  # type: ignore[attr-defined]
