"""The command line as a clumsy user meets it: one clear line, the right exit status, nothing half-written."""

import errno
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from dpdm import checkpoint, workdir
from dpdm.cli import run_command
from dpdm.errors import InputError
from dpdm.privacy.accounting import Mechanism, epsilon_spent
from dpdm.privacy.ledger import Ledger

TINY = [
    "dp.noise_multiplier=4",
    "train.num_iterations=2",
    "train.expected_batch_size=10",
    "loss.noise_multiplicity=1",
    "model.network.width=4",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
    "sampler.num_steps=2",
    "sampler.num_images=3",
    "setup.device=cpu",
    "setup.num_threads=1",
]
Capture = pytest.CaptureFixture[str]


def write_images(folder: Path, count: int, *, side: int = 8, classes: tuple[str, ...] = ("a", "b")) -> Path:
    random = np.random.default_rng(count)
    for index in range(count):
        parent = folder / classes[index % len(classes)] if classes else folder
        parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (side, side), np.uint8)).save(parent / f"{index:03d}.png")
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_images(tmp_path_factory.mktemp("source") / "images", 40)


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, not released."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert run_command(["train", "--workdir", str(run), "--", f"data.path={images}", *TINY]) == 0
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def refused(capfd: Capture) -> Callable[..., str]:
    """Runs a command that must fail; returns its one line of complaint (notes and progress may come before it)."""

    def check(*arguments: object, status: int = 2) -> str:
        capfd.readouterr()
        assert run_command([str(argument) for argument in arguments]) == status
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        complaints = [line for line in err.splitlines() if line.startswith("dpdm: ")]
        assert len(complaints) == 1
        assert err.rstrip().endswith(complaints[0])
        return complaints[0]

    return check


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# Usage


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train"], "--workdir"),
        (["synthesize"], "SOURCE"),
        (["synthesize", "x", "--epsilon", "much", "--workdir", "w"], "'much'"),
        (["trian"], "'train'"),
        (["train", "--workdir", "w", "--foo"], "--foo"),
        (["train", "--workdir", "w", "dp.epsilon"], "'dp.epsilon'"),
        (["train", "--workdir", "w", "--config", "nowhere.yaml"], "nowhere.yaml"),
        (["train", "--workdir", "w"], "dp.epsilon"),
        (["account"], "--dataset-size"),
        (["verify", "nowhere"], "nowhere"),
        (["evaluate", "--workdir", "nowhere"], "nowhere"),
        (["release", "--workdir", "nowhere"], "nowhere"),
        (["sample", "--workdir", "nowhere"], "nowhere"),
        (["prepare", "nowhere", "x.zip"], "nowhere"),
    ],
)
def test_wrong_usage_is_told_in_one_line(
    arguments: list[str], hint: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hint in refused(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_help_of_every_command_says_what_it_does(capfd: Capture) -> None:
    assert run_command(["--help"]) == 0
    listing = capfd.readouterr().out.split("Commands:\n")[1].split("\n\n")[0]
    commands = [row.split()[0] for row in listing.splitlines()]
    assert {"account", "demo", "train", "release", "sample", "evaluate", "synthesize", "verify"} <= set(commands)
    for command in commands:
        assert run_command([command, "--help"]) == 0
        out = capfd.readouterr().out
        assert out.startswith(f"Usage: dpdm {command}")
        assert "..." not in out.replace("[-- key=value ...]", "")


# account


def test_account_answers_with_one_json_object(capfd: Capture) -> None:
    line = "account --dataset-size 60000 --batch-size 4096 --epochs 300 --delta 1e-5 --epsilon 1 --json"
    assert run_command(list(line.split())) == 0
    result = json.loads(capfd.readouterr().out)
    assert result["noise_multiplier"] == pytest.approx(16.921, rel=1e-3)
    assert result["epsilon"] <= 1
    assert (result["num_steps"], result["delta"]) == (4394, 1e-5)
    assert result["sampling_rate"] == 4096 / 60000


@pytest.mark.parametrize(
    ("extra", "hint"),
    [
        ("--epsilon 1", "got neither"),
        ("--epochs 1 --iterations 1 --epsilon 1", "got both"),
        ("--epochs 1", "--epsilon and --noise-multiplier, got neither"),
        ("--epochs 1 --epsilon 1 --noise-multiplier 1", "got both"),
        ("--epochs 1 --epsilon nan", "--epsilon"),
        ("--epochs 1 --epsilon -1", "--epsilon"),
        ("--epochs 1 --epsilon inf", "--epsilon"),
        ("--epochs inf --epsilon 1", "--epochs"),
        ("--epochs nan --epsilon 1", "--epochs"),
        ("--iterations 0 --epsilon 1", "--iterations"),
        ("--iterations 1 --noise-multiplier 1e-6", "--noise-multiplier"),
        ("--iterations 1 --noise-multiplier 1 --warmup-noise-multiplier 0", "--warmup-noise-multiplier"),
        ("--iterations 1 --noise-multiplier 1 --delta 0.001", "delta < 1/N"),
        ("--iterations 1 --noise-multiplier 1 --batch-size 1001", "--batch-size"),
        ("--iterations 1 --noise-multiplier 1 --dataset-size 0", "--dataset-size"),
    ],
)
def test_account_refuses(extra: str, hint: str, refused: Callable[..., str]) -> None:
    assert hint in refused("account", "--dataset-size", 1000, "--batch-size", 100, *extra.split())


def test_account_counts_all_that_a_warm_up_buys(capfd: Capture) -> None:
    plan = "--dataset-size 60000 --batch-size 4096 --iterations 730 --delta 1e-6 --noise-multiplier 9.2935 --json"
    warmup = ("--warmup-noise-multiplier", "12.9", "--warmup-noise-multiplier", "10.1")
    assert run_command(["account", *list(plan.split()), *warmup]) == 0
    bought = [Mechanism("means", 1.0, 12.9, 1), Mechanism("covariances", 1.0, 10.1, 1)]
    bought.append(Mechanism("DP-SGD", 4096 / 60000, 9.2935, 730))
    assert json.loads(capfd.readouterr().out)["epsilon"] == epsilon_spent(bought, 1e-6)


def test_account_warns_of_a_large_delta(capfd: Capture) -> None:
    line = "account --dataset-size 1000 --batch-size 100 --iterations 1 --noise-multiplier 2 --delta 0.0005"
    assert run_command(list(line.split())) == 0
    assert "warning: delta=0.0005 is above 1/(10 N)" in capfd.readouterr().err


def test_account_totals_ledgers_and_statements(run: Path, capfd: Capture, refused: Callable[..., str]) -> None:
    ledger = str(run / "private" / "ledger.jsonl")

    def total(*files: str) -> float:
        capfd.readouterr()
        assert run_command(["account", "--json", *(word for file in files for word in ("--compose", file))]) == 0
        return json.loads(capfd.readouterr().out)["epsilon"]

    assert run_command(["release", "--workdir", str(run)]) == 0
    statement = str(run / "release" / "privacy.json")
    assert total(ledger) == total(statement) < total(ledger, statement) <= 2 * total(ledger)
    for same in ((ledger, statement), (ledger, ledger), (statement, statement)):
        assert run_command(["account", *(word for file in same for word in ("--compose", file))]) == 0
        assert f"{same[0]} and {same[1]} say the same: if they are of one run" in capfd.readouterr().err
    assert "privacy.json" in refused("account", "--compose", run / "config.yaml")
    assert "none" in refused("account", "--compose", run / "nothing")
    assert "--compose alone" in refused("account", "--compose", run / "config.yaml", "--epsilon", "5")
    stats = ["--fid", "stats.npz", "--samples", run]
    assert "--classifiers" in refused("evaluate", *stats, "--classifiers", "paper")
    assert "--holdout" in refused("evaluate", *stats, "--holdout", "images.zip")
    assert "--classifiers" in refused("evaluate", "--workdir", run, "--classifier-epochs", "2")


# train: refused before anything is bought or left behind


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("train.nmu_iterations=2", "did you mean train.num_iterations?"),
        ("dp.epsilon=1", "got both"),
        ("dp.noise_multiplier=null", "got neither"),
        ("dp.delta=0.03", "delta < 1/N"),
        ("train.expected_batch_size=41", "<= 40"),
        ("data.path=nowhere", "nowhere"),
        ("data.path=null", "data.path"),
        ("data.num_classes=3", "data.num_classes"),
        ("sampler.class_weights=[1,1,1]", "sampler.class_weights"),
        ("data.resolution=9", "data.resolution"),
        ("model.network.channel_multipliers=[1,1,1,1,1]", "channel_multipliers"),
        ("model.network.attention_resolutions=[5]", "attention_resolutions"),
        ("model.network.dropout=0.1", "dropout"),
        ("setup.device=nonsense", "setup.device"),
        ("train.num_iterations=null", "train.num_epochs or train.num_iterations"),
    ],
)
def test_train_refuses_and_leaves_nothing(
    override: str, hint: str, images: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    target = tmp_path / "new" / "run"
    assert hint in refused("train", "--workdir", target, "--", f"data.path={images}", *TINY, override)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="here cuda can be used")
def test_a_gpu_that_is_not_there_is_named(images: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    message = refused("train", "--workdir", tmp_path / "w", "--", f"data.path={images}", *TINY, "setup.device=cuda")
    assert "'cuda'" in message


def test_labels_that_are_missing_are_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    flat = write_images(tmp_path / "flat", 30, classes=())
    keys = [f"data.path={flat}", *TINY, "data.num_classes=2"]
    assert "one folder per class" in refused("train", "--workdir", tmp_path / "w", "--", *keys)
    assert not (tmp_path / "w").exists()


def test_all_bad_images_are_named_in_one_go(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = write_images(tmp_path / "bad", 20)
    (source / "a" / "000.png").write_bytes((source / "a" / "000.png").read_bytes()[:40])
    (source / "b" / "new.jpg").write_text("no image")
    message = refused("train", "--workdir", tmp_path / "w", "--", f"data.path={source}", *TINY)
    assert "2 images" in message
    assert "a/000.png" in message
    assert "b/new.jpg" in message
    assert not (tmp_path / "w").exists()


def test_images_of_different_sizes_are_named(tmp_path: Path, refused: Callable[..., str]) -> None:
    source = write_images(write_images(tmp_path / "sizes", 20), 5, side=9)
    message = refused("train", "--workdir", tmp_path / "w", "--", f"data.path={source}", *TINY)
    assert "8x8" in message
    assert "9x9" in message


@pytest.mark.parametrize("name", ["text.zip", "text.txt", "empty", "one"])
def test_sources_that_are_no_images(name: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "text.zip").write_text("hello")
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "one", 1)
    assert name in refused("train", "--workdir", tmp_path / "w", "--", f"data.path={tmp_path / name}", *TINY)
    assert not (tmp_path / "w").exists()


def test_a_large_delta_is_warned_of_before_training(images: Path, tmp_path: Path, capfd: Capture) -> None:
    keys = [f"data.path={images}", *TINY, "dp.delta=0.01"]
    assert run_command(["train", "--workdir", str(tmp_path / "w"), "--", *keys]) == 0
    before, after = capfd.readouterr().err.split("Warning: delta=0.01 is above 1/(10 N) = 0.0025")
    assert "Privacy: at most epsilon=" in before
    assert "DP-SGD: 2 of 2 steps" in after


# Folders


def test_a_folder_with_a_run_is_not_overwritten(run: Path, images: Path, refused: Callable[..., str]) -> None:
    before = contents(run)
    assert "--resume" in refused("train", "--workdir", run, "--", f"data.path={images}", *TINY)
    assert "another --workdir" in refused("synthesize", images, "--epsilon", 10, "--workdir", run)
    message = refused("train", "--resume", "--workdir", run, "--", "optim.learning_rate=1")
    assert "config with which the run" in message
    assert contents(run) == before


def test_resume_needs_a_run(tmp_path: Path, images: Path, refused: Callable[..., str]) -> None:
    assert "leave out --resume" in refused(
        "train", "--resume", "--workdir", tmp_path / "w", "--", f"data.path={images}", *TINY
    )
    refused("train", "--resume", "--workdir", tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("command", ["train", "sample", "release", "evaluate", "synthesize"])
@pytest.mark.parametrize("below", ["", "below"])
def test_a_workdir_that_is_a_file(
    command: str, below: str, tmp_path: Path, images: Path, refused: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("mine")
    first = [command, images, "--epsilon", 10] if command == "synthesize" else [command]
    keys = ["--", f"data.path={images}", *TINY] if command == "train" else []
    assert "file" in refused(*first, "--workdir", tmp_path / "file" / below, *keys)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_workdir_that_cannot_be_written_to(
    tmp_path: Path, images: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workdir.os, "access", lambda path, mode: False)  # tests may run as root, who may everything
    message = refused("train", "--workdir", tmp_path / "w", "--", f"data.path={images}", *TINY)
    assert "permission" in message


def test_images_of_an_earlier_attempt_are_not_trained_on(run: Path, tmp_path: Path, capfd: Capture) -> None:
    """A run that died between preparing and its first purchase left ``train.zip``; the next one has other images."""
    for name in ("ledger.jsonl", "checkpoint.safetensors"):
        (run / "private" / name).unlink()
    other = write_images(tmp_path / "other", 25)
    assert run_command(["train", "--workdir", str(run), "--", f"data.path={other}", *TINY]) == 0
    assert "one of 25 images" in capfd.readouterr().err


def test_sample_and_release_refuse_to_replace(run: Path, refused: Callable[..., str], capfd: Capture) -> None:
    assert "dpdm train" in refused("release", "--workdir", run.parent / "nothing")
    assert "--preview" in refused("release", "--workdir", run, "--preview", "--half")
    assert "--preview" in refused("release", "--from", run, "--preview")
    assert run_command(["release", "--workdir", str(run), "--preview"]) == 0
    assert f"--workdir {run} --ema 0.999" in capfd.readouterr().err
    assert run_command(["release", "--workdir", str(run)]) == 0
    assert "released once" in refused("release", "--workdir", run)
    assert "is over" in refused("train", "--resume", "--workdir", run)
    assert run_command(["sample", "--workdir", str(run)]) == 0
    before = contents(run)
    assert "choose another --workdir" in refused("sample", "--workdir", run)
    assert contents(run) == before


def test_a_budget_near_the_largest_is_calibrated(capfd: Capture) -> None:
    """Refused are only noise multipliers that were given, by a quick and looser bound."""
    numbers = ["--dataset-size", "1000", "--batch-size", "1000", "--iterations", "10", "--delta", "1e-5"]
    assert run_command(["account", *numbers, "--epsilon", "90", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert 85 < found["epsilon"] <= 90
    assert run_command(["account", *numbers, "--noise-multiplier", str(0.5 * found["noise_multiplier"])]) == 2
    assert "raise the noise multiplier" in capfd.readouterr().err


# Damage


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "ledger.jsonl"])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
@pytest.mark.parametrize("command", [["train", "--resume"], ["release"]])
def test_damaged_state_is_refused(
    name: str, damage: str, command: list[str], run: Path, refused: Callable[..., str]
) -> None:
    file = run / "private" / name
    content = file.read_bytes()
    flipped = bytes([content[len(content) // 2] ^ 255])
    middle = len(content) // 2
    file.write_bytes(
        {"cut": content[:middle], "flip": content[:middle] + flipped + content[middle + 1 :], "empty": b""}[damage]
    )
    assert name in refused(*command, "--workdir", run, status=1)
    assert not (run / "release").exists()


def test_a_ledger_that_lost_its_last_lines_is_noticed(run: Path, refused: Callable[..., str]) -> None:
    """The rest is a whole chain; but the checkpoint knows of more steps."""
    file = run / "private" / "ledger.jsonl"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-1]))
    Ledger(file)
    for command in (["train", "--resume"], ["release"]):
        assert "damaged" in refused(*command, "--workdir", run, status=1)


def test_a_checkpoint_without_a_ledger_is_no_new_run(run: Path, images: Path, refused: Callable[..., str]) -> None:
    (run / "private" / "ledger.jsonl").unlink()
    message = refused("train", "--workdir", run, "--", f"data.path={images}", *TINY)
    assert "what was spent is unknown" in message


@pytest.mark.parametrize("content", ["", "00", "zz" * 32])
def test_a_damaged_key_is_refused(content: str, run: Path, refused: Callable[..., str]) -> None:
    (run / "private" / "key").write_text(content)
    assert "64 hex digits" in refused("train", "--resume", "--workdir", run)


@pytest.mark.parametrize("content", ["", "garbage", "dp: {noise_multiplier: 1.0}", "\0"])
def test_a_damaged_config_is_never_released(content: str, run: Path, capfd: Capture) -> None:
    (run / "config.yaml").write_text(content)
    assert run_command(["release", "--workdir", str(run)]) in (1, 2)
    assert "config.yaml" in capfd.readouterr().err.splitlines()[-1]
    assert not (run / "release").exists()
    assert (run / "private" / "key").exists()


def test_a_config_that_was_edited_is_never_released(run: Path, refused: Callable[..., str]) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("delta: 1.0e-05", "delta: 1.0e-03"))
    assert "undo the change" in refused("release", "--workdir", run, status=1)


def test_a_damaged_archive_is_named(run: Path, refused: Callable[..., str]) -> None:
    (run / "private" / "train.zip").write_bytes(b"garbage")
    assert "train.zip" in refused("train", "--resume", "--workdir", run)


# On the way


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "somewhere"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_loses_nothing(
    error: Exception, images: Path, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "--workdir", str(tmp_path / "w"), "--", f"data.path={images}", *TINY]
    with monkeypatch.context() as patched:

        def full(*arguments: object, **named: object) -> None:
            raise error

        patched.setattr(checkpoint, "save_file", full)
        assert "free some space" in refused(*command, status=1)
    assert run_command(["train", "--resume", "--workdir", str(tmp_path / "w")]) == 0
    assert Ledger(tmp_path / "w" / "private" / "ledger.jsonl").spent("DP-SGD") == 2


def test_an_unexpected_error_keeps_its_traceback(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: Capture
) -> None:
    def broken(*arguments: object, **named: object) -> None:
        raise KeyError("nobody\nforesaw this")

    monkeypatch.setattr("dpdm.account.answer", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert "KeyError" in refused("account", status=1)
    (log,) = tmp_path.iterdir()
    assert "in broken" in log.read_text()
    monkeypatch.setenv("DPDM_DEBUG", "1")
    assert run_command(["account"]) == 1
    assert "in broken" in capfd.readouterr().err


def dpdm(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dpdm", *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)


def wait_for_steps(process: subprocess.Popen[Any], ledger: Path, meanwhile: Callable[[], object]) -> None:
    """Returns when a run has bought some steps."""
    deadline = time.monotonic() + 60
    while not (ledger.exists() and ledger.read_bytes().count(b"\n") > 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        meanwhile()


def test_ctrl_c_saves_and_a_second_run_is_kept_out(images: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    run, steps = tmp_path / "w", 80
    keys = [f"data.path={images}", *TINY, f"train.num_iterations={steps}"]
    process = dpdm("train", "--workdir", run, "--", *keys)
    ledger = run / "private" / "ledger.jsonl"
    try:
        wait_for_steps(process, ledger, lambda: time.sleep(0.01))
        process.send_signal(signal.SIGSTOP)  # so that it cannot finish first
        for command in (["train", "--resume"], ["release"]):
            assert "at work" in refused(*command, "--workdir", run)
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()  # where an assertion failed before its end
    assert process.returncode == 130
    assert "--resume" in err.splitlines()[-1]
    assert "Traceback" not in err
    state, _ = checkpoint.load(run / "private" / "checkpoint.safetensors")
    assert 3 <= state.step == Ledger(ledger).spent("DP-SGD") < steps
    assert run_command(["train", "--resume", "--workdir", str(run)]) == 0
    state, _ = checkpoint.load(run / "private" / "checkpoint.safetensors")
    assert state.step == Ledger(ledger).spent("DP-SGD") == steps


def test_the_end_of_the_terminal_saves(images: Path, tmp_path: Path) -> None:
    """Whoever closes it, or whose connection breaks: nobody hears the run, and it saves all the same."""
    run, steps = tmp_path / "w", 2000
    keys = [f"data.path={images}", *TINY, f"train.num_iterations={steps}", "train.checkpoint_every=10000"]
    master, slave = os.openpty()

    def open_terminal() -> None:
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where these tests run under nohup

    process = subprocess.Popen(
        [sys.executable, "-m", "dpdm", "train", "--workdir", str(run), "--", *keys],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        preexec_fn=open_terminal,
    )
    os.close(slave)
    ledger = run / "private" / "ledger.jsonl"
    try:
        wait_for_steps(process, ledger, lambda: select.select([master], [], [], 0.01)[0] and os.read(master, 2**16))
        os.close(master)
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    state, _ = checkpoint.load(run / "private" / "checkpoint.safetensors")
    assert 3 <= state.step == Ledger(ledger).spent("DP-SGD") < steps


def test_verify_of_a_changed_release(run: Path, refused: Callable[..., str], capfd: Capture) -> None:
    assert run_command(["release", "--workdir", str(run)]) == 0
    assert run_command(["verify", str(run / "release")]) == 0
    (run / "release" / "README.md").write_text("no privacy at all")
    capfd.readouterr()
    assert run_command(["verify", str(run / "release")]) == 1
    assert "README.md differs" in capfd.readouterr().err
    (run / "release" / "privacy.json").write_text("{")
    assert "privacy.json" in refused("verify", run / "release", status=1)


def test_a_lock_can_be_nested_and_leaves_nothing_after_an_error(tmp_path: Path) -> None:
    folder = workdir.Workdir(tmp_path / "w")
    with pytest.raises(InputError, match="mine"), folder.lock(), folder.lock():
        raise InputError("mine")
    assert not folder.root.exists()
    with folder.lock():
        pass
    assert folder.private.stat().st_mode & 0o777 == 0o700


def test_a_pretrained_release_keeps_its_own_network(tmp_path: Path, refused: Callable[..., str]) -> None:
    line = ["sample", "--pretrained", "mnist_small_eps_1.0", "--workdir", str(tmp_path / "w"), "--"]
    for key in ("model.denoiser=v", "data.resolution=32", "loss.sigma_data=2"):
        assert f"got {key}" in refused(*line, key)
    assert "setup.device" in refused(*line, "setup.device=meta")


def test_a_total_names_what_it_does_not_hold(tmp_path: Path, capfd: Capture, refused: Callable[..., str]) -> None:
    """A statement of 1,000 images for which delta 0.5 says nothing; one that began with a private release."""
    source = {"sha256": "ab" * 32, "kind": "private release"}
    statement = {
        "mechanisms": [{"name": "DP-SGD", "sampling_rate": 0.1, "noise_multiplier": 2.0, "num_steps": 10}],
        "delta": 1e-5,
        "dataset_size": 1000,
        "unit": "one image, with its label",
        "files": {"model.safetensors": "cd" * 32},
        "initial_weights": [source],
    }
    file = tmp_path / "privacy.json"
    file.write_text(json.dumps(statement))
    assert "delta < 1/N" in refused("account", "--compose", file, "--delta", "0.5")
    assert run_command(["account", "--compose", str(file)]) == 0
    assert "began with a private release" in capfd.readouterr().err
    other = tmp_path / "other.json"
    other.write_text(json.dumps({**statement, "files": {"model.safetensors": "ab" * 32}, "initial_weights": []}))
    assert run_command(["account", "--compose", str(file), "--compose", str(other)]) == 0
    assert capfd.readouterr().err == ""
    other.write_text(json.dumps({**statement, "dataset_size": 1_000_000, "initial_weights": []}))
    assert "delta < 1/N = 1e-06" in refused("account", "--compose", file, "--compose", other)
    other.write_text(json.dumps({**statement, "dataset_size": 0}))
    assert "dataset_size 0" in refused("account", "--compose", other)
    for steps in (1.5, 0, True):
        statement["mechanisms"][0]["num_steps"] = steps  # type: ignore[index]
        file.write_text(json.dumps(statement))
        assert "num_steps" in refused("account", "--compose", file)


def test_the_config_in_a_new_run_s_folder_is_not_overwritten(tmp_path: Path, refused: Callable[..., str]) -> None:
    file = tmp_path / "w" / "config.yaml"
    file.parent.mkdir()
    file.write_text("dp: {epsilon: 1}  # by hand\n")
    assert "outside of --workdir" in refused("train", "--config", file, "--workdir", tmp_path / "w")
    assert "by hand" in file.read_text()
