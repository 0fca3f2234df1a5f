"""What a private step costs, beside the plain step on the same images and beside other ways to clip per example.

    python benchmarks/dp_step.py                                          # the table of docs/performance.md
    python benchmarks/dp_step.py --network mnist_28 --examples 8 --draws 32 --device cpu --json

A step is one forward and backward pass over EXAMPLES x DRAWS images. The private ones also clip each example's gradient
over all layers, the mean over its draws, and add the clipped ones up. What happens once in a logical batch of hundreds
or thousands of examples (noise, Adam) is in ``noise_seconds``, not in the step. All ways get the same weights, images
and noise. They take turns within one process, and every ratio is the median of the ratios of the rounds. Peaks are of
resident memory (on a GPU: of what torch allocated) above what the process held before the step; on a CPU each way is
measured in a process of its own.

Ways:
    plain         mean loss, backward: eager, the network as it is
    private       ours
    opacus_hooks  Opacus' GradSampleModule: a gradient for each image, averaged over the draws, clipped
    opacus_ghost  Opacus' fast gradient clipping: norms without gradients, a second backward. It clips *images*, so with
                  more than one draw it is another algorithm: here for its time alone
    vmap          torch.func's vmap over grad, an example with its draws at a time
    plain_compiled  the plain step in bf16 by torch.compile, in torch.channels_last: the fastest that torch alone
                  makes of it. Only if asked for (--peers), as compiling takes a minute

A way that does not fit in memory is left out: on a CPU the processes that measure peaks tell, before anything is timed.
"""

import argparse
import copy
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _charts import ROOT, write_between
from torch import Tensor, nn

from dpdm import config as configs
from dpdm.device import keep_freed_memory, use_full_precision
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.loss import diffusion_loss, noise_level
from dpdm.privacy.dpsgd import clipped_sum
from dpdm.privacy.step_noise import StepNoise, add_noise

NETWORKS = ("mnist_28", "cifar10_32", "celeba_64")
SHAPES = ((16, 4), (8, 32), (64, 1))
CLIPPING_NORM = 1.0
PEERS = ("opacus_hooks", "opacus_ghost", "vmap")
ON_DEMAND = ("plain_compiled",)
Step = Callable[[], list[Tensor]]


class Problem:
    """A network, images of (B, C, H, W) and draws of (K, B), the same for all ways."""

    def __init__(self, network: str, examples: int, draws: int, device: str, overrides: Sequence[str] = ()) -> None:
        self.config = configs.load([ROOT / "configs" / network / "train_eps_10.0.yaml"], overrides, quiet=True)
        data = self.config.data
        side, channels, classes = int(data.resolution or 0), int(data.num_channels or 0), int(data.num_classes or 0)
        generator = torch.Generator().manual_seed(0)
        self.denoiser = configs.build_denoiser(self.config).to(device).train()
        with torch.no_grad():  # fresh weights give gradients of nearly nothing in most layers
            for parameter in self.denoiser.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(device))
        self.examples, self.draws, self.device = examples, draws, device
        self.images = (torch.rand(examples, channels, side, side, generator=generator) * 2 - 1).to(device)
        labels = torch.randint(max(1, classes), (examples,), generator=generator).to(device)
        self.labels = labels if classes else None
        u = torch.rand(draws, examples, generator=generator).clamp(1e-4, 1 - 1e-4)
        self.sigma = noise_level(self.config.loss, self.denoiser.kind, u).to(device)
        self.noise = torch.randn(draws, *self.images.shape, generator=generator).to(device)

    def losses(self, records: np.ndarray, denoiser: Denoiser | None = None) -> Tensor:
        """Returns the loss of each example of ``records``, (b,)."""
        rows = torch.from_numpy(records).to(self.device)
        return self.losses_of(
            denoiser or self.denoiser,
            self.images[rows],
            None if self.labels is None else self.labels[rows],
            self.sigma[:, rows],
            self.noise[:, rows],
        )

    def losses_of(
        self, denoiser: Denoiser, images: Tensor, labels: Tensor | None, sigma: Tensor, noise: Tensor
    ) -> Tensor:
        return diffusion_loss(denoiser, images, labels, sigma=sigma, noise=noise, kind=self.config.loss.type)

    @property
    def parameters(self) -> dict[str, Tensor]:
        return dict(self.denoiser.network.named_parameters())


def plain(problem: Problem, precision: str = "float32") -> Step:
    def step() -> list[Tensor]:
        for parameter in problem.parameters.values():
            parameter.grad = None
        with _autocast(problem, precision):
            losses = problem.losses(np.arange(problem.examples))
        losses.sum().backward()
        return [p.grad for p in problem.parameters.values() if p.grad is not None]

    return step


def plain_compiled(problem: Problem) -> Step:
    own = copy.deepcopy(problem.denoiser).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    denoiser = _with_network(own, torch.compile(own.network))  # type: ignore[arg-type]
    parameters = list(own.network.parameters())

    def step() -> list[Tensor]:
        for parameter in parameters:
            parameter.grad = None
        with _autocast(problem, "bf16"):
            losses = problem.losses(np.arange(problem.examples), denoiser)
        losses.sum().backward()
        return [p.grad for p in parameters if p.grad is not None]

    return step


def private(problem: Problem, precision: str = "float32") -> Step:
    def loss(records: np.ndarray) -> Tensor:
        with _autocast(problem, precision):
            return problem.losses(records)

    def step() -> list[Tensor]:
        return clipped_sum(
            problem.parameters,
            loss,
            np.arange(problem.examples),
            clipping_norm=CLIPPING_NORM,
            physical_batch_size=problem.examples,
        ).sums

    return step


def _autocast(problem: Problem, precision: str) -> torch.autocast:
    return torch.autocast(problem.device, torch.bfloat16, enabled=precision == "bf16")


def _clip_rows(gradients: list[Tensor]) -> list[Tensor]:
    """Returns the sum of (B, *shape) gradients, each example clipped, in float32 as those libraries do it."""
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
    scale = (CLIPPING_NORM / (norms + 1e-6)).clamp(max=1.0)
    return [torch.einsum("b,b...->...", scale, g) for g in gradients]


def opacus_hooks(problem: Problem) -> Step:
    from opacus.grad_sample import GradSampleModule  # pyright: ignore[reportMissingImports]

    warnings.filterwarnings("ignore", message="Full backward hook")
    own = _for_opacus(problem.denoiser)
    module = GradSampleModule(own.network, loss_reduction="sum")
    denoiser = _with_network(own, module)
    by_name = {name.removeprefix("_module."): p for name, p in module.named_parameters()}

    def step() -> list[Tensor]:
        module.zero_grad(set_to_none=True)
        for parameter in by_name.values():
            parameter.grad_sample = None  # type: ignore[attr-defined]
        problem.losses(np.arange(problem.examples), denoiser).sum().backward()
        samples = [p.grad_sample for p in by_name.values()]  # type: ignore[attr-defined]
        return _clip_rows([g.unflatten(0, (problem.draws, problem.examples)).sum(0) for g in samples])

    return step


def opacus_ghost(problem: Problem) -> Step:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping  # pyright: ignore[reportMissingImports]

    warnings.filterwarnings("ignore", message="Full backward hook")
    own = _for_opacus(problem.denoiser)
    module = GradSampleModuleFastGradientClipping(
        own.network,
        loss_reduction="sum",
        max_grad_norm=CLIPPING_NORM,  # type: ignore[arg-type]
        use_ghost_clipping=True,
    )
    denoiser = _with_network(own, module)

    def step() -> list[Tensor]:
        module.zero_grad(set_to_none=True)
        module.enable_hooks()
        losses = problem.losses(np.arange(problem.examples), denoiser)
        losses.sum().backward(retain_graph=True)
        coefficients = module.get_clipping_coef().unflatten(0, (problem.draws, problem.examples)).mean(0)
        module.zero_grad(set_to_none=True)
        module.disable_hooks()
        (coefficients.detach() * losses).sum().backward()
        module.enable_hooks()
        return [p.grad for p in module.parameters() if p.grad is not None]

    return step


def vmap(problem: Problem) -> Step:
    from torch.func import functional_call, grad
    from torch.func import vmap as vectorise

    parameters = {f"network.{name}": p.detach() for name, p in problem.parameters.items()}
    labels = torch.zeros(problem.examples, dtype=torch.int64) if problem.labels is None else problem.labels

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = problem.denoiser.network
            self.denoiser = [problem.denoiser]  # in a list: its parameters are the network's

        def forward(self, image: Tensor, label: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
            shown = None if problem.labels is None else label[None]
            return problem.losses_of(self.denoiser[0], image[None], shown, sigma[:, None], noise[:, None])[0]

    module = Loss()

    def one(parameters: dict[str, Tensor], *example: Tensor) -> Tensor:
        return functional_call(module, parameters, example)  # type: ignore[no-any-return]

    gradients = vectorise(grad(one), in_dims=(None, 0, 0, 1, 1))

    def step() -> list[Tensor]:
        found = gradients(parameters, problem.images, labels.to(problem.device), problem.sigma, problem.noise)
        return _clip_rows([found[name] for name in parameters])

    return step


def _for_opacus(denoiser: Denoiser) -> Denoiser:
    """Returns a copy, as hooks stay with the layers, all of whose convolutions are of the class that Opacus knows."""
    own = copy.deepcopy(denoiser)
    for layer in own.modules():
        if isinstance(layer, nn.Conv2d):
            layer.__class__ = nn.Conv2d
    return own


def _with_network(denoiser: Denoiser, module: nn.Module) -> Denoiser:
    """Returns a denoiser that calls ``module``, a wrapper of its network."""
    wrapped = Denoiser(denoiser.network, denoiser.kind, sigma_data=denoiser.sigma_data)
    module.num_classes = denoiser.network.num_classes  # type: ignore[assignment]
    wrapped.network = module  # type: ignore[assignment]
    return wrapped


WAYS: dict[str, Callable[[Problem], Step]] = {
    "plain": plain,
    "private": private,
    "plain_bf16": lambda problem: plain(problem, "bf16"),
    "private_bf16": lambda problem: private(problem, "bf16"),
    "opacus_hooks": opacus_hooks,
    "opacus_ghost": opacus_ghost,
    "vmap": vmap,
    "plain_compiled": plain_compiled,
}


def oracle(problem: Problem) -> Tensor:
    """Returns the clipped sum, flat, by a loop over examples with the network in float64, on the problem's device."""
    double = Problem.__new__(Problem)
    double.__dict__ = dict(problem.__dict__)
    double.denoiser = configs.build_denoiser(problem.config).double().to(problem.device)
    double.denoiser.load_state_dict(problem.denoiser.state_dict())
    for name in ("images", "sigma", "noise"):
        setattr(double, name, getattr(problem, name).double())
    total = torch.zeros(sum(p.numel() for p in double.parameters.values()), dtype=torch.float64)
    for example in range(problem.examples):
        loss = double.losses(np.array([example]))[0]
        gradient = _flat(list(torch.autograd.grad(loss, list(double.parameters.values()))))  # on the CPU
        total += gradient * min(1.0, CLIPPING_NORM / float(gradient.norm()))
    return total


def relative_error(problem: Problem, way: str, expected: Tensor) -> float:
    return float((_flat(WAYS[way](problem)()) - expected).norm() / expected.norm())


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().flatten().double().cpu() for t in tensors])


def seconds(step: Step, device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def noise_seconds(problem: Problem, *, ready: bool = False) -> float:
    """Returns the time of one logical step's noise, however many examples the step has.

    With ``ready`` the numbers are there, as setup.overlap_noise makes them beside the step, and are only added.
    """
    sums = [torch.zeros(p.shape, dtype=torch.float64, device=p.device) for p in problem.parameters.values()]
    times = []
    for number in range(5):
        noise = StepNoise(sum(total.numel() for total in sums), 1.0, 1.0, bytes([number] * 32))
        if ready:
            noise.begin()
            noise.numbers()
        times.append(seconds(lambda noise=noise: add_noise(sums, noise) or [], problem.device))
    return statistics.median(times)


def gpu_peak_bytes(way: str, arguments: argparse.Namespace) -> int:
    """Returns the peak of a GPU's memory in one step above what was allocated before it.

    What another way left in reference cycles, as Opacus does, is removed first.
    """
    gc.collect()
    problem = Problem(arguments.network, arguments.examples, arguments.draws, arguments.device)
    step = WAYS[way](problem)
    step()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def peak_bytes(way: str, arguments: argparse.Namespace) -> int | None:
    """Returns ``own_peak_bytes`` of a new process; None if there was not enough memory for it."""
    command = [sys.executable, __file__, "--peak-of", way, "--network", arguments.network]
    command += ["--examples", str(arguments.examples), "--draws", str(arguments.draws)]
    command += ["--threads", str(arguments.threads)]
    child = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    if child.returncode == -signal.SIGKILL:  # the kernel ends who asks for more than there is
        return None
    child.check_returncode()
    return int(child.stdout)


def own_peak_bytes(way: str, arguments: argparse.Namespace) -> int:
    """Returns the peak of memory in one step above what this process, a new one, held before it; Linux alone."""
    problem = Problem(arguments.network, arguments.examples, arguments.draws, "cpu")
    warm = Problem(arguments.network, 1, 1, "cpu")
    WAYS[way](warm)()  # loads code
    step = WAYS[way](problem)
    del warm
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status("VmRSS")
    step()
    return _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def has_bf16(device: str) -> bool:
    """Whether a device has some way of its own to compute in bf16."""
    return device != "cpu" or (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of one network and shape."""
    names = [way for way in WAYS if way not in (*PEERS, *ON_DEMAND) or way in arguments.peers]
    if not has_bf16(arguments.device):
        print("bf16 is not measured: this CPU has none of its own.", file=sys.stderr)
        names = [way for way in names if not way.endswith("_bf16")]
    if find_spec("opacus") is None:
        for name in [way for way in names if way.startswith("opacus")]:
            print(f"{name} is not measured: pip install 'dpdm[benchmark]'.", file=sys.stderr)
            names.remove(name)
    peaks: dict[str, int] = {}
    if arguments.device == "cpu" and not arguments.no_peak:  # first, as this process keeps what it once had
        for name in [way for way in names if way not in ON_DEMAND]:
            peak = peak_bytes(name, arguments)
            if peak is None:
                print(f"{name} is not measured: this machine's memory does not hold it.", file=sys.stderr)
                names.remove(name)
            else:
                peaks[name] = peak
    problem = Problem(arguments.network, arguments.examples, arguments.draws, arguments.device)
    steps = {}
    for name in names:
        try:
            steps[name] = WAYS[name](problem)
            steps[name]()
        except Exception as error:
            lacks_memory = isinstance(error, torch.OutOfMemoryError)
            if not (lacks_memory or name in (*PEERS, *ON_DEMAND)):  # of others' faults our own figures do not die
                raise
            why = "the GPU's memory does not hold it" if lacks_memory else f"{type(error).__name__}: {error}"
            print(f"{name} is not measured: {why}.", file=sys.stderr)
            steps.pop(name, None)
            torch.cuda.empty_cache()
    rounds = [{name: seconds(step, arguments.device) for name, step in steps.items()} for _ in range(arguments.rounds)]
    figures: dict[str, Any] = {
        "network": arguments.network,
        "examples": arguments.examples,
        "draws": arguments.draws,
        "device": torch.cuda.get_device_name() if arguments.device != "cpu" else "cpu",
        "threads": torch.get_num_threads(),
        "rounds": arguments.rounds,
        "torch": torch.__version__,
    }
    for name in steps:
        figures[f"{name}_seconds"] = statistics.median(r[name] for r in rounds)
    for name in steps:
        if name != "plain" and "plain" in steps:
            figures[f"{name}_ratio"] = statistics.median(r[name] / r["plain"] for r in rounds)
    figures["noise_seconds"] = noise_seconds(problem)
    figures["noise_added_seconds"] = noise_seconds(problem, ready=True)
    if not arguments.no_error:
        expected = oracle(problem)
        if "private" in steps:
            figures["relative_error"] = relative_error(problem, "private", expected)
        if "private_bf16" in steps:
            figures["relative_error_bf16"] = relative_error(problem, "private_bf16", expected)
    if arguments.device != "cpu" and not arguments.no_peak:
        measured = [name for name in steps if name not in ON_DEMAND]  # it would be compiled once more
        del problem, steps
        for name in measured:
            try:
                peaks[name] = gpu_peak_bytes(name, arguments)
            except torch.OutOfMemoryError:
                print(f"The peak of {name} is not measured: the GPU's memory does not hold it.", file=sys.stderr)
    return figures | {f"{name}_peak_bytes": peak for name, peak in peaks.items()}


def table(results: list[dict[str, Any]]) -> str:
    """Returns the figures as Markdown, a row for each network and shape."""
    ways = [way for way in WAYS if way != "plain" and any(f"{way}_seconds" in r for r in results)]
    header = ["network", "examples x draws", "plain, s", *ways, "memory: private / plain", "error", "error in bf16"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for r in results:
        ratios = [f"{r[f'{way}_ratio']:.2f}" if f"{way}_ratio" in r else "-" for way in ways]
        peaks = {"private_peak_bytes", "plain_peak_bytes"}
        memory = f"{r['private_peak_bytes'] / r['plain_peak_bytes']:.2f}" if peaks <= r.keys() else "-"
        errors = [f"{r[name]:.1e}" if name in r else "-" for name in ("relative_error", "relative_error_bf16")]
        shape = f"{r['examples']} x {r['draws']}"
        cells = [
            r["network"],
            shape,
            f"{r['plain_seconds']:.3f}" if "plain_seconds" in r else "-",
            *ratios,
            memory,
            *errors,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, help="default: all")
    parser.add_argument("--examples", type=int, help="default: 16, 8 and 64, with 4, 32 and 1 draws")
    parser.add_argument("--draws", type=int)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=(*PEERS, *ON_DEMAND))
    parser.add_argument("--no-peak", action="store_true")
    parser.add_argument("--no-error", action="store_true")
    parser.add_argument("--json", action="store_true", help="print an object, and nothing else (several: one a line)")
    parser.add_argument("--docs", action="store_true", help="also write the table of docs/performance.md")
    parser.add_argument("--peak-of", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if (arguments.examples is None) != (arguments.draws is None):
        parser.error("give --examples and --draws together")
    torch.set_num_threads(arguments.threads)
    use_full_precision()
    if arguments.device == "cpu":
        keep_freed_memory()
    if arguments.peak_of:
        print(own_peak_bytes(arguments.peak_of, arguments))
        return
    results = []
    for network in [arguments.network] if arguments.network else NETWORKS:
        for examples, draws in SHAPES if arguments.examples is None else [(arguments.examples, arguments.draws)]:
            chosen = argparse.Namespace(**{**vars(arguments), "network": network, "examples": examples, "draws": draws})
            results.append(measure(chosen))
            if arguments.json:
                print(json.dumps(results[-1]), flush=True)
            else:
                print(table(results[-1:]), file=sys.stderr, flush=True)
    if arguments.docs:
        write_between(ROOT / "docs" / "performance.md", "dp_step", table(results))
    if not arguments.json:
        print(table(results))


if __name__ == "__main__":
    main()
