"""Statements and configs by other versions of dpdm, and by people who say they are: what is still held against them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.made_release import edit, make_config, make_release, make_statement

from dpdm.cli import run_command
from dpdm.config import Config
from dpdm.release import load_config, load_denoiser
from dpdm.released_files import SECTIONS, redacted
from dpdm.verify import page, verify

Content = dict[str, Any]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return make_release(tmp_path)


def problems_of(release: Path) -> list[str]:
    return verify(release).problems


def said_by_another_version(release: Path, **words: Any) -> list[str]:
    def change(statement: Content) -> None:
        statement["versions"]["dpdm"] = "0.0.1"
        statement.update(words)

    edit(release, "privacy.json", change)
    return problems_of(release)


# Whatever version it says it is from


def test_neighbours_are_compared_whatever_the_version(release: Path) -> None:
    assert said_by_another_version(release, adjacency="change one pixel") == [
        "adjacency is change one pixel, by config.json it is add or remove one record"
    ]


def test_public_facts_are_compared_whatever_the_version(release: Path) -> None:
    facts = make_statement(make_config())["public_facts"]
    told = ["public_facts in privacy.json is not of the kind that dpdm writes"]
    assert said_by_another_version(release, public_facts={**facts, "dataset_size": 41}) == told
    assert said_by_another_version(release, public_facts={**facts, "split": "another", "more": 1}) == []


@pytest.mark.parametrize("name", [n for n, value in make_statement(make_config()).items() if isinstance(value, str)])
def test_words_are_words_whatever_the_version(release: Path, name: str) -> None:
    for value in (None, 3, ["x"], {"x": "y"}):
        assert any(line.startswith(f"{name} ") for line in said_by_another_version(release, **{name: value}))


@pytest.mark.parametrize("name", ["assumptions", "not_covered"])
@pytest.mark.parametrize("value", [None, 3, "x", [3], [[]], [{}], {}])
def test_lists_of_words_are_that_whatever_the_version(release: Path, name: str, value: Any) -> None:
    """The page would be printed from them."""
    told = f"{name} in privacy.json is not of the kind that dpdm writes"
    assert said_by_another_version(release, **{name: value}) == [told]


def test_a_page_says_that_words_are_ours_only_if_they_were_compared(release: Path) -> None:
    ours = "the words those that dpdm writes"
    assert ours in " ".join(page(verify(release)).split())
    assert said_by_another_version(release) == []
    text = " ".join(page(verify(release)).split())
    assert ours not in text
    assert "were not compared" in text


@pytest.mark.parametrize("note", ["fully anonymous", "", None, 3])
def test_a_note_in_group_privacy_is_ours(release: Path, note: Any) -> None:
    edit(release, "privacy.json", lambda s: s["group_privacy"]["2"].update(note=note))
    assert any("group_privacy" in line for line in problems_of(release))


def test_a_number_beyond_all_data_sets_is_refused_in_one_line(release: Path, capfd: pytest.CaptureFixture[str]) -> None:
    edit(release, "config.json", lambda c: c["train"].update(num_iterations=None, num_epochs=1.0))
    edit(release, "privacy.json", lambda s: s.update(dataset_size=10**400))
    assert run_command(["verify", str(release)]) == 1
    assert "dataset_size is no number of images or persons" in capfd.readouterr().err


def test_a_delta_that_the_accountant_does_not_resolve_is_a_claim_that_cannot_be_recomputed(release: Path) -> None:
    edit(release, "config.json", lambda c: c["dp"].update(delta=1e-50))
    assert problems_of(release) == ["delta is 1e-05, by config.json it is 1e-50"]
    edit(release, "privacy.json", lambda s: s.update(delta=1e-50))
    assert any(line.startswith("epsilon cannot be recomputed: Expected delta") for line in problems_of(release))


def test_a_value_of_another_type_is_not_as_it_is_read(release: Path) -> None:
    edit(release, "config.json", lambda c: c["dp"].update(secure_noise=1))
    assert problems_of(release) == ["config.json is not that of a release: dp.secure_noise"]


# Config keys that there were not yet


def without(*path: str) -> Callable[[Content], None]:
    def change(config: Content) -> None:
        *sections, last = path
        for section in sections:
            config = config[section]
        del config[last]

    return change


def with_values(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if not isinstance(value, dict):
        return [(path, value)]
    return [leaf for name, item in value.items() for leaf in with_values(item, (*path, name))]


def new_keys() -> list[tuple[str, ...]]:
    """Returns the keys of which the made release has the default, as one from before the key has."""
    own, default = (dict(with_values(redacted(config))) for config in (make_config(), Config()))
    return [path for path, value in own.items() if value == default[path]]


def test_a_release_from_before_any_one_key_is_consistent_and_can_be_loaded(release: Path) -> None:
    content = (release / "config.json").read_text()
    statement = (release / "privacy.json").read_text()
    expected = load_config(release)
    keys = new_keys()
    assert len(keys) > 40
    for path in keys:
        edit(release, "config.json", without(*path))
        assert load_config(release) == expected, path
        (release / "config.json").write_text(content)
    for path in (("dp", "secure_noise"), ("data", "unit"), ("loss", "type"), ("sampler",)):
        edit(release, "config.json", without(*path))
        found = verify(release)
        assert found.problems == [], path
        assert found.notices == [
            f"config.json lacks {'.'.join(path)}, as one from before there were such keys does: they have their "
            "defaults."
        ]
        assert f"config.json lacks {'.'.join(path)}" in " ".join(page(found).split())
        (release / "config.json").write_text(content)
        (release / "privacy.json").write_text(statement)


def test_a_release_from_before_many_keys_draws_images(release: Path, tmp_path: Path) -> None:
    lacking = new_keys()
    for path in lacking:
        edit(release, "config.json", without(*path))
    found = verify(release)
    assert found.problems == []
    assert f"and {len(lacking) - 5} more" in found.notices[0]
    load_denoiser(release)
    keys = (f"model.ckpt={release}", "sampler.num_images=2", "sampler.num_steps=2")
    assert run_command(["sample", "--workdir", str(tmp_path / "out"), "--", *keys]) == 0


def test_a_key_that_is_lacking_is_taken_for_its_default_in_every_check(release: Path) -> None:
    """Else leaving one out would be a way around a check."""
    for path, told in (
        (("dp", "noise_multiplier"), []),  # nothing is said of the noise then but by epsilon, which is recomputed
        (("train", "num_iterations"), ["3 steps of DP-SGD are stated, config.json asks for 0"]),
        (("train", "warmup"), ["the mechanism of central images"]),
        (("train", "expected_batch_size"), ["sampling_rate is 0.25, by config.json it is 6.4"]),
        (("data", "num_channels"), ["model.safetensors"]),
        (("data",), ["model.safetensors"]),
        (("model",), ["model.safetensors"]),
    ):
        content = {name: (release / name).read_text() for name in ("config.json", "privacy.json")}
        edit(release, "config.json", without(*path))
        found = problems_of(release)
        assert (found == []) == (told == []), (path, found)
        assert all(any(line.startswith(start) for line in found) for start in told), (path, found)
        for name, text in content.items():
            (release / name).write_text(text)


@pytest.mark.parametrize("section", [*SECTIONS, "setup", "evaluation", "more"])
def test_unknown_keys_stay_refused(release: Path, section: str) -> None:
    edit(release, "config.json", lambda c: c.setdefault(section, {}).update(new_key=1))
    assert any(line.startswith("config.json cannot be used: Expected a known key") for line in problems_of(release))


@pytest.mark.parametrize("section", ["setup", "evaluation"])
def test_sections_that_are_not_shared_stay_refused(release: Path, section: str) -> None:
    edit(release, "config.json", lambda c: c.update({section: {}}))
    assert problems_of(release) == [f"config.json is not that of a release: {section}"]


def test_cells_are_stated(tmp_path: Path) -> None:
    keys = ["train.warmup.covariance_noise_multiplier=3", "train.warmup.covariance_side=4"]
    cells = ["train.warmup.splits=1", "train.warmup.cell_noise_multiplier=5"]
    assert "cells" not in make_statement(make_config(keys))["warmup"]
    assert "parts of each class ('central cells')" in make_statement(make_config([*keys, *cells]))["warmup"]
    release = make_release(tmp_path / "run", keys=[*keys, *cells])
    assert not problems_of(release)
    assert "Central cells" in page(verify(release))


@pytest.mark.parametrize(
    ("keys", "counted"),
    [
        (["train.warmup.count_weight=0.2"], True),
        ([], False),
        (["train.warmup.count_weight=0.2", "data.num_classes=1", "data.class_names=[a]"], False),  # N is public
    ],
)
def test_counted_classes_are_stated(tmp_path: Path, keys: list[str], counted: bool) -> None:
    statement = make_statement(make_config(keys))
    assert ("noisy sizes of the classes" in statement["warmup"]) == counted
    release = make_release(tmp_path / "run", keys=keys)
    assert not problems_of(release)
    assert ("and its noisy size" in " ".join(page(verify(release)).split())) == counted
