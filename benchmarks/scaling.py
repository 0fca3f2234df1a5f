"""How the time of a private step grows with draws, examples, pixels, width and processes.

    python benchmarks/scaling.py                  # the tables of docs/performance.md; --docs also writes them there
    python benchmarks/scaling.py --axis draws --json

Each axis changes one thing of a base case; its settings take turns within one process, and a + b x is fitted to their
medians so that the squares of its deviations, relative to the times, add up to the least: times scatter by a share of
themselves. Width enters by its square, to which weights and multiplications are proportional. A step is what
``benchmarks/dp_step.py`` calls one: forward, backward, clipping, sum, all examples in one physical batch.

Processes: one logical step with its noise, shared out among one or two processes (gloo) on this machine, by torchrun,
started in turn. Threads are those of each process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _charts import ROOT, Series, linear_chart, picture, table, write_between
from dp_step import CLIPPING_NORM, NETWORKS, Problem, private, seconds

from dpdm import distributed
from dpdm.device import use_full_precision
from dpdm.errors import RunError
from dpdm.privacy.dpsgd import private_gradient

PAGE = ROOT / "docs" / "performance.md"
EXAMPLES, DRAWS = 8, 4  # of the base case
STEPS_PER_GROUP = 3  # timed in each group of processes
COLOUR = "#1a7f5a"
PICTURE = (
    "![Seconds of a step against draws, examples, pixels and squared width, with the fitted lines](images/scaling.svg)"
)


@dataclass(frozen=True)
class Axis:
    """What varies.

    Attributes:
        values: settings, rising.
        power: x of the fit is a setting to this power.
        label: of x in the chart.
        unit: what b is the time of.
    """

    values: tuple[int, ...]
    power: int
    label: str
    unit: str


AXES = {
    "draws": Axis((1, 2, 4, 8, 16, 32), 1, f"draws K of each of {EXAMPLES} examples", "draw"),
    "examples": Axis((2, 4, 8, 16, 32, 64), 1, f"examples of {DRAWS} draws", "example"),
    "resolution": Axis((16, 20, 24, 28, 32, 40, 48), 2, "pixels of an image", "pixel"),
    "width": Axis((8, 16, 24, 32, 64), 2, "width, squared", "width squared"),
}
GROUPS = ((1, 1), (1, 2), (2, 1))  # processes, threads of each


def problem_at(axis: str, value: int, arguments: argparse.Namespace) -> Problem:
    """Returns the base case with ``axis`` set to ``value``."""
    overrides = []
    if axis == "resolution":  # attention stays at the lowest resolution
        overrides = [f"data.resolution={value}", f"model.network.attention_resolutions=[{value // 4}]"]
    elif axis == "width":
        overrides = [f"model.network.width={value}"]
    examples, draws = (value if axis == "examples" else EXAMPLES), (value if axis == "draws" else DRAWS)
    return Problem(arguments.network, examples, draws, arguments.device, overrides)


def measure(axis: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings of an axis, the medians of their times, and the fit."""
    steps = {value: private(problem_at(axis, value, arguments)) for value in AXES[axis].values}
    for step in steps.values():
        step()
    rounds = [{x: seconds(step, arguments.device) for x, step in steps.items()} for _ in range(arguments.rounds)]
    times = [statistics.median(r[value] for r in rounds) for value in steps]
    x = [value ** AXES[axis].power for value in steps]
    return {**_facts(arguments), "axis": axis, "values": list(steps), "seconds": times, **fit(x, times)}


def fit(x: list[int], y: list[float]) -> dict[str, float]:
    """Returns the line a + b x of least squares relative to y: ``intercept``, ``slope``, ``largest_deviation``."""
    ones, given, times = np.ones(len(x)), np.array(x, dtype=np.float64), np.array(y)
    (intercept, slope), *_ = np.linalg.lstsq(np.stack([ones, given], axis=1) / times[:, None], ones, rcond=None)
    deviation = np.abs((intercept + slope * given) / times - 1)
    return {"intercept": float(intercept), "slope": float(slope), "largest_deviation": float(deviation.max())}


def measure_processes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the median time of a logical step in each group of processes."""
    found: dict[tuple[int, int], list[float]] = {group: [] for group in GROUPS}
    for _ in range(arguments.rounds):
        for processes, threads in GROUPS:
            found[processes, threads] += run_group(processes, threads, arguments)
    medians = {group: statistics.median(times) for group, times in found.items()}
    return {
        **_facts(arguments),
        "axis": "processes",
        "examples": arguments.group_shape[0],
        "draws": arguments.group_shape[1],
        "groups": [
            {"processes": processes, "threads": threads, "seconds": value}
            for (processes, threads), value in medians.items()
        ],
    }


def run_group(processes: int, threads: int, arguments: argparse.Namespace) -> list[float]:
    """Returns the times of steps in a group of processes, as rank 0 sees them.

    Raises:
        RunError: if rank 0 leaves none.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [__file__, "--worker", str(out), "--network", arguments.network, "--threads", str(threads)]
        command += ["--group-shape", *map(str, arguments.group_shape)]
        # Not by the exit status: a group on a CPU sometimes aborts at exit, its work done.
        done = subprocess.run(
            command, check=False, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True
        )
        if not out.exists():
            raise RunError(f"Expected times from {processes} processes, got none: {done.stderr.strip()[-300:]}")
        times: list[float] = json.loads(out.read_text(encoding="utf-8"))
        return times


def work(arguments: argparse.Namespace) -> None:
    """Times steps as a member of a group; rank 0 writes them."""
    with distributed.processes():
        examples, draws = arguments.group_shape
        problem = Problem(arguments.network, examples, draws, "cpu")
        times = []
        for _ in range(1 + STEPS_PER_GROUP):
            distributed.barrier()
            times.append(seconds(lambda: _logical_step(problem), "cpu"))
        if distributed.is_main():
            arguments.worker.write_text(json.dumps(times[1:]), encoding="utf-8")


def _logical_step(problem: Problem) -> list[torch.Tensor]:
    return private_gradient(
        problem.parameters,
        problem.losses,
        np.arange(problem.examples),
        clipping_norm=CLIPPING_NORM,
        noise_multiplier=1.0,
        expected_batch_size=problem.examples,
        physical_batch_size=problem.examples,
        noise_key=bytes(32) if distributed.is_main() else None,
    ).gradients


def _facts(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "network": arguments.network,
        "device": torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu",
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "torch": torch.__version__,
    }


def report(results: list[dict[str, Any]]) -> str:
    """Returns the fits, the times and the processes as Markdown."""
    lines = [r for r in results if r["axis"] != "processes"]
    parts = []
    if lines:
        rows = []
        for r in lines:
            axis = AXES[r["axis"]]
            times = ", ".join(f"{value}: {s:.3f}" for value, s in zip(r["values"], r["seconds"], strict=True))
            slope = f"{1e3 * r['slope']:.3g} ms per {axis.unit}"
            rows.append([r["axis"], times, f"{1e3 * r['intercept']:.0f} ms", slope, f"{r['largest_deviation']:.0%}"])
        parts.append(table(["what grows", "seconds of a step", "a", "b", "farthest from a + b x"], rows))
    for r in results:
        if r["axis"] == "processes":
            first = r["groups"][0]["seconds"]
            header = ["processes", "threads of each", "seconds of a logical step", "speed"]
            parts.append(
                table(
                    header,
                    [
                        [str(g["processes"]), str(g["threads"]), f"{g['seconds']:.3f}", f"{first / g['seconds']:.2f}"]
                        for g in r["groups"]
                    ],
                )
            )
    return "\n\n".join(parts)


def chart(results: list[dict[str, Any]]) -> str:
    """Returns times as dots and fits as lines, one SVG picture of all axes."""
    charts = []
    for r in results:
        if r["axis"] == "processes":
            continue
        axis = AXES[r["axis"]]
        x = [float(value**axis.power) for value in r["values"]]
        line = [(end, r["intercept"] + r["slope"] * end) for end in (x[0], x[-1])]
        dots = list(zip(x, r["seconds"], strict=True))
        charts.append(
            linear_chart([Series(r["axis"], COLOUR, dots, line)], x_label=axis.label, y_label="seconds of a step")
        )
    return picture(charts, columns=2)


def write_page(page: Path, results: list[dict[str, Any]]) -> None:
    """Puts the tables between the page's two marks and the chart into ``images/scaling.svg`` beside it."""
    write_between(page, "scaling", f"{report(results)}\n\n{PICTURE}")
    (page.parent / "images" / "scaling.svg").write_text(chart(results), encoding="utf-8")


def main(given: list[str], page: Path = PAGE) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="mnist_28")
    parser.add_argument("--axis", choices=[*AXES, "processes"], help="default: all")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    shape = {"nargs": 2, "type": int, "default": [16, 8], "metavar": ("EXAMPLES", "DRAWS")}
    parser.add_argument("--group-shape", **shape, help="of the step of processes; default: 16 8")
    parser.add_argument("--json", action="store_true", help="print an object, and nothing else (several: one a line)")
    parser.add_argument("--docs", action="store_true", help="also write the tables and chart of docs/performance.md")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(given)
    if arguments.docs and arguments.axis:
        parser.error("--docs needs all axes: leave --axis out")
    torch.set_num_threads(arguments.threads)
    use_full_precision()
    if arguments.worker:
        work(arguments)
        return
    results = []
    everything = [*AXES, "processes"] if arguments.device == "cpu" else [*AXES]
    for axis in [arguments.axis] if arguments.axis else everything:
        results.append(measure_processes(arguments) if axis == "processes" else measure(axis, arguments))
        if arguments.json:
            print(json.dumps(results[-1]), flush=True)
        else:
            print(report(results[-1:]), file=sys.stderr, flush=True)
    if arguments.docs:
        write_page(page, results)
    if not arguments.json:
        print(report(results))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RunError as error:
        sys.exit(str(error))
