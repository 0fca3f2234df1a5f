"""``data.unit=group``: what one person with several images can change, and the whole way to a release that says so."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.made_release import edit, make_release
from torch import Tensor

from dpdm import central_model, run, run_audit, train
from dpdm import config as configs
from dpdm.account import compose
from dpdm.announcement import announcement
from dpdm.cli import run_command
from dpdm.config import Config
from dpdm.data.archive import ArchiveWriter, ImageArchive
from dpdm.errors import InputError
from dpdm.privacy import noise
from dpdm.privacy.accounting import parts
from dpdm.privacy.central import WarmupConfig
from dpdm.privacy.ledger import Ledger
from dpdm.synthesize import default_num_images
from dpdm.verify import page, verify
from dpdm.workdir import Workdir

SIZES = (1, 6, 2, 3, 9, 1, 4, 2, 5, 3)
GROUPS = np.random.default_rng(0).permutation(np.repeat(np.arange(len(SIZES)), SIZES))
BATCH, DRAWS, CLIP = 4, 3, 1.0
KEY = bytes(32)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_archive(path: Path, pixels: np.ndarray, groups: np.ndarray | None = GROUPS) -> Path:
    with ArchiveWriter(path, ["a", "b", "c"], None if groups is None else groups.tolist()) as writer:
        for index, image in enumerate(pixels):
            writer.add(image, index % 3)
    return path


def numbered_images() -> np.ndarray:
    """Images that say by their grey level which they are."""
    return np.broadcast_to(np.arange(len(GROUPS), dtype=np.uint8)[:, None, None, None], (len(GROUPS), 1, 8, 8))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "images.zip", numbered_images())


def config_for(archive: Path, *keys: str) -> Config:
    return configs.load(
        [],
        [
            f"data.path={archive}",
            "data.unit=group",
            "dp.noise_multiplier=2.5",
            f"dp.clipping_norm={CLIP}",
            "train.num_iterations=2",
            f"train.expected_batch_size={BATCH}",
            "train.physical_batch_size=3",
            f"loss.noise_multiplicity={DRAWS}",
            "model.network.width=4",
            "model.network.channel_multipliers=[1]",
            "model.network.num_res_blocks=1",
            "setup.device=cpu",
            "setup.num_threads=1",
            *keys,
        ],
    )


@pytest.fixture
def opened(archive: Path, tmp_path: Path) -> run.Run:
    """A run that has bought nothing yet, with weights that give every layer a gradient."""
    found, _, _ = run.open_run(config_for(archive), Workdir(tmp_path / "w"), resume=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in found.denoiser.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return found


def clipped_sum(opened: run.Run, batch: list[int], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Returns what a step of training makes of a batch, without noise, (P,) float64."""
    monkeypatch.setattr(train, "poisson_sample", lambda key, num_records, rate: np.array(batch, np.int64))
    quiet = replace(opened, plan=replace(opened.plan, noise_multiplier=1e-12))
    step = train.private_step(quiet, dict(opened.denoiser.network.named_parameters()), train.step_keys(KEY))
    return torch.cat([g.flatten() for g in step.gradients]).double() * BATCH


def test_a_person_moves_a_step_by_at_most_the_clipping_norm(opened: run.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = list(range(len(SIZES)))
    whole = clipped_sum(opened, batch, monkeypatch)
    moved = [
        float((whole - clipped_sum(opened, [other for other in batch if other != person], monkeypatch)).norm())
        for person in batch
    ]
    assert max(moved) <= CLIP * (1 + 1e-5)
    assert min(moved) > CLIP * 0.999  # all of them are clipped, so that the test can fail


def test_with_images_as_the_unit_a_person_moves_it_further(opened: run.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    images = replace(opened, archive=ImageArchive(opened.archive.path))
    others = np.flatnonzero(GROUPS != 4).tolist()
    moved = clipped_sum(images, list(range(len(GROUPS))), monkeypatch) - clipped_sum(images, others, monkeypatch)
    assert float(moved.norm()) > 8 * CLIP  # their nine images, each clipped alone


class Shown:
    """What the loss is shown of each draw."""

    def __init__(self, opened: run.Run, monkeypatch: pytest.MonkeyPatch) -> None:
        self._run, self._loss = opened, train.diffusion_loss
        monkeypatch.setattr(train, "diffusion_loss", self._see)

    def _see(self, denoiser: Any, images: Tensor, labels: Tensor, **draws: Any) -> Tensor:
        self.images = ((images[..., 0, 0, 0] + 1) * 127.5).round().long()
        self.labels = labels
        self.draws = (draws["sigma"], draws["noise"], draws["drop_label"])
        return self._loss(denoiser, images, labels, **draws)

    def __call__(self, records: list[int], key: bytes = KEY) -> Tensor:
        return train.example_losses(
            self._run.denoiser, self._run.archive, np.array(records), self._run.config.loss, key=key
        ).detach()


def test_every_draw_takes_an_image_of_its_own_person(opened: run.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(opened, monkeypatch)
    records = [4, 0, 6, 8]
    counts = np.zeros(len(GROUPS))
    for number in range(200):
        shown(records, bytes([number]) * 32)
        assert shown.images.shape == (DRAWS, len(records))
        assert torch.equal(torch.from_numpy(GROUPS)[shown.images], torch.tensor(records).expand(DRAWS, -1))
        assert torch.equal(shown.labels, shown.images % 3)  # each image has its own class
        counts += np.bincount(shown.images.flatten().numpy(), minlength=len(GROUPS))
    for person in records:
        mean = 200 * DRAWS / SIZES[person]
        assert np.abs(counts[person == GROUPS] - mean).max() <= 5 * mean**0.5  # 0 for who has one image


def test_the_loss_of_a_person_is_the_mean_over_draws(opened: run.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(opened, monkeypatch)
    found = shown([4, 1, 9])
    sigma, noise, drop = shown.draws
    images = opened.archive.read(shown.images.flatten().numpy()).reshape(DRAWS, 3, 1, 8, 8)
    for person in range(3):
        losses = [
            shown._loss(
                opened.denoiser,
                torch.from_numpy(images[draw, person : person + 1]).float() / 127.5 - 1,
                shown.labels[draw, person : person + 1],
                sigma=sigma[draw : draw + 1, person : person + 1],
                noise=noise[draw : draw + 1, person : person + 1],
                drop_label=drop[draw : draw + 1, person : person + 1],
            )[0]
            for draw in range(DRAWS)
        ]
        assert float(found[person]) == pytest.approx(float(torch.stack(losses).mean().detach()), rel=1e-4)


def test_no_person_enters_the_loss_of_another(opened: run.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Shown(opened, monkeypatch)
    together = shown([1, 4, 8])
    images, draws = shown.images, shown.draws
    assert torch.allclose(shown([4])[0], together[1], rtol=1e-5)
    assert torch.equal(shown.images[:, 0], images[:, 1])
    for alone, among in zip(shown.draws, draws, strict=True):
        assert torch.equal(alone[:, 0], among[:, 1])
    pixels = opened.archive._pixels
    assert pixels is not None  # so few are kept in memory
    pixels[GROUPS == 1] = 255
    after = shown([1, 4, 8])
    assert torch.equal(after[1:], together[1:])
    assert after[0] != together[0]


def test_batches_and_ledger_count_persons(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, sample = [], train.poisson_sample
    monkeypatch.setattr(train, "poisson_sample", lambda *question: asked.append(question[1:]) or sample(*question))
    train.train(config_for(archive, "train.num_iterations=1"), Workdir(tmp_path / "w"))
    assert asked == [(len(SIZES), BATCH / len(SIZES))]
    bought = Ledger(tmp_path / "w/private/ledger.jsonl")
    assert [m.sampling_rate for m in parts(bought.mechanisms())] == [BATCH / len(SIZES)]
    assert (bought.header["plan"]["dataset_size"], bought.header["plan"]["unit"]) == (len(SIZES), "group")


def test_what_is_said_before_counts_persons(archive: Path, tmp_path: Path) -> None:
    opened, _, _ = run.open_run(config_for(archive), Workdir(tmp_path / "w"), resume=False)
    assert f"one of {len(SIZES)} groups" in announcement(opened)
    assert "data.unit" not in announcement(opened)
    images, _, _ = run.open_run(config_for(archive, "data.unit=image"), Workdir(tmp_path / "v"), resume=False)
    assert "Warning: data.unit=image, though the images have groups" in announcement(images)
    with pytest.raises(InputError, match=f"for {len(SIZES)} groups"):
        run.open_run(config_for(archive, "dp.delta=0.1"), Workdir(tmp_path / "x"), resume=False)
    with pytest.raises(InputError, match="the number of groups"):
        run.open_run(config_for(archive, "train.expected_batch_size=11"), Workdir(tmp_path / "x"), resume=False)


def test_synthetic_images_are_as_many_as_persons(archive: Path) -> None:
    for unit, count in (("group", len(SIZES)), ("image", len(GROUPS))):
        assert default_num_images(ImageArchive(archive, unit), ImageArchive(archive, unit)) == 2 * count  # type: ignore[arg-type]


def test_without_groups_or_with_another_word_it_is_refused(tmp_path: Path) -> None:
    plain = write_archive(tmp_path / "plain.zip", numbered_images(), None)
    with pytest.raises(InputError, match=r"groups for data\.unit=group.*dpdm prepare --groups"):
        train.train(config_for(plain), Workdir(tmp_path / "w"))
    assert not (tmp_path / "w" / "config.yaml").exists()
    with pytest.raises(InputError, match=r"data\.unit"):
        config_for(plain, "data.unit=person")


def central(path: Path, pixels: np.ndarray, norm: float) -> np.ndarray:
    archive = ImageArchive(write_archive(path, pixels), "group")
    quiet = WarmupConfig(noise_multiplier=1e-12, means_per_class=2, clipping_norm=norm, count_weight=0.0)
    means = central_model.central_images(archive, quiet, num_classes=3, key=KEY).means
    return means.reshape(6, -1) * len(SIZES) / 6


def test_a_person_adds_one_image_to_the_central_images(tmp_path: Path) -> None:
    white = np.full((len(GROUPS), 1, 8, 8), 255, np.uint8)
    assert central(tmp_path / "all.zip", white, 100.0).sum() == pytest.approx(len(SIZES) * 64)
    whole = central(tmp_path / "a.zip", white, 2.0)
    for person in (1, 4, 5):
        without = white.copy()
        without[person == GROUPS] = 0  # adds nothing
        moved = whole - central(tmp_path / "b.zip", without, 2.0)
        assert np.linalg.norm(moved) == pytest.approx(2.0, rel=1e-6)
        assert (np.abs(moved).sum(axis=1) > 1e-6).sum() == 1


def test_a_person_adds_one_image_to_the_central_covariances(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero = central_model.Central(np.zeros((3, 1, 8, 8)), np.arange(3), np.full(3, len(SIZES) / 3))
    quiet = WarmupConfig(covariance_noise_multiplier=1e-9, covariance_clipping_norm=2.0)
    found: list[np.ndarray] = []
    monkeypatch.setattr(central_model, "principal_factors", lambda matrices, *_: found.append(matrices) or matrices)
    pixels = np.full((len(GROUPS), 1, 8, 8), 255, np.uint8)
    central_model.with_covariances(
        zero, ImageArchive(write_archive(tmp_path / "a.zip", pixels), "group"), quiet, key=KEY
    )
    for person in (1, 4, 5):
        without = pixels.copy()
        without[person == GROUPS] = 0  # adds nothing
        archive = ImageArchive(write_archive(tmp_path / "b.zip", without), "group")
        central_model.with_covariances(zero, archive, quiet, key=KEY)
        moved = (found[0] - found[-1]) * len(SIZES) / 3
        assert np.linalg.norm(moved) == pytest.approx(4.0, rel=1e-3)
        assert (np.abs(moved).sum(axis=(1, 2)) > 1e-3).sum() == 1


def test_a_person_adds_one_image_to_the_central_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The moments of all cells change by one person's product, from what they are without any of their images."""
    quiet = WarmupConfig(
        covariance_noise_multiplier=1e-9,
        covariance_clipping_norm=2.0,
        covariance_rank=1,
        splits=1,
        cell_noise_multiplier=1e-9,
    )
    size = len(SIZES)
    first = np.zeros((3, 1, 1, 8, 8))
    first[:, :, :, :, :4], first[:, :, :, :, 4:] = 0.1, -0.1
    bought = central_model.Central(np.zeros((3, 1, 8, 8)), np.arange(3), np.full(3, size / 3), factors=first)
    split = central_model.split_classes(bought, quiet)
    found: list[np.ndarray] = []

    def note(pieces: Iterator[np.ndarray], labels: np.ndarray, **named: Any) -> np.ndarray:
        found.append(np.concatenate([np.concatenate(list(pieces)), labels[:, None]], 1))
        assert named["dataset_size"] == len(labels)
        return np.zeros((6, 65, 65))

    monkeypatch.setattr(central_model, "noisy_class_covariances", note)
    pixels = np.random.default_rng(0).integers(0, 256, (len(GROUPS), 1, 8, 8), dtype=np.uint8)
    for person in (None, 1, 4, 5):
        other = pixels.copy()
        other[person == GROUPS] = 255 - other[person == GROUPS]
        archive = ImageArchive(write_archive(tmp_path / "b.zip", other), "group")
        central_model.with_cells(bought, split, archive, quiet, key=KEY)
        assert len(found[-1]) == size
        assert (found[-1] != found[0]).any(1).sum() == (person is not None)


def test_an_audit_counts_persons(archive: Path, tmp_path: Path) -> None:
    found = run_audit._run_with_canaries(config_for(archive), str(archive), tmp_path / "audit", 20)
    assert found.plan.dataset_size == len(SIZES) + 20
    parameters = dict(found.denoiser.network.named_parameters())
    canaries = run_audit._Canaries.place(found, parameters, KEY)
    records = np.array([0, len(SIZES) - 1, len(SIZES), len(SIZES) + 19])
    losses = canaries.losses(found, parameters[canaries.name], records, KEY)
    own = train.example_losses(found.denoiser, found.archive, records[:2], found.config.loss, key=KEY)
    assert torch.allclose(losses[:2], own)


# The whole way

FEW_STEPS = (
    "train.num_epochs=null",
    "train.num_iterations=2",
    "train.expected_batch_size=5",
    "model.network.width=4",
    "model.network.channel_multipliers=[1]",
    "train.warmup.num_iterations=3",
    "sampler.num_steps=2",
    "setup.device=cpu",
    "setup.num_threads=1",
)
NUM_PERSONS, NUM_IMAGES = 23, 173


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ``dpdm synthesize`` on persons with 1 to 15 images each."""
    root = tmp_path_factory.mktemp("persons")
    random = np.random.default_rng(0)
    sizes = np.arange(NUM_PERSONS) % 14 + 1
    sizes[-1] += NUM_IMAGES - sizes.sum()
    lines = ["file,group"]
    for index, person in enumerate(random.permutation(np.repeat(np.arange(NUM_PERSONS), sizes)).tolist()):
        name = f"{'ab'[index % 2]}/{index:03d}.png"
        (root / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8), np.uint8)).save(root / "in" / name)
        lines.append(f"{name},Lovelace {person}")
    (root / "who.csv").write_text("\n".join(lines))
    words = ["synthesize", str(root / "in"), "--groups", str(root / "who.csv"), "--epsilon", "1"]
    with pytest.MonkeyPatch.context() as patch:  # a random key holds nobody out one time in sixty
        patch.setattr(noise, "new_key", lambda: KEY)
        assert run_command([*words, "--workdir", str(root / "run"), "--", *FEW_STEPS]) == 0
    return root / "run"


def test_the_whole_way_speaks_of_persons(made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    private, held_out = (ImageArchive(made / f"private/{name}.zip") for name in ("train", "holdout"))
    assert private.num_groups + held_out.num_groups == NUM_PERSONS
    assert private.num_images + held_out.num_images == NUM_IMAGES
    statement = json.loads((made / "release/privacy.json").read_text())
    assert statement["unit"] == "one person (all of their images)"
    assert "one person (all of their images)" in statement["adjacency"]
    assert statement["dataset_size"] == statement["public_facts"]["dataset_size"] == private.num_groups
    assert statement["mechanisms"][1]["sampling_rate"] == 5 / private.num_groups
    assert ImageArchive(made / "synthetic.zip").num_images == NUM_PERSONS
    assert compose([made / "release/privacy.json", made / "private/ledger.jsonl"], None)["num_runs"] == 2
    assert run_command(["verify", str(made / "release")]) == 0
    told = " ".join(capfd.readouterr().out.split())
    assert f"one person (all of their images), of the {private.num_groups} persons that the model learned from" in told
    assert "2 together by epsilon" in told
    assert "Each person has one image" not in told


def test_nothing_that_is_shared_counts_images_or_names_persons(made: Path) -> None:
    counts = {ImageArchive(made / f"private/{name}.zip").num_images for name in ("train", "holdout")} | {NUM_IMAGES}
    assert min(counts) > 10  # no other number of the release
    shared = {path: path.read_text() for path in (made / "release").iterdir() if path.suffix != ".safetensors"}
    page = (made / "shareable.html").read_text()
    shared[made / "shareable.html"] = re.sub(r"<style>.*?</style>|<img[^>]*>", "", page, flags=re.DOTALL)
    for path, text in shared.items():
        words = re.sub(r"\b[0-9a-f]{64}\b|\d+[.e-][\d.e-]+", "", text)  # neither hashes nor fractions
        assert not counts & {int(number) for number in re.findall(r"\d+", words)}, path
    for path in made.rglob("*"):
        assert not path.is_file() or b"Lovelace" not in path.read_bytes(), path


# Statements that do not fit


@pytest.fixture
def release(tmp_path: Path) -> Path:
    return make_release(tmp_path, keys=["data.unit=group"])


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("privacy.json", lambda s: s.update(unit="one image"), "unit is one image, by config.json it is one person"),
        ("privacy.json", lambda s: s.update(adjacency="add or remove one record"), "adjacency in privacy.json"),
        ("privacy.json", lambda s: s.update(dataset_size=400), "sampling_rate is"),
        (
            "config.json",
            lambda c: c["data"].update(unit="image"),
            "unit is one person (all of their images), by config",
        ),
        ("config.json", lambda c: c["data"].update(unit="hospital"), "config.json cannot be used"),
    ],
)
def test_a_release_of_another_unit_is_refused(
    release: Path, name: str, change: Callable[[Any], Any], problem: str
) -> None:
    assert verify(release).problems == []
    edit(release, name, lambda content: change(content) and None)
    assert any(problem in line for line in verify(release).problems)


def test_the_unit_is_compared_whoever_wrote_the_statement(release: Path) -> None:
    edit(release, "privacy.json", lambda s: s["versions"].update(dpdm="0.0.1"))
    edit(release, "privacy.json", lambda s: s.update(unit="one image"))
    assert [line for line in verify(release).problems if "unit" in line]


def test_several_persons_without_a_guarantee(release: Path) -> None:
    found = verify(release)
    found.statement["group_privacy"]["5"] = {"epsilon": None, "delta": 1.0, "note": "no guarantee"}
    assert "5 persons together not at all" in " ".join(page(found).split())


def test_images_and_persons_are_not_added_up(release: Path, tmp_path: Path) -> None:
    persons, images = release / "privacy.json", make_release(tmp_path / "other") / "privacy.json"
    assert compose([persons, persons], None)["num_runs"] == 2
    with pytest.raises(InputError, match="images in some and persons in others"):
        compose([persons, images], None)


# The command line


def test_prepare_by_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("7_a.png", "7_b.png", "8_a.png"):
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / name)
    dest = tmp_path.parent / f"{tmp_path.name}.zip"
    assert run_command(["prepare", str(tmp_path), str(dest), "--groups", r"^(\d+)_"]) == 0
    assert "of 2 groups" in capfd.readouterr().err
    assert run_command(["prepare", str(tmp_path), str(dest) + ".zip", "--groups", "nowhere.csv"]) == 2
    assert "nowhere.csv" in capfd.readouterr().err
