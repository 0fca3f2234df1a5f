"""The whole way, by one command; and what it does with a folder that it cannot use."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpdm.cli import run_command
from dpdm.data.archive import ImageArchive
from dpdm.diffusion.image_noise import image_labels
from dpdm.errors import InputError
from dpdm.privacy import covariance
from dpdm.privacy.ledger import Ledger
from dpdm.release import load_config
from dpdm.synthesize import Request, synthesize
from dpdm.workdir import Workdir

FEW_STEPS = (
    "train.num_epochs=null",
    "train.num_iterations=2",
    "train.expected_batch_size=50",
    "loss.noise_multiplicity=1",
    "model.network.width=4",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
    "model.network.attention_resolutions=[]",
    "train.warmup.num_iterations=5",
    "sampler.num_steps=2",
    "setup.device=cpu",
    "setup.num_threads=1",
)
# A budget that a large noise multiplier keeps, so that accounting is quick.
EPSILON = 1.0


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write_images(folder: Path, classes: tuple[str, ...], per_class: int, seed: int = 0) -> Path:
    random = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dpdm demo`` with few steps."""
    root = tmp_path_factory.mktemp("demo") / "odd name: #1 [x]"
    assert run_command(["demo", "--epsilon", str(EPSILON), "--workdir", str(root), "--", *FEW_STEPS]) == 0
    return root


def test_demo_leaves_what_is_promised(demo: Path) -> None:
    names = {"config.yaml", "private", "release", "samples", "synthetic.zip", "report.html", "shareable.html"}
    assert {path.name for path in demo.iterdir()} == names
    assert (demo / "private").stat().st_mode & 0o777 == 0o700
    assert {path.name for path in (demo / "release").iterdir()} == {
        "model.safetensors",
        "config.json",
        "privacy.json",
        "README.md",
    }


def test_demo_draws_as_many_images_as_there_were(demo: Path) -> None:
    with zipfile.ZipFile(demo / "synthetic.zip") as file:
        pngs = {name for name in file.namelist() if name.endswith(".png")}
        labels = dict(json.loads(file.read("dataset.json"))["labels"])
        with Image.open(file.open(sorted(pngs)[0])) as image:
            assert (image.mode, image.size) == ("L", (8, 8))
    assert len(pngs) == 1797
    assert set(labels) == pngs
    assert set(labels.values()) == set(range(10))


def test_demo_trains_on_the_private_part_alone(demo: Path) -> None:
    from sklearn.datasets import load_digits

    values, _ = load_digits(return_X_y=True)
    digits = np.rint(values / 16 * 255).astype(np.uint8).reshape(-1, 8, 8)
    private = ImageArchive(demo / "private" / "train.zip")
    assert np.array_equal(private.read(np.arange(private.num_images))[:, 0], digits[np.arange(1797) % 6 != 0])
    assert ImageArchive(demo / "private" / "holdout.zip").num_images == 300
    assert json.loads((demo / "release" / "privacy.json").read_text())["dataset_size"] == 1497


def test_demo_states_what_was_spent(demo: Path) -> None:
    statement = json.loads((demo / "release" / "privacy.json").read_text())
    assert {m["name"]: m["num_steps"] for m in statement["mechanisms"]} == {"central images": 1, "DP-SGD": 2}
    assert 0.9 * EPSILON < statement["epsilon"] <= EPSILON
    assert statement["delta"] == 1e-5
    bought = [m.as_dict() for m in Ledger(demo / "private" / "ledger.jsonl").mechanisms()]
    assert bought == statement["mechanisms"]


def test_nothing_private_is_in_what_is_shared(demo: Path) -> None:
    key = (demo / "private" / "ledger.jsonl").read_text()
    fingerprint = json.loads(key.splitlines()[0])["header"]["data"]
    for name in ("shareable.html", "release/config.json", "release/privacy.json", "release/README.md"):
        text = (demo / name).read_text()
        assert fingerprint not in text
        assert str(demo) not in text
        assert "do not share" not in text
    assert "do not share" in (demo / "report.html").read_text().lower()
    assert not (demo / "private" / "key").exists()
    assert not (demo / "private" / "holdout_key").exists()


def test_what_is_shared_does_not_depend_on_the_real_images(demo: Path, tmp_path: Path) -> None:
    """Measured against real images without classes, the page to be shared is still the one that verify expects."""
    run, flat = tmp_path / "run", tmp_path / "flat"
    shutil.copytree(demo, run)
    write_images(flat, ("",), 20)
    assert run_command(["prepare", str(flat), str(tmp_path / "flat.zip")]) == 0
    before = (run / "shareable.html").read_bytes()
    assert run_command(["evaluate", "--workdir", str(run), "--real", str(tmp_path / "flat.zip")]) in (0, 2)
    assert (run / "shareable.html").read_bytes() == before


def test_demo_replaces_its_own_finished_run_but_nothing_else(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(demo, tmp_path / "run")
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    found: list[set[str]] = []
    monkeypatch.setattr(
        "dpdm.synthesize.synthesize", lambda request, run: found.append({p.name for p in run.root.iterdir()})
    )
    assert run_command(["demo", "--workdir", str(tmp_path / "run")]) == 0
    assert found == [{"mine.txt"}]


def test_a_finished_or_another_run_is_kept(demo: Path, tmp_path: Path) -> None:
    before = {p: p.read_bytes() for p in demo.rglob("*") if p.is_file()}
    request = Request("digits", EPSILON, delta=1e-5, overrides=FEW_STEPS)
    with pytest.raises(InputError, match="finished"):
        synthesize(request, Workdir(demo))
    with pytest.raises(InputError, match="another request"):
        synthesize(Request("digits", 3.0, delta=1e-5, overrides=FEW_STEPS), Workdir(demo))
    assert before == {p: p.read_bytes() for p in demo.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    "classes", [("été & <i>", '"q"\'s', "日本", "=x;y,z"), pytest.param(("",), marks=pytest.mark.slow)]
)
def test_a_folder_of_ones_own(classes: tuple[str, ...], tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", classes, 80 // len(classes))
    overrides = (*FEW_STEPS, "train.expected_batch_size=10")
    result = synthesize(Request(str(source), EPSILON, num_images=7, overrides=overrides), Workdir(tmp_path / "w"))
    synthetic = ImageArchive(tmp_path / "w" / "synthetic.zip")
    assert (synthetic.num_images, synthetic.num_channels, synthetic.resolution) == (7, 3, 8)
    assert (synthetic.labels is not None) == (len(classes) > 1) == ("accuracy" in result)
    if synthetic.labels is not None:  # in the proportions that the release tells
        weights = load_config(tmp_path / "w" / "release").sampler.class_weights
        assert len(weights) == len(classes)
        drawn = image_labels(None, 0, range(7), len(classes), weights)
        assert drawn is not None
        assert synthetic.labels.tolist() == drawn.tolist()
    statement = json.loads((tmp_path / "w" / "release" / "privacy.json").read_text())
    assert statement["delta"] == 1e-5
    private, held_out = (ImageArchive(tmp_path / "w" / "private" / f"{name}.zip") for name in ("train", "holdout"))
    assert private.num_images + held_out.num_images == 80
    assert statement["dataset_size"] == private.num_images
    assert "& <i>" not in (tmp_path / "w" / "shareable.html").read_text()


def test_it_goes_on_where_it_was_stopped_and_takes_the_single_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write_images(tmp_path / "source", ("a", "b"), 40)
    request = Request(str(source), EPSILON, num_images=4, overrides=(*FEW_STEPS, "train.expected_batch_size=10"))
    run = Workdir(tmp_path / "w")
    for step in ("train", "make_release", "make_samples", "evaluate", "write_reports"):
        with monkeypatch.context() as patched:

            def stop(*arguments: object, **named: object) -> None:
                raise KeyboardInterrupt

            patched.setattr(f"dpdm.synthesize.{step}", stop)
            with pytest.raises(KeyboardInterrupt):
                synthesize(request, run)
        assert not run.shareable.exists()
    synthesize(request, run)
    assert run.shareable.exists()
    assert Ledger(run.ledger).spent("DP-SGD") == 2
    assert Ledger(run.ledger).spent("central images") == 1
    capfd.readouterr()
    assert run_command(["evaluate", "--workdir", str(run.root), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == json.loads(run.evaluation.read_text())
    assert run_command(["release", "--workdir", str(run.root)]) == 2
    assert run_command(["verify", str(run.release)]) == 0


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"epsilon": 0.0}, "--epsilon"),
        ({"epsilon": float("nan")}, "--epsilon"),
        ({"epsilon": 1e6}, "--epsilon"),
        ({"delta": 0.0}, "--delta"),
        ({"delta": 0.1}, "delta < 1/N"),
        ({"num_images": 1}, "--num-images"),
        ({"overrides": ("sampler.num_images=4",)}, "--num-images"),
        ({"overrides": ("sampler.labels=3",)}, "sampler.labels"),
        ({"overrides": ("setup.n_gpus_per_node=2",)}, "one process"),
        ({"overrides": ("model.use_ema=false",)}, "model.use_ema"),
        ({"source": "nowhere"}, "nowhere"),
        ({"overrides": ("dp.epsilon=100",)}, "give --epsilon"),
        ({"overrides": ("dp.seed=1",)}, "dp.seed"),
        ({"overrides": ("dp={epsilon: 50}",)}, "give --epsilon"),
        ({"overrides": ("sampler={num_images: 4}",)}, "--num-images"),
        ({"overrides": ("test.n_samples=7",)}, "--num-images"),
        ({"overrides": ("trian.num_epochs=1",)}, "trian.num_epochs"),
        ({"overrides": ("train.expected_batch_size=5000",)}, "train.expected_batch_size"),
        ({"overrides": ("setup.device=nonsense",)}, "setup.device"),
    ],
)
def test_what_is_refused_leaves_nothing(changes: dict[str, object], hint: str, tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", ("a", "b"), 40)
    values: dict[str, object] = {"source": str(source), "epsilon": EPSILON, **changes}
    with pytest.raises(InputError, match=hint) as caught:
        synthesize(Request(**values), Workdir(tmp_path / "w"))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "w").exists()


def test_what_cannot_be_drawn_or_measured_is_found_before_anything_is_bought(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Workdir(tmp_path / "w")
    plain = tmp_path / "plain"
    plain.mkdir()
    for path in write_images(tmp_path / "source", ("a", "b"), 20).rglob("*.png"):
        path.rename(plain / f"{path.parent.name}{path.name}")
    with pytest.raises(InputError, match=r"sampler\.guidance_scale"):
        synthesize(Request(str(plain), EPSILON, overrides=("sampler.guidance_scale=1",)), run)
    assert not run.root.exists()
    for split, count in (("train", 40), ("test", 1)):
        write_images(tmp_path / "divided" / split, ("a",), count)
    with pytest.raises(InputError, match="at least 2 held-out images"):
        synthesize(Request(str(tmp_path / "divided"), EPSILON), run)
    assert not run.root.exists()
    monkeypatch.setattr(covariance, "LARGEST_SIZE", 100)
    large = ("train.warmup.covariance_noise_multiplier=3", *FEW_STEPS)
    with pytest.raises(InputError, match=r"train\.warmup\.covariance_side"):
        synthesize(Request("digits", EPSILON, overrides=large), run)
    assert not run.root.exists()


def test_the_demo_replaces_its_own_finished_run_alone(demo: Path, tmp_path: Path) -> None:
    shutil.copytree(demo, tmp_path / "w")
    run = Workdir(tmp_path / "w")

    def refused(*words: str) -> None:
        before = {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()}
        assert run_command(["demo", "--workdir", str(run.root), *words]) == 2
        assert {path: path.read_bytes() for path in run.root.rglob("*") if path.is_file()} == before

    refused("--epsilon", "0")
    refused("--", "trian.num_epochs=1")
    note = run.private / "request.json"
    note.write_text(json.dumps({**json.loads(note.read_text()), "source": "my/patients"}))
    refused("--", *FEW_STEPS)
    assert run.release.exists()
    note.write_text((demo / "private" / "request.json").read_text())
    before = (run.release / "model.safetensors").read_bytes()
    words = ["--epsilon", str(EPSILON), "--workdir", str(run.root), "--", *FEW_STEPS]
    assert run_command(["demo", *words]) == 0
    assert (run.release / "model.safetensors").read_bytes() != before


def test_the_workdir_may_not_lie_in_the_source(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", ("a", "b"), 40)
    with pytest.raises(InputError, match="outside"):
        synthesize(Request(str(source), EPSILON), Workdir(source / "w"))
    assert {path.name for path in source.iterdir()} == {"a", "b"}


def test_a_workdir_that_no_config_can_name_is_refused_before_training(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", ("a", "b"), 40)
    with pytest.raises(InputError, match=r"plain value of data\.path in --workdir, got .*\$\{x\}"):
        synthesize(Request(str(source), EPSILON), Workdir(tmp_path / "w${x}"))
    assert not Workdir(tmp_path / "w${x}").ledger.exists()


def test_files_of_others_are_kept(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", ("a", "b"), 40)
    (tmp_path / "w" / "samples").mkdir(parents=True)
    (tmp_path / "w" / "samples" / "mine.png").write_text("mine")
    with pytest.raises(InputError, match="samples"):
        synthesize(Request(str(source), EPSILON), Workdir(tmp_path / "w"))
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["samples"]


def test_a_damaged_note_of_the_request_is_named(tmp_path: Path) -> None:
    source = write_images(tmp_path / "source", ("a", "b"), 40)
    (tmp_path / "w" / "private").mkdir(parents=True)
    (tmp_path / "w" / "private" / "request.json").write_text("{")
    with pytest.raises(InputError, match=r"request\.json"):
        synthesize(Request(str(source), EPSILON), Workdir(tmp_path / "w"))
