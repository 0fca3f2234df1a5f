"""What the documentation says of keys and files is true."""

import re
import tomllib
from pathlib import Path

import pytest

from dpdm import config
from dpdm.config import KNOWN_KEYS

ROOT = Path(__file__).parent.parent


def test_every_key_is_documented_and_no_other() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w.]+)` \|", text, flags=re.MULTILINE) == KNOWN_KEYS


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/privacy.md"])
def test_files_that_are_named_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([^)#:]+)\)|`((?:src|docs|tests|configs)/[\w./-]+)`", text):
        path = next(part for part in name if part)
        assert (ROOT / path).exists(), path


def test_every_module_is_in_the_architecture() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    top = {path.name for path in (ROOT / "src" / "dpdm").glob("*.py")} - {"__init__.py", "__main__.py"}
    assert {name for name in top if name not in text} == set()


def test_the_changes_that_tests_catch_are_counted() -> None:
    tags = [m["tag"] for m in tomllib.loads((ROOT / "tests/privacy/mutations.toml").read_text("utf-8")).values()]
    counts = f"{tags.count('privacy')} changes that break privacy, {tags.count('fidelity')} that break fidelity"
    assert counts in (ROOT / "docs" / "assurance.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_loads_with_the_epsilon_of_its_name(path: Path) -> None:
    loaded = config.load([path])
    if path.stem.startswith("train_eps_"):
        assert loaded.dp.epsilon == float(path.stem.removeprefix("train_eps_"))
