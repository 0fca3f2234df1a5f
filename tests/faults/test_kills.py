"""Kills at any moment: nothing is lost but unsaved steps, and epsilon is never under-reported.

The oracle is the same run (same key, same images), never disturbed: a run that was must end on the same bits.
"""

import random
from pathlib import Path

import pytest
from tests.faults.struck import KILLED, STEPS, TINY, Chain, Server, copied, hidden, the_line
from tests.made_release import make_release

from dpdm.privacy.ledger import Ledger
from dpdm.verify import verify
from dpdm.workdir import Workdir


def test_a_run_that_is_killed_again_and_again_ends_on_the_same_bits(
    server: Server, images: Path, tmp_path: Path
) -> None:
    chain = Chain(server, tmp_path, str(images))
    for number, how in KILLS:
        assert chain.go_on(kill=number, how=how)[0] == KILLED
    status, said = chain.go_on()
    assert status == 0, said
    chain.check_ended_as_undisturbed()


# In turn: the archive is written, not renamed; the key; the ledger; half of its first purchase; of the first
# checkpoint; of a step's purchase; of the next checkpoint; it has its name, its folder is not synced; a step is bought,
# not drawn.
KILLS = (
    (13, "before"),
    (23, "before"),
    (32, "before"),
    (37, "half"),
    (10, "half"),
    (12, "half"),
    (19, "half"),
    (14, "after"),
    (18, "after"),
)


@pytest.mark.slow
def test_fifty_kills_at_random_moments(server: Server, tmp_path: Path) -> None:
    """Half of them at a random time, half at a random write; runs on real digits, as many as it takes."""
    overrides = (*TINY, "train.num_iterations=24", "train.expected_batch_size=60", "train.checkpoint_every=5")
    chance, kills, chains = random.Random(0), 0, 0
    while kills < 50:
        chains += 1
        chain = Chain(server, tmp_path / str(chains), "digits", overrides)
        whole_run = 3.0
        done = False
        while not done:
            if kills % 2:
                status, said = chain.go_on(kill=chance.randint(1, 60), how=chance.choice(["before", "half", "after"]))
            else:
                status, said = chain.go_on(seconds=chance.uniform(0, whole_run))
            assert status in (0, KILLED), said
            done = status == 0
            kills += not done
        chain.check_ended_as_undisturbed()
    print(f"{kills} kills of {chains} runs")


@pytest.mark.slow
def test_kills_at_every_write_one_after_the_other(server: Server, images: Path, tmp_path: Path) -> None:
    """The n-th process dies at its n-th write: all of a start, then step by step."""
    for how in ("before", "half", "after"):
        chain, number, status, said = Chain(server, tmp_path / how, str(images)), 0, KILLED, ""
        while status == KILLED:
            number += 1
            status, said = chain.go_on(kill=number, how=how)
        assert status == 0, said
        assert number > 20
        chain.check_ended_as_undisturbed()
        print(f"{number - 1} kills {how} a write")


def test_preparing_that_is_killed_ends_with_the_same_bytes(server: Server, images: Path, tmp_path: Path) -> None:
    assert server("prepare", images, tmp_path / "whole.zip")[0] == 0
    number, status = 0, KILLED
    while status == KILLED:
        number += 1
        dest = tmp_path / "out" / "a.zip"
        status, _ = server("prepare", images, dest, kill=number, how="after")
        if status == KILLED and dest.exists():  # killed when all was done
            break
    assert number > 5
    assert (tmp_path / "out" / "a.zip").read_bytes() == (tmp_path / "whole.zip").read_bytes()
    assert hidden(tmp_path / "out") == []


def test_sampling_that_is_killed_leaves_nothing_for_good(server: Server, tmp_path: Path) -> None:
    make_release(tmp_path)
    command = ["sample", "--workdir", tmp_path, "--", "sampler.num_images=6", "sampler.num_steps=2"]
    for number, how in ((4, "after"), (9, "after"), (13, "before")):
        assert server(*command, kill=number, how=how)[0] == KILLED
        assert not (tmp_path / "samples").exists()
    assert hidden(tmp_path) == [".samples.tmp"]
    status, said = server(*command)
    assert status == 0, said
    assert hidden(tmp_path) == []
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 6
    assert (tmp_path / "synthetic.zip").exists()


def test_a_release_that_is_killed_appears_whole_or_not_at_all(server: Server, stopped: Workdir, tmp_path: Path) -> None:
    run, number = copied(stopped, tmp_path), 0
    while not run.release.exists():
        number += 3
        status, said = server("release", "--workdir", run.root, kill=number, how="after")
        assert status == KILLED, (number, said)
    assert verify(run.release).problems == []
    status, said = server("release", "--workdir", run.root)
    assert status == 2
    assert "released once" in the_line(said)
    assert not run.key.exists()
    assert hidden(run.root) == []


@pytest.mark.slow
def test_the_whole_way_under_kills(server: Server, images: Path, tmp_path: Path) -> None:
    keys = [key for key in TINY if "noise_multiplier" not in key or "warmup" in key]
    run, chance, kills, status, said = Workdir(tmp_path / "w"), random.Random(0), 0, KILLED, ""
    command = ["synthesize", images, "--epsilon", 1, "--workdir", run.root, "--num-images", 8, "--", *keys]
    while status == KILLED:
        fault = {"kill": chance.randint(1, 20 + 10 * kills), "how": chance.choice(["before", "half", "after"])}
        status, said = server(*command, "sampler.num_steps=2", "train.num_epochs=null", **fault)
        kills += status == KILLED
    assert (run.shareable.exists(), kills > 5) == (True, True), said
    print(f"{kills} kills")
    assert verify(run.release).problems == []
    assert Ledger(run.ledger).spent("DP-SGD") == STEPS
    assert hidden(run.root) == []
