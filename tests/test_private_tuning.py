"""``dpdm tune SOURCE --mean-runs M``: all is charged first, the best run alone is left, and it can be released."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.made_release import edit

from dpdm import checkpoint, private_tuning, train
from dpdm import config as configs
from dpdm.cli import run_command
from dpdm.data.archive import ArchiveWriter, ImageArchive
from dpdm.errors import DivergedError, InputError, RunError
from dpdm.evaluation.classifiers import ExactClassifier, logistic_regression_accuracy
from dpdm.privacy import noise
from dpdm.privacy.accounting import Distribution, Mechanism, Repeats, Selection, epsilon_spent
from dpdm.privacy.ledger import Ledger
from dpdm.privacy.second_selection import epsilon_with_selections
from dpdm.private_tuning import SelectionRequest, check_same_cost, noisy_score, score_noise_multiplier, select
from dpdm.release import make_release
from dpdm.synthesize import Request
from dpdm.tune import read_candidates
from dpdm.verify import verify
from dpdm.workdir import Workdir

EPSILON = 1.0
NUM_IMAGES = 90
FEW_STEPS = (
    "train.num_epochs=null",
    "train.num_iterations=2",
    "train.expected_batch_size=10",
    "loss.noise_multiplicity=1",
    "model.network.width=4",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
    "model.network.attention_resolutions=[]",
    "train.warmup.num_iterations=2",
    "sampler.num_steps=2",
    "setup.device=cpu",
    "setup.num_threads=1",
)
CANDIDATES = ((), ("optim.learning_rate=0.01",), ("model.ema_rate=0.5",))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def few_images_for_a_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private_tuning, "SCORE_IMAGES", 30)


def write_archive(path: Path, *, labelled: bool = True) -> Path:
    random = np.random.default_rng(0)
    with ArchiveWriter(path, ["a", "b"] if labelled else None) as writer:
        for index in range(NUM_IMAGES):
            writer.add(random.integers(0, 256, (1, 8, 8), np.uint8), index % 2 if labelled else None)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_archive(tmp_path_factory.mktemp("source") / "images.zip"))


def ask(
    source: str,
    *,
    mean: float = 1.5,
    distribution: Distribution = "geometric",
    candidates: tuple[tuple[str, ...], ...] = CANDIDATES,
    epsilon: float = EPSILON,
) -> SelectionRequest:
    return SelectionRequest(Request(source, epsilon, overrides=FEW_STEPS), Repeats(mean, distribution), candidates)


@pytest.fixture(scope="module")
def chosen(source: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chosen") / "w"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(private_tuning, "SCORE_IMAGES", 30)
        select(ask(source), Workdir(root))
    return root


def test_the_best_run_alone_is_left(chosen: Path) -> None:
    run = Workdir(chosen)
    assert {path.name for path in run.private.iterdir()} == {
        "checkpoint.safetensors",
        "holdout.zip",
        "holdout_key",
        "ledger.jsonl",
        "lock",
        "request.json",
        "selection.json",
        "train.zip",
    }
    state, facts = checkpoint.load(run.checkpoint)
    assert state.step == 2
    assert state.curves == {}
    assert set(facts) == {"candidate", "score", "environment", "ledger"}
    result = json.loads((run.private / "selection.json").read_text())
    assert tuple(result["chosen"]) == CANDIDATES[facts["candidate"]]


def test_one_entry_pays_for_all_runs(chosen: Path) -> None:
    ledger = Ledger(Workdir(chosen).ledger)
    (selection,) = ledger.mechanisms()
    assert isinstance(selection, Selection)
    assert selection.repeats == Repeats(1.5, "geometric")
    assert {(m.name, m.num_steps) for m in selection.base} == {
        ("central images", 1),
        ("DP-SGD", 2),
        ("noisy score", 1),
    }
    size = ImageArchive(Workdir(chosen).train_archive).num_images
    assert {m.sampling_rate for m in selection.base} == {1.0, 10 / size}
    assert 0.99 * EPSILON < epsilon_spent([selection], 1e-5) <= EPSILON
    assert epsilon_with_selections([selection], [], 1e-5) <= EPSILON * 1.001


def test_it_is_released_sampled_and_verified(chosen: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(chosen, tmp_path / "w")
    work = str(tmp_path / "w")
    assert run_command(["release", "--workdir", work]) == 0
    assert run_command(["sample", "--workdir", work, "--", "sampler.num_images=4"]) == 0
    capfd.readouterr()
    assert run_command(["verify", f"{work}/release"]) == 0
    page = " ".join(capfd.readouterr().out.split())
    assert "a secret random number of times, on average 1.5 (geometric)" in page
    assert "chosen among 3 candidates" in page
    assert "The choice of hyperparameters" not in page
    assert run_command(["account", "--compose", f"{work}/release/privacy.json", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["epsilon"] <= EPSILON
    statement = json.loads((tmp_path / "w" / "release" / "privacy.json").read_text())
    assert "Papernot" in statement["accountant"]
    assert run_command(["evaluate", "--workdir", work]) == 0
    assert run_command(["train", "--workdir", work, "--resume"]) == 2


def test_a_run_that_diverges_has_no_right_answers_and_is_not_shown(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would take the whole selection with it, and tell of a run that nobody may see."""
    trained, ends = private_tuning.train, iter([False, True, False])

    def some_diverge(*arguments: Any, **named: Any) -> Any:
        found = trained(*arguments, **named)
        if next(ends):
            raise DivergedError("what nobody may see")
        return found

    monkeypatch.setattr(private_tuning, "train", some_diverge)
    monkeypatch.setattr("dpdm.privacy.selection.draw_number_of_runs", lambda repeats, key: 3)
    monkeypatch.setattr(private_tuning, "noisy_score", lambda *_: 1e6)  # of so few images noise alone may be the best
    select(ask(source), Workdir(tmp_path / "w"))
    assert next(ends, None) is None
    assert "what nobody may see" not in "".join(capfd.readouterr())
    monkeypatch.setattr(
        private_tuning, "train", lambda *_, **__: (_ for _ in ()).throw(DivergedError("what nobody may see"))
    )
    with pytest.raises(RunError, match="The selected run diverged"):
        select(ask(source), Workdir(tmp_path / "all"))
    assert len(Ledger(Workdir(tmp_path / "all").ledger).mechanisms()) == 1
    assert not Workdir(tmp_path / "all").checkpoint.exists()


def test_a_diverged_run_s_score_is_noise_alone() -> None:
    mechanism = Mechanism("noisy score", 1.0, 30.0, 1)
    scores = [private_tuning.noisy_count(0, mechanism, bytes([number]) * 32) for number in range(40)]
    assert 15 < float(np.std(scores)) < 50
    assert abs(float(np.mean(scores))) < 20


def test_a_run_of_a_killed_selection_is_no_run_by_itself(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its statement would not count the selection, with which it shares its randomness."""
    kept = tmp_path / "kept"

    def killed(*_: Any, **__: Any) -> None:
        shutil.copytree(tmp_path / "w" / "private" / "run", kept)
        raise KeyboardInterrupt

    monkeypatch.setattr(private_tuning, "draw", killed)
    with pytest.raises(KeyboardInterrupt):
        select(ask(source), Workdir(tmp_path / "w"))
    with pytest.raises(InputError, match="of a private selection, which is not released by itself"):
        make_release(Workdir(kept))
    with pytest.raises(InputError, match="of a private selection"):
        train.train(configs.load([kept / "config.yaml"]), Workdir(kept), resume=True)
    assert not Workdir(kept).release.exists()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m[0]["base"][2].update(sampling_rate=0.001), "the mechanism of the score"),
        (lambda m: m[0]["base"][2].update(noise_multiplier=1e4), "the mechanism of the score"),
        (lambda m: m[0]["base"][1].update(num_steps=1), "1 steps of DP-SGD are stated, config.json asks for 2"),
        (lambda m: m[0].update(mean_runs=1.1), "both accountants"),
        (lambda m: m[0].update(mean_runs=9.0), "epsilon is"),
        (lambda m: m[0]["base"][2].update(noise_multiplier=0.5), "epsilon is"),
        (lambda m: m[0].update(name="luck"), "beside a private selection"),
        (lambda m: m[0]["base"].pop(2), "lacks its training or its score"),
        (lambda m: m[0]["base"].append({**m[0]["base"][2], "name": "peek"}), "what peek does is not known"),
        (lambda m: m.append(m[0]["base"][1]), "beside a private selection"),
        (lambda m: m.__setitem__(slice(None), m[0]["base"]), "what noisy score does is not known"),
    ],
)
def test_a_forged_selection_is_refused(
    chosen: Path, tmp_path: Path, change: Callable[[Any], Any], problem: str
) -> None:

    shutil.copytree(chosen, tmp_path / "w")
    assert run_command(["release", "--workdir", str(tmp_path / "w")]) == 0
    edit(tmp_path / "w" / "release", "privacy.json", lambda s: change(s["mechanisms"]) and None)
    found = verify(tmp_path / "w" / "release").problems
    assert any(problem in line for line in found), found


def test_a_selection_under_an_impossible_budget_is_told_in_words(chosen: Path, tmp_path: Path) -> None:
    """There is no score's noise to compare with."""
    shutil.copytree(chosen, tmp_path / "w")
    assert run_command(["release", "--workdir", str(tmp_path / "w")]) == 0
    edit(tmp_path / "w" / "release", "config.json", lambda c: c["dp"].update(epsilon=1e300))
    found = verify(tmp_path / "w" / "release").problems
    assert any("a budget that no run has" in line for line in found), found


def test_everything_is_charged_before_the_first_run_and_a_killed_selection_is_replayed(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, keys = Workdir(tmp_path / "w"), []
    trained = private_tuning.train

    def die(*arguments: Any, key: bytes, **named: Any) -> Any:
        assert len(Ledger(run.ledger).mechanisms()) == 1
        keys.append(key)
        trained(*arguments, key=key, **named)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(private_tuning, "train", die)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                select(ask(source), run)
            assert not (run.private / "run").exists()
            assert not run.checkpoint.exists()
    assert keys[0] == keys[1]
    with pytest.raises(InputError, match="another request"):
        select(ask(source, mean=2.0), run)
    with monkeypatch.context() as patched:
        patched.setattr(private_tuning, "execution", lambda device: "another machine")
        with pytest.raises(InputError, match="stays charged"):
            select(ask(source), run)
    select(ask(source), run)
    assert len(Ledger(run.ledger).mechanisms()) == 1
    with pytest.raises(InputError, match="finished"):
        select(ask(source), run)


def test_the_outcome_is_a_function_of_the_key(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "new_key", lambda: noise.test_key(7))
    results = [select(ask(source), Workdir(tmp_path / name)) for name in "ab"]
    assert results[0] == results[1]
    states = [checkpoint.load(Workdir(tmp_path / name).checkpoint)[0] for name in "ab"]
    assert states[0].digest() == states[1].digest()


def test_nothing_is_shown_of_the_runs(source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verbose = (*FEW_STEPS, "train.log_every=1", "train.snapshot_every=1")
    request = SelectionRequest(Request(source, EPSILON, overrides=verbose), Repeats(4.0, "geometric"), CANDIDATES)
    select(request, Workdir(tmp_path / "w"))
    told = capfd.readouterr()
    assert told.out == ""
    after = told.err.split("no progress is shown")[1]
    assert len(after.splitlines()) == 1  # the rest of that sentence
    assert "loss 0" not in told.err
    assert not (tmp_path / "w" / "private" / "snapshots").exists()


def test_no_run_at_all_stays_charged(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpdm.privacy.selection.draw_number_of_runs", lambda repeats, key: 0)
    run = Workdir(tmp_path / "w")
    for _ in range(2):
        with pytest.raises(RunError, match="drawn as 0"):
            select(ask(source, mean=2.0, distribution="poisson"), run)
    assert len(Ledger(run.ledger).mechanisms()) == 1
    assert not run.checkpoint.exists()


@pytest.mark.parametrize(
    "change",
    [
        "train.expected_batch_size=20",
        "train.num_iterations=3",
        "train.warmup.enabled=false",
        "train.warmup.noise_multiplier=99",
        "dp.secure_noise=false",
        "setup.precision=float32",
    ],
)
def test_candidates_that_cost_differently_are_refused(change: str, source: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="all cost the same") as caught:
        select(ask(source, candidates=((), (change,))), Workdir(tmp_path / "w"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "w").exists()


def test_what_may_differ_is_accepted() -> None:
    base = configs.load([], [*FEW_STEPS, "train.warmup.enabled=true"])
    changes = (
        "optim.schedule=linear",
        "loss.noise_multiplicity=8",
        "model.denoiser=v",
        "sampler.guidance_scale=1",
        "dp.clipping_norm=0.5",
        "train.warmup.learning_rate=0.01",
    )
    made = [base, *(configs.load([], [*FEW_STEPS, "train.warmup.enabled=true", change]) for change in changes)]
    check_same_cost(made, [(), *((change,) for change in changes)], 90)


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"candidates": (("dp.epsilon=3",), ())}, "dp.epsilon"),
        ({"candidates": (("model.network.width=0",), ())}, "width"),
        ({"candidates": ((), ("sampler.class_weights=[9,1]",))}, "class_weights"),
        ({"candidates": ((), ("sampler.labels=1",))}, "sampler.labels"),
        ({"epsilon": 0.0}, "--epsilon"),
        ({"mean": 0.5}, "mean_runs"),
        ({"distribution": "uniform"}, "distribution"),
    ],
)
def test_what_is_refused_leaves_nothing(changes: dict[str, Any], hint: str, source: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=hint):
        select(ask(source, **changes), Workdir(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "images.zip", labelled=False)
    with pytest.raises(InputError, match="labels"):
        select(ask(str(path)), Workdir(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def learner(seed: int, classes: int) -> tuple[ExactClassifier, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, 60)
    images = random.integers(0, 200, (60, 1, 8, 8)) + 20 * labels[:, None, None, None]
    return ExactClassifier(images.astype(np.uint8), labels), images.astype(np.uint8), labels


@pytest.mark.parametrize("classes", [2, 3])
def test_the_exact_classifier_is_logistic_regression(classes: int) -> None:
    classifier, images, labels = learner(1, classes)
    _, others, truth = learner(2, classes)
    accuracy = float((classifier.predict(others) == truth).mean())
    assert accuracy == logistic_regression_accuracy(images, labels, others, truth).value
    one_by_one = [int(classifier.predict(image[None])[0]) for image in others]
    assert one_by_one == classifier.predict(others).tolist()
    assert ExactClassifier(images, np.full(60, 3)).predict(others).tolist() == [3] * 60


def test_one_record_moves_the_score_by_at_most_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the noise, which has the stated standard deviation."""
    seen: list[tuple[float, float, float]] = []

    def spy(values: np.ndarray, *, sensitivity: float, noise_multiplier: float, key: bytes) -> np.ndarray:
        seen.append((float(values.sum()), sensitivity, noise_multiplier))
        return values

    classifier, images, labels = learner(3, 2)
    with monkeypatch.context() as patched:
        patched.setattr(private_tuning, "secure_gaussian", spy)
        for number in range(4):
            with ArchiveWriter(tmp_path / f"{number}.zip", ["a", "b"]) as writer:
                for image, label in zip(images[number:], labels[number:], strict=True):
                    writer.add(image, int(label))
            noisy_score(classifier, ImageArchive(tmp_path / f"{number}.zip"), Mechanism("s", 1.0, 5.0, 1), bytes(32))
    assert {(sensitivity, sigma) for _, sensitivity, sigma in seen} == {(1.0, 5.0)}
    counts = [count for count, *_ in seen]
    assert counts[0] == (classifier.predict(images) == labels).sum()
    assert all(0 <= a - b <= 1 for a, b in pairwise(counts))
    archive = ImageArchive(tmp_path / "0.zip")
    noisy = [
        noisy_score(classifier, archive, Mechanism("s", 1.0, 5.0, 1), noise.derive_key(bytes(32), i))
        for i in range(300)
    ]
    assert np.std(noisy) == pytest.approx(5.0, rel=0.15)
    assert np.mean(noisy) == pytest.approx(counts[0], abs=1.0)


def test_the_scores_noise_costs_little() -> None:
    for size, epsilon in ((60, 1.0), (1497, 10.0), (60_000, 1.0), (60_000, 0.2)):
        score = Mechanism("s", 1.0, score_noise_multiplier(size, epsilon, 1e-6), 1)
        assert epsilon_spent([score], 1e-6) < 0.12 * epsilon


def test_by_the_command_line(source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "list.yaml").write_text("- []\n- [optim.learning_rate=0.01, model.ema_rate=0.5]\n")
    words = ["--epsilon", "1", "--mean-runs", "1.5", "--candidates", str(tmp_path / "list.yaml")]
    assert run_command(["tune", source, *words, "--workdir", str(tmp_path / "w"), "--", *FEW_STEPS]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("Chosen: ")
    assert "2: optim.learning_rate=0.01 model.ema_rate=0.5" in err
    assert Workdir(tmp_path / "w").checkpoint.exists()
    assert run_command(["tune", source, *words]) == 2
    assert "--workdir" in capfd.readouterr().err
    assert run_command(["tune", source, *words, "--public", "--workdir", str(tmp_path / "x")]) == 2
    assert "Expected no --public with --mean-runs" in capfd.readouterr().err


@pytest.mark.parametrize(
    "text", ["3", "- a=1\n", "- [1]\n- []\n", "- []\n", "- []\n- []\n", "- []\n- [trian.seed=1]\n", "["]
)
def test_a_list_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text(text)
    with pytest.raises(InputError, match=r"^Expected "):
        read_candidates(tmp_path / "list.yaml")


def test_a_request_of_another_distribution_is_another(source: str) -> None:
    assert replace(ask(source), repeats=Repeats(1.5)) != ask(source)
