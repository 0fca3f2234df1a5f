"""Whole training runs, tiny: resume after any death, the budget, and independence of how a step is computed."""

import math
import os
import shutil
import signal
import stat
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpdm import checkpoint, config, run, warmup
from dpdm import config as configs
from dpdm import train as training
from dpdm.checkpoint import TrainState
from dpdm.config import Config
from dpdm.data.archive import ImageArchive
from dpdm.data.prepare import prepare
from dpdm.diffusion.denoiser import Denoiser
from dpdm.errors import DivergedError, InputError, RunError
from dpdm.physical_batch import physical_batch_size
from dpdm.privacy.dpsgd import PrivateGradient
from dpdm.privacy.ledger import Ledger
from dpdm.release import make_release
from dpdm.run import Run, open_run
from dpdm.train import train
from dpdm.workdir import Workdir

TINY = [
    "dp.noise_multiplier=1.0",
    "train.num_iterations=6",
    "train.expected_batch_size=60",
    "train.checkpoint_every=2",
    "train.warmup.enabled=true",
    "train.warmup.num_iterations=3",
    "train.warmup.count_weight=0.2",
    "loss.noise_multiplicity=2",
    "model.network.width=4",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
    "setup.num_threads=1",
]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "digits.zip"
    prepare("digits", path)
    return path


def tiny(archive: Path, *overrides: str) -> Config:
    return config.load([], [*TINY, f"data.path={archive}", *overrides])


def weights(state: TrainState) -> torch.Tensor:
    return torch.cat([p.flatten() for _, p in sorted(state.ema.items())])


def spent(workdir: Workdir) -> int:
    return Ledger(workdir.ledger).spent("DP-SGD")


class DiedError(Exception):
    """Stands for a process that ends between two lines."""


def die_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Lets the ``call``-th use of ``dpdm.train.<name>`` raise."""
    target, _, name = name.rpartition(".")
    owner = getattr(training, target) if target else training
    real, count = getattr(owner, name), 0

    def dying(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == call:
            raise DiedError
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, dying)


@pytest.fixture(scope="module")
def uninterrupted(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainState:
    workdir = Workdir(tmp_path_factory.mktemp("whole") / "w")
    _, state = train(tiny(archive, "dp.seed=1"), workdir)
    assert spent(workdir) == 6
    return state


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("train_on_central_images", 1),  # central images bought, nothing trained
        ("Books.save", 1),  # before the first checkpoint
        ("private_step", 1),
        ("private_step", 4),  # one step after a checkpoint: it is replayed
        ("update_ema", 5),  # drawn and applied, not saved
        ("Books.save", 3),
    ],
)
def test_a_run_that_died_and_went_on_ends_bit_for_bit_the_same(
    archive: Path, tmp_path: Path, uninterrupted: TrainState, where: str, call: int
) -> None:
    workdir, seeded = Workdir(tmp_path / "w"), tiny(archive, "dp.seed=1")
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, where, call)
        with pytest.raises(DiedError):
            train(seeded, workdir)
    _, state = train(seeded, workdir, resume=True)
    assert state.digest() == uninterrupted.digest()
    assert torch.equal(weights(state), weights(uninterrupted))
    assert state.curves == uninterrupted.curves
    assert torch.equal(state.central["frequencies"], uninterrupted.central["frequencies"])
    assert spent(workdir) == 6  # replayed steps were free
    assert Ledger(workdir.ledger).spent("central images") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_warm_up_stops_when_it_is_asked_to(
    archive: Path,
    tmp_path: Path,
    uninterrupted: TrainState,
    number: int,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It may take an hour, so not at its end; then the run goes on as if nothing had been."""
    workdir, seeded, steps = Workdir(tmp_path / "w"), tiny(archive, "dp.seed=1"), 0
    assert seeded.train.warmup.num_iterations > 2
    real, before = warmup.update_ema, signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored

    def interrupted(*arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 2:
            os.kill(os.getpid(), number)
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(warmup, "update_ema", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(seeded, workdir)
    signal.signal(number, before)
    assert steps == 2
    assert "The warm-up begins again when the run goes on" in capfd.readouterr().err
    _, state = train(seeded, workdir, resume=True)
    assert state.digest() == uninterrupted.digest()
    assert Ledger(workdir.ledger).spent("central images") == 1


def test_who_buys_noise_alone_is_told_so(archive: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Images at noise levels that no float holds; what a step then buys is noise, and that is private."""
    words = ["train.warmup.enabled=false", "train.log_every=1"]
    train(tiny(archive, "loss.p_mean=60", *words), Workdir(tmp_path / "w"))
    told = capfd.readouterr().err
    assert told.count("all gradients are infinite or NaN, so that it adds noise alone (a private figure)") == 1
    assert "of them in a step infinite or NaN" in told
    train(tiny(archive, *words), Workdir(tmp_path / "good"))
    assert "infinite" not in capfd.readouterr().err


def test_a_warm_up_that_diverges_ends_before_steps_are_bought(archive: Path, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "w")
    with pytest.raises(DivergedError, match=r"warm-up.*train\.warmup\.learning_rate"):
        train(tiny(archive, "loss.p_mean=60"), workdir)
    assert Ledger(workdir.ledger).spent("central images") == 1
    assert spent(workdir) == 0


@pytest.mark.parametrize("key", ["setup.data_on_device=true", "setup.overlap_noise=true"])
def test_a_run_may_go_on_with_other_means_to_the_same_bits(
    archive: Path, tmp_path: Path, uninterrupted: TrainState, key: str
) -> None:
    workdir = Workdir(tmp_path / "w")
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, "update_ema", 4)
        with pytest.raises(DiedError):
            train(tiny(archive, "dp.seed=1"), workdir)
    _, state = train(tiny(archive, "dp.seed=1", key), workdir, resume=True)
    assert state.digest() == uninterrupted.digest()
    assert torch.equal(weights(state), weights(uninterrupted))
    assert state.curves == uninterrupted.curves
    assert spent(workdir) == 6  # the step that died with the other means was replayed: the same release


def test_a_lost_step_is_free_with_other_means(archive: Path, tmp_path: Path) -> None:
    """Without dp.seed, so that the identity of a step depends on all that may change its bits."""
    workdir = Workdir(tmp_path / "w")
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, "private_step", 4)
        with pytest.raises(DiedError):
            train(tiny(archive), workdir)
    _, state = train(tiny(archive, "setup.data_on_device=true", "setup.overlap_noise=true"), workdir, resume=True)
    assert (state.step, spent(workdir)) == (6, 6)


def test_the_config_says_where_images_and_noise_are_made(archive: Path, tmp_path: Path) -> None:
    def opened(name: str, *keys: str) -> Run:
        return open_run(tiny(archive, "setup.device=cpu", *keys), Workdir(tmp_path / name), resume=False)[0]

    plain, other = opened("a"), opened("b", "setup.data_on_device=true", "setup.overlap_noise=true")
    assert (plain.images, plain.overlaps_noise) == (plain.archive, False)
    assert (other.images, other.overlaps_noise) == (other.on_device, True)
    assert other.on_device is not None
    moved = replace(other, archive=plain.archive)
    assert moved.images is plain.archive  # never the copy of another archive
    on_a_gpu = replace(plain, device=torch.device("cuda"))
    assert on_a_gpu.overlaps_noise
    refused = replace(on_a_gpu, config=tiny(archive, "setup.overlap_noise=false"))
    assert not refused.overlaps_noise


def test_images_that_do_not_fit_are_left_where_they_are(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, cpu = ImageArchive(archive), torch.device("cpu")
    needed = images.num_images * (8 * 8 + 8)
    monkeypatch.setattr(run, "free_memory", lambda device: 4 * needed)
    assert run.images_on_device(tiny(archive, "setup.data_on_device=true"), images, cpu) is not None
    monkeypatch.setattr(run, "free_memory", lambda device: 4 * needed - 4)
    assert run.images_on_device(tiny(archive), images, torch.device("cuda")) is None
    workdir = Workdir(tmp_path / "w")
    with pytest.raises(InputError, match=r"a quarter of the free memory of cpu.*setup\.data_on_device=false"):
        train(tiny(archive, "setup.data_on_device=true", "setup.device=cpu"), workdir)
    assert not workdir.ledger.exists()


def test_a_step_that_is_not_finite_ends_the_run_before_it_is_kept(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workdir, real = Workdir(tmp_path / "w"), training.private_step

    def broken(*arguments: Any) -> PrivateGradient:
        step = real(*arguments)
        step.gradients[0].view(-1)[0] = math.nan
        return replace(step, figures=step.figures * torch.tensor([1, 1, 1, 0]))

    monkeypatch.setattr(training, "private_step", broken)
    with pytest.raises(RunError, match="finite gradient"):
        train(tiny(archive), workdir)
    state, _ = checkpoint.load(workdir.checkpoint)
    assert state.step == 0
    assert all(torch.isfinite(p).all() for p in state.parameters.values())


def test_a_run_that_diverges_ends_before_it_is_kept(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bad examples count as zero, so nothing else would tell: the budget would go on weights that are no numbers."""
    workdir, real = Workdir(tmp_path / "w"), training.adam_step

    def too_far(config: Any, parameters: dict[str, torch.Tensor], *rest: Any, **named: Any) -> None:
        real(config, parameters, *rest, **named)
        if named["step"] == 1:
            next(iter(parameters.values())).data.view(-1)[0] = math.inf

    monkeypatch.setattr(training, "adam_step", too_far)
    with pytest.raises(DivergedError, match=r"finite weights after the step.*lower optim\.learning_rate"):
        train(tiny(archive), workdir)
    state, _ = checkpoint.load(workdir.checkpoint)
    assert spent(workdir) == 2
    assert all(torch.isfinite(p).all() for p in state.parameters.values())


def test_noise_and_epsilon_may_differ_in_their_last_digits_on_another_machine(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run goes on with the noise with which it began."""
    workdir, made = Workdir(tmp_path / "w"), run.make_plan
    keys = ("train.checkpoint_every=1", "train.warmup.enabled=false", "train.num_iterations=3")
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, "private_step", 3)
        with pytest.raises(DiedError):
            train(tiny(archive, *keys), workdir)
    begun = Ledger(workdir.ledger).header["plan"]

    def elsewhere(factor: float) -> Any:
        def plan(*given: Any) -> Any:
            found = made(*given)
            noise = found.noise_multiplier * factor
            return replace(found, noise_multiplier=noise, epsilon=found.epsilon / factor)

        return plan

    monkeypatch.setattr(run, "make_plan", elsewhere(1 + 1e-3))
    with pytest.raises(InputError, match="Expected the privacy plan"):
        train(tiny(archive, *keys), workdir, resume=True)
    monkeypatch.setattr(run, "make_plan", elsewhere(1 + 1e-4))
    train(tiny(archive, *keys), workdir, resume=True)
    (used,) = {m.noise_multiplier for m in Ledger(workdir.ledger).mechanisms() if m.name == "DP-SGD"}  # type: ignore[union-attr]
    assert used == begun["noise_multiplier"]


def test_what_may_change_is_kept_when_a_run_goes_on(archive: Path, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "w")
    train(tiny(archive, "train.num_iterations=1"), workdir)
    changed = ("train.num_iterations=1", "sampler.num_steps=7", "data.name=Mine")
    train(tiny(archive, *changed), workdir, resume=True)
    kept = configs.load([workdir.config])
    assert (kept.sampler.num_steps, kept.data.name) == (7, "Mine")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("model.ckpt=/nowhere",), r"model\.ckpt=null in training.*model\.init"),
        (("data.class_names=[x, y]",), r"data\.class_names to be those of"),
        (("data.name=/home/me/x",), r"data\.name that may be published"),
        ((f"data.name={'x' * 201}",), r"data\.name of at most 200"),
        (("dp.selection=by /home/me/x",), r"dp\.selection that may be published"),
        (("evaluation.fid_every=1",), r"evaluation\.fid_stats, got none"),
        (("evaluation.fid_every=1", "evaluation.fid_stats=nowhere.npz"), r"nowhere\.npz"),
        (("evaluation.fid_every=1", "evaluation.extractor=nofile.pt"), r"evaluation\.extractor=nofile\.pt"),
        (("setup.device=meta",), r"setup\.device.*'meta'"),
    ],
)
def test_what_cannot_go_well_is_refused_before_there_is_a_run(
    archive: Path, tmp_path: Path, keys: tuple[str, ...], message: str
) -> None:
    workdir = Workdir(tmp_path / "w")
    with pytest.raises(InputError, match=message):
        train(tiny(archive, *keys), workdir)
    assert not workdir.ledger.exists()
    assert not workdir.config.exists()


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_once(archive: Path, tmp_path: Path) -> None:
    config = tiny(archive, "setup.device=cuda", "train.physical_batch_size=16", "train.num_iterations=5")
    config = replace(config, train=replace(config.train, checkpoint_every=1000))
    waits: list[int] = []
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        step = training.private_step

        def watched(*arguments: Any) -> PrivateGradient:
            torch.cuda.set_sync_debug_mode("warn")
            waits.append(len([w for w in caught if "synchronizing" in str(w.message)]))
            return step(*arguments)

        patch.setattr(training, "private_step", watched)
        try:
            train(config, Workdir(tmp_path / "w"))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert np.diff(waits)[1:].tolist() == [1, 1, 1]


def test_steps_that_are_computed_otherwise_are_charged_and_the_budget_holds(archive: Path, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "w")
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, "private_step", 4)
        with pytest.raises(DiedError):
            train(tiny(archive), workdir)
    assert spent(workdir) == 4  # reserved before it was drawn
    _, state = train(tiny(archive, "train.physical_batch_size=7"), workdir, resume=True)
    # The checkpoint was at step 2. Steps 3 and 4 differ in rounding, so they are bought anew: six charged in all.
    assert spent(workdir) == 6
    assert state.step == 4


def test_the_ledger_is_written_before_the_randomness_is_drawn(archive: Path, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "w")
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, "private_step", 1)
        with pytest.raises(DiedError):
            train(tiny(archive), workdir)
    assert spent(workdir) == 1


def test_one_step_does_not_depend_on_the_physical_batch(archive: Path, tmp_path: Path) -> None:
    results = []
    for name, pieces in {"one": ["train.physical_batch_size=1"], "split": ["train.n_splits=3"], "rule": []}.items():
        seeded = tiny(archive, "dp.seed=3", "train.num_iterations=1", "train.warmup.enabled=false", *pieces)
        _, state = train(seeded, Workdir(tmp_path / name))
        # Adam's first moment is a tenth of the gradient: unlike its update, it is continuous.
        results.append(torch.cat([m.flatten() for _, m in sorted(state.exp_avg.items())]))
    assert torch.linalg.norm(results[0]) > 0
    for other in results[1:]:
        assert float((results[0] - other).norm() / results[0].norm()) < 1e-5


def test_two_runs_of_one_config_draw_different_noise(archive: Path, tmp_path: Path) -> None:
    runs = [train(tiny(archive, "train.num_iterations=1"), Workdir(tmp_path / name))[1] for name in "ab"]
    assert not torch.equal(weights(runs[0]), weights(runs[1]))


def test_an_archive_that_was_prepared_into_the_run_is_the_users(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However its path is written."""
    monkeypatch.chdir(tmp_path)
    workdir = Workdir(Path("w"))
    workdir.private.mkdir(parents=True)
    shutil.copy(archive, workdir.train_archive)
    train(tiny(workdir.train_archive.resolve(), "train.num_iterations=1"), workdir)
    assert workdir.train_archive.read_bytes() == archive.read_bytes()


def test_a_run_goes_on_with_its_own_images_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workdir, elsewhere = Workdir(tmp_path / "w"), tmp_path / "elsewhere"
    train(tiny(Path("digits"), "train.num_iterations=1"), workdir)
    train(tiny(Path("digits"), "train.num_iterations=1"), workdir, resume=True)
    assert "is not read" not in capsys.readouterr().err
    train(tiny(elsewhere, "train.num_iterations=1"), workdir, resume=True)
    said = f"data.path={elsewhere} is not read: the run goes on with the images that it prepared from digits."
    assert said in capsys.readouterr().err
    assert config.load([workdir.config]).data.path == "digits"


def test_an_existing_run_needs_resume_and_its_own_config(archive: Path, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "w")
    train(tiny(archive, "train.num_iterations=1"), workdir)
    before = workdir.checkpoint.read_bytes()
    with pytest.raises(InputError, match="--resume"):
        train(tiny(archive, "train.num_iterations=1"), workdir)
    for change in ("optim.learning_rate=1", "dp.noise_multiplier=2", "train.num_iterations=2", "dp.clipping_norm=2"):
        with pytest.raises(InputError, match=r"with which the run in .* began"):
            train(tiny(archive, "train.num_iterations=1", change), workdir, resume=True)
    other = tmp_path / "other.zip"
    prepare("digits", other, split="holdout")
    with pytest.raises(InputError, match="Expected the images"):
        train(tiny(other, "train.num_iterations=1"), workdir, resume=True)
    assert workdir.checkpoint.read_bytes() == before
    assert spent(workdir) == 1


def test_private_files_are_for_their_owner_alone(archive: Path, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "w")
    train(tiny(archive, "train.num_iterations=1"), workdir)
    assert stat.S_IMODE(workdir.private.stat().st_mode) == 0o700
    assert stat.S_IMODE(workdir.key.stat().st_mode) == 0o600


def test_a_damaged_checkpoint_is_noticed(archive: Path, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "w")
    _, state = train(tiny(archive, "train.num_iterations=1"), workdir)
    again, _ = checkpoint.load(workdir.checkpoint)
    assert again.digest() == state.digest()
    content = bytearray(workdir.checkpoint.read_bytes())
    for position in (10, len(content) // 2, len(content) - 100):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        workdir.checkpoint.write_bytes(bytes(damaged))
        with pytest.raises(RuntimeError, match="whole checkpoint"):
            checkpoint.load(workdir.checkpoint)


def test_a_checkpoint_of_another_run_is_refused(archive: Path, tmp_path: Path) -> None:
    one, other = (Workdir(tmp_path / name) for name in "ab")
    for workdir in (one, other):
        train(tiny(archive, "train.num_iterations=1"), workdir)
    one.checkpoint.write_bytes(other.checkpoint.read_bytes())  # as many steps, of the same shape
    with pytest.raises(RunError, match="another run"):
        train(tiny(archive, "train.num_iterations=1"), one, resume=True)
    with pytest.raises(RunError, match="another run"):
        make_release(one)


def test_example_losses_depend_on_their_own_record_alone(archive: Path) -> None:
    images = ImageArchive(archive)
    settings = config.resolve(tiny(archive), images)
    denoiser = config.build_denoiser(settings)
    together = training.example_losses(denoiser, images, np.array([3, 50, 700]), settings.loss, key=bytes(32))
    alone = training.example_losses(denoiser, images, np.array([50]), settings.loss, key=bytes(32))
    assert torch.allclose(together[1], alone[0], rtol=1e-5)
    other = training.example_losses(denoiser, images, np.array([50]), settings.loss, key=bytes(31) + b"1")
    assert not torch.allclose(alone, other, rtol=1e-3)


def test_a_physical_batch_from_a_larger_machine_is_cut_to_the_memory() -> None:
    facts = ["data.resolution=32", "data.num_channels=3", "data.num_classes=10", "loss.noise_multiplicity=8"]
    settings = [*facts, "train.expected_batch_size=2048"]

    def size(gibibytes: int, *wishes: str) -> int:
        return physical_batch_size(config.load([], [*settings, *wishes]), torch.device("cpu"), gibibytes * 2**30)

    assert size(4) == size(80) == 12  # by rule: 100,352 pixels a pass
    assert size(4, "train.physical_batch_size=512") == 12
    assert size(24, "train.physical_batch_size=512") == 73  # six such passes
    assert size(24, "train.physical_batch_size=512", "data.resolution=128") == 4  # where one example fills a pass
    assert size(4, "data.resolution=128") == 1
    assert size(80, "train.physical_batch_size=7") == 7
    assert size(80, "train.physical_batch_size=2000", "train.n_splits=16") == 128


def test_a_gpus_physical_batch_follows_its_memory() -> None:
    facts = ["data.resolution=28", "data.num_channels=1", "data.num_classes=10", "train.expected_batch_size=4096"]
    facts += ["model.network.attention_resolutions=[7]", "loss.noise_multiplicity=8"]

    def size(gibibytes: int, precision: str, *wishes: str, triton: bool = True) -> int:
        settings = config.load([], [*facts, f"setup.precision={precision}", *wishes])
        return physical_batch_size(settings, torch.device("cuda"), gibibytes * 2**30, triton=triton)

    # 64 examples of 32 draws took 6.64 GiB on an H100 in bf16, 13.9 in float32, of which these are 0.4 of the memory.
    assert 900 > size(80, "bf16") > 2 * size(80, "float32") - 3 > 750
    assert size(80, "bf16", "train.physical_batch_size=4096") == pytest.approx(1.75 * size(80, "bf16"), abs=2)
    assert 2 * size(80, "bf16", triton=False) < size(80, "bf16")
    assert size(8, "bf16") == pytest.approx(size(80, "bf16") / 10, abs=1)
    assert size(1, "float32", "model.network.width=256") == 1


@pytest.mark.parametrize(
    "keys", [("loss.augmentation=1",), ("loss.flip=true",), ("loss.augmentation=1", "loss.flip=true")]
)
def test_each_draw_moves_its_image_by_the_records_own_numbers(
    archive: Path, monkeypatch: pytest.MonkeyPatch, keys: tuple[str, ...]
) -> None:
    images = ImageArchive(archive)
    settings = config.resolve(tiny(archive, "loss.noise_multiplicity=3", *keys), images)
    denoiser = config.build_denoiser(settings)
    seen: list[torch.Tensor] = []
    loss = training.diffusion_loss

    def look(denoiser: Denoiser, shown: torch.Tensor, *rest: Any, **draws: Any) -> torch.Tensor:
        seen.append(shown)
        return loss(denoiser, shown, *rest, **draws)

    monkeypatch.setattr(training, "diffusion_loss", look)
    together = training.example_losses(denoiser, images, np.array([3, 50, 700]), settings.loss, key=bytes(32))
    alone = training.example_losses(denoiser, images, np.array([50]), settings.loss, key=bytes(32))
    assert torch.allclose(together[1], alone[0], rtol=1e-5)
    assert torch.equal(seen[0][:, 1], seen[1][:, 0])
    assert seen[0].shape == (3, 3, 1, 8, 8)
    still = torch.from_numpy(images.read(np.array([3, 50, 700]))).float() / 127.5 - 1
    mirrored = (seen[0] == still.flip(3)).flatten(2).all(2)
    if keys == ("loss.flip=true",):
        assert (mirrored | (seen[0] == still).flatten(2).all(2)).all()
        assert 0 < mirrored.sum() < 9
    else:
        assert len(torch.unique(seen[0].flatten(0, 1), dim=0)) == 9  # each draw has a distortion of its own
