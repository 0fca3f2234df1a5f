"""Configs and command lines that nobody should write, by the function that the command calls; some as real ones."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tests.hostile.harness import STOPPED, Outcome, Sandbox, stopped_before_the_work
from tests.hostile.words import command_lines, documents, overrides

REAL = 50


@pytest.fixture(name="box")
def sandbox(given: Path, tmp_path: Path) -> Iterator[Sandbox]:
    with stopped_before_the_work():
        yield Sandbox(tmp_path, given)


def attack(box: Sandbox, count: int, first_seed: int, *, real: bool = False) -> Counter[int | str | None]:
    """Tries ``count`` cases, half of them config files; returns how often which exit status came."""
    statuses: Counter[int | str | None] = Counter()
    failures: list[Outcome] = []
    limits = settings(
        max_examples=count // 2,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )

    def check(*words: str) -> None:
        outcome = (box.attempt_command if real else box.attempt)(*words)
        box.clear()
        statuses[outcome.status] += 1
        statuses["reached the work"] += STOPPED in outcome.err
        if outcome.problems:
            failures.append(outcome)

    @seed(first_seed)
    @limits
    @given(command_lines())
    def try_lines(words: list[str]) -> None:
        check(*words)

    @seed(first_seed)
    @limits
    @given(documents(), overrides(), st.sampled_from(("train", "train", "sample", "audit run")))
    def try_configs(document: bytes, words: list[str], command: str) -> None:
        (box.work / "config.yaml").write_bytes(document.replace(b"@given", str(box.given).encode()))
        workdir = [] if command == "audit run" else ["--workdir", "@work/new"]
        check(*command.split(), "--config", "@work/config.yaml", *workdir, "--", *words)

    try_lines()
    try_configs()
    assert not failures, "\n".join([f"{len(failures)} of {count}", *map(str, failures[:20])])
    return statuses


def test_odd_configs_and_command_lines_are_told_in_one_line(box: Sandbox) -> None:
    statuses = attack(box, 200, first_seed=0)
    assert statuses[2] > 130
    assert statuses["reached the work"] > 2  # not all fail at the first look


@pytest.mark.slow
def test_ten_thousand_configs_and_command_lines(box: Sandbox) -> None:
    statuses = Counter[int | str | None]()
    for first_seed in range(1, 21):
        statuses += attack(box, 500, first_seed)
    print(statuses)
    assert statuses["reached the work"] > 100


@pytest.mark.slow
def test_real_commands(given: Path, tmp_path: Path) -> None:
    box = Sandbox(tmp_path, given)
    print(attack(box, REAL, first_seed=99, real=True))


def test_a_real_command_is_told_in_one_line(given: Path, tmp_path: Path) -> None:
    box = Sandbox(tmp_path, given)
    outcome = box.attempt_command("prepare", "@given/cifar.tar.gz\x1b[2J\n\udcff", "@work/a.zip")
    assert (outcome.status, outcome.problems) == (2, []), str(outcome)
