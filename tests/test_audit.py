"""Attacks on the real step and on whole runs: silent about the code as it is, loud about broken code."""

import functools
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dpdm import audit, run_audit, step_audit, train
from dpdm import config as configs
from dpdm.cli import run_command
from dpdm.config import Config
from dpdm.data.archive import ArchiveWriter
from dpdm.errors import InputError, RunError
from dpdm.privacy import dpsgd, noise
from dpdm.privacy.accounting import Mechanism, epsilon_spent
from dpdm.privacy.dpsgd import per_example_gradients
from dpdm.privacy.poisson import poisson_sample
from dpdm.privacy.step_noise import StepNoise
from dpdm.run_audit import audit_run
from dpdm.step_audit import StepClaim, audit_step

SURE = 0.999999  # correct code fails a test once in a million times
NUM_IMAGES = 40
TINY = (
    "train.expected_batch_size=12",
    "train.physical_batch_size=8",
    "loss.noise_multiplicity=2",
    "model.network.width=16",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
    "setup.device=cpu",
    "setup.num_threads=1",
)
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, random = tmp_path_factory.mktemp("audit") / "images.zip", np.random.default_rng(0)
    with ArchiveWriter(path, ["a", "b", "c"]) as writer:
        for index in range(NUM_IMAGES):
            writer.add(random.integers(0, 256, (1, 8, 8), np.uint8), index % 3)
    return path


@functools.cache
def claim(epsilon: float = 4.0, sampling_rate: float = 1.0) -> StepClaim:
    return StepClaim.of_epsilon(epsilon, delta=1e-5, sampling_rate=sampling_rate)


def fixed_keys(first: int) -> Callable[[], bytes]:
    numbers = itertools.count(first)
    return lambda: noise.test_key(next(numbers))


# Ways to break a step. Each changes the function that training itself calls.


def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    real = dpsgd.add_noise

    def add_noise(sums: Sequence[Tensor], noise: StepNoise) -> None:
        real(sums, StepNoise(noise.size, noise.standard_deviation / 2, 1.0, noise.key, secure=noise.grid is not None))

    patch.setattr(dpsgd, "add_noise", add_noise)


def no_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(dpsgd, "add_noise", lambda sums, noise: None)


def the_same_noise_each_time(patch: pytest.MonkeyPatch) -> None:
    real = dpsgd.add_noise

    def add_noise(sums: Sequence[Tensor], noise: StepNoise) -> None:
        real(sums, StepNoise(noise.size, noise.standard_deviation, 1.0, bytes(32), secure=noise.grid is not None))

    patch.setattr(dpsgd, "add_noise", add_noise)


def no_clipping(patch: pytest.MonkeyPatch) -> None:
    real = dpsgd.clip_and_sum
    patch.setattr(dpsgd, "clip_and_sum", lambda grads, clipping_norm, sums: real(grads, 1e9 * clipping_norm, sums))


def clip_each_layer(patch: pytest.MonkeyPatch) -> None:
    real = dpsgd.clip_and_sum

    def clip_and_sum(grads: Sequence[Tensor], clipping_norm: float, sums: Sequence[Tensor]) -> Tensor:
        norms = [real([g], clipping_norm, [total]) for g, total in zip(grads, sums, strict=True)]
        return torch.stack(norms).norm(dim=0)

    patch.setattr(dpsgd, "clip_and_sum", clip_and_sum)


def sample_twice_as_often(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(train, "poisson_sample", lambda key, count, rate: poisson_sample(key, count, min(1.0, 2 * rate)))


# The step.


def test_a_correct_step_comes_near_its_claim() -> None:
    found = audit_step(claim(), num_trials=200, confidence=SURE, new_key=fixed_keys(0))
    assert not found.is_violation
    assert 0.2 < found.bound.epsilon < found.claimed_epsilon == pytest.approx(4.0, abs=1e-3)
    assert found.noise_multiplier > found.claim.mechanism.noise_multiplier
    audit.check(found)


@pytest.mark.parametrize(
    ("broken", "epsilon"),
    [(half_the_noise, 4.0), (no_noise, 4.0), (no_clipping, 4.0), (the_same_noise_each_time, 1.0)],
)
def test_a_broken_step_is_found(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None], epsilon: float
) -> None:
    broken(monkeypatch)
    found = audit_step(claim(epsilon), num_trials=200, confidence=SURE, new_key=fixed_keys(0))
    assert found.is_violation
    with pytest.raises(RunError, match="the guarantee is broken"):
        audit.check(found)


def test_the_scores_are_those_of_the_mechanism(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean and standard deviation in both worlds, at another clipping norm, of a step that takes half its records."""
    seen: list[np.ndarray] = []
    bound = step_audit.two_world_bound

    def two_world_bound(absent: np.ndarray, present: np.ndarray, **numbers: float) -> Any:
        seen.extend((absent, present))
        return bound(absent, present, **numbers)

    monkeypatch.setattr(step_audit, "two_world_bound", two_world_bound)
    keys = ["dp.noise_multiplier=0.8", "dp.clipping_norm=0.03"]
    keys += ["train.expected_batch_size=50", "train.num_iterations=9"]
    config = configs.load([], keys)
    of_run = StepClaim.of_run(config, dataset_size=100)
    assert (of_run.mechanism.sampling_rate, of_run.mechanism.noise_multiplier) == (0.5, 0.8)
    assert of_run.mechanism.num_steps == 1
    audit_step(of_run, num_trials=200, confidence=SURE, new_key=fixed_keys(0))
    absent, present = seen
    assert abs(absent.mean()) < 4 * 0.8 / np.sqrt(200)
    assert absent.std() == pytest.approx(0.8, rel=0.15)
    assert present.mean() == pytest.approx(0.5, abs=4 * np.sqrt((0.8**2 + 0.25) / 200))
    assert present.std() == pytest.approx(np.sqrt(0.8**2 + 0.25), rel=0.15)


def test_without_noise_a_canary_counts_as_exactly_the_clipping_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the other records as nothing: they are orthogonal to it."""
    no_noise(monkeypatch)
    run, direction = step_audit._canvas_run(claim())
    parameters = dict(run.denoiser.named_parameters())
    for records, expected in (([0, 1, 2], 0.0), ([3], 1.0), ([0, 1, 2, 3], 1.0), ([], 0.0)):
        batch = np.array(records, np.int64)
        monkeypatch.setattr(train, "poisson_sample", lambda key, count, rate, batch=batch: batch)
        step = train.private_step(run, parameters, train.step_keys(noise.test_key(0)))
        assert step.clip_fraction == 1 or not records  # the worst case: every gradient is longer than C
        assert step_audit._along(step, direction) * run.plan.expected_batch_size == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("trials", "confidence", "message"),
    [(99, 0.95, "--trials"), (100, 0.4, "--confidence"), (100, 1.0, "--confidence")],
)
def test_a_step_audit_refuses(trials: int, confidence: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        audit_step(claim(), num_trials=trials, confidence=confidence)


def test_a_step_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = dpsgd.add_noise
    infinite = StepNoise(step_audit.SIDE * step_audit.SIDE, np.inf, 1.0, bytes(32), secure=False)
    monkeypatch.setattr(dpsgd, "add_noise", lambda sums, noise: real(sums, infinite))
    with pytest.raises(RunError, match="finite"):
        audit_step(claim(), num_trials=100, confidence=0.95)


# The run.


def run_config(archive: Path, *overrides: str) -> Config:
    keys = (f"data.path={archive}", "dp.noise_multiplier=3", "train.num_iterations=4", *TINY, *overrides)
    return configs.load([], keys)


def test_a_correct_run_is_within_its_claim(archive: Path) -> None:
    found = audit_run(run_config(archive), num_canaries=60, confidence=SURE, data_is_public=True)
    assert not found.is_violation
    assert 0 < found.bound.num_right < found.bound.num_guesses
    assert found.plan.dataset_size == NUM_IMAGES + 60
    assert found.plan.sampling_rate == 12 / 100
    audit.check(found)


def test_a_broken_run_is_found(monkeypatch: pytest.MonkeyPatch, archive: Path) -> None:
    config = run_config(archive, "dp.noise_multiplier=12", "train.expected_batch_size=140", "train.num_iterations=6")
    no_noise(monkeypatch)
    found = audit_run(config, num_canaries=100, confidence=0.999, data_is_public=True, new_key=fixed_keys(0))
    assert found.is_violation
    assert found.bound.num_right > 0.9 * found.bound.num_guesses
    with pytest.raises(RunError, match="the guarantee is broken"):
        audit.check(found)


def test_images_train_as_without_an_audit(archive: Path, tmp_path: Path) -> None:
    """A step of which all canaries are absent is the step of training, bit for bit."""
    run = run_audit._run_with_canaries(run_config(archive), str(archive), tmp_path, 20)
    parameters = dict(run.denoiser.network.named_parameters())
    canaries = run_audit._Canaries.place(run, parameters, noise.test_key(0))
    keys = train.step_keys(noise.test_key(1))
    step = run_audit._step_without(np.arange(NUM_IMAGES, NUM_IMAGES + 20), run, parameters, canaries, keys)
    alone = run_audit.replace(run, plan=run_audit.replace(run.plan, dataset_size=NUM_IMAGES))
    trained = train.private_step(alone, parameters, keys)
    assert step.batch_size == trained.batch_size > 0
    for found, expected in zip(step.gradients, trained.gradients, strict=True):
        assert torch.equal(found, expected)


def test_a_canary_has_one_gradient_entry_of_its_own(archive: Path, tmp_path: Path) -> None:
    run = run_audit._run_with_canaries(run_config(archive, "dp.clipping_norm=0.5"), str(archive), tmp_path, 20)
    parameters = dict(run.denoiser.network.named_parameters())
    canaries = run_audit._Canaries.place(run, parameters, noise.test_key(0))
    records = np.array([3, 17, NUM_IMAGES, NUM_IMAGES + 7])

    def gradients(loss: Callable[[np.ndarray], Tensor], records: np.ndarray) -> Tensor:
        return torch.cat([g.flatten(1) for g in per_example_gradients(parameters, loss, records)[1]], dim=1)

    matrix = parameters[canaries.name]
    mixed = gradients(lambda some: canaries.losses(run, matrix, some, bytes(32)), records)
    alone = gradients(
        lambda some: train.example_losses(run.denoiser, run.archive, some, run.config.loss, key=bytes(32)), records[:2]
    )
    assert torch.allclose(mixed[:2], alone, atol=1e-6)
    assert (mixed[2:] != 0).sum(1).tolist() == [1, 1]
    assert mixed[2:].sum(1).tolist() == [2.0, 2.0]  # four times C, so that it is clipped to C
    assert len(set(canaries.positions.tolist())) == 20


def test_only_public_images_are_trained_on(archive: Path) -> None:
    with pytest.raises(InputError, match="--public"):
        audit_run(run_config(archive), num_canaries=60, confidence=0.95)


def test_central_images_are_left_out_and_their_share_of_noise_kept(archive: Path, tmp_path: Path) -> None:
    warm = ("train.warmup.enabled=true", "train.warmup.noise_multiplier=40", "dp.noise_multiplier=null", "dp.epsilon=1")
    plan = run_audit._run_with_canaries(run_config(archive, *warm), str(archive), tmp_path, 20).plan
    steps = Mechanism("steps", plan.sampling_rate, plan.noise_multiplier, plan.num_iterations)
    assert plan.warmup == ()
    assert plan.epsilon == epsilon_spent([steps], 1e-5) < 1
    assert epsilon_spent([steps, Mechanism("central images", 1.0, 40.0, 1)], 1e-5) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(
    ("canaries", "confidence", "message"),
    [(9, 0.95, "--canaries"), (5000, 0.95, "--canaries"), (60, 1.0, "--confidence")],
)
def test_a_run_audit_refuses(archive: Path, canaries: int, confidence: float, message: str) -> None:
    with pytest.raises(InputError, match=message):
        audit_run(run_config(archive), num_canaries=canaries, confidence=confidence, data_is_public=True)


# The command.


@pytest.fixture
def refused(capfd: Capture) -> Callable[..., str]:
    """Runs a command that must fail with exit status 2 and one line; returns the line."""

    def refuse(*arguments: object) -> str:
        capfd.readouterr()
        assert run_command([str(argument) for argument in arguments]) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
        return err

    return refuse


def test_the_command_for_a_step(capfd: Capture) -> None:
    line = ["audit", "step", "--epsilon", "2", "--trials", "100", "--confidence", str(SURE), "--json"]
    assert run_command(line) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["audit"] == "step"
    assert found["claimed_epsilon"] == pytest.approx(2, abs=1e-3)
    assert (found["num_trials"], found["confidence"], found["violation"]) == (100, SURE, False)


def test_the_command_fails_when_the_guarantee_is_broken(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    no_noise(monkeypatch)  # found by so few trials for certain
    assert run_command(["audit", "step", "--epsilon", "4", "--trials", "100", "--confidence", str(SURE)]) == 1
    out, err = capfd.readouterr()
    assert "violation                       True" in out
    assert err.splitlines()[-1].startswith("dpdm: Expected bounds within the claimed epsilon=4, got one above it")


def test_the_command_for_a_run(capfd: Capture, archive: Path) -> None:
    keys = [f"data.path={archive}", "dp.noise_multiplier=3", "train.num_iterations=2", *TINY]
    line = ["audit", "run", "--public", "--canaries", "20", "--confidence", str(SURE), "--json", "--", *keys]
    assert run_command(line) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["audit"], found["num_canaries"], found["num_steps"]) == ("run", 20, 2)
    assert found["claimed_epsilon"] == pytest.approx(epsilon_spent([Mechanism("", 12 / 60, 3.0, 2)], 1e-5))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["step", "--epsilon", "0"], "--epsilon"),
        (["step", "--epsilon", "nan"], "--epsilon"),
        (["step", "--delta", "0"], "delta"),
        (["step", "--sampling-rate", "2"], "sampling_rate"),
        (["step", "--trials", "1"], "--trials"),
        (["step", "--dataset-size", "100"], "--config"),
        (["step", "--", "dp.epsilon=1"], "--dataset-size"),
        (["step", "--dataset-size", "100", "--epsilon", "1", "--", "dp.epsilon=1"], "--epsilon"),
        (["step", "--dataset-size", "0", "--", "dp.epsilon=1"], "--dataset-size"),
        (["step", "--dataset-size", "100", "--", "dp.epsilon=1"], "train.num_epochs"),
        (["run", "--", "data.path=."], "--public"),
        (["run", "--", "dp.epsilon=-1"], "dp.epsilon"),
        (["run", "--", "data.resolution=16"], "data.path"),
        (["run", "--public", "--", "data.path=nowhere"], "nowhere"),
        (["run", "--canaries", "3"], "--canaries"),
        (["step", "--confidence", "2"], "--confidence"),
        (["stop"], "stop"),
    ],
)
def test_the_command_refuses(arguments: list[str], hint: str, refused: Callable[..., str]) -> None:
    assert hint in refused("audit", *arguments)


# The full figures, see docs/audit.md.


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, 4.0, 10.0])
def test_5000_trials_reach_60_percent_of_the_claim(epsilon: float) -> None:
    found = audit_step(claim(epsilon), num_trials=5000, confidence=0.95, new_key=fixed_keys(0))
    assert 0.6 * epsilon <= found.bound.epsilon
    assert not found.is_violation


@pytest.mark.slow
def test_200_audits_alarm_as_rarely_as_stated_and_find_half_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def alarms(first: int) -> int:
        keys = [fixed_keys(first + 200 * number) for number in range(200)]
        return sum(audit_step(claim(), num_trials=100, confidence=0.95, new_key=key).is_violation for key in keys)

    assert alarms(0) <= 10
    half_the_noise(monkeypatch)
    assert alarms(10**6) >= 190


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broken", "sampling_rate"),
    [(half_the_noise, 1.0), (half_the_noise, 0.25), (clip_each_layer, 1.0), (sample_twice_as_often, 0.25)],
)
def test_smaller_errors_are_found_by_more_trials(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[[pytest.MonkeyPatch], None], sampling_rate: float
) -> None:
    broken(monkeypatch)
    found = audit_step(claim(sampling_rate=sampling_rate), num_trials=5000, confidence=SURE, new_key=fixed_keys(0))
    assert found.is_violation


@pytest.mark.parametrize("override", ["dp.noise_multiplier=2", "dp={noise_multiplier: 2}"])
def test_a_run_s_own_target_is_taken_however_it_is_written(override: str) -> None:
    found = run_audit.default_run_config([override]).dp
    assert (found.epsilon, found.noise_multiplier) == (None, 2.0)
    assert run_audit.default_run_config([]).dp.epsilon == 10.0


@pytest.mark.slow
def test_one_run_on_the_digits_proves_a_fifth_of_the_claim() -> None:
    found = audit_run(run_audit.default_run_config(["setup.num_threads=1"]), num_canaries=1000, confidence=0.95)
    assert 2.0 <= found.bound.epsilon <= found.claimed_epsilon == pytest.approx(10, rel=1e-3)
