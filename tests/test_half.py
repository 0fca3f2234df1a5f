"""Releases with weights rounded to float16: half the size, the same statement, and said wherever it matters."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.made_release import edit, hash_again, make_release, rewrite_weights

from dpdm.cli import run_command
from dpdm.errors import InputError, RunError
from dpdm.half import halve
from dpdm.release import load_denoiser
from dpdm.released_files import to_half
from dpdm.verify import page, verify
from dpdm.workdir import Workdir


@pytest.fixture
def release(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    return make_release(tmp_path / "run")


def test_a_rounded_release_is_the_same_but_for_rounding(release: Path, tmp_path: Path) -> None:
    assert run_command(["release", "--from", str(release), "--half", "--workdir", str(tmp_path / "half")]) == 0
    half = tmp_path / "half" / "release"
    found = verify(half)
    assert found.problems == []
    before = json.loads((release / "privacy.json").read_text(encoding="utf-8"))
    changed = {name for name in {*before, *found.statement} if before.get(name) != found.statement.get(name)}
    assert changed == {"rounding", "files"}
    assert (half / "config.json").read_bytes() == (release / "config.json").read_bytes()
    assert "float16" in found.statement["rounding"]
    assert "float16" in (half / "README.md").read_text(encoding="utf-8")
    assert "float16" in page(found)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (half, release)]
    assert sizes[0] < 0.7 * sizes[1]  # of so small a network the header is a good part


def test_weights_are_the_nearest_and_are_computed_with_in_float32(release: Path, tmp_path: Path) -> None:
    half = halve(release, Workdir(tmp_path / "half"))
    stored, before = load_file(half / "model.safetensors"), load_file(release / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = dict(load_denoiser(half).network.named_parameters())
    for name, tensor in before.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], stored[name].float())
        # Half a unit in the last of 11 binary digits; below 2^-14 numbers are 2^-24 apart.
        assert torch.all((loaded[name] - tensor).abs() <= torch.clamp(tensor.abs() * 2**-11, min=2**-25))


@pytest.mark.parametrize(
    ("said", "problem"),
    [(True, "as F32 [16], by privacy.json it is F16"), (False, "as F16 [16], by privacy.json it is F32")],
)
def test_the_statement_and_the_weights_must_agree(tmp_path: Path, said: bool, problem: str) -> None:
    release = make_release(tmp_path / "run", half=said)
    other = torch.float32 if said else torch.float16
    rewrite_weights(release, lambda w: w.update({name: tensor.to(other) for name, tensor in w.items()}))
    first = next(iter(load_denoiser(release).network.named_parameters()))
    shape = str(list(first[1].shape))
    assert any(f"{first[0]} {problem.replace('[16]', shape)}" in found for found in verify(release).problems)


def test_other_words_about_rounding_are_refused(tmp_path: Path) -> None:
    release = make_release(tmp_path / "run", half=True)
    edit(release, "privacy.json", lambda s: s.update(rounding="the noise was rounded away"))
    assert any("rounding in privacy.json is not what dpdm states" in problem for problem in verify(release).problems)


def test_numbers_that_are_not_finite_are_found_in_half_precision(tmp_path: Path) -> None:
    release = make_release(tmp_path / "run", half=True)
    rewrite_weights(release, lambda w: w["embed_1.bias"].fill_(torch.inf))
    assert any("a number that is not finite" in problem for problem in verify(release).problems)


def test_what_does_not_agree_with_its_statement_is_not_written_anew(release: Path, tmp_path: Path) -> None:
    weights = release / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RunError, match=r"agree with its own statement, got: model\.safetensors differs"):
        halve(release, Workdir(tmp_path / "half"))
    assert not (tmp_path / "half").exists()
    hash_again(release)
    halve(release, Workdir(tmp_path / "half"))


def test_a_rounded_release_is_not_rounded_again_nor_over_a_run(release: Path, tmp_path: Path) -> None:
    half = halve(release, Workdir(tmp_path / "half"))
    with pytest.raises(InputError, match="use it as it is"):
        halve(half, Workdir(tmp_path / "again"))
    with pytest.raises(InputError, match="choose another --workdir"):
        halve(release, Workdir(tmp_path / "half"))


def test_weights_beyond_float16_are_refused() -> None:
    assert to_half({"w": torch.tensor([65_504.0])})["w"].item() == 65_504
    with pytest.raises(RunError, match="65,504 to be rounded to float16, got more in w"):
        to_half({"w": torch.tensor([1.0, -70_000.0])})


@pytest.mark.parametrize(
    "given", [[], ["--half"], ["--workdir", "W"], ["--half", "--workdir", "W", "--", "dp.delta=1"]]
)
def test_a_release_is_rounded_into_another_folder_or_not_at_all(
    release: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["release", "--from", str(release), *given]) == 2
    assert "Expected --half, --workdir and nothing else" in capsys.readouterr().err
