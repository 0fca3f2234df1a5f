"""``dpdm tune SOURCE --mean-runs M``: private selection of the settings, on the private images themselves, all charged.

A secret random number of runs is made. Each takes one of the candidates at random, trains it with DP-SGD and fresh
randomness, and gets a noisy score; the weights and the score of the best run are kept. What that costs together is
known (Papernot and Steinke 2022, arXiv 2110.03620), and the noise is such that it meets the budget.

**What a run uses of the private images** is the base of the selection, the same for every candidate: what a warm-up
buys if the recipe has one, the steps of DP-SGD, and the score. The score is how many of the N training records a
classifier gets right that learned from this run's synthetic images alone: one record adds 0 or 1, whatever the others
are, so that it is a Gaussian mechanism of sensitivity 1. Of a group of images one counts, chosen by the key. Training
records, and not held-out ones, because then each record is in one data set of N that all mechanisms of the base are
about.

**What is seen** is the best run. The others are trained in a folder in ``private/`` that is removed after each run, and
all that training would print is dropped: no loss, no progress, no count. How long it takes is not hidden; the statement
says that time is outside the guarantee.

**When it is killed.** The whole selection is in the ledger, synced, before the first run, with an identity that names
the data, the candidates, the key, the code and the machine. Nothing of it is on the disk before its end but the folder
of the present run, which is removed when the same command is given again. That command begins at the first run, under
the same key: number of runs, candidates, batches and noise are functions of it, so what is seen in the end is one
output of the mechanism that was charged, however often and whenever it was stopped. With another identity it is
refused, and stays charged. On a GPU, whose rounding cannot be repeated, every process has another.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dpdm import account, checkpoint, distributed
from dpdm import config as configs
from dpdm.central_model import check_covariances
from dpdm.checkpoint import TrainState
from dpdm.config import Config
from dpdm.data.archive import ImageArchive
from dpdm.device import environment, execution
from dpdm.errors import DivergedError, InputError, RunError
from dpdm.evaluation.classifiers import ExactClassifier
from dpdm.evaluation.guarantee import round_up
from dpdm.files import write_json
from dpdm.generate import as_drawn, denoiser_with, draw
from dpdm.plan import Plan, check_keys, check_names, make_plan, planned_steps
from dpdm.privacy import accounting, noise
from dpdm.privacy.accounting import Mechanism, Repeats, Selection
from dpdm.privacy.discrete import secure_gaussian
from dpdm.privacy.ledger import Ledger
from dpdm.privacy.selection import repeat_and_select
from dpdm.recipes import score_noise_multiplier
from dpdm.run import key_name, plain_plan, read_key, set_up, write_key
from dpdm.statement import SCORE
from dpdm.synthesize import Request, claim, configure, prepare_data, start_over
from dpdm.train import train
from dpdm.tune import built_in_candidates, silence
from dpdm.workdir import Workdir

SCORE_IMAGES = 2000  # synthetic images that the classifier learns from
PIECE = 1024  # images decoded at a time


@dataclass(frozen=True)
class SelectionRequest:
    """What a user asked for; a folder goes on with the same request and refuses another.

    Attributes:
        request: source, budget and overrides of all candidates, as ``dpdm synthesize`` takes them.
        repeats: the number of runs.
        candidates: overrides of each, on top of the request's; None: ``built_in_candidates``.
    """

    request: Request
    repeats: Repeats
    candidates: tuple[tuple[str, ...], ...] | None = None


@dataclass(frozen=True)
class Candidates:
    """What a selection chooses from, and what it may buy.

    Attributes:
        overrides: of each candidate on top of the recipe, as it is shown.
        configs: as a run of each is released.
        plan: of each single run, all alike, with the epsilon of the whole selection.
        selection: what is charged.
    """

    overrides: tuple[tuple[str, ...], ...]
    configs: tuple[Config, ...]
    plan: Plan
    selection: Selection

    def to_run(self, number: int) -> Config:
        """Returns the config by which a candidate is trained: its noise is given, nothing is shown."""
        config = self.configs[number]
        dp = replace(config.dp, epsilon=None, noise_multiplier=self.plan.noise_multiplier)
        quiet = replace(config.train, log_every=None, snapshot_every=None)
        return replace(config, dp=dp, train=quiet, evaluation=replace(config.evaluation, fid_every=None))


def select(asked: SelectionRequest, workdir: Workdir) -> dict[str, Any]:
    """Makes ``workdir`` a run that ``dpdm release`` takes; returns the chosen overrides and the noisy score.

    Guarantee: weights, config and score of the chosen run, which is all that is kept or shown, are the output of the
    one mechanism in the ledger.

    Raises:
        InputError: for candidates of different cost, images without labels, or a folder with something else in it.
        RunError: if the number of runs was drawn as 0, which a Poisson number may be, or the selected run diverged.
    """
    if distributed.size() > 1:
        raise InputError(f"Expected one process for a private selection, got {distributed.size()}: leave out torchrun.")
    with workdir.lock():
        claim(asked, asked.request.source, workdir, finished=workdir.config)
        try:
            real, _ = prepare_data(asked.request, workdir)
            found = find_candidates(asked, workdir, real)
        except InputError:
            if not workdir.ledger.exists():  # nothing was bought: leave the folder as it was found
                start_over(workdir)
            raise
        if not workdir.checkpoint.exists():
            device = set_up(found.configs[0])
            print(announcement(found, repeatable=device.type == "cpu"), file=sys.stderr, flush=True)
            key, ledger = _open_books(found, real, workdir, device)
            best = repeat_and_select(
                lambda number, run_key: _one_run(found, real, workdir, number, run_key),
                len(found.configs),
                asked.repeats,
                key,
            )
            if best is None:
                raise RunError("The number of runs was drawn as 0, so nothing is selected; what it cost stays charged.")
            if best.result is None:
                raise RunError(
                    "The selected run diverged, so nothing can be kept; what it cost stays charged: begin another in a "
                    "new --workdir, with lower learning rates."
                )
            _keep(best.candidate, best.score, best.result, ledger, workdir)
        return _finish(found, workdir)


def find_candidates(asked: SelectionRequest, workdir: Workdir, real: ImageArchive) -> Candidates:
    """Returns the candidates for the images' public facts, and the noise that keeps their selection in the budget."""
    request, size = asked.request, real.num_records
    base = configs.resolve(configure(request, workdir, real), real)
    if real.labels is None or not base.data.num_classes:
        raise InputError("Expected images with labels for --mean-runs, got none: runs are scored by a classifier.")
    overrides = asked.candidates or built_in_candidates(base, same_cost=True)
    given = "" if asked.candidates is None else " (a list that the user gave, which is not accounted for)"
    selection = (
        f"chosen among {len(overrides)} candidates{given} by private selection on the private images, which epsilon "
        f"covers; the candidates are variations of settings chosen {base.dp.selection}"
    )
    made = []
    for values in overrides:
        config = configure(replace(request, overrides=(*request.overrides, *values)), workdir, real)
        made.append(configs.resolve(replace(config, dp=replace(config.dp, selection=selection)), real))
        if made[-1].model.init is not None or not made[-1].dp.enabled:
            raise InputError(
                "Expected neither model.init nor dp.enabled=false with --mean-runs, got one of them: every run begins "
                "with fresh weights and is private; leave it out."
            )
        check_names(made[-1])
        check_keys(made[-1])  # what is impossible is found before anything is bought
        check_covariances(made[-1].train.warmup, real, base.data.num_classes)
        if made[-1].sampler.labels not in (None, made[-1].data.num_classes):
            raise InputError(
                f"Expected sampler.labels=null with --mean-runs, got {made[-1].sampler.labels}: a run is scored by a "
                "classifier that learns all classes from its images."
            )
        configs.build_denoiser(made[-1])
    check_same_cost(made, overrides, size)
    train, dp = made[0].train, made[0].dp
    rate = accounting.sampling_rate(train.expected_batch_size, size, real.unit)
    others = list(train.warmup.mechanisms())
    others.append(Mechanism(SCORE, 1.0, score_noise_multiplier(size, request.epsilon, dp.delta), 1))
    steps = planned_steps(made[0], size)
    account.check_steps(steps, "the number of steps")
    sigma = accounting.calibrate_noise_multiplier(
        request.epsilon, dp.delta, rate, steps, others=others, repeats=asked.repeats
    )
    whole = Selection(
        accounting.SELECTION, (*others[:-1], Mechanism("DP-SGD", rate, sigma, steps), others[-1]), asked.repeats
    )
    plan = make_plan(replace(made[0], dp=replace(dp, epsilon=None, noise_multiplier=sigma)), size)
    plan = replace(plan, epsilon=accounting.epsilon_spent([whole], dp.delta))
    return Candidates(tuple(overrides), tuple(made), plan, whole)


def check_same_cost(made: Sequence[Config], overrides: Sequence[Sequence[str]], dataset_size: int) -> None:
    """Raises InputError unless all candidates buy the same: a selection's cost is known for one base alone.

    They may differ in network, preconditioning, averages, loss, optimizer, sampler, clipping norm, and in what a
    warm-up does with what it has bought.
    """

    def bought(config: Config) -> dict[str, Any]:
        return {
            "train.expected_batch_size": config.train.expected_batch_size,
            "the number of steps": planned_steps(config, dataset_size),
            "a noise multiplier of train.warmup": config.train.warmup.mechanisms(),
            "a key of dp": replace(config.dp, clipping_norm=1.0),
            "a key of data": config.data,
            "a key of setup": config.setup,
            "a key of evaluation": config.evaluation,
        }

    first = bought(made[0])
    for config, values in zip(made, overrides, strict=True):
        for name, value in bought(config).items():
            if value != first[name]:
                raise InputError(
                    f"Expected candidates that all cost the same, got {' '.join(values)!r}, which changes {name}: vary "
                    "keys of model, loss, optim and sampler alone."
                )


def announcement(found: Candidates, *, repeatable: bool) -> str:
    """Returns what will be spent, and the candidates, before anything is.

    Args:
        found: to be chosen from.
        repeatable: whether the same command has the same outcome once more, as on a CPU.
    """
    plan, repeats = found.plan, found.selection.repeats
    lines = [configs.to_yaml(found.configs[0]), "Candidates, on top of these settings:"]
    lines += [f"  {number}: {' '.join(values) or 'as they are'}" for number, values in enumerate(found.overrides, 1)]
    lines += [
        f"Privacy: at most epsilon={round_up(plan.epsilon)} at delta={plan.delta:g}, adding or removing one of "
        f"{plan.dataset_size} {plan.unit}s, for all runs together.",
        f"  A secret number of runs, {repeats.mean_runs:g} on average ({repeats.distribution}), of which the best is "
        "kept; each of",
        *(
            f"    {m.name}: {m.num_steps} uses, sampling rate {m.sampling_rate:.4g}, noise multiplier "
            f"{m.noise_multiplier:g}."
            for m in found.selection.base
        ),
        "How many runs there are, and how far they are, is secret: no progress is shown. "
        + (
            "If it is stopped, the same command begins anew with the same outcome, for nothing more."
            if repeatable
            else "If it is stopped on a GPU, what it costs is lost: its outcome cannot be repeated bit for bit."
        ),
    ]
    return "\n".join(lines)


def _open_books(found: Candidates, real: ImageArchive, workdir: Workdir, device: torch.device) -> tuple[bytes, Ledger]:
    """Returns the selection's key and a ledger in which the whole selection is charged, on the disk."""
    hashes = [configs.run_hash(config) for config in found.configs]
    if workdir.ledger.exists():
        key, ledger = read_key(workdir), Ledger(workdir.ledger, repair=True)
    else:
        key = noise.new_key()
        write_key(workdir, key)
        ledger = Ledger.create(
            workdir.ledger,
            {
                "data": real.fingerprint(),
                "initial_weights": [],
                "plan": plain_plan(found.plan),
                "config": configs.fingerprint(hashes),
                "candidates": hashes,
                "key": key_name(key),
            },
        )
    what = (real.fingerprint(), json.dumps(found.selection.as_dict()), *hashes, execution(device))
    identity = noise.derive_key(key, "identity", *what).hex()
    if ledger.mechanisms() and not ledger.was_charged(identity):
        raise InputError(
            "Expected the images, key, candidates, code, libraries and machine with which this selection was begun, "
            "got others (on a GPU every start is another): it stays charged; put them back, or begin another in a new "
            "--workdir."
        )
    ledger.reserve(found.selection, identity)
    return noise.derive_key(key, "selection"), ledger


def _one_run(
    found: Candidates, real: ImageArchive, workdir: Workdir, number: int, key: bytes
) -> tuple[float, TrainState | None]:
    """Trains one candidate and returns its noisy score and state; leaves nothing else behind.

    A run that diverges has no images: none is right, its score is noise alone, and its state is None.

    Guarantee: given the candidate, what is returned is the output of the selection's base under ``key``: the warm-up's
    purchases, DP-SGD and score, each with a key of its own. That a run diverged follows from what DP-SGD released. The
    state's curves, which have no noise, are emptied.
    """
    mechanism = found.selection.base[-1]
    folder = Workdir(workdir.candidate)
    shutil.rmtree(folder.root, ignore_errors=True)
    try:
        with silence():
            config, state = train(found.to_run(number), folder, key=noise.derive_key(key, "training"))
            state.curves.clear()
            images, labels = draw(denoiser_with(config, state.ema), as_drawn(config, state), num_images=SCORE_IMAGES)
            assert labels is not None  # images without labels were refused
            score = noisy_score(ExactClassifier(images, labels), real, mechanism, key)
    except DivergedError:
        return noisy_count(0, mechanism, key), None
    finally:
        shutil.rmtree(folder.root, ignore_errors=True)
    return score, state


def noisy_score(classifier: ExactClassifier, real: ImageArchive, mechanism: Mechanism, key: bytes) -> float:
    """Returns how many of the N training records ``classifier`` gets right, plus Gaussian noise.

    Guarantee: a record adds 0 or 1, a function of this record, its number, the key and the classifier, which knows of
    the records what DP-SGD released: one Gaussian mechanism of sensitivity 1 and ``mechanism``'s noise multiplier.
    """
    assert real.labels is not None
    count = real.num_records
    uniform = noise.to_uniform(noise.random_words(noise.derive_key(key, "images of the score"), count))
    chosen = real.choose_images(np.arange(count), uniform)
    right = 0
    for start in range(0, count, PIECE):
        rows = chosen[start : start + PIECE]
        right += int((classifier.predict(real.read(rows)) == real.labels[rows]).sum())
    return noisy_count(right, mechanism, key)


def noisy_count(right: int, mechanism: Mechanism, key: bytes) -> float:
    """Returns a count plus ``mechanism``'s Gaussian noise, of a run's ``key``."""
    noisy = secure_gaussian(
        np.array([float(right)]),
        sensitivity=1.0,
        noise_multiplier=mechanism.noise_multiplier,
        key=noise.derive_key(key, "noise of the score"),
    )
    return float(noisy[0])


def _keep(candidate: int, score: float, state: TrainState, ledger: Ledger, workdir: Workdir) -> None:
    """Saves the chosen run, in one file that appears whole: from then on the selection is over."""
    device = next(iter(state.parameters.values())).device
    facts = {"candidate": candidate, "score": score, "environment": environment(device)}
    checkpoint.save(workdir.checkpoint, state, {**facts, "ledger": ledger.last_line})


def _finish(found: Candidates, workdir: Workdir) -> dict[str, Any]:
    """Deletes the key, from which every run could be made again, and writes the chosen config."""
    _, facts = checkpoint.load(workdir.checkpoint)
    config = found.configs[facts["candidate"]]
    result = {
        "note": "output of the private selection, which epsilon covers",
        "chosen": list(found.overrides[facts["candidate"]]),
        "noisy_score": facts["score"],
        "num_records": found.plan.dataset_size,
        "noise": found.selection.base[-1].noise_multiplier,
    }
    write_json(workdir.selection, result)
    workdir.key.unlink(missing_ok=True)
    configs.save(config, workdir.config)
    return result


def summary(result: dict[str, Any]) -> str:
    """Returns what was selected in words."""
    return (
        f"Chosen: {' '.join(result['chosen']) or 'the settings as they are'}; noisy score "
        f"{result['noisy_score']:.0f} of {result['num_records']} (noise {result['noise']:g}), which epsilon covers."
    )
