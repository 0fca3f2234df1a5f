"""Public pre-training: digits 0 to 4 are everybody's, digits 5 to 9 are private and begin with the public model."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from tests.made_release import edit, rewrite_weights
from torch import Tensor

from dpdm import checkpoint, train
from dpdm import config as configs
from dpdm.account import compose
from dpdm.cli import run_command
from dpdm.config import Config
from dpdm.data.archive import ArchiveWriter
from dpdm.diffusion.adapters import merged, trained_parameters
from dpdm.errors import InputError, RunError
from dpdm.evaluate import warmup_images
from dpdm.evaluation.guarantee import Guarantee
from dpdm.plan import check_keys
from dpdm.privacy.accounting import Mechanism
from dpdm.privacy.dpsgd import per_example_gradients
from dpdm.privacy.ledger import Ledger
from dpdm.release import load_denoiser, make_release, preview
from dpdm.run import open_run
from dpdm.verify import page, verify
from dpdm.workdir import Workdir

TINY = (
    "train.num_iterations=3",
    "train.expected_batch_size=50",
    "loss.noise_multiplicity=2",
    "model.network.width=4",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
    "setup.device=cpu",
    "setup.num_threads=1",
)
PUBLIC = ("data.name=digits 0 to 4", "data.public=true", "dp.enabled=false")
PRIVATE = ("data.name=digits 5 to 9", "dp.noise_multiplier=2")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``public.zip``, ``private.zip``, and ``few.zip`` of three classes."""
    root = tmp_path_factory.mktemp("owner-of-digits")
    images, labels = load_digits(return_X_y=True)
    pixels = np.rint(images * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    for name, classes in {"public": range(5), "private": range(5, 10), "few": range(7, 10)}.items():
        with ArchiveWriter(root / f"{name}.zip", [str(c) for c in classes]) as writer:
            for image, label in zip(pixels, labels, strict=True):
                if label in classes:
                    writer.add(image, int(label) - classes[0])
    return root


def config_for(folder: Path, name: str, *keys: str) -> Config:
    own = PUBLIC if name == "public" else PRIVATE
    return configs.load([], [*TINY, *own, f"data.path={folder / name}.zip", *keys])


@pytest.fixture(scope="module")
def public(folder: Path) -> Path:
    """The run on public digits, released; its private files stay as they were before."""
    workdir = Workdir(folder / "public")
    train.train(config_for(folder, "public", "train.num_iterations=12"), workdir)
    assert run_command(["release", "--workdir", str(workdir.root)]) == 0
    return workdir.root


@pytest.fixture(scope="module")
def private(folder: Path, public: Path) -> Path:
    """The private run that began with it, released."""
    workdir = Workdir(folder / "private")
    keys = (f"model.init={public / 'release'}", "model.trainable=[norm,bias,label]", "model.lora_rank=1")
    train.train(config_for(folder, "private", *keys), workdir)
    assert run_command(["release", "--workdir", str(workdir.root)]) == 0
    return workdir.root


@pytest.fixture
def release(public: Path, tmp_path: Path) -> Path:
    """A copy of the public release, to be changed."""
    shutil.copytree(public / "release", tmp_path / "public" / "release")
    return tmp_path / "public" / "release"


def statement_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "release" / "privacy.json").read_text(encoding="utf-8"))


def weights_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "release" / "model.safetensors")


# Training without privacy


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("data.public=false",), "Weights trained without privacy on private data cannot enter a release"),
        (("data.name=null",), "Expected data.name with"),
        (("dp.epsilon=1",), r"Expected dp.epsilon=null with dp.enabled=false, got 1.0"),
        (("dp.noise_multiplier=1",), "Expected dp.noise_multiplier=null"),
        (("train.warmup.enabled=true",), r"Expected train.warmup.enabled=false with dp.enabled=false, got true"),
        (("data.unit=group",), "Expected data.unit=image"),
    ],
)
def test_what_is_no_run_on_public_images_is_not_begun(
    folder: Path, tmp_path: Path, keys: tuple[str, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train.train(config_for(folder, "public", *keys), Workdir(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_a_run_on_public_images_buys_nothing(public: Path) -> None:
    workdir = Workdir(public)
    state, _ = checkpoint.load(workdir.checkpoint)
    assert state.step == 12
    assert Ledger(workdir.ledger).mechanisms() == []
    assert set(state.curves) == {"loss", "batch_size"}
    assert state.curves["batch_size"] == [50.0] * 12


def test_a_private_run_on_public_images_is_charged_as_any_other(folder: Path, tmp_path: Path) -> None:
    keys = ("dp.enabled=true", "dp.noise_multiplier=2")
    train.train(config_for(folder, "public", *keys), Workdir(tmp_path / "w"))
    ledger = Ledger(Workdir(tmp_path / "w").ledger)
    assert ledger.mechanisms() == [Mechanism("DP-SGD", 50 / ledger.header["plan"]["dataset_size"], 2.0, 3)]


def test_a_public_step_is_the_mean_gradient_of_its_batch(folder: Path, tmp_path: Path) -> None:
    """Against per-example gradients, summed and neither clipped nor noised; whatever the physical batch."""
    run, _, _ = open_run(config_for(folder, "public"), Workdir(tmp_path / "w"), resume=False)
    parameters = trained_parameters(run.denoiser.network)
    keys = train.step_keys(bytes(range(32)))
    run.physical_batch_size = 50
    whole = train.public_step(run, parameters, keys)
    run.physical_batch_size = 7
    pieces = train.public_step(run, parameters, keys)
    drawn: list[np.ndarray] = []

    def loss(records: np.ndarray) -> Tensor:
        drawn.append(records)
        return train.example_losses(run.denoiser, run.archive, records, run.config.loss, key=keys.diffusion)

    order = np.argsort(train.noise.random_words(keys.batch, run.archive.num_images), kind="stable")
    losses, gradients = per_example_gradients(parameters, loss, order[:50])
    assert len(set(drawn[0].tolist())) == 50
    assert whole.mean_loss == pytest.approx(float(losses.mean()), rel=1e-4)
    for ours, split, each in zip(whole.gradients, pieces.gradients, gradients, strict=True):
        assert torch.allclose(ours, each.mean(0), rtol=1e-3, atol=1e-5)
        assert torch.allclose(split, ours, rtol=1e-3, atol=1e-5)


def test_a_public_step_is_refused_to_a_private_run(folder: Path, tmp_path: Path) -> None:
    run, _, _ = open_run(config_for(folder, "private"), Workdir(tmp_path / "w"), resume=False)
    with pytest.raises(ValueError, match="without privacy on public images"):
        train.public_step(run, trained_parameters(run.denoiser.network), train.step_keys(bytes(32)))


def test_a_public_run_that_died_goes_on_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeded = config_for(folder, "public", "dp.seed=1", "train.checkpoint_every=1")
    _, whole = train.train(seeded, Workdir(tmp_path / "whole"))
    real, calls = train.public_step, []

    def dying(*arguments: Any) -> train.PublicGradient:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyError("died")
        return real(*arguments)

    monkeypatch.setattr(train, "public_step", dying)
    with pytest.raises(KeyError, match="died"):
        train.train(seeded, Workdir(tmp_path / "w"))
    _, state = train.train(seeded, Workdir(tmp_path / "w"), resume=True)
    assert state.digest() == whole.digest()
    assert state.curves == whole.curves
    assert all(torch.equal(state.ema[name], whole.ema[name]) for name in whole.ema)


# Its release


def test_the_statement_of_a_public_model_promises_nothing(public: Path) -> None:
    statement = statement_of(public)
    assert [statement[name] for name in ("epsilon", "delta", "unit", "accountant")] == [None] * 4
    assert statement["mechanisms"] == []
    number = Ledger(Workdir(public).ledger).header["plan"]["dataset_size"]
    assert statement["public_images"] == {"name": "digits 0 to 4", "number": number}
    assert statement["guarantee"].startswith("none")
    assert "There is no privacy guarantee" in (public / "release" / "README.md").read_text()
    with pytest.raises(InputError, match="no guarantee to show"):
        Guarantee.from_statement(statement)
    found = verify(public / "release")
    assert found.problems == []
    text = " ".join(page(found).split())
    assert "PUBLIC MODEL, NO GUARANTEE" in text
    assert "images called digits 0 to 4" in text
    assert "A private model whose statement calls its images public looks just the same" in text


def test_a_public_release_is_rounded_as_what_it_is(public: Path, tmp_path: Path, capfd: Capture) -> None:
    words = ["--from", str(public / "release"), "--half", "--workdir", str(tmp_path / "half")]
    assert run_command(["release", *words]) == 0
    assert "a public model, without any guarantee" in capfd.readouterr().err
    found = verify(tmp_path / "half" / "release")
    assert (found.problems, found.is_public) == ([], True)
    card = (tmp_path / "half" / "release" / "README.md").read_text(encoding="utf-8")
    assert "There is no privacy guarantee" in card
    assert "float16" in card


def test_verify_lets_no_public_model_pass_for_a_private_one(public: Path, private: Path, capfd: Capture) -> None:
    assert run_command(["verify", str(public / "release")]) == 1
    out, err = capfd.readouterr()
    assert out.startswith("PUBLIC MODEL, NO GUARANTEE")
    assert "there is no guarantee; add --public" in err
    assert run_command(["verify", str(public / "release"), "--public"]) == 0
    assert run_command(["verify", str(private / "release"), "--public"]) == 1
    assert "no public model" in capfd.readouterr().err
    assert run_command(["verify", str(private / "release")]) == 0


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda s: s.update(epsilon=1.0, delta=1e-5), "a public model has no epsilon, 1.0 is stated"),
        (lambda s: s.update(guarantee="complete"), "guarantee in privacy.json is not what dpdm states"),
        (lambda s: s.update(public_images={"name": "MNIST", "number": 3}), "public_images does not tell"),
        (lambda s: s.update(public_images=3), "public_images does not tell"),
        (lambda s: s.update(initial_weights=[{}]), "a release in initial_weights is not made of what"),
        (lambda s: s.update(note="private!"), "privacy.json holds note"),
        (lambda s: s.pop("public_images"), "there is no guarantee that could be verified"),
    ],
)
def test_what_does_not_fit_in_a_public_statement_is_named(release: Path, change: Any, problem: str) -> None:
    edit(release, "privacy.json", lambda s: change(s) and None)
    assert any(problem in line for line in verify(release).problems)


def test_totals_leave_a_public_model_out(public: Path, private: Path) -> None:
    for file in (public / "release" / "privacy.json", Workdir(public).ledger):
        with pytest.raises(InputError, match="protects nobody on the public ones"):
            compose([private / "release" / "privacy.json", file], None)
    assert compose([private / "release" / "privacy.json"], None)["epsilon"] == statement_of(private)["epsilon"]


# Beginning with a release


def test_the_statement_names_the_public_source(public: Path, private: Path) -> None:
    statement = statement_of(private)
    (source,) = statement["initial_weights"]
    assert source["sha256"] == statement_of(public)["files"]["model.safetensors"]
    assert (source["kind"], source["images"]) == ("public model", "digits 0 to 4")
    assert source["number"] == statement_of(public)["public_images"]["number"]
    assert (source["epsilon"], source["fresh"]) == (None, [])
    said = [s for s in statement["not_covered"] if "images called digits 0 to 4: whoever is on them is not" in s]
    assert len(said) == 1
    assert "a public model (digits 0 to 4)" in (private / "release" / "README.md").read_text()
    found = verify(private / "release")
    assert found.problems == []
    assert " ".join(said[0].split()) in " ".join(page(found).split())


def test_no_path_of_the_source_is_released(public: Path, private: Path) -> None:
    for path in (private / "release").iterdir():
        assert b"owner-of-digits" not in path.read_bytes(), path.name
    assert json.loads((private / "release" / "config.json").read_text())["model"]["init_sha256"] is not None


def test_a_release_is_a_plain_network(public: Path, private: Path) -> None:
    """Adapters are merged; weights that were neither trained nor adapted are those of the source, to the bit."""
    before, after = weights_of(public), weights_of(private)
    assert {name: w.shape for name, w in after.items()} == {name: w.shape for name, w in before.items()}
    load_denoiser(private / "release")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {"conv_out.weight"}  # 1 x 36: no adapter would be smaller
    state, _ = checkpoint.load(Workdir(private).checkpoint)
    name = "embed_1.base.weight"
    assert torch.equal(state.parameters[name], before["embed_1.weight"])
    assert torch.equal(state.ema[name], before["embed_1.weight"])


def moved(state: checkpoint.TrainState, source: Mapping[str, Tensor]) -> dict[str, bool]:
    return {name: bool((state.parameters[name] != weight).any()) for name, weight in source.items()}


def test_another_average_is_merged_too(folder: Path, public: Path, tmp_path: Path) -> None:
    keys = (f"model.init={public / 'release'}", "model.trainable=[norm]", "model.lora_rank=1", "model.ema_rates=[0.0]")
    workdir = Workdir(tmp_path / "w")
    train.train(config_for(folder, "private", *keys), workdir)
    state, _ = checkpoint.load(workdir.checkpoint)
    assert len(preview(workdir)) == 2
    found = load_file(make_release(workdir, 0.0) / "model.safetensors")
    chosen, other = merged(state.average(0.0)), merged(state.ema)
    assert found.keys() == chosen.keys()
    assert all(torch.equal(found[name], chosen[name]) for name in found)
    assert any(not torch.equal(found[name], other[name]) for name in found)
    assert verify(workdir.release).problems == []


def test_frozen_weights_get_neither_gradient_nor_noise(
    folder: Path, public: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = train.private_gradient, []

    def watched(parameters: Mapping[str, Tensor], *arguments: Any, **named: Any) -> Any:
        result = real(parameters, *arguments, **named)
        calls.append((list(parameters), [bool((g != 0).all()) for g in result.gradients]))
        return result

    monkeypatch.setattr(train, "private_gradient", watched)
    keys = (f"model.init={public / 'release'}", "model.trainable=[norm,label]")
    _, state = train.train(config_for(folder, "private", *keys), Workdir(tmp_path / "w"))
    names = [name for name in state.parameters if "norm" in name or "label" in name]
    assert len(calls) == 3
    for given, noisy in calls:
        assert given == names
        assert all(noisy)  # every number of every trained weight has noise, the unused label's row too
    assert set(state.exp_avg) == set(names)
    for name, has in moved(state, weights_of(public)).items():
        assert has == (name in names), name
        assert torch.equal(state.ema[name], state.parameters[name]) == (not has), name


def test_gradients_of_adapters_and_trained_weights_against_a_loop(folder: Path, public: Path, tmp_path: Path) -> None:
    """Per example, between frozen layers: one by one, by autograd without any rule."""
    keys = (f"model.init={public / 'release'}", "model.trainable=[norm,encoder.0.residual.conv_1]", "model.lora_rank=1")
    run, _, _ = open_run(config_for(folder, "private", *keys), Workdir(tmp_path / "w"), resume=False)
    parameters = trained_parameters(run.denoiser.network)
    assert any(name.endswith(".up.weight") and parameter.dim() == 4 for name, parameter in parameters.items())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parameters.values():  # with up = 0 the gradient of down would be 0
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))

    def loss(records: np.ndarray) -> Tensor:
        return train.example_losses(run.denoiser, run.archive, records, run.config.loss, key=bytes(32))

    records = np.array([3, 40, 41, 500])
    losses, gradients = per_example_gradients(parameters, loss, records)
    for index, record in enumerate(records):
        alone = loss(np.array([record]))
        assert torch.allclose(losses[index], alone[0], rtol=1e-4)
        expected = torch.autograd.grad(alone.sum(), list(parameters.values()))
        for name, ours, theirs in zip(parameters, gradients, expected, strict=True):
            assert torch.allclose(ours[index], theirs, rtol=1e-2, atol=1e-4 * float(theirs.abs().max())), name


def test_other_classes_have_fresh_labels_which_the_statement_says(folder: Path, public: Path, tmp_path: Path) -> None:
    keys = (f"model.init={public / 'release'}", "model.trainable=[label,norm]")
    workdir = Workdir(tmp_path / "w")
    _, state = train.train(config_for(folder, "few", *keys), workdir)
    assert torch.equal(state.parameters["conv_in.weight"], weights_of(public)["conv_in.weight"])
    assert len(state.parameters["label_embedding.weight"]) == 4
    assert run_command(["release", "--workdir", str(workdir.root)]) == 0
    assert statement_of(workdir.root)["initial_weights"][0]["fresh"] == ["label_embedding.weight"]
    assert verify(workdir.release).problems == []
    with pytest.raises(InputError, match="to name label_embedding"):
        train.train(config_for(folder, "few", keys[0], "model.trainable=[norm]"), Workdir(tmp_path / "x"))


def test_a_private_source_is_named_with_its_own_promise(folder: Path, private: Path, tmp_path: Path) -> None:
    """A release that began with a private one, which began with a public one: all three are told."""
    workdir = Workdir(tmp_path / "w")
    keys = (f"model.init={private / 'release' / 'model.safetensors'}", "data.name=the same digits")
    train.train(config_for(folder, "private", *keys), workdir)
    assert run_command(["release", "--workdir", str(workdir.root)]) == 0
    statement, before = statement_of(workdir.root), statement_of(private)
    first, second = statement["initial_weights"]
    assert first["kind"] == "private release"
    assert [first[name] for name in ("epsilon", "delta", "unit")] == [before[n] for n in ("epsilon", "delta", "unit")]
    assert second == before["initial_weights"][0]
    assert any("protected by both promises together: by the sums" in line for line in statement["not_covered"])
    assert any("with which that release began" in line for line in statement["not_covered"])
    assert verify(workdir.release).problems == []
    edit(workdir.release, "privacy.json", lambda s: s["initial_weights"][0].update(epsilon=1e-3))
    assert any("not_covered" in line for line in verify(workdir.release).problems)
    edit(workdir.release, "privacy.json", lambda s: s.pop("initial_weights") and None)
    assert any("not those that config.json names" in line for line in verify(workdir.release).problems)
    with pytest.raises(InputError, match="Expected a public model"):
        train.train(config_for(folder, "public", keys[0]), Workdir(tmp_path / "x"))


def test_central_images_begin_with_the_source_and_leave_the_rest_frozen(
    folder: Path, public: Path, tmp_path: Path
) -> None:
    workdir = Workdir(tmp_path / "w")
    warmup = ("train.warmup.enabled=true", "train.warmup.num_iterations=2")
    adapters = ("model.trainable=[norm]", "model.lora_rank=1")
    config = config_for(folder, "private", f"model.init={public / 'release'}", *adapters, *warmup)
    _, state = train.train(config, workdir)
    source = weights_of(public)
    assert set(state.warmup) == set(source)
    assert torch.equal(state.warmup["conv_in.bias"], source["conv_in.bias"])
    assert not torch.equal(state.warmup["norm_out.weight"], source["norm_out.weight"])
    drawn = warmup_images(workdir, 2)
    assert drawn is not None
    assert drawn.images.shape == (2, 1, 8, 8)


# Where weights may be from


def test_a_run_does_not_go_on_from_other_weights(
    folder: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies before its first checkpoint; then somebody puts another release in the place of its source."""
    config, workdir = config_for(folder, "private", f"model.init={release}"), Workdir(tmp_path / "w")
    with monkeypatch.context() as patch:
        patch.setattr(train, "share_state", lambda state: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(config, workdir)
    assert not workdir.checkpoint.exists()
    backup = tmp_path / "backup"
    shutil.copytree(release, backup)
    rewrite_weights(release, lambda weights: weights["conv_in.bias"].add_(1))
    with pytest.raises(InputError, match="a run cannot go on from others"):
        train.train(configs.load([workdir.config]), workdir, resume=True)
    with pytest.raises(InputError, match="Expected the config with which the run"):
        train.train(config, workdir, resume=True)
    shutil.rmtree(release)
    shutil.copytree(backup, release)
    train.train(configs.load([workdir.config]), workdir, resume=True)
    shutil.rmtree(release)  # by now the checkpoint holds what is needed
    _, state = train.train(configs.load([workdir.config]), workdir, resume=True)
    assert state.step == 3
    assert run_command(["release", "--workdir", str(workdir.root)]) == 0
    assert statement_of(workdir.root)["initial_weights"][0]["images"] == "digits 0 to 4"


def test_the_release_checks_once_more_that_images_are_public(folder: Path, tmp_path: Path) -> None:
    workdir = Workdir(tmp_path / "w")
    train.train(config_for(folder, "public"), workdir)
    text = workdir.config.read_text()
    assert text.count("public: true") == 1
    workdir.config.write_text(text.replace("public: true", "public: false"))
    with pytest.raises(RunError, match="undo the change"):
        make_release(workdir)
    with pytest.raises(InputError, match="cannot enter a release"):
        check_keys(configs.load([workdir.config]))


def test_several_processes_share_a_public_step(folder: Path, tmp_path: Path, together: Any) -> None:
    run, _, _ = open_run(config_for(folder, "public"), Workdir(tmp_path / "w"), resume=False)
    parameters, keys = trained_parameters(run.denoiser.network), train.step_keys(bytes(32))
    alone = train.public_step(run, parameters, keys)
    for step in together(3, lambda rank: train.public_step(run, parameters, keys)):
        assert step.mean_loss == pytest.approx(alone.mean_loss, rel=1e-5)
        for ours, theirs in zip(step.gradients, alone.gradients, strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)
