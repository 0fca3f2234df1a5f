"""Damaged and forged files of every kind, each through the command that a user would read it with."""

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.hostile.given import make_given
from tests.hostile.harness import Sandbox, stopped_before_the_work
from tests.hostile.mutations import mutate
from tests.made_release import KEYS, hash_again

NEW = "@work/new"


@dataclass(frozen=True)
class Target:
    """A file to be damaged, and the commands that read it: ``@work`` holds a copy of the folder it is in.

    Attributes:
        file: relative to ``given``.
        folder: what is copied to ``@work``; the file's own parent or one above it, or the file alone.
        commands: each reads the damaged file.
        mend: makes what would notice the damage at once agree with it.
    """

    file: str
    folder: str
    commands: tuple[tuple[str, ...], ...]
    mend: Callable[[Path], None] = lambda folder: None


def _again(folder: Path) -> None:
    try:
        hash_again(folder)
    except (OSError, ValueError, TypeError):
        pass  # the statement itself is damaged


READERS = (
    ("train", "--workdir", NEW, "--", "data.path=@work/{0}", "dp.noise_multiplier=4", "train.num_iterations=1", "train.expected_batch_size=2"),
    ("prepare", "@work/{0}", "@work/new.zip"),
    ("fid-stats", "@work/{0}", "@work/new.npz"),
)
IMAGES = ("prepare", "@work/formats", "@work/new.zip", "--resolution", "8", "--transform", "center-crop")
SAMPLES = ("evaluate", "--fid", "@given/stats.npz", "--extractor", "@given/extractor.pt", "--samples", "@work/{0}")
CONVERT = ("release", "--from", "@work/model.pth", "--workdir", NEW, "--", *KEYS)
RELEASE = (
    ("verify", "@work/release"),
    ("sample", "--workdir", NEW, "--", "model.ckpt=@work/release"),
    ("account", "--compose", "@work/release/privacy.json"),
)
RUN = (("train", "--resume", "--workdir", "@work/run"), ("release", "--workdir", "@work/run"))
TARGETS = (
    *(Target("archive.zip", "archive.zip", (tuple(word.format("archive.zip") for word in command),)) for command in (*READERS, SAMPLES)),
    *(Target(f"formats/{name}", "formats", (IMAGES,)) for name in ("image.png", "image.jpg", "image.webp", "image.bmp", "image.gif", "image.tiff", "image.ppm", "deep.png", "transparent.png")),
    Target("idx/train-images-idx3-ubyte.gz", "idx", (("prepare", "@work/idx", "@work/new.zip"),)),
    Target("idx/train-labels-idx1-ubyte", "idx", (("prepare", "@work/idx", "@work/new.zip"),)),
    *(Target(f"celeba/{name}", "celeba", (("prepare", "@work/celeba", "@work/new.zip", "--attribute", "Smiling"),)) for name in ("list_attr_celeba.txt", "list_eval_partition.txt")),
    Target("cifar.tar", "cifar.tar", (("prepare", "@work/cifar.tar", "@work/new.zip"),)),
    Target("cifar.tar.gz", "cifar.tar.gz", (("prepare", "@work/cifar.tar.gz", "@work/new.zip"),)),
    Target("model.pth", "model.pth", (CONVERT, ("sample", "--workdir", NEW, "--", "model.ckpt=@work/model.pth", *KEYS))),
    Target("stats.npz", "stats.npz", (("evaluate", "--fid", "@work/stats.npz", "--extractor", "@given/extractor.pt", "--samples", "@given/images"),)),
    Target("samples.npz", "samples.npz", (tuple(word.format("samples.npz") for word in SAMPLES),)),
    Target("config.yaml", "config.yaml", (("train", "--config", "@work/config.yaml", "--workdir", NEW, "--", "data.path=@given/archive.zip"),)),
    *(Target(f"released/release/{name}", "released/release", RELEASE) for name in ("config.json", "privacy.json", "model.safetensors", "README.md")),
    *(Target(f"released/release/{name}", "released/release", RELEASE, _again) for name in ("config.json", "model.safetensors")),
    Target("released/synthetic.zip", "released/synthetic.zip", (("verify", "@given/released/release", "--images", "@work/synthetic.zip"),)),
    *(Target(f"run/{name}", "run", RUN) for name in ("private/checkpoint.safetensors", "private/ledger.jsonl", "private/train.zip", "private/key", "config.yaml")),
    Target("run/private/ledger.jsonl", "run", (("account", "--compose", "@work/run/private/ledger.jsonl"),)),
)  # fmt: skip


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory, tiny_inception_file: Path) -> Iterator[Sandbox]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("files")
    given = make_given(root / "given")
    shutil.copy(tiny_inception_file, given / "extractor.pt")
    with stopped_before_the_work():
        yield Sandbox(root / "box", given)


def attack(box: Sandbox, count: int, seed: int) -> dict[int | None, int]:
    """Damages files in turn, ``count`` in all; returns how often which exit status came."""
    chance = random.Random(seed)
    contents = {target.file: (box.given / target.file).read_bytes() for target in TARGETS}
    statuses: dict[int | None, int] = {}
    failures = []
    for number in range(count):
        target = TARGETS[number % len(TARGETS)]
        box.clear()
        source, copy = box.given / target.folder, box.work / Path(target.folder).name
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
        damaged = copy if source.is_file() else copy / Path(target.file).relative_to(target.folder)
        damaged.write_bytes(mutate(contents[target.file], chance, [*contents.values()]))
        target.mend(copy)
        kept = damaged.read_bytes()
        outcome = box.attempt(*chance.choice(target.commands))
        statuses[outcome.status] = statuses.get(outcome.status, 0) + 1
        if "Not enough memory" in outcome.err:
            outcome.problems.append("took 2 GiB for a small file")
        if outcome.problems:
            failures.append(f"{number} (seed {seed}), {target.file}, {len(kept)} bytes: {outcome}")
    box.clear()
    assert not failures, "\n".join([f"{len(failures)} of {count}", *failures[:20]])
    return statuses


def test_damaged_files_are_told_in_one_line(box: Sandbox) -> None:
    statuses = attack(box, 2 * len(TARGETS), seed=0)
    assert statuses[2] > len(TARGETS) / 2


@pytest.mark.slow
def test_a_thousand_damaged_files_are_told_in_one_line(box: Sandbox) -> None:
    statuses = attack(box, 1000, seed=1)
    print(statuses)
    assert statuses[2] > 300
