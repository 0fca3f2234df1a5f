"""Breaks the guarantee on purpose, in a copy of the sources: an ordinary test must notice each time.

The list is ``mutations.toml``. One helper process imports the libraries, never dpdm, and forks for every mutation, so
that each costs the run of its tests alone.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Literal, get_args

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "dpdm"
PASSED, FAILED, NONE_SELECTED, ANOTHER_COPY = 0, 1, 5, 90  # pytest's exit statuses; our own
SECONDS = 60  # a mutation's tests take at most three on an idle machine, all together 25
BROKEN = re.compile(r"\b(NameError|UnboundLocalError|ImportError|ModuleNotFoundError|AttributeError|TypeError)\b")
Tag = Literal["privacy", "fidelity"]

HELPER = f"""
import gc, json, os, signal, sys
import cryptography, dp_accounting, hypothesis, numpy, omegaconf, PIL.Image, pytest, safetensors.torch
import scipy.stats, sklearn.datasets, torch, torch._dynamo, tqdm.auto
from dp_accounting import pld, rdp

assert not any(name.partition(".")[0] == "dpdm" for name in sys.modules)
gc.freeze()  # collections in the forks pass over all this
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(job["seconds"])
        os.chdir(job["folder"])  # hypothesis keeps its examples there
        log = os.open("log", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.path.insert(0, job["folder"])
        status = int(pytest.main(job["arguments"]))
        ours = [m.__file__ for n, m in list(sys.modules.items()) if n.partition(".")[0] == "dpdm"]
        if not ours or not all(file.startswith(os.path.join(job["folder"], "dpdm")) for file in ours):
            status = {ANOTHER_COPY}
        sys.stdout.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Mutation:
    """One way to break the guarantee: ``old`` becomes ``new`` in ``file``, and one of ``tests`` must fail.

    ``needs`` is a library without which they are skipped.
    """

    tag: Tag
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    needs: str = ""

    @property
    def can_be_tried(self) -> bool:
        return not self.needs or find_spec(self.needs) is not None


MUTATIONS = {
    name: Mutation(**{**entry, "tests": tuple(entry["tests"])})
    for name, entry in tomllib.loads(Path(__file__).with_name("mutations.toml").read_text(encoding="utf-8")).items()
}


class Copies:
    """Runs tests on copies of the sources, in forks of the helper process."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def run(self, folder: Path, tests: Sequence[str], *options: str, seconds: int = SECONDS) -> tuple[int, str]:
        """Returns pytest's exit status (negative: killed by that signal) and output, for ``folder/dpdm``."""
        arguments = ["-x", "-q", "--no-header", "--tb=short", "--assert=plain", "--import-mode=importlib"]
        arguments += ["-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        arguments += ["-c", str(ROOT / "pyproject.toml"), f"--rootdir={ROOT}", "--hypothesis-seed=0"]
        arguments += ["-m", "not gpu", f"--basetemp={folder / 'tmp'}", *options]
        arguments += [str(ROOT / test) for test in tests]
        job = {"folder": str(folder), "arguments": arguments, "seconds": seconds}
        stdin, stdout = _pipes(self._process)
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        return int(stdout.readline()), (folder / "log").read_text(encoding="utf-8", errors="replace")[-4000:]


def _pipes(process: "subprocess.Popen[str]") -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


@pytest.fixture(scope="module")
def copies() -> Iterator[Copies]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("CI", None)  # with it hypothesis passes over the seed that `run` gives
    with subprocess.Popen(
        [sys.executable, "-c", HELPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield Copies(process)
        _pipes(process)[0].close()


def copy_sources(folder: Path) -> Path:
    shutil.copytree(SOURCE, folder / "dpdm", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "dpdm"


NAMED = sorted({test for mutation in MUTATIONS.values() if mutation.can_be_tried for test in mutation.tests})


@pytest.mark.slow  # `make test` runs them all anyway; none of them is slow itself
def test_named_tests_pass_without_a_mutation(copies: Copies, tmp_path: Path) -> None:
    copy_sources(tmp_path)
    status, output = copies.run(tmp_path, NAMED, seconds=5 * SECONDS)
    assert status == PASSED, output


def test_named_tests_are_in_make_test(copies: Copies, tmp_path: Path) -> None:
    """So that one that fails without its mutation fails there as well. A name that is no test's is an error."""
    copy_sources(tmp_path)
    status, output = copies.run(tmp_path, NAMED, "--collect-only", "-m", "slow")
    assert status == NONE_SELECTED, output


def test_a_test_of_the_installed_package_would_be_noticed(copies: Copies, tmp_path: Path) -> None:
    """Without a copy in the folder, dpdm comes from the installation."""
    status, output = copies.run(tmp_path, ["tests/privacy/test_poisson.py::test_bad_rates_are_refused"])
    assert status == ANOTHER_COPY, output


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutation_is_caught(copies: Copies, tmp_path: Path, name: str) -> None:
    mutation = MUTATIONS[name]
    if not mutation.can_be_tried:
        pytest.skip(f"needs {mutation.needs}")
    assert mutation.tag in get_args(Tag)
    path = copy_sources(tmp_path) / mutation.file
    text = path.read_text(encoding="utf-8")
    found = text.count(mutation.old)
    assert found == 1, f"Expected the old text of {name} once in {mutation.file}, got it {found} times."
    mutated = text.replace(mutation.old, mutation.new)
    compile(mutated, str(path), "exec")  # a syntax error would be caught by any test
    path.write_text(mutated, encoding="utf-8")
    status, output = copies.run(tmp_path, mutation.tests)
    assert not BROKEN.search(output), f"Expected {name} to be code that runs, got:\n{output}"
    assert status == FAILED, f"Expected {mutation.tests} to fail with {name}, got exit status {status}:\n{output}"
