"""Images per second of our samplers beside those of diffusers, with networks of one size.

    python benchmarks/sampling.py                                             # the table of docs/performance.md
    python benchmarks/sampling.py --network mnist_28 --solver ddim --device cpu --json

Both draw the same number of images in one batch, from their own noise to pixels in memory: ours by
``dpdm.diffusion.sampling.sample``, diffusers by its unconditional pipelines. They take turns within one process, and
every ratio is the median of the ratios of the rounds. A forward pass of each network at that batch is timed between
them, so that it can be seen what the network gives and what the sampler. bf16 is torch.autocast around either one.

The network of diffusers is its UNet2DModel built like ours: widths, residual blocks, resampling inside residual blocks,
one head of attention. Attention that only UNet2DModel has (after every block on the way up, where ours has one) is
taken out. Parameters, floating-point operations of a forward pass (counted, two to a multiplication and addition), and
evaluations of the networks are in the table. The weights are random: they change no time.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _charts import ROOT, table, write_between
from dp_step import NETWORKS, Problem, has_bf16, seconds
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dpdm.device import use_full_precision
from dpdm.diffusion.sampling import PrecisionType, SamplerConfig, SamplerType, sample
from dpdm.recorded import recorded

PAGE = ROOT / "docs" / "performance.md"
STEPS: dict[SamplerType, int] = {"ddim": 50, "dpm_solver_pp": 15}
PRECISIONS = ("float32", "bf16")
NOT_INSTALLED = "diffusers is not measured: pip install 'dpdm[benchmark]'."
Draw = Callable[[], list[Tensor]]


class Ours:
    """Our network and samplers; ``draw`` draws ``images`` at once, in ``precision``."""

    precision: PrecisionType = "float32"

    def __init__(self, problem: Problem) -> None:
        self.problem, self.network = problem, problem.denoiser.network
        self.denoiser = problem.denoiser.eval()

    def record(self) -> None:
        """Makes of it, on a GPU, what ``dpdm sample`` does; a recording can no longer be counted."""
        self.denoiser = recorded(self.problem.denoiser).eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.denoiser is not self.problem.denoiser:  # as ``draw`` asks, which is one recording for both
            labels = torch.zeros(len(x), dtype=torch.int64, device=x.device) if self.network.num_classes else None
            return self.denoiser(x, 1.0, labels)
        return self.network(x, torch.zeros(len(x), device=x.device))

    def draw(self, solver: SamplerType, num_steps: int, images: int) -> Draw:
        config = SamplerConfig(type=solver, num_steps=num_steps, precision=self.precision)

        def draw() -> list[Tensor]:
            pixels, _ = sample(
                self.denoiser,
                config,
                seed=0,
                indices=range(images),
                num_classes=self.network.num_classes,
                resolution=self.network.resolution,
                num_channels=self.network.num_channels,
                device=self.problem.device,
            )
            return [pixels]

        return draw


class Diffusers:
    """The same of diffusers.

    Raises:
        ImportError: if it is not installed.
    """

    def __init__(self, problem: Problem) -> None:
        from diffusers import UNet2DModel  # pyright: ignore
        from diffusers.utils import logging  # pyright: ignore

        logging.set_verbosity_error()  # it warns of what is meant: one head of attention
        ours, device = problem.denoiser.network, problem.device
        config = ours.config
        sides = [ours.resolution // 2**level for level in range(len(config.channel_multipliers))]
        attends = [side in config.attention_resolutions for side in sides]
        self.device = device
        self.network: Any = UNet2DModel(
            sample_size=ours.resolution,
            in_channels=ours.num_channels,
            out_channels=ours.num_channels,
            block_out_channels=tuple(multiplier * config.width for multiplier in config.channel_multipliers),
            layers_per_block=config.num_res_blocks,
            down_block_types=tuple("AttnDownBlock2D" if yes else "ResnetDownsampleBlock2D" for yes in attends),
            up_block_types=tuple("AttnUpBlock2D" if yes else "ResnetUpsampleBlock2D" for yes in reversed(attends)),
            downsample_type="resnet",
            upsample_type="resnet",
            attention_head_dim=None,
            norm_num_groups=config.width // 4,
        )
        for block in self.network.up_blocks:
            if hasattr(block, "attentions"):
                last = block.attentions[-1]
                block.attentions = nn.ModuleList([*(nn.Identity() for _ in block.attentions[:-1]), last])
        self.network.to(device).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, 10).sample

    def draw(self, solver: SamplerType, num_steps: int, images: int) -> Draw:
        from diffusers import (  # pyright: ignore
            DDIMPipeline,  # pyright: ignore
            DDIMScheduler,  # pyright: ignore
            DDPMPipeline,  # pyright: ignore
            DPMSolverMultistepScheduler,  # pyright: ignore
        )

        if solver == "ddim":
            pipeline: Any = DDIMPipeline(self.network, DDIMScheduler())
        else:  # the one of its pipelines without conditions that takes this scheduler
            scheduler: Any = DPMSolverMultistepScheduler()  # DPM-Solver++(2M)
            pipeline = DDPMPipeline(self.network, scheduler)
        pipeline.set_progress_bar_config(disable=True)

        def draw() -> list[Tensor]:
            generator = torch.Generator(self.device).manual_seed(0)
            done = pipeline(
                batch_size=images, generator=generator, num_inference_steps=num_steps, output_type="np"
            ).images
            return [torch.from_numpy(done)]

        return draw


def operations(way: Ours | Diffusers, x: Tensor) -> int:
    """Returns the floating-point operations of one forward pass of one image."""
    # The counter knows no fused attention of a CPU; the plain one has the same operations.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        way.forward(x[:1])
    return counter.get_total_flops()


def evaluations(way: Ours | Diffusers, draw: Draw) -> int:
    """Returns how many images the network sees for one image of ``draw``, which draws one."""
    seen = 0

    def count(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        nonlocal seen
        seen += len(given[0])

    hook = way.network.register_forward_hook(count)
    draw()
    hook.remove()
    return seen


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one network and solver."""
    solver, num_steps, images = arguments.solver, arguments.num_steps or STEPS[arguments.solver], arguments.images
    problem = Problem(arguments.network, images, 1, arguments.device)
    ours = Ours(problem)
    ways: dict[str, Ours | Diffusers] = {"ours": ours}
    figures: dict[str, Any] = {
        "network": arguments.network,
        "solver": solver,
        "num_steps": num_steps,
        "images": images,
        "device": torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu",
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "torch": torch.__version__,
    }

    def count(name: str, way: Ours | Diffusers) -> dict[str, Any]:
        return {
            f"{name}_parameters": sum(p.numel() for p in way.network.parameters()),
            f"{name}_operations": operations(way, problem.images),
            f"{name}_evaluations": evaluations(way, way.draw(solver, num_steps, 1)),
        }

    figures |= count("ours", ours)
    try:
        diffusers = Diffusers(problem)
        figures |= {"diffusers": sys.modules["diffusers"].__version__} | count("diffusers", diffusers)
        ways["diffusers"] = diffusers
    except ImportError:
        print(NOT_INSTALLED, file=sys.stderr)
    except Exception as error:  # of its faults our own figures do not die
        print(f"diffusers is not measured: {type(error).__name__}: {error}.", file=sys.stderr)
    ours.record()
    for precision in arguments.precision:
        suffix, ours.precision = "" if precision == "float32" else f"_{precision}", precision
        with torch.autocast(arguments.device, torch.bfloat16, enabled=precision == "bf16"):
            for name, value in _timed(ways, solver, num_steps, problem.images, arguments).items():
                figures[name.replace("*", suffix)] = value
    return figures


def _timed(
    ways: dict[str, Ours | Diffusers],
    solver: SamplerType,
    num_steps: int,
    x: Tensor,
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """Returns medians over the rounds; * in a name is the place of the precision."""

    def forward(way: Ours | Diffusers) -> list[Tensor]:
        with torch.no_grad():
            return [way.forward(x)]

    draws = {name: way.draw(solver, num_steps, len(x)) for name, way in ways.items()}
    for way in ways.values():
        forward(way)  # loads kernels
    rounds, forwards = [], []
    for _ in range(arguments.rounds):
        forwards.append({name: seconds(lambda way=way: forward(way), arguments.device) for name, way in ways.items()})
        rounds.append({name: seconds(draw, arguments.device) for name, draw in draws.items()})
    figures = {}
    for name in ways:
        figures[f"{name}*_forward_seconds"] = statistics.median(r[name] for r in forwards)
        figures[f"{name}*_seconds"] = statistics.median(r[name] for r in rounds)
        figures[f"{name}*_images_per_second"] = len(x) / figures[f"{name}*_seconds"]
    if "diffusers" in ways:
        figures["forward_ratio*"] = statistics.median(r["diffusers"] / r["ours"] for r in forwards)
        figures["ratio*"] = statistics.median(r["diffusers"] / r["ours"] for r in rounds)
    return figures


def sizes_table(results: list[dict[str, Any]]) -> str:
    """Returns what shows that the networks are of one size, as Markdown, a row for each network."""
    header = ["network", "parameters: ours", "diffusers", "GFLOP of an image and evaluation: ours", "diffusers"]
    rows = {}
    for r in results:
        known = [name for name in ("ours", "diffusers") if f"{name}_parameters" in r]
        cells = {name: (f"{r[f'{name}_parameters']:,}", f"{r[f'{name}_operations'] / 1e9:.3f}") for name in known}
        nothing = ("-", "-")
        pairs = zip(cells["ours"], cells.get("diffusers", nothing), strict=True)
        rows[r["network"]] = [r["network"], *(cell for pair in pairs for cell in pair)]
    return table(header, rows.values())


def speed_table(results: list[dict[str, Any]]) -> str:
    """Returns the images per second as Markdown, a row for each network, solver and precision."""
    header = ["network", "solver, evaluations: ours, diffusers", "precision", "forward, s: ours", "diffusers"]
    header += ["ratio", "images/s: ours", "diffusers", "**ratio**"]
    rows = []
    for r in results:
        counts = ", ".join(str(r[f"{name}_evaluations"]) for name in ("ours", "diffusers") if f"{name}_seconds" in r)
        for suffix, precision in (("", "float32"), ("_bf16", "bf16")):
            if f"ours{suffix}_seconds" not in r:
                continue
            cells = [r["network"], f"`{r['solver']}`, {counts}", precision]
            for name, form in (("forward_seconds", "{:.3f}"), ("images_per_second", "{:.2f}")):
                values = [r.get(f"{way}{suffix}_{name}") for way in ("ours", "diffusers")]
                values.append(r.get(("forward_" if name == "forward_seconds" else "") + f"ratio{suffix}"))
                forms = (form, form, "{:.2f}")
                cells += ["-" if v is None else f.format(v) for f, v in zip(forms, values, strict=True)]
            rows.append(cells)
    return table(header, rows)


def report(results: list[dict[str, Any]]) -> str:
    return f"{sizes_table(results)}\n\n{speed_table(results)}"


def main(given: list[str], page: Path = PAGE) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, help="default: all")
    parser.add_argument("--solver", choices=list(STEPS), help="default: both")
    parser.add_argument("--num-steps", type=int, help="default: 50 of ddim, 15 of dpm_solver_pp")
    parser.add_argument("--images", type=int, help="in one batch; default: 16 on a CPU, 256 on a GPU")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: both, where the device has bf16")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print an object, and nothing else (several: one a line)")
    parser.add_argument("--docs", action="store_true", help="also write the tables of docs/performance.md")
    arguments = parser.parse_args(given)
    arguments.images = arguments.images or (16 if arguments.device == "cpu" else 256)
    arguments.precision = arguments.precision or (PRECISIONS if has_bf16(arguments.device) else ("float32",))
    torch.set_num_threads(arguments.threads)
    use_full_precision()
    results = []
    for network in [arguments.network] if arguments.network else NETWORKS:
        for solver in [arguments.solver] if arguments.solver else STEPS:
            results.append(measure(argparse.Namespace(**{**vars(arguments), "network": network, "solver": solver})))
            if arguments.json:
                print(json.dumps(results[-1]), flush=True)
            else:
                print(speed_table(results[-1:]), file=sys.stderr, flush=True)
    if arguments.docs:
        write_between(page, "sampling", report(results))
    if not arguments.json:
        print(report(results))


if __name__ == "__main__":
    main(sys.argv[1:])
