"""Damaged and forged files of every kind, each through the command that a user would read it with."""

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.hostile.harness import Sandbox, stopped_before_the_work
from tests.hostile.mutations import mutate
from tests.made_release import hash_again

from dpdm.released_files import ALLOWED


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
    commands: tuple[str, ...]
    mend: Callable[[Path], None] = lambda folder: None


def _again(folder: Path) -> None:
    with contextlib.suppress(OSError, ValueError, TypeError):  # the statement itself is damaged
        hash_again(folder)


TRAIN = "train --workdir @work/new -- dp.noise_multiplier=4 train.num_iterations=1 train.expected_batch_size=2"
EVALUATE = "evaluate --extractor @given/extractor.pt"
IMAGES = "prepare @work/formats @work/new.zip --resolution 8 --transform center-crop"
CELEBA = "prepare @work/celeba @work/new.zip --attribute Smiling"
ORIGINAL = (
    "release --from @work/model.pth --config @given/model.yaml --workdir @work/new",
    "sample --config @given/model.yaml --workdir @work/new -- model.ckpt=@work/model.pth",
)
RELEASE = (
    "verify @work/release",
    "sample --workdir @work/new -- model.ckpt=@work/release",
    "account --compose @work/release/privacy.json",
)
RUN = ("train --resume --workdir @work/run", "release --workdir @work/run")
FORMATS = ("image.png", "image.jpg", "image.webp", "image.bmp", "image.gif", "image.tiff", "image.ppm", "deep.png")
TARGETS = (
    Target("archive.zip", "archive.zip", (f"{TRAIN} data.path=@work/archive.zip",)),
    Target("archive.zip", "archive.zip", ("prepare @work/archive.zip @work/new.zip",)),
    Target(
        "archive.zip", "archive.zip", ("fid-stats @work/archive.zip @work/new.npz --extractor @given/extractor.pt",)
    ),
    Target("archive.zip", "archive.zip", (f"{EVALUATE} --fid @given/stats.npz --samples @work/archive.zip",)),
    *(Target(f"formats/{name}", "formats", (IMAGES,)) for name in (*FORMATS, "transparent.png")),
    Target("idx/train-images-idx3-ubyte.gz", "idx", ("prepare @work/idx @work/new.zip",)),
    Target("idx/train-labels-idx1-ubyte", "idx", ("prepare @work/idx @work/new.zip",)),
    Target("celeba/list_attr_celeba.txt", "celeba", (CELEBA,)),
    Target("celeba/list_eval_partition.txt", "celeba", (CELEBA,)),
    Target("cifar.tar", "cifar.tar", ("prepare @work/cifar.tar @work/new.zip",)),
    Target("cifar.tar.gz", "cifar.tar.gz", ("prepare @work/cifar.tar.gz @work/new.zip",)),
    Target("model.pth", "model.pth", ORIGINAL),
    Target("old.pth", "model.pth", ORIGINAL),
    Target("stats.npz", "stats.npz", (f"{EVALUATE} --fid @work/stats.npz --samples @given/images",)),
    Target("samples.npz", "samples.npz", (f"{EVALUATE} --fid @given/stats.npz --samples @work/samples.npz",)),
    Target("config.yaml", "config.yaml", (f"{TRAIN} data.path=@given/archive.zip @work/config.yaml",)),
    *(Target(f"released/release/{name}", "released/release", RELEASE) for name in ALLOWED),
    *(Target(f"released/release/{name}", "released/release", RELEASE, _again) for name in ALLOWED[:2]),
    Target(
        "released/synthetic.zip",
        "released/synthetic.zip",
        ("verify @given/released/release --images @work/synthetic.zip",),
    ),
    *(Target(f"run/private/{name}", "run", RUN) for name in ("checkpoint.safetensors", "train.zip", "key")),
    Target("run/config.yaml", "run", RUN),
    Target("run/private/ledger.jsonl", "run", (*RUN, "account --compose @work/run/private/ledger.jsonl")),
)


@pytest.fixture
def box(given: Path, tmp_path: Path) -> Iterator[Sandbox]:
    with stopped_before_the_work():
        yield Sandbox(tmp_path, given)


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
        outcome = box.attempt(*chance.choice(target.commands).split())
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
