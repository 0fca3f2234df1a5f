"""The scripts behind docs/performance.md, on tiny settings: what they print, and what they write into the page."""

import dataclasses
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import central
import dp_step
import gpu_report
import levers
import logical_step
import pytest
import sampling
import scaling
import torch
from _charts import write_between
from dp_step import NETWORKS, Problem

from dpdm import config as configs
from dpdm.account import steps_of
from dpdm.errors import InputError, RunError
from dpdm.recipes import recipe

ROOT = Path(__file__).parent.parent
SVG = "{http://www.w3.org/2000/svg}"
TINY = ["--network", "mnist_28", "--threads", "1", "--rounds", "1"]
needs_diffusers = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers: a peer")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    page = tmp_path / "docs" / "performance.md"
    (page.parent / "images").mkdir(parents=True)
    marks = (f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\n" for name in ("sampling", "scaling", "gpu"))
    page.write_text("before\n" + "between\n".join(marks) + "after\n")
    return page


def printed(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_page_has_a_place_for_every_table() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    names = re.findall(r"<!-- (\w+): begin -->\n(?:.*\n)*?<!-- \1: end -->", text)
    assert names == ["dp_step", "sampling", "scaling", "gpu"]


def test_a_page_without_the_place_is_not_touched(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- other: begin -->\n<!-- other: end -->\n")
    with pytest.raises(SystemExit, match=r"one place for the table scaling in .*, found 0"):
        write_between(page, "scaling", "new")
    assert page.read_text() == "<!-- other: begin -->\n<!-- other: end -->\n"


@needs_diffusers
@pytest.mark.parametrize("network", NETWORKS)
def test_the_peers_network_is_of_our_size(network: str) -> None:
    problem = Problem(network, 1, 1, "cpu")
    ours, peer = sampling.Ours(problem), sampling.Diffusers(problem)
    parameters = [sum(p.numel() for p in way.network.parameters()) for way in (ours, peer)]
    assert parameters[1] == pytest.approx(parameters[0], rel=0.01)
    counts = [sampling.operations(way, problem.images) for way in (ours, peer)]
    assert counts[1] == pytest.approx(counts[0], rel=0.03)
    with torch.no_grad():
        assert peer.forward(problem.images).shape == problem.images.shape


@needs_diffusers
def test_sampling_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    precisions = ["--precision", "float32", "bf16"]
    sampling.main([*TINY, *precisions, "--solver", "dpm_solver_pp", "--num-steps", "3", "--images", "2", "--json"])
    (figures,) = printed(capsys)
    assert (figures["solver"], figures["num_steps"], figures["images"]) == ("dpm_solver_pp", 3, 2)
    assert figures["ours_evaluations"] == figures["diffusers_evaluations"] == 3
    for suffix in ("", "_bf16"):
        for way in ("ours", "diffusers"):
            speed = 2 / figures[f"{way}{suffix}_seconds"]
            assert figures[f"{way}{suffix}_images_per_second"] == pytest.approx(speed)
            assert figures[f"{way}{suffix}_forward_seconds"] > 0
        ratio = figures[f"diffusers{suffix}_seconds"] / figures[f"ours{suffix}_seconds"]
        assert figures[f"ratio{suffix}"] == pytest.approx(ratio)  # of the only round


@pytest.mark.parametrize("has_bf16", [True, False])
def test_sampling_in_bf16_where_the_device_has_it(
    has_bf16: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(sampling, "has_bf16", lambda device: has_bf16)
    sampling.main([*TINY, "--solver", "ddim", "--num-steps", "2", "--images", "1", "--json"])
    (figures,) = printed(capsys)
    assert figures["ours_seconds"] > 0
    assert ("ours_bf16_seconds" in figures) == has_bf16


def test_sampling_without_the_peer(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    sampling.main(
        [*TINY, "--solver", "ddim", "--num-steps", "2", "--images", "1", "--precision", "float32", "--json", "--docs"],
        page,
    )
    shown = capsys.readouterr()
    assert shown.err == "diffusers is not measured: pip install 'dpdm[benchmark]'.\n"
    figures = json.loads(shown.out)
    assert figures["ours_seconds"] > 0
    assert not [name for name in figures if name.startswith(("diffusers", "ratio", "forward_ratio"))]
    before, between, *_ = page.read_text().split("\n<!-- sampling: ")
    assert before == "before"
    assert "| mnist_28 | 1,753,345 | - | 0.638 | - |" in between
    speed = f"{figures['ours_images_per_second']:.2f}"
    assert f"| mnist_28 | `ddim`, 2 | float32 | {figures['ours_forward_seconds']:.3f} | - | - | {speed} |" in between


def test_least_squares() -> None:
    assert scaling.fit([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx(
        {"intercept": 3.0, "slope": 2.0, "largest_deviation": 0.0}, abs=1e-12
    )
    bent = scaling.fit([0, 1, 2], [1.0, 4.0, 1.0])  # y = a of least 2 (a - 1)^2 + (a / 4 - 1)^2
    assert bent == pytest.approx({"intercept": 12 / 11, "slope": 0.0, "largest_deviation": 8 / 11}, abs=1e-12)


def test_each_axis_changes_what_it_says() -> None:
    arguments = scaling.argparse.Namespace(network="cifar10_32", device="cpu")
    base = scaling.problem_at("draws", scaling.DRAWS, arguments)
    width, side = base.config.model.network.width, base.images.shape[-1]
    assert (base.examples, base.draws, width, side) == (scaling.EXAMPLES, scaling.DRAWS, 32, 32)
    for axis, value in {"draws": 3, "examples": 5, "resolution": 16, "width": 8}.items():
        problem = scaling.problem_at(axis, value, arguments)
        network = problem.config.model.network
        changed = {
            "draws": (problem.draws, base.draws),
            "examples": (problem.examples, base.examples),
            "resolution": (problem.images.shape[-1], side),
            "width": (network.width, width),
        }
        assert {name: is_ for name, (is_, was) in changed.items() if is_ != was} == {axis: value}


def test_scaling_writes_fits_processes_and_charts(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {"draws": (1, 2), "examples": (1, 2), "resolution": (8, 12), "width": (4, 8)}
    axes = {name: dataclasses.replace(axis, values=few[name]) for name, axis in scaling.AXES.items()}
    monkeypatch.setattr(scaling, "AXES", axes)
    monkeypatch.setattr(scaling, "EXAMPLES", 1)
    monkeypatch.setattr(scaling, "DRAWS", 1)
    groups = {(1, 1): [6.0, 1.0, 2.0], (1, 2): [1.0, 1.0, 1.0], (2, 1): [0.5, 0.5, 9.0]}
    monkeypatch.setattr(scaling, "run_group", lambda processes, threads, _: groups[processes, threads])
    scaling.main([*TINY, "--json", "--docs"], page)
    results = {figures["axis"]: figures for figures in printed(capsys)}
    assert list(results) == [*axes, "processes"]
    table = page.read_text().split("scaling: ")[1]
    for name in axes:
        found = results[name]
        assert (found["values"], len(found["seconds"])) == (list(few[name]), 2)
        assert found["largest_deviation"] < 1e-9  # a line through two points
        assert f"| {name} | {few[name][0]}: {found['seconds'][0]:.3f}, {few[name][1]}: " in table
    assert "| 1 | 1 | 2.000 | 1.00 |\n| 1 | 2 | 1.000 | 2.00 |\n| 2 | 1 | 0.500 | 4.00 |\n" in table
    picture = ElementTree.fromstring((page.parent / "images" / "scaling.svg").read_text())
    assert len(list(picture.iter(f"{SVG}polyline"))) == 4
    assert len(list(picture.iter(f"{SVG}circle"))) == 8


def test_a_group_that_leaves_no_times(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="no such network")
    monkeypatch.setattr(scaling.subprocess, "run", lambda *_, **__: failed)
    arguments = scaling.argparse.Namespace(network="mnist_28", group_shape=[2, 1])
    with pytest.raises(RunError, match="Expected times from 2 processes, got none: no such network"):
        scaling.run_group(2, 1, arguments)


@pytest.mark.slow
def test_processes_share_a_step() -> None:
    arguments = scaling.argparse.Namespace(network="mnist_28", group_shape=[2, 1])
    for processes in (1, 2):
        times = scaling.run_group(processes, 1, arguments)
        assert len(times) == scaling.STEPS_PER_GROUP
        assert min(times) > 0


@pytest.mark.slow
@pytest.mark.parametrize("peaks", [False, True], ids=["times", "peaks"])
def test_step_prints_one_object(peaks: bool) -> None:
    command = [sys.executable, "benchmarks/dp_step.py", *TINY, "--examples", "2", "--draws", "2", "--json"]
    command += ["--peers", "opacus_hooks"] if peaks else ["--no-peak", "--peers"]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    figures = json.loads(done.stdout)
    assert figures["private_ratio"] == pytest.approx(figures["private_seconds"] / figures["plain_seconds"])
    assert figures["relative_error"] <= 1e-5
    if peaks:
        assert min(figures["plain_peak_bytes"], figures["private_peak_bytes"]) > 1e6
        if importlib.util.find_spec("opacus") is not None:
            assert figures["opacus_hooks_seconds"] > 0


@pytest.mark.parametrize("has_bf16", [True, False])
def test_a_step_without_the_peers(
    has_bf16: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dp_step, "has_bf16", lambda device: has_bf16)
    monkeypatch.setitem(sys.modules, "opacus", None)
    shape = ["--examples", "1", "--draws", "1", "--no-peak", "--no-error"]
    monkeypatch.setattr(sys, "argv", ["dp_step.py", *TINY, *shape, "--peers", "opacus_hooks", "--json"])
    dp_step.main()
    shown = capsys.readouterr()
    notes = shown.err.splitlines()
    assert notes[-1] == "opacus_hooks is not measured: pip install 'dpdm[benchmark]'."
    assert [note.split(":")[0] for note in notes[:-1]] == ([] if has_bf16 else ["bf16 is not measured"])
    figures = json.loads(shown.out)
    assert figures["private_seconds"] > 0
    assert not [name for name in figures if name.startswith("opacus")]
    assert ("private_bf16_seconds" in figures) == has_bf16


def test_a_way_that_does_not_fit_in_memory_is_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        way = command[command.index("--peak-of") + 1]
        return subprocess.CompletedProcess(command, -signal.SIGKILL if way == "private_bf16" else 0, "1024\n")

    monkeypatch.setattr(dp_step.subprocess, "run", run)
    monkeypatch.setattr(dp_step, "has_bf16", lambda device: True)
    shape = ["--examples", "1", "--draws", "1", "--no-error"]
    monkeypatch.setattr(sys, "argv", ["dp_step.py", *TINY, *shape, "--peers", "--json"])
    dp_step.main()
    shown = capsys.readouterr()
    assert shown.err == "private_bf16 is not measured: this machine's memory does not hold it.\n"
    figures = json.loads(shown.out)
    assert figures["private_peak_bytes"] == 1024
    assert not [name for name in figures if name.startswith("private_bf16")]


def test_a_whole_step_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    logical_step.main([*TINY, "--examples", "2", "--draws", "1", "--json"])
    (figures,) = printed(capsys)
    assert figures["ready_ratio"] == pytest.approx(figures["ready_seconds"] / figures["plain_seconds"])
    assert 0 < figures["noise_share"] < 1
    # Less than the other, but of so short a step by less than times scatter.
    assert 0 < figures["noise_share_ready"] < 1
    assert (figures["plain_waits"], figures["ready_waits"], figures["device"]) == (None, None, "cpu")


def gpu_row(**changes: Any) -> dict[str, Any]:
    figures = {"network": "mnist_28", "examples": 8, "draws": 32, "device": "a GPU", "torch": "2.11", "rounds": 7}
    figures |= {"plain_seconds": 0.004, "plain_bf16_seconds": 0.002, "private_seconds": 0.005, "private_ratio": 1.25}
    return {**figures, "private_bf16_seconds": 0.0025, "noise_seconds": 2.5, "noise_added_seconds": 0.5, **changes}


def test_gpu_tables_and_the_projected_run(tmp_path: Path, page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = {"opacus_hooks_seconds": 0.02, "plain_peak_bytes": 200, "private_peak_bytes": 210, "relative_error": 2e-6}
    # 64 x 32 images in 15.625 ms are 131,072 in a second, the images of a published step.
    large = gpu_row(examples=64, private_seconds=0.03, private_bf16_seconds=0.015625)
    rows = [gpu_row(**full), large, gpu_row(draws=1, examples=64, private_bf16_seconds=1e-9)]
    (tmp_path / "dp_step.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sample = {"network": "mnist_28", "solver": "ddim", "num_steps": 50, "images": 256}
    sample |= {"ours_seconds": 2.0, "ours_images_per_second": 128.0, "diffusers_images_per_second": 64.0, "ratio": 2.0}
    (tmp_path / "sampling.jsonl").write_text(json.dumps(sample) + "\n")
    whole = {"network": "mnist_28", "examples": 1024, "draws": 32, "plain_seconds": 0.5, "ready_seconds": 0.4}
    whole |= {"ready_ratio": 0.81, "noise_share": 0.125, "noise_share_ready": 0.004, "plain_waits": 7, "ready_waits": 1}
    (tmp_path / "logical_step.jsonl").write_text(json.dumps(whole) + "\n")
    gpu_report.main([str(tmp_path), "--docs"], page)
    text = capsys.readouterr().out
    assert "Measured on a GPU with torch 2.11." in text
    assert "| mnist_28 | 8 x 32 | 4.0 | 5.0 | 1.25 | 1.25 | 102,400 | 8.0 | 1.05 | 2.0e-06 |" in text
    assert "| mnist_28 | 64 x 32 | 4.0 | 30.0 | 1.25 | 7.81 | 131,072 | - | - | - |" in text
    assert "| mnist_28 | `ddim`, 50 | 256 | float32 | 128.0 | 64.0 | 2.00 |" in text
    assert "| mnist_28, 1024 x 32 | 500 | 400 | 0.81 | 12.5 % | 0.4 % | 7 | 1 |" in text
    steps = steps_of("epochs", 300, 60_000, 4096)
    told = f"MNIST at epsilon 1 as published, projected from the step of 64 x 32: {steps * 1.5 / 60:.0f} minutes."
    assert told in text
    assert text.strip() in page.read_text().split("gpu: begin")[1]


def test_gpu_tables_of_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a run that was cut short: one line by half, and no step that keeps the GPU busy."""
    (tmp_path / "dp_step.jsonl").write_text(json.dumps(gpu_row()) + '\n{"network": "mni')
    gpu_report.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert "| mnist_28 | 8 x 32 |" in text
    assert "projected" not in text
    (tmp_path / "dp_step.jsonl").unlink()
    sample = {
        "network": "mnist_28",
        "solver": "ddim",
        "num_steps": 50,
        "images": 256,
        "device": "a GPU",
        "torch": "2.11",
    }
    (tmp_path / "sampling.jsonl").write_text(
        json.dumps(sample | {"ours_seconds": 2.0, "ours_images_per_second": 128.0}) + "\n"
    )
    gpu_report.main([str(tmp_path)])
    text = capsys.readouterr().out
    assert "Measured on a GPU with torch 2.11." in text
    assert "| mnist_28 | `ddim`, 50 | 256 | float32 | 128.0 | - | - |" in text


def test_gpu_tables_need_figures(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"Expected figures in .*dp_step\.jsonl, got none: run benchmarks/gpu\.sh"):
        gpu_report.main([str(tmp_path)])


def test_gpu_script_leaves_few_files_within_its_time() -> None:
    text = (ROOT / "benchmarks" / "gpu.sh").read_text(encoding="utf-8")
    assert len(set(re.findall(r'"\$OUT/([\w.]+)"', text))) <= 8
    networks, shapes = len(NETWORKS), len(re.findall(r"\d+x\d+", re.findall(r"LARGE:-([^}]*)", text)[0]))
    times = {"$NETWORKS": networks, "$LARGE": shapes, "": 1}
    seconds, beside, loop = 0, 0, ""
    last = "# Last, as compiling may take all the time that is left."
    assert text.count(last) == 1
    for line in text.partition(last)[0].replace("\\\n", "").splitlines():
        if found := re.match(r"\s*for \w+ in (\$\w+)", line):
            loop = found[1]
        elif line.strip() == "done":
            loop = ""
        elif line.strip() == "wait":
            seconds += beside
        elif found := re.match(r"\s*try (\d+) ", line):
            if line.endswith("&"):
                beside = max(beside, int(found[1]))
            else:
                seconds += int(found[1]) * times[loop]
    assert 0 < seconds <= 600


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_says_that_there_is_no_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    script = ["sh", str(ROOT / "benchmarks" / "gpu.sh")]
    done = subprocess.run(script, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "Expected a usable GPU, torch sees none: set DEVICE=cpu to try the script.\n"


def test_levers_are_keys_that_a_run_takes_and_their_table_is_made_of_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[str, ...]] = []

    def synthesize(request: Any, workdir: Any) -> dict[str, Any]:
        asked.append(request.overrides)
        value = len(asked) / 10
        return {
            "accuracy": {"synthetic": {"value": value}},
            "frechet": {"synthetic": 10 * value},
            "variance_share": {"synthetic": value},
        }

    monkeypatch.setattr(levers, "synthesize", synthesize)
    facts = {"resolution": 7, "num_channels": 1, "num_classes": 10, "epsilon": 1.0, "delta": 1e-5}
    for keys in levers.LEVERS_OF_MNIST.values():
        configs.load([], [*recipe(dataset_size=50_000, **facts), *levers.SMALL, *keys])  # type: ignore[arg-type]
    for ablation in (levers.DIGITS, levers.of_mnist("folder")):
        asked.clear()
        levers.measure(ablation, 10.0, list(ablation.levers), 1, ["setup.device=cpu"])
        base = (*ablation.overrides, "setup.device=cpu")
        assert asked == [(*base, *keys) for keys in ablation.levers.values()]  # a request checks its keys
    asked.clear()
    result = levers.measure(levers.DIGITS, 10.0, ["the recipe", "K = 8"], 2, [])
    assert asked == [(), ("loss.noise_multiplicity=8",)] * 2  # by turns
    asked.clear()
    kept = tmp_path / "kept.json"
    levers.measure(levers.DIGITS, 10.0, ["the recipe"], 1, [], kept)
    again = levers.measure(levers.DIGITS, 10.0, ["K = 8", "the recipe"], 2, [], kept)
    assert asked == [(), ("loss.noise_multiplicity=8",), ("loss.noise_multiplicity=8",), ()]  # what is kept stays
    assert [one["accuracy"] for one in again["runs"]["the recipe"]] == [0.1, 0.4]
    with pytest.raises(InputError, match=f"Expected figures of .* in {kept}, got those of"):
        levers.measure(levers.DIGITS, 1.0, ["the recipe"], 1, [], kept)
    for damaged in ("{", "[]", "{}"):
        kept.write_text(damaged)
        with pytest.raises(InputError, match=f"Expected figures in {kept}, could not read them"):
            levers.measure(levers.DIGITS, 10.0, ["the recipe"], 1, [], kept)
    page = tmp_path / "levers.md"
    page.write_text("<!-- levers: begin -->\n<!-- levers: end -->\n")
    levers.write_between(page, "levers", levers.table(levers.DIGITS, result))
    assert "| the recipe |  | 20.0 ± 10.0 % | 2.0 ± 1.0 | 20.0 ± 10.0 % |" in page.read_text()
    assert "| K = 8 | `loss.noise_multiplicity=8` | 30.0 ± 10.0 %" in page.read_text()


def test_what_the_warm_up_buys_is_measured_on_drawn_images(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--data", "digits", "--noise-multiplier", "2", "--json"]
    central.main(words)
    means = json.loads(capsys.readouterr().out)
    central.main([*words, "--covariance-noise-multiplier", "2"])
    both = json.loads(capsys.readouterr().out)
    assert both["covariance_noise_multiplier"] == 2
    central.main([*words, "--covariance-noise-multiplier", "2", "--splits", "1", "--cell-noise-multiplier", "1"])
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.7
    assert 0.6 < means["accuracy"] < both["accuracy"] + 0.1
    assert both["accuracy"] > 0.7  # by chance it would be 0.1
    monkeypatch.setattr(central, "NUM_DRAWN_FOR_CNN", 2000)
    central.main([*words, "--cnn"])
    assert json.loads(capsys.readouterr().out)["accuracy"] > 0.5
