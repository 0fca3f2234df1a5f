"""Releases written anew: with rounded weights, which is said wherever it matters, or with a fuller statement."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.made_release import edit, hash_again, make_release, rewrite_weights

from dpdm.cli import run_command
from dpdm.errors import InputError, RunError
from dpdm.release import load_config, load_denoiser
from dpdm.released_files import to_half
from dpdm.verify import page, verify
from dpdm.workdir import Workdir
from dpdm.written_anew import write_anew


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
    half = write_anew(release, Workdir(tmp_path / "half"), half=True)
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
        write_anew(release, Workdir(tmp_path / "half"), half=True)
    assert not (tmp_path / "half").exists()
    hash_again(release)
    write_anew(release, Workdir(tmp_path / "half"), half=True)


def test_a_rounded_release_is_not_rounded_again_nor_over_a_run(release: Path, tmp_path: Path) -> None:
    half = write_anew(release, Workdir(tmp_path / "half"), half=True)
    with pytest.raises(InputError, match="use it as it is"):
        write_anew(half, Workdir(tmp_path / "again"), half=True)
    with pytest.raises(InputError, match="choose another --workdir"):
        write_anew(release, Workdir(tmp_path / "half"), half=True)


def test_weights_beyond_float16_are_refused() -> None:
    assert to_half({"w": torch.tensor([65_504.0])})["w"].item() == 65_504
    with pytest.raises(RunError, match="65,504 to be rounded to float16, got more in w"):
        to_half({"w": torch.tensor([1.0, -70_000.0])})


@pytest.mark.parametrize(
    "given",
    [[], ["--half"], ["--selection", "by eye"], ["--workdir", "W"], ["--half", "--workdir", "W", "--", "dp.delta=1"]],
)
def test_a_release_is_written_anew_into_another_folder_or_not_at_all(
    release: Path, given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["release", "--from", str(release), *given]) == 2
    assert "Expected --workdir, --half or --selection, and nothing else" in capsys.readouterr().err


def test_a_release_says_more_of_its_choices_and_is_the_same_otherwise(release: Path, tmp_path: Path) -> None:
    words = "the average was chosen by accuracy on the private images"
    given = ["release", "--from", str(release), "--selection", words, "--workdir", str(tmp_path / "told")]
    assert run_command(given) == 0
    told = tmp_path / "told" / "release"
    found = verify(told)
    assert found.problems == []
    before = json.loads((release / "privacy.json").read_text(encoding="utf-8"))
    assert found.statement["hyperparameters"] == f"{before['hyperparameters']}; {words}"
    changed = {name for name in {*before, *found.statement} if before.get(name) != found.statement.get(name)}
    assert changed == {"hyperparameters", "files"}
    assert load_config(told).dp.selection == found.statement["hyperparameters"]
    for name in ("model.safetensors", "README.md"):
        assert (told / name).read_bytes() == (release / name).read_bytes()


def test_a_rounded_release_can_still_say_more(release: Path, tmp_path: Path) -> None:
    half = write_anew(release, Workdir(tmp_path / "half"), half=True)
    told = write_anew(half, Workdir(tmp_path / "told"), selection="by eye")
    assert verify(told).problems == []
    assert (told / "model.safetensors").read_bytes() == (half / "model.safetensors").read_bytes()
    assert "float16" in json.loads((told / "privacy.json").read_text(encoding="utf-8"))["rounding"]


@pytest.mark.parametrize("words", [" ", "by /home/me/figures.csv"])
def test_words_that_cannot_be_published_are_not_added(release: Path, tmp_path: Path, words: str) -> None:
    with pytest.raises(InputError, match=r"--selection|dp\.selection"):
        write_anew(release, Workdir(tmp_path / "told"), selection=words)
    assert not (tmp_path / "told").exists()


def test_a_checkpoint_of_the_original_has_no_statement_to_add_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["release", "--from", str(tmp_path / "model.pth"), "--config", "c.yaml", "--selection", "by eye"]
    assert run_command(given) == 2
    assert "Expected no --selection with --from" in capsys.readouterr().err
