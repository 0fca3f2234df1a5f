"""What training buys from the data, under which randomness, and what one record can change."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpdm import checkpoint, train
from dpdm import config as configs
from dpdm.config import Config
from dpdm.data.archive import ArchiveWriter
from dpdm.errors import InputError, RunError
from dpdm.plan import make_plan
from dpdm.privacy import central
from dpdm.privacy.accounting import Mechanism, epsilon_spent
from dpdm.privacy.dpsgd import per_example_gradients
from dpdm.privacy.ledger import Ledger
from dpdm.run import Books
from dpdm.workdir import Workdir

NUM_IMAGES, BATCH, STEPS, DRAWS = 48, 12, 3, 2
CLIP = 6.5  # among the norms of the gradients in the tests of one step, 5.5 to 7.6


@dataclass
class Watch:
    """What training did, seen from outside: arguments of its calls and the ledger's state at each."""

    workdir: Workdir
    runs: list[train.Run] = field(default_factory=list)
    keys: list[train.StepKeys] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    gradients: list[dict[str, Any]] = field(default_factory=list)
    charged_before_means: list[int] = field(default_factory=list)

    def install(self, monkeypatch: pytest.MonkeyPatch, crash_at: int | None = None) -> None:
        step, sample, gradient, means = (
            train.private_step,
            train.poisson_sample,
            train.private_gradient,
            central.noisy_class_means,
        )

        def private_step(run: train.Run, parameters: dict[str, Tensor], keys: train.StepKeys):
            self.runs.append(run)
            self.keys.append(keys)
            if crash_at == len(self.keys) - 1:
                raise DiedError
            return step(run, parameters, keys)

        def poisson_sample(key: bytes, num_records: int, rate: float) -> np.ndarray:
            batch = sample(key, num_records, rate)
            charged = Ledger(self.workdir.ledger).spent("DP-SGD")
            self.samples.append(
                {"key": key, "num_records": num_records, "rate": rate, "batch": batch, "charged": charged}
            )
            return batch

        def private_gradient(parameters: dict[str, Tensor], loss: Any, batch: np.ndarray, **arguments: Any):
            result = gradient(parameters, loss, batch, **arguments)
            flat = torch.cat([g.flatten() for g in result.gradients])
            self.gradients.append({**arguments, "batch": batch, "result": flat})
            return result

        def noisy_class_means(*positional: Any, **arguments: Any) -> central.ClassMeans:
            self.charged_before_means.append(Ledger(self.workdir.ledger).spent("central images"))
            return means(*positional, **arguments)

        monkeypatch.setattr(train, "private_step", private_step)
        monkeypatch.setattr(train, "poisson_sample", poisson_sample)
        monkeypatch.setattr(train, "private_gradient", private_gradient)
        monkeypatch.setattr("dpdm.central_model.noisy_class_means", noisy_class_means)


class DiedError(Exception):
    """Stands for a process that dies."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def write_archive(path: Path, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    with ArchiveWriter(path, ["a", "b", "c"]) as writer:
        for index in range(NUM_IMAGES):
            writer.add(random.integers(0, 256, (1, 8, 8), np.uint8), index % 3)
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_archive(tmp_path / "images.zip")


def config_for(archive: Path, *overrides: str) -> Config:
    return configs.load(
        [],
        [
            f"data.path={archive}",
            "dp.noise_multiplier=2.5",
            "dp.clipping_norm=0.01",
            f"train.num_iterations={STEPS}",
            f"train.expected_batch_size={BATCH}",
            "train.physical_batch_size=4",
            "train.checkpoint_every=1",
            f"loss.noise_multiplicity={DRAWS}",
            "model.network.width=4",
            "model.network.channel_multipliers=[1]",
            "model.network.num_res_blocks=1",
            "setup.device=cpu",
            "setup.num_threads=1",
            *overrides,
        ],
    )


def trained(
    monkeypatch: pytest.MonkeyPatch, workdir: Path, config: Config, *, resume: bool = False
) -> tuple[Watch, checkpoint.TrainState]:
    watch = Watch(Workdir(workdir))
    with monkeypatch.context() as patch:
        watch.install(patch)
        _, state = train.train(config, watch.workdir, resume=resume)
    return watch, state


def crashed_in_step_one(monkeypatch: pytest.MonkeyPatch, workdir: Path, config: Config) -> Watch:
    """Trains one step, saves, reserves the next and dies."""
    watch = Watch(Workdir(workdir))
    with monkeypatch.context() as patch:
        watch.install(patch, crash_at=1)
        with pytest.raises(DiedError):
            train.train(config, watch.workdir)
    return watch


# What is bought.


def test_the_ledger_says_what_was_done(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path) -> None:
    watch, state = trained(monkeypatch, tmp_path / "w", config_for(archive))
    assert state.step == len(watch.samples) == len(watch.gradients) == STEPS
    for sample, gradient in zip(watch.samples, watch.gradients, strict=True):
        assert sample["num_records"] == NUM_IMAGES
        assert gradient["expected_batch_size"] == BATCH
        assert np.array_equal(gradient["batch"], sample["batch"])
        assert (sample["rate"], gradient["noise_multiplier"]) == (BATCH / NUM_IMAGES, 2.5)
        assert gradient["clipping_norm"] == 0.01
    assert Ledger(watch.workdir.ledger).mechanisms() == [Mechanism("DP-SGD", BATCH / NUM_IMAGES, 2.5, STEPS)]


def test_a_step_is_charged_before_its_randomness_is_drawn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path
) -> None:
    watch, _ = trained(monkeypatch, tmp_path / "w", config_for(archive))
    assert [sample["charged"] for sample in watch.samples] == [1, 2, 3]


def test_empty_batches_are_steps_with_noise(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path) -> None:
    monkeypatch.setattr(train, "poisson_sample", lambda key, num_records, rate: np.empty(0, np.int64))
    watch, state = trained(monkeypatch, tmp_path / "w", config_for(archive))
    assert state.step == STEPS
    assert Ledger(watch.workdir.ledger).spent("DP-SGD") == STEPS
    for gradient in watch.gradients:
        # noise_multiplier * C / expected batch size
        assert float(gradient["result"].std()) == pytest.approx(2.5 * 0.01 / BATCH, rel=0.2)


def test_the_warm_up_is_charged_once_and_before_it_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path
) -> None:
    config = config_for(
        archive, "train.warmup.enabled=true", "train.warmup.num_iterations=1", "train.warmup.noise_multiplier=4"
    )
    watch, _ = trained(monkeypatch, tmp_path / "w", config)
    assert watch.charged_before_means == [1]
    assert Mechanism("central images", 1.0, 4.0, 1) in Ledger(watch.workdir.ledger).mechanisms()


def test_covariances_are_planned_and_charged_once_and_before_it_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path
) -> None:
    keys = ["enabled=true", "num_iterations=1", "noise_multiplier=4", "covariance_noise_multiplier=3"]
    config = config_for(archive, *(f"train.warmup.{key}" for key in keys))
    looked: list[list[str]] = []
    original = train.with_covariances

    def with_covariances(*positional: Any, **named: Any) -> Any:
        looked.append([m.name for m in Ledger(tmp_path / "w/private/ledger.jsonl").mechanisms()])
        return original(*positional, **named)

    monkeypatch.setattr(train, "with_covariances", with_covariances)
    watch, _ = trained(monkeypatch, tmp_path / "w", config)
    bought = [Mechanism("central images", 1.0, 4.0, 1), Mechanism("central covariances", 1.0, 3.0, 1)]
    assert looked == [[mechanism.name for mechanism in bought]]
    ledger = Ledger(watch.workdir.ledger)
    assert ledger.mechanisms()[:2] == bought
    assert [entry["name"] for entry in ledger.header["plan"]["warmup"]] == [mechanism.name for mechanism in bought]
    without = make_plan(config_for(archive, *(f"train.warmup.{key}" for key in keys[:3])), NUM_IMAGES)
    assert ledger.header["plan"]["epsilon"] > without.epsilon


def test_covariances_about_other_centres_are_another_purchase(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path
) -> None:
    """Should another machine's arithmetic move a centre, the same noise must not meet the other sums."""
    keys = ["enabled=true", "num_iterations=1", "noise_multiplier=4", "covariance_noise_multiplier=3"]
    config = config_for(archive, *(f"train.warmup.{key}" for key in keys))
    seen: list[bytes] = []
    central_images, moved = train.central_images, 0.0

    def images(*positional: Any, **named: Any) -> Any:
        found = central_images(*positional, **named)
        return replace(found, means=found.means.clip(0.1, 0.9) + moved)

    def killed(*positional: Any, key: bytes) -> Any:
        seen.append(key)
        raise DiedError

    monkeypatch.setattr(train, "central_images", images)
    monkeypatch.setattr(train, "with_covariances", killed)
    run = Workdir(tmp_path / "w")
    for _ in range(2):  # the same centres: the same randomness, bought once
        with pytest.raises(DiedError):
            train.train(config, run, resume=bool(seen))
    assert len(set(seen)) == 1
    moved = 0.01
    with pytest.raises(InputError, match="central covariances were bought, got another"):
        train.train(config, run, resume=True)
    assert len(seen) == 2


CELLS = ["enabled=true", "num_iterations=1", "noise_multiplier=4", "covariance_noise_multiplier=3"]
CELLS = [f"train.warmup.{key}" for key in (*CELLS, "splits=1", "cell_noise_multiplier=5")]


def test_cells_are_planned_and_charged_once_and_before_it_looks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path
) -> None:
    looked: list[int] = []
    original = train.with_cells

    def with_cells(*positional: Any, **named: Any) -> Any:
        looked.append(len(Ledger(tmp_path / "w/private/ledger.jsonl").mechanisms()))
        return original(*positional, **named)

    monkeypatch.setattr(train, "with_cells", with_cells)
    watch, _ = trained(monkeypatch, tmp_path / "w", config_for(archive, *CELLS))
    assert looked == [3]
    ledger = Ledger(watch.workdir.ledger)
    assert ledger.mechanisms()[2] == Mechanism("central cells", 1.0, 5.0, 1)
    assert [entry["name"] for entry in ledger.header["plan"]["warmup"]][2:] == ["central cells"]
    without = make_plan(config_for(archive, *CELLS[:4]), NUM_IMAGES)
    assert ledger.header["plan"]["epsilon"] > without.epsilon


@pytest.mark.parametrize("moved", ["centres", "directions", "cell_centres"])
def test_cells_that_are_found_otherwise_are_another_purchase(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path, moved: str
) -> None:
    """Should another machine's arithmetic move what images are told apart by, the same noise must not meet them."""
    seen: list[bytes] = []
    split_classes, by = train.split_classes, 0.0

    def split(*positional: Any) -> Any:
        found = split_classes(*positional)
        return replace(found, **{moved: getattr(found, moved) + by})

    def killed(*positional: Any, key: bytes) -> Any:
        seen.append(key)
        raise DiedError

    monkeypatch.setattr(train, "split_classes", split)
    monkeypatch.setattr(train, "with_cells", killed)
    run = Workdir(tmp_path / "w")
    for _ in range(2):
        with pytest.raises(DiedError):
            train.train(config_for(archive, *CELLS), run, resume=bool(seen))
    assert len(set(seen)) == 1
    by = 1.0
    with pytest.raises(InputError, match="central cells were bought, got another"):
        train.train(config_for(archive, *CELLS), run, resume=True)
    assert len(seen) == 2


# Under which randomness.


def test_every_key_is_used_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path) -> None:
    first, _ = trained(monkeypatch, tmp_path / "first", config_for(archive))
    second, _ = trained(monkeypatch, tmp_path / "second", config_for(archive))  # the same config: other noise
    keys = [x["key"] for watch in (first, second) for x in watch.samples]
    keys += [x["noise_key"] for watch in (first, second) for x in watch.gradients]
    assert len(set(keys)) == 2 * 2 * STEPS


def test_the_diffusion_draws_have_a_key_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path
) -> None:
    draws: list[bytes] = []
    losses = train.example_losses

    def example_losses(*positional: Any, key: bytes) -> Tensor:
        draws.append(key)
        return losses(*positional, key=key)

    monkeypatch.setattr(train, "example_losses", example_losses)
    watch, _ = trained(monkeypatch, tmp_path / "w", config_for(archive))
    others = {x["key"] for x in watch.samples} | {x["noise_key"] for x in watch.gradients}
    assert len(set(draws)) == STEPS  # one a step, whatever the physical batches
    assert not set(draws) & others


def test_identity_depends_on_all_that_a_step_is_made_of(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path
) -> None:
    watch = crashed_in_step_one(monkeypatch, tmp_path / "w", config_for(archive))
    run = watch.runs[0]
    config = run.config
    books = Books(run, watch.workdir, Ledger(watch.workdir.ledger), b"k" * 32, "execution")
    setup = replace(config.setup, precision="bf16")
    in_bf16 = replace(books, run=replace(run, config=replace(config, setup=setup)))
    with monkeypatch.context() as patch:
        patch.setattr("dpdm.run.code_hash", lambda: "other code")
        of_other_code = books.identity("central images")
    others = [
        books.identity("DP-SGD", 1, "digest"),
        books.identity("DP-SGD", 0, "other digest"),
        books.identity("central images"),
        in_bf16.identity("DP-SGD", 0, "digest"),
        of_other_code,
        replace(books, key=bytes(32)).identity("DP-SGD", 0, "digest"),
        replace(books, execution="other").identity("DP-SGD", 0, "digest"),
        *(
            replace(books, run=changed).identity("DP-SGD", 0, "digest")
            for changed in (
                replace(run, data_fingerprint="other"),
                replace(run, physical_batch_size=5),
                replace(run, config=replace(config, loss=replace(config.loss, p_mean=0.5))),
                replace(run, config=replace(config, optim=replace(config.optim, learning_rate=0.1))),
                replace(run, config=replace(config, dp=replace(config.dp, clipping_norm=2.0))),
                replace(run, config=replace(config, train=replace(config.train, expected_batch_size=13))),
                replace(run, config=replace(config, model=replace(config.model, ema_rate=0.5))),
            )
        ),
    ]
    same = books.identity("DP-SGD", 0, "digest")
    assert same == books.identity("DP-SGD", 0, "digest")
    for position in (0, 1):  # the ledger's name and the key
        assert len({same[position], *(other[position] for other in others)}) == len(others) + 1
    assert same[0] != same[1].hex()  # the ledger does not show the key


@pytest.mark.parametrize("group", ["parameters", "exp_avg", "exp_avg_sq"])
def test_the_digest_depends_on_all_that_the_next_update_needs(group: str) -> None:
    def state(value: float) -> checkpoint.TrainState:
        groups = {name: {"w": torch.ones(3)} for name in ("parameters", "ema", "exp_avg", "exp_avg_sq")}
        groups[group] = {"w": torch.tensor([1.0, 1.0, value])}
        return checkpoint.TrainState(
            groups["parameters"], ema=groups["ema"], exp_avg=groups["exp_avg"], exp_avg_sq=groups["exp_avg_sq"]
        )

    assert state(1.0).digest() == state(1.0).digest()
    assert state(1.0).digest() != state(1.0000001).digest()


def test_a_replayed_step_is_the_same_and_free(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path) -> None:
    config = config_for(archive)
    crashed = crashed_in_step_one(monkeypatch, tmp_path / "w", config)
    resumed, state = trained(monkeypatch, tmp_path / "w", config, resume=True)
    assert resumed.keys[0] == crashed.keys[1]
    assert len(resumed.keys) == 2
    assert state.step == STEPS
    assert Ledger(resumed.workdir.ledger).spent("DP-SGD") == STEPS


def test_a_step_from_other_weights_has_other_randomness_and_is_charged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path
) -> None:
    config = config_for(archive)
    crashed = crashed_in_step_one(monkeypatch, tmp_path / "w", config)
    state, facts = checkpoint.load(crashed.workdir.checkpoint)
    next(iter(state.parameters.values())).view(-1)[0] += 1.0
    checkpoint.save(crashed.workdir.checkpoint, state, facts)
    resumed, state = trained(monkeypatch, tmp_path / "w", config, resume=True)
    assert not set(resumed.keys) & set(crashed.keys)
    # Two steps were charged before: one more is all that the plan allows.
    assert len(resumed.samples) == 1
    assert state.step == 2
    assert Ledger(resumed.workdir.ledger).spent("DP-SGD") == STEPS


def test_a_run_goes_on_with_its_own_data_and_config_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path
) -> None:
    crashed = crashed_in_step_one(monkeypatch, tmp_path / "w", config_for(archive))
    for config in (
        config_for(write_archive(tmp_path / "others.zip", seed=1)),
        config_for(archive, "dp.noise_multiplier=1.5"),
        config_for(archive, "train.num_iterations=9"),
        config_for(archive, "optim.learning_rate=0.1"),
    ):
        with pytest.raises(InputError, match="with which the run in"):
            train.train(config, crashed.workdir, resume=True)
    assert Ledger(crashed.workdir.ledger).spent("DP-SGD") == 2


def test_a_ledger_that_lost_lines_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path) -> None:
    config = config_for(archive)
    watch, _ = trained(monkeypatch, tmp_path / "w", config)
    lines = watch.workdir.ledger.read_bytes().splitlines(keepends=True)
    for kept in (1, 3):
        watch.workdir.ledger.write_bytes(b"".join(lines[:kept]))
        with pytest.raises(RunError, match="ledger"):
            train.train(config, watch.workdir, resume=True)
    watch.workdir.ledger.unlink()
    with pytest.raises(InputError, match="what was spent is unknown"):
        train.train(config, watch.workdir)
    assert not watch.workdir.ledger.exists()


# What one record can change.


@dataclass
class Step:
    """One step of a run, without noise, from any batch."""

    run: train.Run
    parameters: Mapping[str, Tensor]
    monkeypatch: pytest.MonkeyPatch

    def __call__(self, batch: list[int]) -> Tensor:
        """Returns the gradient times the expected batch size, (P,) float64: the clipped sum."""
        self.monkeypatch.setattr(train, "poisson_sample", lambda key, num_records, rate: np.array(batch, np.int64))
        step = train.private_step(self.run, self.parameters, train.step_keys(bytes(32)))
        return torch.cat([g.flatten() for g in step.gradients]).double() * BATCH


@pytest.fixture
def one_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, archive: Path) -> Step:
    config = config_for(archive, f"dp.clipping_norm={CLIP}", "train.physical_batch_size=3")
    run = crashed_in_step_one(monkeypatch, tmp_path / "w", config).runs[0]
    parameters = dict(run.denoiser.network.named_parameters())
    randomise(parameters)
    return Step(replace(run, plan=replace(run.plan, noise_multiplier=1e-12)), parameters, monkeypatch)


def randomise(parameters: Mapping[str, Tensor]) -> None:
    """Fills the layers that begin at zero, which would hide the others."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)


def test_a_step_against_a_loop_over_records(one_step: Step) -> None:
    batch = [1, 5, 8, 13, 21, 34, 40]
    run, parameters = one_step.run, one_step.parameters
    draws_key = train.step_keys(bytes(32)).diffusion
    total, clipped = torch.zeros(sum(p.numel() for p in parameters.values()), dtype=torch.float64), 0
    for record in batch:  # all K draws of a record make one loss, clipped as one
        losses = train.example_losses(run.denoiser, run.archive, np.array([record]), run.config.loss, key=draws_key)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(losses[0], list(parameters.values()))]).double()
        total += gradient * min(1.0, CLIP / float(gradient.norm()))
        clipped += float(gradient.norm()) > CLIP
    assert 0 < clipped < len(batch)
    assert float((one_step(batch) - total).norm() / total.norm()) < 1e-4


def test_one_record_moves_a_step_by_at_most_the_clipping_norm(one_step: Step) -> None:
    batch = [1, 5, 8, 13, 21, 34, 40]
    whole, moved = one_step(batch), []
    for record in batch:
        without = one_step([other for other in batch if other != record])
        moved.append(float((whole - without).norm()))
    assert max(moved) <= CLIP * (1 + 1e-5)
    assert max(moved) > CLIP * 0.999  # the bound is reached, so the test can fail


def test_no_record_enters_the_gradient_of_another(one_step: Step) -> None:
    run, parameters = one_step.run, one_step.parameters
    records = np.array([3, 7, 11])

    def gradients() -> list[Tensor]:
        def loss(some: np.ndarray) -> Tensor:
            return train.example_losses(run.denoiser, run.archive, some, run.config.loss, key=bytes(32))

        return per_example_gradients(parameters, loss, records)[1]

    before = gradients()
    pixels = run.archive._pixels
    assert pixels is not None  # so few are kept in memory
    pixels[7] = 255 - pixels[7]
    after = gradients()
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[[0, 2]], new[[0, 2]])
    assert any(not torch.equal(old[1], new[1]) for old, new in zip(before, after, strict=True))


# What is planned.


@pytest.mark.parametrize("warmup", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_the_plan_stays_within_epsilon(archive: Path, warmup: str) -> None:
    config = config_for(
        archive,
        "dp.noise_multiplier=null",
        "dp.epsilon=1",
        f"train.warmup.enabled={warmup}",
        "train.warmup.noise_multiplier=10",
    )
    plan = make_plan(config, NUM_IMAGES)
    bought = [Mechanism("steps", BATCH / NUM_IMAGES, plan.noise_multiplier, STEPS)]
    if warmup == "true":
        bought.append(Mechanism("means", 1.0, 10.0, 1))
    assert epsilon_spent(bought, 1e-5) <= 1
    assert plan.epsilon == pytest.approx(epsilon_spent(bought, 1e-5))
    assert plan.epsilon == pytest.approx(1, rel=1e-3)
