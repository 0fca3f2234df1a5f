"""``model.init`` and public models, on releases that nobody trained: whence weights may be, what is said of them."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.made_release import (
    KEYS,
    PUBLIC_KEYS,
    edit,
    make_config,
    make_public_release,
    make_release,
    make_statement,
    make_weights,
)

from dpdm import config as configs
from dpdm import own_statement
from dpdm.account import compose
from dpdm.cli import run_command
from dpdm.config import Config
from dpdm.data.archive import ArchiveWriter
from dpdm.errors import InputError
from dpdm.initial import Source, open_initial
from dpdm.privacy.accounting import Mechanism
from dpdm.privacy.ledger import Ledger
from dpdm.run import open_run
from dpdm.verify import verify
from dpdm.workdir import Workdir

SOURCE = Source("ab" * 32, "public model", "circles", 70, None, None, None)
PLAN = {"dataset_size": 40, "num_iterations": 3}
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, random = tmp_path_factory.mktemp("data") / "images.zip", np.random.default_rng(0)
    with ArchiveWriter(path, ["a", "b"]) as writer:
        for index in range(40):
            writer.add(random.integers(0, 256, (1, 8, 8), np.uint8), index % 2)
    return path


@pytest.fixture
def public(tmp_path: Path) -> Path:
    return make_public_release(tmp_path / "public")


def config_for(archive: Path, source: Path, *keys: str) -> Config:
    return make_config([f"data.path={archive}", f"model.init={source}", *keys])


def source_of(release: Path) -> dict[str, Any]:
    return open_initial(make_config([f"model.init={release}"])).sources[0].as_dict()


# Where weights may be from


@pytest.mark.parametrize(
    ("denoiser", "key", "refused"),
    [
        ("edm", "loss.sigma_data=0.2", True),
        ("edm", "loss.beta_d=12", False),
        ("vp", "loss.beta_d=12", True),
        ("vp", "loss.beta_min=0.3", True),
        ("vp", "loss.sigma_data=0.2", False),
    ],
)
def test_weights_are_not_taken_for_another_preconditioning(
    tmp_path: Path, denoiser: str, key: str, refused: bool
) -> None:
    release = make_public_release(tmp_path / "public", [f"model.denoiser={denoiser}"])
    config = make_config([f"model.init={release}", f"model.denoiser={denoiser}", key])
    if refused:
        with pytest.raises(InputError, match=f"Expected {key.partition('=')[0]}=.* as the release in"):
            open_initial(config)
    else:
        assert open_initial(config).weights


def test_private_images_are_not_trained_on_without_privacy(archive: Path, tmp_path: Path, capfd: Capture) -> None:
    """The plain command, without a word on who may see the images."""
    keys = [*KEYS, *PUBLIC_KEYS[1:], f"data.path={archive}"]
    assert run_command(["train", "--workdir", str(tmp_path / "w"), "--", *keys]) == 2
    error = capfd.readouterr().err
    assert "Weights trained without privacy on private data cannot enter a release" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_what_is_known_of_a_source(public: Path, tmp_path: Path) -> None:
    """The statement's own hash, kind and numbers; of a private release its promise."""
    statement = json.loads((public / "privacy.json").read_text())
    nothing = {"epsilon": None, "delta": None, "unit": None, "fresh": []}
    told = {"sha256": statement["files"]["model.safetensors"], "images": "squares", "number": 40}
    assert source_of(public) == {**told, "kind": "public model", **nothing}
    private = make_release(tmp_path / "private")
    statement = json.loads((private / "privacy.json").read_text())
    promise = {name: statement[name] for name in ("epsilon", "delta", "unit")}
    assert source_of(private) == {**told, "kind": "private release", **promise, "fresh": []}


def test_the_sources_of_a_source_are_named_behind_it(public: Path) -> None:
    edit(public, "privacy.json", lambda s: s.update(initial_weights=[SOURCE.as_dict()]))
    assert open_initial(make_config([f"model.init={public}"])).sources[1:] == (SOURCE,)
    edit(public, "privacy.json", lambda s: s.update(initial_weights=10 * [SOURCE.as_dict()]))
    with pytest.raises(InputError, match="at most 10 releases"):
        source_of(public)


def test_weights_of_half_the_precision_are_taken(tmp_path: Path) -> None:
    release = make_release(tmp_path / "half", half=True)
    weights = open_initial(make_config([f"model.init={release}"])).weights
    for name, weight in make_weights(make_config()).items():
        assert weights[name].dtype == torch.float32
        assert torch.equal(weights[name], weight.half().float())


def test_weights_of_unknown_origin_are_refused(archive: Path, public: Path, tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    shutil.copytree(public, converted)
    edit(converted, "privacy.json", lambda s: s.pop("public_images") and None)  # as of a converted checkpoint
    shutil.copy(public / "model.safetensors", tmp_path / "model.safetensors")
    (tmp_path / "original.pth").write_bytes(b"weights")
    for path, message in {
        converted: "its weights were converted",
        tmp_path / "model.safetensors": "without a statement nobody knows",
        tmp_path / "original.pth": "without a statement nobody knows",
        tmp_path / "nothing": "without a statement nobody knows",
    }.items():
        with pytest.raises(InputError, match=message):
            open_run(config_for(archive, path), Workdir(tmp_path / "w"), resume=False)


def test_weights_that_are_not_those_of_the_statement_are_refused(public: Path) -> None:
    content = bytearray((public / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (public / "model.safetensors").write_bytes(content)
    with pytest.raises(InputError, match="got others: dpdm verify says more"):
        source_of(public)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("model.network.width=8",), "Expected the network of the release in"),
        (("model.network.num_res_blocks=2",), "is missing there and"),
        (("model.denoiser=v",), r"Expected model\.denoiser=edm"),
        ((f"model.init_sha256={'a' * 64}",), "a run cannot go on from others"),
        (("model.init=null", f"model.init_sha256={'a' * 64}"), r"Expected model\.init, the release whose weights"),
        (("model.trainable=[convolution]",), "got 'convolution'"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    archive: Path, public: Path, tmp_path: Path, keys: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_run(config_for(archive, public, *keys), Workdir(tmp_path / "w"), resume=False)


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s.update(public_images={"name": "x" * 300, "number": 40}),
        lambda s: s.update(public_images={"name": "x", "number": True}),
        lambda s: s.update(public_images=None),
        lambda s: s.update(initial_weights=[{**SOURCE.as_dict(), "sha256": "key"}]),
        lambda s: s.update(initial_weights=[{**SOURCE.as_dict(), "kind": "good"}]),
        lambda s: s.update(initial_weights=[{**SOURCE.as_dict(), "epsilon": 1.0}]),
        lambda s: s.update(initial_weights=[{**SOURCE.as_dict(), "fresh": ["conv_in.weight"]}]),
        lambda s: s.update(initial_weights={}),
        lambda s: s.update(mechanisms=[1]),
        lambda s: s.update(files=3),
    ],
)
def test_a_strangers_statement_is_refused_in_one_line(public: Path, change: Callable[[Any], Any]) -> None:
    path = public / "privacy.json"
    statement = json.loads(path.read_text())
    change(statement)
    path.write_text(json.dumps(statement))
    with pytest.raises(InputError, match="Expected a release in"):
        source_of(public)


# What is noted and said


def test_a_run_notes_where_its_weights_began(archive: Path, public: Path, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "w")
    _, _, state = open_run(config_for(archive, public), workdir, resume=False)
    assert Ledger(workdir.ledger).header["initial_weights"] == [source_of(public)]
    assert configs.load([workdir.config]).model.init_sha256 == source_of(public)["sha256"]
    for name, weight in load_file(public / "model.safetensors").items():
        assert torch.equal(state.parameters[name], weight)
        assert torch.equal(state.ema[name], weight)


def test_the_statement_says_whom_each_source_leaves_uncovered() -> None:
    config, mechanisms = make_config(), [Mechanism("DP-SGD", 0.25, 4.0, 3)]
    private = replace(SOURCE, kind="private release", epsilon=2.0, delta=1e-6, unit="one image", images=None)
    persons = replace(private, unit="one person (all of their images)")
    statement = own_statement.make_statement(config, mechanisms, PLAN, (private, persons, SOURCE))
    assert statement["initial_weights"] == [private.as_dict(), persons.as_dict(), SOURCE.as_dict()]
    said = statement["not_covered"]
    assert [line for line in said if "70 images called circles: whoever is on them is not protected" in line]
    both = [line for line in said if "protected by both promises together: by the sums" in line]
    assert len(both) == 1
    assert "epsilon 2 at delta 1e-6 for one image" in both[0]
    assert "70 images without a name" in both[0]
    assert len([line for line in said if "no sum of the two" in line]) == 1  # images and persons do not add up
    without = own_statement.make_statement(config, mechanisms, PLAN)
    assert "initial_weights" not in without
    assert len(said) == len(without["not_covered"]) + 3


def test_verify_asks_where_weights_began(tmp_path: Path) -> None:
    """A statement may neither forget the source that its config names nor make one up."""
    release = make_release(tmp_path / "a")
    edit(release, "privacy.json", lambda s: s.update(initial_weights=[SOURCE.as_dict()]))
    assert any("not those that config.json names" in line for line in verify(release).problems)
    release = make_release(tmp_path / "b")
    edit(release, "config.json", lambda c: c["model"].update(init_sha256=SOURCE.sha256))
    assert any("not those that config.json names" in line for line in verify(release).problems)
    statement = own_statement.make_statement(make_config(), [], PLAN, (SOURCE,))
    changes = {name: statement[name] for name in ("initial_weights", "not_covered")}
    edit(release, "privacy.json", lambda s: s.update(changes))
    assert verify(release).problems == ["README.md is not the model card that dpdm makes of this statement"]


# A public model


def test_verify_fails_on_a_public_model_unless_one_is_expected(public: Path, tmp_path: Path, capfd: Capture) -> None:
    assert verify(public).problems == []
    assert run_command(["verify", str(public)]) == 1
    out, err = capfd.readouterr()
    assert out.startswith("PUBLIC MODEL, NO GUARANTEE")
    assert "there is no guarantee; add --public" in err
    assert run_command(["verify", str(public), "--public"]) == 0
    assert run_command(["verify", str(make_release(tmp_path / "private")), "--public"]) == 1
    assert "no public model" in capfd.readouterr().err


def test_a_private_model_that_is_renamed_public_must_at_least_change_its_config(tmp_path: Path) -> None:
    folder = make_release(tmp_path / "run")
    edit(folder, "privacy.json", lambda s: s.update(mechanisms=[], public_images={"name": "squares", "number": 40}))
    problems = verify(folder).problems
    assert any("by config.json it is not" in line for line in problems)
    assert any("a public model has no epsilon" in line for line in problems)


def test_a_private_statement_does_not_fit_a_config_without_privacy(tmp_path: Path) -> None:
    release = make_release(tmp_path / "run")
    edit(release, "config.json", lambda c: c["dp"].update(enabled=False))
    assert any("differential privacy is True, by config.json it is False" in p for p in verify(release).problems)


def test_totals_leave_a_public_model_out(public: Path, tmp_path: Path) -> None:
    private = make_release(tmp_path / "private") / "privacy.json"
    plan = {"dataset_size": 40, "noise_multiplier": 0.0, "delta": 1e-5, "unit": "image"}
    ledger = Ledger.create(tmp_path / "ledger.jsonl", {"plan": plan})
    for file in (public / "privacy.json", ledger.path):
        with pytest.raises(InputError, match="protects nobody on the public ones"):
            compose([private, file], None)
    assert compose([private], None)["epsilon"] == pytest.approx(make_statement(make_config())["epsilon"])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("model.lora_rank=2",), r"Expected model\.lora_rank=0 with model\.trainable=\[all\]"),
        (("model.lora_rank=-1",), r"Expected model\.lora_rank >= 0"),
        (("model.trainable=[all,norm]",), r"Expected model\.trainable to be"),
        (("model.trainable=['']",), r"Expected model\.trainable to be"),
        (("model.init_sha256=abc",), "Expected 64 hex digits"),
    ],
)
def test_wrong_keys_are_named(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=message):
        configs.load([], keys)
