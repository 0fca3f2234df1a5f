"""What leaves the house, and what does not."""

import json
import math
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from tests import made_release

from dpdm import central_model, checkpoint, train
from dpdm import config as configs
from dpdm.account import compose
from dpdm.consistency import words_in
from dpdm.data.archive import ArchiveWriter, ImageArchive
from dpdm.errors import InputError, RunError
from dpdm.generate import draw, grid
from dpdm.model_cards import model_card
from dpdm.own_statement import make_statement
from dpdm.plan import check_names
from dpdm.privacy.accounting import epsilon_spent, parts
from dpdm.privacy.central import WarmupConfig
from dpdm.privacy.ledger import Ledger
from dpdm.published_words import check_words
from dpdm.release import load_config, load_denoiser, make_release, preview, sampling_config
from dpdm.released_files import redacted
from dpdm.verify import verify
from dpdm.workdir import Workdir

SECRET_SEED = 5_553_217

CONFIG = made_release.make_config()
STATEMENT = made_release.make_statement(CONFIG)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Workdir:
    """A run of three steps after a warm-up, not released yet."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("owner-of-secrets")
    random = np.random.default_rng(0)
    with ArchiveWriter(root / "images.zip", ["a", "b"]) as writer:
        for index in range(40):
            writer.add(random.integers(0, 256, (1, 8, 8), np.uint8), index % 2)
    overrides = [
        f"data.path={root / 'images.zip'}",
        "data.name=squares",
        "dp.noise_multiplier=2.5",
        "train.num_iterations=3",
        "train.expected_batch_size=10",
        f"train.seed={SECRET_SEED}",
        f"sampler.seed={SECRET_SEED}",
        "train.warmup.enabled=true",
        "train.warmup.num_iterations=2",
        "loss.noise_multiplicity=2",
        "model.ema_rates=[0.05, 0.0]",
        "model.network.width=4",
        "model.network.channel_multipliers=[1]",
        "model.network.num_res_blocks=1",
        "setup.device=cpu",
        "setup.num_threads=1",
    ]
    workdir = Workdir(root / "run")
    train.train(configs.load([], overrides), workdir)
    return workdir


@pytest.fixture(scope="module")
def counted(finished: Workdir, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workdir, np.ndarray]:
    """A run on 30 images of class a and 10 of class b that bought noisy counts, not released yet; the counts."""
    root = tmp_path_factory.mktemp("counted")
    with ArchiveWriter(root / "images.zip", ["a", "b"]) as writer:
        for index in range(40):
            writer.add(np.full((1, 8, 8), index, np.uint8), int(index >= 30))
    keys = [f"data.path={root / 'images.zip'}", "train.warmup.noise_multiplier=0.3", "train.warmup.count_weight=1"]
    bought: list[np.ndarray] = []
    original = train.central_images

    def central_images(
        archive: ImageArchive, config: WarmupConfig, *, num_classes: int, key: bytes
    ) -> central_model.Central:
        found = original(archive, config, num_classes=num_classes, key=key)
        assert found.frequencies is not None
        bought.append(found.frequencies)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "central_images", central_images)
        train.train(configs.load([finished.config], keys), Workdir(root / "run"))
    (frequencies,) = bought
    return Workdir(root / "run"), frequencies


@pytest.fixture
def workdir(finished: Workdir, tmp_path: Path) -> Workdir:
    shutil.copytree(finished.root, tmp_path / "run")
    return Workdir(tmp_path / "run")


def test_a_release_holds_the_allow_list_and_is_consistent(workdir: Workdir) -> None:
    release = make_release(workdir)
    assert {p.name for p in release.iterdir()} == {"model.safetensors", "config.json", "privacy.json", "README.md"}
    found = verify(release)
    statement = found.statement
    assert found.problems == []
    assert set(statement["files"]) == {"model.safetensors", "config.json", "README.md"}


def test_the_weights_are_the_moving_average_and_nothing_else(workdir: Workdir) -> None:
    state, _ = checkpoint.load(workdir.checkpoint)
    release = make_release(workdir)
    with safe_open(release / "model.safetensors", framework="pt") as file:
        released = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
        assert not file.metadata()
    network = load_denoiser(release).network
    assert set(released) == {name for name, _ in network.named_parameters()}
    for name, tensor in released.items():
        assert torch.equal(tensor, state.ema[name])
        assert torch.equal(tensor, dict(network.named_parameters())[name])
    # Otherwise the comparison would not tell the groups of the checkpoint apart.
    assert any(not torch.equal(state.ema[name], state.parameters[name]) for name in released)


@pytest.mark.parametrize("rate", [0.05, 0.0])
def test_another_average_may_be_released(workdir: Workdir, rate: float) -> None:
    state, _ = checkpoint.load(workdir.checkpoint)
    release = make_release(workdir, rate)
    assert verify(release).problems == []
    assert load_config(release).model.ema_rate == rate
    found = dict(load_denoiser(release).network.named_parameters())
    wanted = state.average(rate)
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        assert torch.equal(tensor, found[name].detach())
        assert rate > 0 or torch.equal(tensor, state.parameters[name])
    assert any(not torch.equal(tensor, state.ema[name]) for name, tensor in wanted.items())


def test_a_run_before_its_first_step_is_not_released(
    finished: Workdir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has bought nothing: its statement would name no mechanism, and its key would be gone."""

    def interrupted(*given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "_next_step", interrupted)
    run = Workdir(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train.train(configs.load([finished.config], ["train.warmup.enabled=false"]), run)
    assert run.checkpoint.exists()
    with pytest.raises(InputError, match="before its first step"):
        make_release(run)
    assert run.key.exists()
    assert not run.release.exists()


def test_averages_are_shown_before_one_is_chosen(workdir: Workdir) -> None:
    """What is shown is what the release of that average draws; nothing is released by it."""
    pictures = preview(workdir)
    assert pictures == [workdir.averages / f"{rate}.png" for rate in (0.999, 0.05, 0.0)]
    assert not workdir.release.exists()
    assert workdir.key.exists()
    shown = {picture.stem: np.asarray(Image.open(picture)) for picture in pictures}
    assert not np.array_equal(shown["0.999"], shown["0.05"])
    release = make_release(workdir, 0.05)
    config = configs.load([release / "config.json"], [f"sampler.seed={SECRET_SEED}"])
    assert np.array_equal(shown["0.05"], np.asarray(grid(*draw(load_denoiser(release), config, num_images=200))))
    with pytest.raises(InputError, match="a run is released once"):
        preview(workdir)


def test_images_are_drawn_by_the_noisy_frequencies_of_their_classes(
    counted: tuple[Workdir, np.ndarray], tmp_path: Path
) -> None:
    run, frequencies = counted
    shutil.copytree(run.root, tmp_path / "run")
    workdir = Workdir(tmp_path / "run")
    assert sampling_config(workdir).sampler.class_weights == ()  # nothing is released yet
    release = make_release(workdir)
    weights = load_config(release).sampler.class_weights
    assert weights == pytest.approx(frequencies, rel=5e-4)
    assert list(weights) == pytest.approx([30, 10], abs=4)
    assert list(weights) != [30, 10]
    assert verify(release).problems == []
    assert "drawn by their noisy frequencies" in (release / "README.md").read_text(encoding="utf-8")
    config = sampling_config(workdir)
    assert config.sampler.class_weights == weights
    equal = configs.load([release / "config.json"], ["sampler.class_weights=[]"])
    assert equal.sampler.class_weights == ()
    few = replace(config, sampler=replace(config.sampler, num_steps=2, type="dpm_solver_pp"))
    _, labels = draw(load_denoiser(release), few, num_images=400)
    assert labels is not None
    assert (labels == 0).mean() == pytest.approx(weights[0] / sum(weights), abs=0.1)


def test_equal_weights_of_classes_may_be_asked_for(counted: tuple[Workdir, np.ndarray], tmp_path: Path) -> None:
    shutil.copytree(counted[0].root, tmp_path / "run")
    workdir = Workdir(tmp_path / "run")
    config = configs.load([workdir.config], ["sampler.class_weights=[10, 10]"])
    configs.save(config, workdir.config)
    release = make_release(workdir)
    assert load_config(release).sampler.class_weights == (1.0, 1.0)
    assert "noisy frequencies" not in (release / "README.md").read_text(encoding="utf-8")
    assert verify(release).problems == []


def test_what_an_older_run_did_not_keep_is_said(
    counted: tuple[Workdir, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(counted[0].root, tmp_path / "run")
    workdir = Workdir(tmp_path / "run")
    state, facts = checkpoint.load(workdir.checkpoint)
    assert state.central
    checkpoint.save(workdir.checkpoint, replace(state, central={}), facts)
    release = make_release(workdir)
    assert load_config(release).sampler.class_weights == ()
    assert "all classes equally often" in capsys.readouterr().err


def test_weights_that_were_not_bought_do_not_leave(workdir: Workdir) -> None:
    """Though no such run begins: somebody may have written them into the run's config."""
    configs.save(configs.load([workdir.config], ["sampler.class_weights=[3, 1]"]), workdir.config)
    assert load_config(make_release(workdir)).sampler.class_weights == ()


def test_an_average_that_was_not_kept_is_refused(workdir: Workdir) -> None:
    with pytest.raises(InputError, match=r"Expected --ema to be one of \[0.999, 0.05, 0.0\].*got 0.9"):
        make_release(workdir, 0.9)
    assert not workdir.release.exists()


def test_the_statement_tells_all_that_was_bought(workdir: Workdir) -> None:
    statement = json.loads((make_release(workdir) / "privacy.json").read_text(encoding="utf-8"))
    bought = Ledger(workdir.ledger).mechanisms()
    assert statement["mechanisms"] == [m.as_dict() for m in bought]
    assert {(m.name, m.sampling_rate, m.noise_multiplier, m.num_steps) for m in parts(bought)} == {
        ("DP-SGD", 0.25, 2.5, 3),
        ("central images", 1.0, 5.0, 1),
    }
    assert statement["epsilon"] == pytest.approx(epsilon_spent(bought, 1e-5))
    assert (statement["delta"], statement["dataset_size"], statement["clipping_norm"]) == (1e-5, 40, 1.0)


def test_no_path_seed_key_or_fingerprint_is_in_a_release(workdir: Workdir) -> None:
    ledger = Ledger(workdir.ledger)
    last = json.loads(workdir.ledger.read_text().splitlines()[-1])
    secrets = {
        "a folder": "owner-of-secrets",
        "the workdir": str(workdir.root),
        "a seed": str(SECRET_SEED),
        "the key": workdir.key.read_text().strip(),
        "the fingerprint of the data": ledger.header["data"],
        "an identity": last["identity"],
        "an entry of the set-up": "num_threads",
        "a private curve": "clip_fraction",
    }
    release = make_release(workdir)
    for path in release.iterdir():
        content = path.read_bytes()
        for what, secret in secrets.items():
            assert secret.encode() not in content, f"{what} is in {path.name}"
    config = load_config(release)
    assert (config.data.path, config.dp.seed, config.train.seed, config.sampler.seed) == (None, None, 0, 0)
    assert config.data.name == "squares"


def test_keys_are_deleted_at_release_and_the_run_is_over(workdir: Workdir) -> None:
    workdir.holdout_key.write_text("ab" * 32)
    make_release(workdir)
    assert not workdir.key.exists()
    assert not workdir.holdout_key.exists()
    with pytest.raises(InputError, match="released once"):
        make_release(workdir)
    with pytest.raises(InputError, match="is over"):
        train.train(configs.load([workdir.config]), workdir, resume=True)


def test_a_ledger_s_total_is_the_statement_s(workdir: Workdir) -> None:
    """Of both mechanisms: the warm-up and the steps."""
    assert len(Ledger(workdir.ledger).mechanisms()) == 2
    total = compose([workdir.ledger], None)["epsilon"]
    make_release(workdir)
    assert total == json.loads((workdir.release / "privacy.json").read_text())["epsilon"]
    assert total == compose([workdir.release / "privacy.json"], None)["epsilon"]


def test_a_second_release_is_not_made_of_a_run_whose_first_one_left(workdir: Workdir, tmp_path: Path) -> None:
    make_release(workdir)
    workdir.release.rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="was not released"):
        make_release(workdir, 0.05)
    assert not workdir.release.exists()


def test_weights_that_are_no_numbers_are_not_released(workdir: Workdir) -> None:
    state, facts = checkpoint.load(workdir.checkpoint)
    next(iter(state.ema.values())).view(-1)[0] = math.nan
    checkpoint.save(workdir.checkpoint, state, facts)
    with pytest.raises(RunError, match="Expected finite weights"):
        make_release(workdir)
    assert workdir.key.exists()
    assert not workdir.release.exists()


def test_a_choice_made_since_is_in_the_statement(workdir: Workdir) -> None:
    said = configs.load([workdir.config]).dp.selection
    release = make_release(workdir, 0.05, selection="of three averages, by accuracy on the private images")
    found = verify(release)
    assert found.problems == []
    assert found.statement["hyperparameters"] == f"{said}; of three averages, by accuracy on the private images"
    assert load_config(release).dp.selection == found.statement["hyperparameters"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (" ", "Expected --selection to be words"),
        ("by /home/me/figures.csv", r"dp\.selection that may be published"),
        ("of ${EPOCHS} epochs", "which would refer to something else"),
        ("a\x7fb", "cannot be written as text"),
        ("a\udce9b", "cannot be written as text"),
    ],
)
def test_words_that_verify_would_refuse_are_not_released(workdir: Workdir, words: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_release(workdir, selection=words)
    assert workdir.key.exists()
    assert not workdir.release.exists()


def test_what_verify_would_refuse_is_not_released(workdir: Workdir, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a release cannot be undone: keys are deleted, and there is no second one."""
    before = sorted(workdir.root.rglob("*"))
    with monkeypatch.context() as patch:
        patch.setattr("dpdm.release.make_statement", lambda *a, **k: {**make_statement(*a, **k), "epsilon": 1e-3})
        with pytest.raises(RunError, match=r"agrees with its own statement, got: epsilon is .*Nothing was released"):
            make_release(workdir)
    assert sorted(workdir.root.rglob("*")) == before
    assert verify(make_release(workdir)).problems == []


@given(name=st.text("aé肺:\\/~_*`<|. ", max_size=12), said=st.text("aé肺:\\/~_*`<|. ", max_size=12))
@settings(max_examples=100, deadline=None)
def test_what_training_accepts_verify_accepts(name: str, said: str) -> None:
    """Both look for paths, in words and in the files that hold them."""
    config = replace(CONFIG, data=replace(CONFIG.data, name=name), dp=replace(CONFIG.dp, selection=said))
    try:
        check_names(config)
    except InputError:
        return
    statement = STATEMENT | {"hyperparameters": said}
    for words in ([model_card(statement, config)], words_in(statement), words_in(redacted(config))):
        assert check_words("a file", "\n".join(words)) == []


def test_a_name_that_verify_would_refuse_is_not_released(workdir: Workdir) -> None:
    workdir.config.write_text(workdir.config.read_text().replace("name: squares", "name: /home/me/squares"))
    with pytest.raises(InputError, match=r"data\.name that may be published"):
        make_release(workdir)
    assert workdir.key.exists()
    assert not workdir.release.exists()


def test_private_files_are_for_the_owner_alone(workdir: Workdir) -> None:
    assert stat.S_IMODE(workdir.private.stat().st_mode) == 0o700
    assert stat.S_IMODE(workdir.key.stat().st_mode) == 0o600


def test_a_run_with_public_noise_is_not_released(finished: Workdir, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "seeded")
    train.train(configs.load([finished.config], ["dp.seed=7"]), workdir)
    with pytest.raises(InputError, match=r"dp\.seed=null for a release, got 7"):
        make_release(workdir)
    assert not workdir.release.exists()
    # Nor by taking the seed out of the file afterwards.
    config = workdir.config.read_text()
    assert config.count("seed: 7") == 1
    workdir.config.write_text(config.replace("seed: 7", "seed: null"))
    with pytest.raises(RunError, match="undo the change"):
        make_release(workdir)
    assert not workdir.release.exists()


def test_without_a_whole_ledger_nothing_is_released(workdir: Workdir) -> None:
    content = workdir.ledger.read_bytes()
    lines = content.splitlines(keepends=True)
    damaged = [
        None,
        content.replace(b"2.5", b"9.5", 1),
        b"".join(lines[1:]),
        b"".join(lines[:-1]),  # the last step is missing: no hash tells
        lines[0],
    ]
    for change in damaged:
        workdir.ledger.unlink()
        if change is not None:
            workdir.ledger.write_bytes(change)
        with pytest.raises(RunError, match="ledger"):
            make_release(workdir)
        assert not workdir.release.exists()
        workdir.ledger.write_bytes(content)
    make_release(workdir)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("clipping_norm: 1.0", "clipping_norm: 0.5"),
        ("delta: 1.0e-05", "delta: 1.0e-06"),
        ("selection: by", "selection: not by"),
        ("expected_batch_size: 10", "expected_batch_size: 11"),
    ],
)
def test_a_changed_config_is_not_released(workdir: Workdir, old: str, new: str) -> None:
    config = workdir.config.read_text()
    assert config.count(old) == 1
    workdir.config.write_text(config.replace(old, new))
    with pytest.raises(RunError, match="undo the change"):
        make_release(workdir)
    assert not workdir.release.exists()
    assert workdir.key.exists()


@pytest.mark.parametrize(
    ("file", "old", "new", "problem"),
    [
        ("privacy.json", '"noise_multiplier": 2.5', '"noise_multiplier": 2.4', "epsilon is"),
        ("privacy.json", '"num_steps": 3', '"num_steps": 4', "epsilon is"),
        ("README.md", "adding or removing", "looking at", "README.md differs"),
        ("config.json", "squares", "circles", "config.json differs"),
        ("notes.txt", "", "", "notes.txt is not on the allow-list"),
        ("README.md", None, None, "README.md is missing"),
    ],
)
def test_verify_names_what_does_not_fit(
    workdir: Workdir, file: str, old: str | None, new: str | None, problem: str
) -> None:
    release = make_release(workdir)
    path = release / file
    if old is None or new is None:
        path.unlink()
    elif not path.exists():
        path.write_text("loss of step 1: 0.3")
    else:
        content = path.read_text()
        assert old in content
        path.write_text(content.replace(old, new))
    problems = verify(release).problems
    assert any(problem in found for found in problems), problems


def test_weights_with_another_hash_are_named(workdir: Workdir) -> None:
    release = make_release(workdir)
    content = bytearray((release / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (release / "model.safetensors").write_bytes(content)
    assert verify(release).problems == ["model.safetensors differs from the statement's hash"]


def test_what_is_no_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="statement"):
        verify(tmp_path)
    with pytest.raises(InputError, match="release folder or a weights file"):
        load_denoiser(tmp_path)
    (tmp_path / "privacy.json").write_text('{"epsilon": 1}')
    with pytest.raises(RunError, match="could not read it"):
        verify(tmp_path)
    with pytest.raises(InputError, match="dpdm train first"):
        make_release(Workdir(tmp_path / "empty"))
