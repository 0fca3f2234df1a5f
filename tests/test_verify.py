"""A release and its forgeries: what does not fit is named, nothing hostile does harm, the page says what it should."""

import base64
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from tests.made_release import edit, hash_again, make_release, png_chunk, rewrite_weights, write_json

from dpdm.cli import run_command
from dpdm.data.archive import ArchiveWriter
from dpdm.errors import InputError, RunError
from dpdm.evaluation.report import SharedReport, write_shareable_report
from dpdm.generate import write_archive
from dpdm.verify import against, page, verify

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("made")
    make_release(root, images=12)
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def release(run: Path) -> Path:
    return run / "release"


def problems_of(release: Path) -> list[str]:
    return verify(release).problems


def test_a_release_that_fits_is_consistent_and_its_page_is_printed(release: Path, capfd: Capture) -> None:
    found = verify(release)
    assert found.problems == []
    assert found.notices == []
    assert found.images == {"synthetic.zip": 12}
    assert run_command(["verify", str(release)]) == 0
    out, err = capfd.readouterr()
    assert out.rstrip("\n") == page(found)
    assert err == ""


def test_the_page_names_all_that_matters(release: Path) -> None:
    found = verify(release)
    first, second = found.epsilons
    text = page(found)
    words = " ".join(text.split())
    for phrase in (
        "one image, with its label, of the 40",
        "add or remove one record",
        "DP-SGD",
        "0.25",
        "noise of 4 times",
        "Central images",
        f"{first:.6g} by PLD",
        f"{second:.6g} by a second accountant",
        "12 in synthetic.zip",
        "That the training was done as stated",
        *found.statement["assumptions"],
        *found.statement["not_covered"],
        found.statement["floating_point"],
        found.statement["hyperparameters"],
    ):
        assert " ".join(phrase.split()) in words
    assert len(text.splitlines()) <= 70
    assert max(map(len, text.splitlines())) <= 110


def test_page_of_a_large_epsilon_and_of_groups_without_a_guarantee(release: Path) -> None:
    found = verify(release)
    found.statement["epsilon"] = 25.0
    found.statement["group_privacy"]["5"] = {"epsilon": None, "delta": 1.0, "note": "no guarantee"}
    text = " ".join(page(found).split())
    assert "more than 400 million" in text
    assert "5 images together not at all" in text


# What its maker could have changed, hashes and all


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.update(epsilon=s["epsilon"] * 0.999), "epsilon is"),
        (lambda s: s.update(epsilon=s["epsilon"] * 1.5), "both accountants"),
        (lambda s: s["mechanisms"][0].update(num_steps=4), "epsilon is"),
        (lambda s: s["mechanisms"][1].update(noise_multiplier=3.9), "epsilon is"),
        (lambda s: s["mechanisms"].pop(0), "the mechanism of central images is None"),
        (lambda s: s["mechanisms"].append({**s["mechanisms"][0], "name": "counts"}), "what counts does is not known"),
        (lambda s: s["mechanisms"].append(s["mechanisms"][0]), "a mechanism is named twice"),
        (lambda s: s.update(mechanisms=[]), "no mechanism is named"),
        (lambda s: s.update(delta=1e-4), "delta is 0.0001, by config.json it is 1e-05"),
        (lambda s: s.update(delta=0.03), "delta 0.03 allows publishing"),
        (lambda s: s.update(clipping_norm=0.1), "clipping_norm is 0.1"),
        (lambda s: s.update(dataset_size=400), "sampling_rate is 0.25, by config.json it is 0.025"),
        (lambda s: s["public_facts"].update(dataset_size=4000), "public_facts in privacy.json is not what"),
        (lambda s: s["group_privacy"]["2"].update(epsilon=0.1), "group_privacy does not follow"),
        (lambda s: s["group_privacy"].update({"100": {"epsilon": 0.1, "delta": 0}}), "group_privacy does not follow"),
        (lambda s: s.update(adjacency="replace one record"), "adjacency in privacy.json is not what"),
        (lambda s: s.update(unit="one hospital"), "unit in privacy.json is not what"),
        (lambda s: s["assumptions"].pop(), "assumptions in privacy.json is not what"),
        (lambda s: s["not_covered"].append("Nothing else."), "not_covered in privacy.json is not what"),
        (lambda s: s.update(loss=[0.3, 0.2]), "privacy.json holds loss"),
        (lambda s: s.pop("threat_model"), "privacy.json lacks threat_model"),
        (lambda s: s["versions"].update(secret="1"), "versions does not name"),
        (lambda s: s["versions"].update(torch="/root/x"), "versions does not name"),
    ],
)
def test_a_forged_statement_is_refused(release: Path, change: Callable[[Any], Any], problem: str) -> None:
    edit(release, "privacy.json", lambda s: change(s) and None)
    assert any(problem in found for found in problems_of(release)), problems_of(release)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["train"].update(expected_batch_size=5), "sampling_rate is 0.25, by config.json it is 0.125"),
        (lambda c: c["train"].update(num_iterations=2), "3 steps of DP-SGD are stated, config.json asks for 2"),
        (lambda c: c["dp"].update(noise_multiplier=9.0), "noise_multiplier is 4.0, by config.json it is 9.0"),
        (lambda c: c["dp"].update(epsilon=0.1, noise_multiplier=None), "is above the budget in config.json, 0.1"),
        (lambda c: c["train"]["warmup"].update(noise_multiplier=1.0), "the mechanism of central images"),
        (lambda c: c["train"]["warmup"].update(count_weight=0.2), "warmup in privacy.json is not what"),
        (lambda c: c["sampler"].update(class_weights=[30.0, 10.0]), "which was not bought"),
        (lambda c: c["sampler"].update(class_weights=[1.0] * 3), "are not one number of four digits"),
        (lambda c: c["sampler"].update(class_weights=[1.00001] * 2), "are not one number of four digits"),
        (lambda c: c["data"].update(path="images"), "config.json is not that of a release: data.path"),
        (lambda c: c["train"].update(seed=7), "config.json is not that of a release: train.seed"),
        (lambda c: c["dp"].update(seed=7), "config.json is not that of a release: dp.seed"),
        (lambda c: c.update(setup={"num_threads": 3}), "config.json is not that of a release: setup"),
        (lambda c: c["optim"].update(secret=1), "config.json cannot be used"),
        (lambda c: c["data"].update(name="${oc.env:HOME}"), "config.json cannot be used: it holds ${"),
        (
            lambda c: c["data"].update(name="/home/ada/scans"),
            "config.json seems to name a path of a machine: /home/ada",
        ),
        (lambda c: c["data"].update(name="ab" * 32), "config.json holds 64 hex digits"),
        (lambda c: c["model"]["network"].update(width=8), "by config.json it is F32"),
        (lambda c: c["model"]["network"].update(num_res_blocks=32), "config.json asks for 32 blocks"),
        (lambda c: c["model"]["network"].update(num_res_blocks=10**9), "num_res_blocks >= 1 and <= 32"),
        (lambda c: c["data"].update(resolution=7), "synthetic.zip: 00000/img00000000.png is of 8x8 pixels"),
    ],
)
def test_a_forged_config_is_refused(release: Path, change: Callable[[Any], Any], problem: str) -> None:
    edit(release, "config.json", lambda c: change(c) and None)
    assert any(problem in found for found in problems_of(release)), problems_of(release)


@pytest.mark.parametrize(
    ("change", "options", "problem"),
    [
        (lambda w: w.update(extra=torch.zeros(3)), {}, "holds extra, by config.json (0 tensors missing, 1 too many)"),
        (lambda w: w.pop("embed_1.bias"), {}, "lacks embed_1.bias"),
        (lambda w: w.update({"embed_1.bias": torch.zeros(17)}), {}, "holds embed_1.bias as F32 [17]"),
        (lambda w: w.update({"embed_1.bias": torch.zeros(16).double()}), {}, "holds embed_1.bias as F64 [16]"),
        (lambda w: w["embed_1.bias"].fill_(torch.nan), {}, "a number that is not finite"),
        (lambda w: w["conv_in.weight"][0, 0, 0].fill_(-torch.inf), {}, "a number that is not finite"),
        (lambda w: None, {"metadata": {"loss": "0.3"}}, "holds metadata"),
    ],
)
def test_forged_weights_are_refused(
    release: Path, change: Callable[[Any], Any], options: dict[str, Any], problem: str
) -> None:
    rewrite_weights(release, change, **options)
    assert any(problem in found for found in problems_of(release)), problems_of(release)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda header, body: (header, body + b"secret"), "bytes behind its tensors"),
        (lambda header, body: (header + b" " * 64, body), "a longer header than its tensors need"),
        (lambda header, body: (header.replace(b'"F32"', b'"F32","F":1', 1), body), "says odd things"),
        (lambda header, body: (header.replace(b"[0,", b"[4,", 1), body), "overlap, or bytes between them"),
        (lambda header, body: (header.replace(b"[0,", b"[true,", 1), body), "says odd things"),
        (lambda header, body: (b"[" * 100_000, body), "nested too deeply"),
        (lambda header, body: (b"[]", body), "is no safetensors file"),
        (lambda header, body: (header[:-20], body), "model.safetensors"),
        (lambda header, body: (header, body[:-4]), "or too few"),
    ],
)
def test_a_forged_safetensors_file_is_refused(
    release: Path, change: Callable[[bytes, bytes], tuple[bytes, bytes]], problem: str
) -> None:
    path = release / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, body = change(content[8 : 8 + length], content[8 + length :])
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    hash_again(release)
    found = [line for line in problems_of(release) if line.startswith("model.safetensors")]
    assert any(problem in line for line in found), found


def test_another_model_card_is_refused(release: Path) -> None:
    card = release / "README.md"
    card.write_text(card.read_text() + "\nPerfectly anonymous.\n")
    hash_again(release)
    assert problems_of(release) == ["README.md is not the model card that dpdm makes of this statement"]


def test_spaces_and_escapes_that_could_hide_something_are_refused(release: Path) -> None:
    for name in ("config.json", "privacy.json"):
        path = release / name
        before = path.read_text()
        path.write_text(before.replace('"', ' "', 1))
        hashes = "" if name == "privacy.json" else "config.json differs"
        assert any(
            f"{name} is not written as dpdm writes it" in line or hashes in line for line in problems_of(release)
        )
        path.write_text(before)
    path = release / "config.json"
    path.write_text(path.read_text().replace("squares", "squ\\u0061res"))
    hash_again(release)
    assert problems_of(release) == [
        "config.json is not written as dpdm writes it: it holds other spaces, escapes or digits"
    ]


def test_words_of_another_version_are_not_compared_and_that_is_said(release: Path) -> None:
    def change(statement: dict[str, Any]) -> None:
        statement["versions"]["dpdm"] = "0.0.1"
        statement["assumptions"] = ["None.\x1b[2J\nPRIVACY STATEMENT: epsilon 0"]

    edit(release, "privacy.json", change)
    found = verify(release)
    assert found.problems == []
    assert any("by dpdm 0.0.1, were not compared" in notice for notice in found.notices)
    text = page(found)
    assert "were not compared" in " ".join(text.split())
    assert "\x1b" not in text
    assert text.count("\nPRIVACY STATEMENT") == 0


def test_an_older_version_may_have_had_fewer_keys_and_that_is_said(release: Path) -> None:
    def older(statement: dict[str, Any]) -> None:
        statement["versions"]["dpdm"] = "0.0.1"

    def fewer(config: dict[str, Any]) -> None:
        del config["optim"]["schedule"], config["train"]["warmup"]["blur"]

    edit(release, "config.json", fewer)
    edit(release, "privacy.json", older)
    found = verify(release)
    assert found.problems == []
    assert any("config.json lacks optim.schedule, train.warmup.blur" in notice for notice in found.notices)
    # A key that no release has is not excused by age, and neither is one on which the statement depends.
    edit(release, "config.json", lambda c: c["train"].update(seed=7))
    assert problems_of(release) == ["config.json is not that of a release: train.seed"]

    def without_steps(config: dict[str, Any]) -> None:
        del config["train"]["seed"], config["train"]["num_iterations"]

    edit(release, "config.json", without_steps)
    assert any("3 steps of DP-SGD are stated, config.json asks for 0" in problem for problem in problems_of(release))


def test_a_page_by_another_version_is_looked_through_and_that_is_said(run: Path, release: Path) -> None:
    edit(release, "privacy.json", lambda statement: statement["versions"].update(dpdm="0.0.1"))
    shareable = run / "shareable.html"
    shareable.write_text("<p>a page of the time")
    found = verify(release)
    assert found.problems == []
    assert any("Nor were the words of shareable.html" in notice for notice in found.notices)
    shareable.write_text(f"<p>see /home/me/images, {'ab' * 32}")
    assert len(problems_of(release)) == 2
    picture = base64.b64encode(b"not a picture").decode()
    shareable.write_text(f'<img src="data:image/png;base64,{picture}">')
    assert len(problems_of(release)) == 1


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["model"].update(use_ema=False), "model.use_ema"),
        (lambda c: c["dp"].update(epsilon=1e300), "a budget that no run has"),
    ],
)
def test_a_config_of_no_possible_run_is_refused(release: Path, change: Any, problem: str) -> None:
    edit(release, "config.json", change)
    assert any(problem in line for line in problems_of(release))


def test_true_is_no_number(release: Path) -> None:
    edit(release, "privacy.json", lambda s: s["public_facts"].update(num_channels=True))
    assert any("public_facts" in line for line in problems_of(release))


def test_no_images_are_none_that_were_looked_through(release: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert verify(release, tmp_path / "empty").problems == ["empty holds no images"]


def test_a_command_that_fails_leaves_no_page(release: Path, tmp_path: Path, capfd: Capture) -> None:
    for words, status in ((["--against", str(tmp_path / "none.zip")], 2), (["--public"], 1)):
        assert run_command(["verify", str(release), *words]) == status
        assert capfd.readouterr().out == ""


# Accountants


def test_both_accountants_are_asked_and_either_can_refuse(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dpdm.privacy.accounting.epsilon_spent", "dpdm.privacy.second_accountant.epsilon_upper_bound"):
        with monkeypatch.context() as patch:
            patch.setattr(name, lambda mechanisms, delta: 5.0)
            assert any("epsilon is 5 by" in problem for problem in problems_of(release)), name


def test_the_largest_epsilon_that_is_asked_for_is_recomputed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second accountant may be above the first by its own tolerance, also where both are near the limit."""
    with monkeypatch.context() as patch:
        patch.setattr("dpdm.privacy.accounting.epsilon_spent", lambda mechanisms, delta: 100.0)
        patch.setattr("dpdm.privacy.second_accountant.epsilon_upper_bound", lambda mechanisms, delta: 100.05)
        assert verify(make_release(tmp_path)).problems == []


def test_what_takes_too_long_or_means_nothing_is_not_recomputed(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object) -> float:
        raise AssertionError

    monkeypatch.setattr("dpdm.privacy.accounting.epsilon_spent", asked)
    for change, problem in (
        ({"noise_multiplier": 0.1, "num_steps": 10_000}, "promises nothing"),
        ({"noise_multiplier": 1e-9}, "<= noise_multiplier <="),
        ({"num_steps": 10**7}, "<= num_steps <="),
        ({"num_steps": 2 * 10**6, "noise_multiplier": 1e4}, "more than 1000000 steps"),
    ):
        content = (release / "privacy.json").read_text()
        edit(release, "privacy.json", lambda s, change=change: s["mechanisms"][1].update(change))
        assert any(problem in line for line in problems_of(release)), problems_of(release)
        (release / "privacy.json").write_text(content)


# Files that nobody should open


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"mechanisms": [], "mechanisms": []}',
        b'{"mechanisms": NaN}',
        b'{"epsilon": 1}',
        b"1" * 5000,
    ],
)
def test_a_statement_that_is_none_is_refused_in_one_line(release: Path, content: bytes, capfd: Capture) -> None:
    (release / "privacy.json").write_bytes(content)
    assert run_command(["verify", str(release)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "privacy.json, could not read it" in err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epsilon", "1"),
        ("epsilon", float("inf")),
        ("epsilon", -1.0),
        ("epsilon", None),
        ("epsilon", True),
        ("epsilon", 10**400),
        ("delta", 0),
        ("delta", 1.5),
        ("delta", []),
        ("dataset_size", 0),
        ("dataset_size", 40.0),
        ("dataset_size", True),
        ("clipping_norm", {}),
        ("mechanisms", {}),
        ("mechanisms", [[]]),
        ("mechanisms", [{"name": "DP-SGD"}]),
        ("mechanisms", [{"name": 1, "sampling_rate": 0.25, "noise_multiplier": 4.0, "num_steps": 3}]),
        ("mechanisms", [{"name": "DP-SGD", "sampling_rate": 1.25, "noise_multiplier": 4.0, "num_steps": 3}]),
        ("mechanisms", [{"name": "DP-SGD", "sampling_rate": 0.25, "noise_multiplier": "4", "num_steps": 3}]),
        ("mechanisms", [{"name": "DP-SGD", "sampling_rate": 0.25, "noise_multiplier": 4.0, "num_steps": 10**400}]),
        ("mechanisms", [{"name": "DP-SGD", "sampling_rate": 0.25, "noise_multiplier": 4.0, "num_steps": -1}]),
        ("files", []),
        ("files", {"README.md": "0"}),
    ],
)
def test_numbers_that_are_none_are_refused_in_one_line(release: Path, name: str, value: Any, capfd: Capture) -> None:
    path = release / "privacy.json"
    write_json(path, {**json.loads(path.read_text()), name: value})
    assert run_command(["verify", str(release)]) == 1
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["public_facts", "group_privacy", "versions", "assumptions", "not_covered", "unit"])
@pytest.mark.parametrize("value", [None, 1, "x", [], {}, [[]], {"2": None}, {"dpdm": []}])
def test_odd_values_are_refused_without_a_crash(release: Path, name: str, value: Any) -> None:
    edit(release, "privacy.json", lambda s: s.update({name: value}))
    assert problems_of(release) != []


@pytest.mark.parametrize("name", ["privacy.json", "config.json", "README.md", "model.safetensors"])
def test_links_pipes_and_folders_are_not_opened(release: Path, name: str) -> None:
    path = release / name
    path.rename(release.parent / "elsewhere")
    makers: list[Callable[[], Any]] = [
        lambda: path.symlink_to(release.parent / "elsewhere"),
        lambda: path.symlink_to("/dev/zero"),
        lambda: os.mkfifo(path),
        path.mkdir,
    ]
    for make in makers:
        make()
        if name == "privacy.json":
            with pytest.raises(RunError, match="could not read it"):
                verify(release)
        else:
            assert any(line.startswith(name) for line in problems_of(release))
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize("name", ["privacy.json", "config.json", "README.md", "model.safetensors"])
def test_huge_files_are_not_read(release: Path, name: str) -> None:
    os.truncate(release / name, 2**43)  # a hole: it takes no room on the disk
    start = time.monotonic()
    if name == "privacy.json":
        with pytest.raises(RunError, match=r"has 8,796,093,022,208 bytes"):
            verify(release)
    else:
        assert any("more than" in line for line in problems_of(release))
    assert time.monotonic() - start < 10


def test_names_are_told_without_control_characters(release: Path, capfd: Capture) -> None:
    (release / "a\x1b[2J\nb").write_text("")
    for index in range(30):
        (release / f"x{index:02d}").write_text("")
    assert run_command(["verify", str(release)]) == 1
    err = capfd.readouterr().err
    assert "\x1b" not in err
    assert "a [2J b is not on the allow-list" in err
    assert "11 more files are not on it" in err


# Images and the page beside the release


def test_images_are_looked_through_where_they_are(run: Path, release: Path, tmp_path: Path) -> None:
    content = (run / "synthetic.zip").read_bytes()
    (run / "synthetic.zip").write_bytes(content + b"secret")
    assert any("something follows it" in line for line in problems_of(release))
    shutil.copytree(release, tmp_path / "received" / "release")
    assert verify(tmp_path / "received" / "release").images == {}
    found = verify(tmp_path / "received" / "release", run / "synthetic.zip")
    assert any("something follows it" in line for line in found.problems)
    with pytest.raises(InputError, match="--images"):
        verify(release, tmp_path / "nowhere")


def test_a_folder_that_is_not_a_runs_is_left_alone(release: Path, tmp_path: Path) -> None:
    """Somebody's downloads may hold a samples/ of another kind."""
    shutil.copytree(release, tmp_path / "downloads" / "model")
    (tmp_path / "downloads" / "samples").mkdir()
    (tmp_path / "downloads" / "samples" / "notes.txt").write_text("mine")
    assert verify(tmp_path / "downloads" / "model").problems == []


def test_an_image_with_a_text_in_it_is_found(run: Path, release: Path) -> None:
    (run / "samples").mkdir()
    info = PngImagePlugin.PngInfo()
    info.add_text("patient", "Ada")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(run / "samples" / "000000.png", pnginfo=info)
    assert "samples: 000000.png holds tEXt beside its pixels" in problems_of(release)


@pytest.fixture
def shareable(run: Path, release: Path) -> Path:
    """The page that ``dpdm synthesize`` puts beside the release."""
    statement = json.loads((release / "privacy.json").read_text())
    report = SharedReport(
        statement=statement,
        synthetic=np.random.default_rng(0).integers(0, 256, (4, 1, 8, 8), np.uint8),
        config=(release / "config.json").read_text(),
        versions=statement["versions"],
        synthetic_labels=np.array([0, 1, 0, 1]),
        class_names=("a", "b"),
    )
    write_shareable_report(run / "shareable.html", report)
    return run / "shareable.html"


def test_the_page_to_be_shared_is_made_again(release: Path, shareable: Path) -> None:
    assert problems_of(release) == []
    text = shareable.read_text()
    for old, new, problem in (
        ("</body>", "<script>x</script></body>", "is not the page that dpdm makes of this release"),
        ("</main>", "<!-- loss of step 1: 0.3 --></main>", "is not the page that dpdm makes of this release"),
    ):
        shareable.write_text(text.replace(old, new))
        assert problems_of(release) == [f"shareable.html {problem}"]
    png = base64.b64decode(text.split("base64,")[1].split('"')[0])
    more = png[:-12] + png_chunk(b"tEXt", b"Author\0Ada") + png[-12:]
    shareable.write_text(text.replace(base64.b64encode(png).decode(), base64.b64encode(more).decode()))
    assert problems_of(release) == ["shareable.html: a picture holds tEXt beside its pixels"]
    shareable.write_bytes(b"\xff\xfe")
    assert problems_of(release)[0].startswith("shareable.html ")


# Any change at all


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_no_byte_of_a_release_can_be_changed(made: Path, data: st.DataObject) -> None:
    change_a_byte(made, data)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(data=st.data())
def test_no_byte_of_a_release_can_be_changed_in_many_ways(made: Path, data: st.DataObject) -> None:
    change_a_byte(made, data)


def change_a_byte(made: Path, data: st.DataObject) -> None:
    """Changes, removes or adds a byte somewhere; verify must tell, and fail in no other way."""
    with tempfile.TemporaryDirectory() as folder:
        release = Path(shutil.copytree(made, Path(folder) / "run")) / "release"
        path = data.draw(st.sampled_from([*sorted(release.iterdir()), release.parent / "synthetic.zip"]))
        content = path.read_bytes()
        at = data.draw(st.integers(0, len(content) - 1))
        new = data.draw(st.one_of(st.just(b""), st.binary(min_size=1, max_size=3)))
        path.write_bytes(content[:at] + new + content[at + 1 :])
        if path.read_bytes() == content:
            return
        try:
            assert problems_of(release) != [] or (
                path.name == "privacy.json" and same_claim(content, path.read_bytes())
            )
        except RunError as error:
            assert path.name == "privacy.json", error  # noqa: PT017  # the only file without which nothing can be said


def same_claim(first: bytes, second: bytes) -> bool:
    """Whether two statements differ in what cannot be known from outside alone: digits of no weight, and versions."""
    old, new = json.loads(first), json.loads(second)
    for name, tolerance in (("epsilon", 1e-2), ("group_privacy", None), ("versions", None)):
        before, after = old.pop(name), new.pop(name)
        if tolerance is not None and not before * (1 - 1e-6) <= after <= before * (1 + tolerance):
            return False
    return old == new


# Against the training images


@pytest.fixture
def training(tmp_path: Path) -> tuple[Path, np.ndarray]:
    images = np.random.default_rng(5).integers(0, 256, (60, 1, 8, 8), np.uint8)
    with ArchiveWriter(tmp_path / "train.zip") as writer:
        for image in images:
            writer.add(image)
    return tmp_path / "train.zip", images


def test_without_copies_the_release_passes(release: Path, training: tuple[Path, np.ndarray], capfd: Capture) -> None:
    assert run_command(["verify", str(release), "--against", str(training[0])]) == 0
    out, err = capfd.readouterr()
    assert out.startswith("PRIVACY STATEMENT")
    assert "training image" not in out  # what is on standard output may be passed on
    assert "Copies of training images among 12 synthetic ones (each compared with 60)" in err


def test_a_copy_is_found_and_its_release_refused(
    run: Path, release: Path, training: tuple[Path, np.ndarray], capfd: Capture
) -> None:
    archive, images = training
    drawn = np.random.default_rng(6).integers(0, 256, (10, 1, 8, 8), np.uint8)
    drawn[7] = images[33]
    (run / "synthetic.zip").unlink()
    write_archive(run / "synthetic.zip", drawn, np.zeros(10, np.int64))
    report = against(release, archive)[run / "synthetic.zip"]
    assert report.pairs == ((7, 33, 0.0),)
    assert run_command(["verify", str(release), "--against", str(archive)]) == 1
    out, err = capfd.readouterr()
    assert out == ""  # so that a statement that is written to a file does not stand there as if all were well
    assert "synthetic image 7 and training image 33: 0.00 grey levels apart" in err
    assert err.rstrip().endswith("dpdm: 1 of the synthetic images are copies of training images: do not share them.")


def test_images_for_the_comparison_can_be_elsewhere_and_must_be_somewhere(
    run: Path, release: Path, training: tuple[Path, np.ndarray]
) -> None:
    (run / "synthetic.zip").rename(run / "other.zip")
    with pytest.raises(InputError, match="found none: give them by --images"):
        against(release, training[0])
    assert against(release, training[0], run / "other.zip")[run / "other.zip"].synthetic.total == 12


@pytest.mark.parametrize(("weights", "warned"), [("[5,1]", True), ("[2,2]", False), ("[]", False)])
def test_sample_tells_what_its_images_are_not(
    run: Path, release: Path, weights: str, warned: bool, capfd: Capture
) -> None:
    """By private class sizes they would tell of these; and evaluate measures the images that were there before."""
    before = (run / "synthetic.zip").read_bytes()
    keys = ["sampler.num_images=2", "sampler.num_steps=2", f"sampler.class_weights={weights}", "setup.device=cpu"]
    assert run_command(["sample", "--workdir", str(run), "--", f"model.ckpt={release}", *keys]) == 0
    err = capfd.readouterr().err
    assert ("sampler.class_weights that are not the release's" in err) == warned
    assert "synthetic.zip, which dpdm evaluate measures, keeps the images that it had" in err
    assert (run / "synthetic.zip").read_bytes() == before


@pytest.mark.parametrize("key", ["model.denoiser=v", "loss.sigma_data=5", "data.resolution=16", "dp.epsilon=1"])
def test_sample_takes_no_key_that_makes_another_model(release: Path, tmp_path: Path, capfd: Capture, key: str) -> None:
    words = ["sample", "--workdir", str(tmp_path / "out"), "--", f"model.ckpt={release}"]
    assert run_command([*words, key]) == 2
    assert f"Expected keys of sampler and setup for {release}, got {key}" in capfd.readouterr().err
    section, _, value = key.partition(".")
    (tmp_path / "mine.yaml").write_text(f"{section}:\n  {value.replace('=', ': ')}\n")
    harmless = section == "dp"
    if harmless:  # neither does the file alone fit together
        (tmp_path / "mine.yaml").write_text("dp: {epsilon: 1}\nsampler: {type: edm, stochastic: true}\n")
    keys = ["sampler.num_images=1", "sampler.num_steps=2", "sampler.type=ddim", "setup.device=cpu"]
    assert run_command([*words[:1], "--config", str(tmp_path / "mine.yaml"), *words[1:], *keys]) == (
        0 if harmless else 2
    )
    assert harmless or f"Expected {key.partition('=')[0]}=" in capfd.readouterr().err


@pytest.mark.parametrize("output", ["folder", "zip", "npz"])
def test_what_sample_draws_elsewhere_is_looked_through(
    release: Path, training: tuple[Path, np.ndarray], tmp_path: Path, capfd: Capture, output: str
) -> None:
    """The folder, or the file in it; the overview beside it is no image."""
    keys = [f"model.ckpt={release}", "sampler.num_images=4", "sampler.num_steps=2", f"sampler.output={output}"]
    assert run_command(["sample", "--workdir", str(tmp_path / "out"), "--", *keys, "setup.device=cpu"]) == 0
    places = [tmp_path / "out" / "samples", *(tmp_path / "out" / "samples").glob("images.*")]
    assert len(places) == (1 if output == "folder" else 2)
    for place in places:
        assert run_command(["verify", str(release), "--images", str(place), "--against", str(training[0])]) == 0
        assert "among 4 synthetic ones" in capfd.readouterr().err


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_copies_are_looked_for_wherever_images_lie(
    run: Path, release: Path, training: tuple[Path, np.ndarray], capfd: Capture, form: str
) -> None:
    archive, images = training
    samples = run / "samples"
    shutil.rmtree(samples, ignore_errors=True)
    samples.mkdir()
    drawn = np.concatenate([np.random.default_rng(7).integers(0, 256, (3, 1, 8, 8), np.uint8), images[5:6]])
    if form == "zip":
        write_archive(samples / "images.zip", drawn, np.zeros(4, np.int64))
    else:
        for index, image in enumerate(drawn):
            Image.fromarray(image[0]).save(samples / f"{index:06d}.png")
    found = against(release, archive)
    assert [(place.name, report.copies) for place, report in found.items()] == [
        ("synthetic.zip", 0),
        ("images.zip" if form == "zip" else "samples", 1),
    ]
    assert run_command(["verify", str(release), "--against", str(archive)]) == 1
    assert "1 of the synthetic images are copies" in capfd.readouterr().err
