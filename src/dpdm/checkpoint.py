"""The private training state: one safetensors file, replaced as a whole.

It holds weights, their average, Adam's moments, the private curves and the state's facts. No pickles. It never leaves
``private/``: what may is made by ``release.py``.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpdm.errors import RunError
from dpdm.files import atomic_path
from dpdm.privacy.ledger import Ledger
from dpdm.transfer import to_host


@dataclass
class TrainState:
    """Everything that a resumed run needs to go on exactly where it was.

    Attributes:
        parameters: raw network weights, by name; updated in place.
        ema: their moving average.
        averages: further moving averages, by rate and name ("0.99/...").
        exp_avg, exp_avg_sq: Adam's moments, of the parameters that are trained.
        step: weight updates of DP-SGD so far.
        warmup: the average's weights after the warm-up; empty without one.
        central: what else the warm-up bought, by name: "frequencies" of the classes, noisy, (num_classes,) float64, if
            they were counted.
        curves: per-step private figures, each (step,) float64.
    """

    parameters: dict[str, Tensor]
    ema: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    averages: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    warmup: dict[str, Tensor] = field(default_factory=dict)
    central: dict[str, Tensor] = field(default_factory=dict)
    curves: dict[str, list[float]] = field(default_factory=dict)

    def average(self, rate: float) -> dict[str, Tensor]:
        """Returns the further average of ``rate``, by name, sharing memory."""
        own = f"{rate}/"
        return {name.removeprefix(own): tensor for name, tensor in self.averages.items() if name.startswith(own)}

    def digest(self, copies: Sequence[Tensor] | None = None) -> str:
        """Returns a SHA-256 of all that the next update depends on: weights, moments, step.

        Args:
            copies: of the values of ``hashed()``, in order, on the CPU; None: they are made now.
        """
        named = self.hashed()
        tensors = to_host(list(named.values())) if copies is None else copies
        return _digest(dict(zip(named, tensors, strict=True)), str(self.step))

    def hashed(self) -> dict[str, Tensor]:
        """Returns weights and moments, by group and name."""
        groups = {"parameters": self.parameters, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {f"{group}/{name}": tensor for group, named in groups.items() for name, tensor in named.items()}


GROUPS = ("parameters", "ema", "averages", "exp_avg", "exp_avg_sq", "warmup", "central")


def save(path: Path, state: TrainState, facts: dict[str, Any]) -> None:
    """Writes the state and JSON-able ``facts`` to ``path``, atomically."""
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().contiguous()
        for group in GROUPS
        for name, tensor in getattr(state, group).items()
    }
    for name, values in state.curves.items():
        tensors[f"curves/{name}"] = torch.tensor(values, dtype=torch.float64)
    metadata = {"step": str(state.step), "facts": json.dumps(facts)}
    metadata["digest"] = _digest(tensors, metadata["step"], metadata["facts"])
    with atomic_path(path) as temporary:
        write_tensors(tensors, temporary, metadata)


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file.

    Raises:
        RunError: if it cannot be written; safetensors reports a full disk as an error of its own kind.
    """
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise RunError(f"Could not write {path}: {error}; free some space and go on with the same command.") from None


def load(path: Path) -> tuple[TrainState, dict[str, Any]]:
    """Returns a saved state, on the CPU, and its facts.

    Raises:
        RunError: if the file is damaged.
    """
    groups: dict[str, dict[str, Any]] = {group: {} for group in (*GROUPS, "curves")}
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # not a dict
        if _digest(tensors, metadata["step"], metadata["facts"]) != metadata["digest"]:
            raise ValueError("its digest differs")
        for key, tensor in tensors.items():
            group, _, name = key.partition("/")
            groups[group][name] = tensor
        curves = {name: values.tolist() for name, values in groups.pop("curves").items()}
        state = TrainState(**groups, step=int(metadata["step"]), curves=curves)
        facts = dict(json.loads(metadata["facts"]))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise RunError(
            f"Expected a whole checkpoint at {path}, could not read it ({error}): start a new run."
        ) from None
    return state, facts


def check_accounted(state: TrainState, facts: dict[str, Any], ledger: Ledger) -> None:
    """Raises RunError if a state holds more than its ledger says was bought: the ledger lost lines, or is another's.

    A saved state names the ledger's last line of its time, by hash; that line must still be there.
    """
    if not ledger.has_line(facts.get("ledger", "")):
        raise RunError(
            f"Expected ledger {ledger.path} to hold the line that the checkpoint was saved after, found none: one "
            "of the two is another run's or damaged; start a new run."
        )
    bought = [m["name"] for m in ledger.header["plan"]["warmup"]] if state.warmup or state.central else []
    unpaid = ledger.header["plan"]["noise_multiplier"] == 0  # a run without privacy, on public images, buys nothing
    if (ledger.spent("DP-SGD") < state.step and not unpaid) or not all(map(ledger.spent, bought)):
        raise RunError(
            f"Expected ledger {ledger.path} to name everything in the checkpoint ({state.step} steps of DP-SGD), got "
            f"{ledger.spent('DP-SGD')}: it is damaged and what was spent is unknown; start a new run."
        )


def _digest(tensors: dict[str, Tensor], *texts: str) -> str:
    """Returns a SHA-256 over names, bytes and texts, in an order that does not depend on the file's."""
    sha = hashlib.sha256(json.dumps(texts).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().numpy().data)
    return sha.hexdigest()
