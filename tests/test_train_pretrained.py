"""benchmarks/train_pretrained.sh with a tiny model of the digits: calls that go on, parts, release and figures."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpdm import config as configs
from dpdm.plan import make_plan
from dpdm.verify import verify

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "train_pretrained.sh"
NAME = "digits_eps_10.0"
KEYS = (
    "train.num_iterations=4 train.expected_batch_size=100 loss.noise_multiplicity=1 train.warmup.num_iterations=2 "
    "train.warmup.noise_multiplier=5 model.network.width=4 model.network.channel_multipliers=[1] "
    "model.network.num_res_blocks=1 sampler.num_steps=2 setup.device=cpu setup.num_threads=1"
)
# What the script takes for Python: it notes every step, and presses Ctrl-C in the second one of the first training.
PYTHON = """
import os, runpy, signal, sys

notes, arguments = __file__ + ".steps", sys.argv[1:]
if arguments[0] == "-m":
    if arguments[2] == "train":
        import dpdm.train as training
        step = training.private_step

        def noted(*given):
            with open(notes, "a+") as file:
                file.write(f"{os.getpid()}\\n")
                file.seek(0)
                if len(file.readlines()) == 2:
                    os.kill(os.getpid(), signal.SIGINT)
            return step(*given)

        training.private_step = noted
    from dpdm.cli import main
    sys.argv = ["dpdm", *arguments[2:]]
    main()
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(arguments[0])))
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "python.py").write_text(PYTHON)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path / "python.py"}" "$@"\n')
    python.chmod(0o755)
    (tmp_path / "config.yaml").write_text("data: {name: digits}\ndp: {epsilon: 10}\n")
    own = {"PYTHON": str(python), "CONFIG": str(tmp_path / "config.yaml"), "DATA": "digits", "KEYS": KEYS}
    own |= {"PART": "20k", "QUALITY": "--parts quick --num-images 60 --device cpu", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


def call(environment: dict[str, str], state: Path, out: Path | None = None) -> tuple[int, str]:
    own = {} if out is None else {"OUT": str(out)}
    done = subprocess.run(
        ["sh", str(SCRIPT), NAME, str(state)], env={**environment, **own}, check=False, capture_output=True, text=True
    )
    return done.returncode, done.stderr


@pytest.mark.slow
def test_calls_go_on_to_a_release_and_its_figures(environment: dict[str, str], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    status, said = call(environment, first)
    assert status == 75, said
    assert said.splitlines()[-1] == "Not done: call again."
    assert {path.name for path in first.iterdir()} == {"parts"}
    parts = sorted((first / "parts").glob("part.*"))
    assert len(parts) > 2
    assert max(path.stat().st_size for path in parts) <= 20 * 1024
    sums = [line.split() for line in (first / "parts" / "sha256").read_text().splitlines()]
    assert sums == [[hashlib.sha256(path.read_bytes()).hexdigest(), path.name] for path in parts]

    shutil.copytree(first, tmp_path / "damaged")
    content = bytearray((tmp_path / "damaged" / "parts" / parts[1].name).read_bytes())
    content[7] ^= 1
    (tmp_path / "damaged" / "parts" / parts[1].name).write_bytes(content)
    status, said = call(environment, tmp_path / "damaged")
    assert status == 1
    assert "Expected whole parts in" in said
    assert {path.name for path in (tmp_path / "damaged").iterdir()} == {"parts"}

    status, said = call(environment, first, second)
    assert status == 0, said
    processes = (tmp_path / "python.py.steps").read_text().split()
    assert [processes.count(process) for process in dict.fromkeys(processes)] == [2, 2]  # it went on where it was
    assert {path.name for path in second.iterdir()} == {"release", "figures", "statement.txt"}
    found = verify(second / "release")
    assert found.problems == []
    assert "rounding" in found.statement
    # Every step was bought once: what the first call had done is not done again.
    assert {m["name"]: m["num_steps"] for m in found.statement["mechanisms"]} == {
        "DP-SGD": 4,
        "central images": 1,
        "central covariances": 1,
    }
    figures = json.loads((second / "figures" / f"{NAME}.json").read_text())
    assert figures["epsilon"] == found.statement["epsilon"]
    assert figures["figures"]["quick"]["samples"] == 60

    status, said = call(environment, second)
    assert status == 0, said
    assert "DP-SGD" not in said
    assert json.loads((second / "figures" / f"{NAME}.json").read_text()) == figures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"DATA": "nowhere"}, "Expected DATA to be real images, got 'nowhere': set it to their path."),
        ({"CONFIG": "none.yaml"}, "Expected a config at none.yaml, found none: check NAME, or set CONFIG."),
        ({"LIMIT": "30"}, "Expected more than 40 seconds to train in, got LIMIT=30: raise it."),
    ],
)
def test_what_is_missing_is_said(
    environment: dict[str, str], tmp_path: Path, change: dict[str, str], message: str
) -> None:
    assert call(environment | change, tmp_path / "state") == (2, f"{message}\n")


def test_parts_and_calls_are_small_unless_told() -> None:
    text = SCRIPT.read_text(encoding="utf-8")
    assert re.search(r"PART=\$\{PART:-(\d+)m\}", text)[1] == "15"  # type: ignore[index]
    assert re.search(r"LIMIT=\$\{LIMIT:-(\d+)\}", text)[1] == "560"  # type: ignore[index]


@pytest.mark.parametrize("data", ["mnist", "fmnist"])
@pytest.mark.parametrize("epsilon", [0.2, 1.0, pytest.param(10.0, marks=pytest.mark.slow)])  # which takes long
def test_every_recipe_stays_within_its_budget(data: str, epsilon: float) -> None:
    folder, own = ROOT / "configs", ROOT / "configs" / "pretrained" / f"{data}_eps_{epsilon}.yaml"
    files = [folder / f"{data}_28" / f"train_eps_{epsilon}.yaml", folder / "pretrained" / "recipe.yaml"]
    config = configs.load([*files, *([own] if own.exists() else [])])
    assert (config.dp.epsilon, config.dp.delta) == (epsilon, 1e-5)
    assert config.train.warmup.enabled
    assert "not accounted for" in config.dp.selection or "neither choice is accounted for" in config.dp.selection
    if data == "mnist":  # the two differ in nothing that is accounted
        plan = make_plan(config, 60_000)
        assert 0.99 * epsilon < plan.epsilon <= epsilon
