"""Who may import whom (ARCHITECTURE: imports run rightward only), read from the source, and what a command loads."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dpdm

ROOT = Path(dpdm.__file__).parent
ROOMS = ("diffusion", "privacy", "data", "evaluation")
# Each module imports only from later rows. A room stands for all its modules, which may import each other.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("commands", "planning_commands", "checking_commands"),
    ("private_tuning",),
    ("tune",),
    ("synthesize", "step_audit", "run_audit", "written_anew"),
    ("evaluate", "verify", "audit"),
    ("train", "release"),
    ("consistency",),
    ("statement",),
    ("announcement", "monitor", "released_files", "own_statement", "model_cards"),
    ("generate", "run", "fidelity"),
    ("checkpoint", "reference_checkpoint", "warmup", "plan", "initial", "physical_batch", "recorded", "idle_keys"),
    ("account", "central_model", "config", "launch", "options", "recipes"),
    ROOMS,
    (
        "device",
        "workdir",
        "distributed",
        "fetching",
        "progress",
        "reference",
        "plain_yaml",
        "published_words",
        "optimizer",
        "pretrained",
        "signals",
        "foreign_pickles",
        "files",
        "untrusted",
        "transfer",
        "functions",
        "errors",
        "__init__",
    ),
)
BASE = {
    "distributed",
    "errors",
    "fetching",
    "files",
    "functions",
    "progress",
    "transfer",
    "untrusted",
}  # what a room may import beside itself
# Within the last row; __init__ imports release only when load_denoiser is asked for.
WITHIN_LAST = {
    "workdir": {"errors", "files"},
    "device": {"distributed", "errors"},
    "files": {"errors"},
    "fetching": {"errors", "files", "progress"},
    "distributed": {"errors"},
    "reference": {"errors"},
    "plain_yaml": {"errors", "untrusted"},
    "published_words": {"untrusted"},
    "optimizer": {"errors"},
    "pretrained": {"errors"},
    "__init__": {"release"},
}
WITHOUT_TORCH = (
    "account",
    "errors",
    "files",
    "progress",
    "workdir",
    "cli",
    "commands",
    "planning_commands",
    "checking_commands",
    "options",
    "launch",
    "plain_yaml",
    "privacy/accounting",
    "privacy/auditing",
    "privacy/ledger",
    "privacy/second_accountant",
    "privacy/second_selection",
    "privacy/selection",
    "reference",
    "untrusted",
)


def modules() -> dict[str, Path]:
    return {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.py"))}


def imported(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Returns the dotted names of all modules that a file imports, those inside functions included unless told."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {node.module} if node.module != "dpdm" else {f"dpdm.{alias.name}" for alias in node.names}
    return names


def own(names: set[str]) -> set[str]:
    """Returns the first part behind ``dpdm.``: a room, or a module beside the rooms."""
    return {name.split(".")[1] for name in names if name.startswith("dpdm.")}


def layer_of(part: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if part in layer)


def test_every_module_has_its_place() -> None:
    parts = {name.split("/")[0] for name in modules()}
    assert parts == {part for layer in LAYERS for part in layer}


@pytest.mark.parametrize("name", [name for name in modules() if name.split("/")[0] not in ROOMS])
def test_imports_run_rightward_only(name: str) -> None:
    for other in own(imported(modules()[name])):
        if other in WITHIN_LAST.get(name, ()):
            continue
        same_row = layer_of(other) == layer_of(name)
        assert layer_of(other) > layer_of(name) or (same_row and other == "config"), f"{name} imports {other}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_only_themselves_and_the_base(room: str) -> None:
    found = {name: own(imported(path)) for name, path in modules().items() if name.startswith(f"{room}/")}
    assert found
    for name, others in found.items():
        assert others <= {room, *BASE}, f"{name} imports {others - {room, *BASE}}"


def test_only_train_and_those_above_join_diffusion_to_privacy() -> None:
    joined = {name for name, path in modules().items() if own(imported(path)) >= {"diffusion", "privacy"}}
    assert joined <= {"private_tuning", "train", "run", "warmup", "config", "release", "recorded"}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_no_torch_here(name: str) -> None:
    """Directly, or at the top of what it imports of ours."""
    seen: set[str] = set()
    pending = [name]
    while pending:
        current = pending.pop()
        seen.add(current)
        names = imported(modules()[current], top_level_only=True)
        assert not [found for found in names if found.split(".")[0] == "torch"], f"{current} imports torch"
        below = {found.removeprefix("dpdm.").replace(".", "/") for found in names if found.startswith("dpdm.")}
        pending += [found for found in below if found in modules() and found not in seen]


@pytest.mark.parametrize(
    "code",
    [
        "import dpdm",
        "from dpdm.cli import run_command; assert run_command(['account', '--dataset-size', '1000', '--batch-size', "
        "'100', '--iterations', '2', '--noise-multiplier', '2', '--json']) == 0",
    ],
)
def test_loads_no_torch(code: str) -> None:
    check = "; import sys; assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code + check], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
