"""Several processes, started as a user starts them: the run of one, and what happens when one dies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpdm import checkpoint, config, distributed
from dpdm.checkpoint import TrainState
from dpdm.data.prepare import prepare
from dpdm.errors import PeerError
from dpdm.privacy.ledger import Ledger
from dpdm.run import share_state
from dpdm.train import train
from dpdm.workdir import Workdir

TINY = [
    "dp.seed=1",
    "dp.noise_multiplier=1.0",
    "train.num_iterations=4",
    "train.expected_batch_size=60",
    "train.checkpoint_every=1",
    "train.warmup.enabled=true",
    "train.warmup.num_iterations=3",
    "loss.noise_multiplicity=2",
    "model.network.width=4",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
    "setup.device=cpu",
    "setup.num_threads=1",
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    prepare("digits", path)
    return path


def start(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, *arguments], stderr=subprocess.PIPE, text=True, env={**os.environ})


def moments(state: TrainState) -> torch.Tensor:
    """Adam's first moment: unlike its update, it moves as little as the gradients do."""
    return torch.cat([m.flatten() for _, m in sorted(state.exp_avg.items())]).double()


def distance(first: TrainState, second: TrainState) -> float:
    return float((moments(first) - moments(second)).norm() / moments(first).norm())


@pytest.fixture(scope="module")
def alone(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainState:
    settings = config.load([], [*TINY, f"data.path={archive}"])
    return train(settings, Workdir(tmp_path_factory.mktemp("alone") / "w"))[1]


@pytest.mark.slow  # so does the next, up to the step at which one of them dies
def test_two_processes_train_as_one(archive: Path, tmp_path: Path, alone: TrainState) -> None:
    process = start(*TORCHRUN, "-m", "dpdm", "train", "--workdir", f"{tmp_path}/w", "--", *TINY, f"data.path={archive}")
    output = process.communicate(timeout=120)[1]
    assert process.returncode == 0, output
    state, _ = checkpoint.load(Workdir(tmp_path / "w").checkpoint)
    assert state.step == 4
    assert distance(state, alone) < 1e-5
    assert state.curves["batch_size"] == alone.curves["batch_size"]
    assert output.count("Trained 4 steps") == 1  # one process speaks


@pytest.mark.slow
def test_a_process_that_dies_ends_the_run_with_a_message_and_a_state_to_go_on_from(
    archive: Path, tmp_path: Path, alone: TrainState
) -> None:
    """Started by the key, not by torchrun; the run goes on in one process."""
    workdir = Workdir(tmp_path / "w")
    code = (
        "import os, dpdm.train as t; f = t.private_step; steps = []\n"
        "def step(*a):\n"
        " steps.append(1)\n"
        " if os.environ['RANK'] == '1' and len(steps) == 3: os._exit(9)\n"
        " return f(*a)\n"
        "t.private_step = step\n"
        "from dpdm.cli import main; main()"
    )
    (tmp_path / "run.py").write_text(code)
    arguments = ["train", "--workdir", str(workdir.root), "--", *TINY, f"data.path={archive}"]
    process = start(*TORCHRUN, str(tmp_path / "run.py"), *arguments)
    output = process.communicate(timeout=120)[1]
    assert process.returncode == 1
    assert "dpdm: Process 0 lost contact with another one of this run" in output
    assert "--resume" in output
    assert Ledger(workdir.ledger).spent("DP-SGD") == 3  # charged before it was drawn
    _, state = train(config.load([], [*TINY, f"data.path={archive}"]), workdir, resume=True)
    assert state.step == 4
    assert distance(state, alone) < 1e-5


@pytest.mark.slow  # docs/from-the-original.md, which is tested, starts two processes by the key as well
def test_the_key_starts_the_processes_and_a_mistake_is_one_line(archive: Path, tmp_path: Path) -> None:
    overrides = [*TINY, f"data.path={archive}", "setup.n_gpus_per_node=2", "train.num_iterations=1"]
    process = start("-m", "dpdm", "train", "--workdir", f"{tmp_path}/w", "--", *overrides)
    output = process.communicate(timeout=120)[1]
    assert process.returncode == 0, output
    again = start("-m", "dpdm", "train", "--workdir", f"{tmp_path}/w", "--", *overrides)
    output = again.communicate(timeout=120)[1]
    assert again.returncode == 1
    assert output.count("dpdm: Expected no run in") == 1
    assert output.rstrip().splitlines()[-1].startswith("dpdm: Of 2 processes one ended early")


def test_on_main_and_together_fail_on_all_or_none(together) -> None:
    def fails() -> None:
        raise ZeroDivisionError

    def on_main(rank: int) -> str:
        assert distributed.on_main(lambda: distributed.rank()) == 0
        try:
            distributed.on_main(fails)
        except (ZeroDivisionError, PeerError) as error:
            return type(error).__name__
        return "nothing"

    def block(rank: int) -> str:
        try:
            with distributed.together():
                if rank > 0:
                    fails()
        except (ZeroDivisionError, PeerError) as error:
            return type(error).__name__
        return "nothing"

    assert together(3, on_main) == ["ZeroDivisionError", "PeerError", "PeerError"]
    assert together(3, block) == ["PeerError", "ZeroDivisionError", "PeerError"]


def test_a_state_is_shared_by_name_whatever_the_order(together) -> None:
    """Rank 0 has it from a checkpoint, in the order of the file, the others in that of the network."""

    def share(rank: int) -> TrainState:
        names = ["a", "b", "c"] if rank else ["c", "a", "b"]
        one, two, three, four = ({name: torch.full((2,), ord(name) - 97.0 * rank) for name in names} for _ in range(4))
        state = TrainState(one, two, three, four, step=0 if rank else 7)
        state.averages = {f"0.5/{name}": torch.full((2,), ord(name) - 97.0 * rank) for name in names}
        state.central = {} if rank else {"frequencies": torch.tensor([3.0, 1.0])}
        share_state(state)
        return state

    for state in together(3, share):
        assert state.step == 7
        assert state.central["frequencies"].tolist() == [3.0, 1.0]
        for group in (state.parameters, state.ema, state.average(0.5), state.exp_avg, state.exp_avg_sq):
            assert {name: float(tensor[0]) for name, tensor in group.items()} == {"a": 97.0, "b": 98.0, "c": 99.0}


def test_shares_cover_everything_once(together) -> None:
    for count in (0, 1, 5, 12):
        parts = together(4, lambda rank, count=count: list(distributed.share(count)))
        assert [index for part in parts for index in part] == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
