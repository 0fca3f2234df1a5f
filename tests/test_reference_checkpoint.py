"""Files in the original's format, filled by the vectors' formula: through the public face they give its outputs."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dpdm
from dpdm import config as configs
from dpdm.config import Config, build_denoiser
from dpdm.diffusion.denoiser import Denoiser
from dpdm.diffusion.sampling import Guidance, ddim, edm, karras_sigmas
from dpdm.errors import InputError
from dpdm.reference_checkpoint import original_names

from .diffusion.conftest import REFERENCE_NAMES, VECTORS
from .diffusion.test_sampling_vectors import WELL_CONDITIONED, relative_error

CONFIGS = Path(__file__).parents[1] / "configs"
DESCRIPTIONS = json.loads((VECTORS / "vectors.json").read_text())


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def config_of(name: str) -> Path:
    return CONFIGS / name / "sample_eps_10.0.yaml"


def weights_of(name: str, phase: float) -> dict[str, Tensor]:
    """The original's parameters by its names, in its order and its layout, by the formula of the vectors."""
    weights = {}
    for index, (key, shape) in enumerate(DESCRIPTIONS[name]["parameters"]):
        flat = np.arange(np.prod(shape), dtype=np.float64)
        wave = np.sin(0.7 * flat + 1.3 * index + phase)
        if len(shape) > 1:
            values = wave * np.sqrt(3 / (flat.size // shape[0]))
        else:
            values = 1 + 0.3 * wave if key.endswith(".weight") else 0.1 * wave
        weights[key] = torch.from_numpy(values.reshape(shape).astype(np.float32))
    return weights


def content_of(name: str) -> dict[str, Any]:
    """A checkpoint as the original saves it; the raw weights differ from their average."""
    raw, average = weights_of(name, 0.9), weights_of(name, DESCRIPTIONS[name]["phase"])
    adam = {i: {"step": 7, "exp_avg": torch.zeros_like(p)} for i, p in enumerate(raw.values())}
    return {
        "model": {f"module.model.{key}": value for key, value in raw.items()},
        "ema": {"decay": 0.999, "num_updates": 7, "shadow_params": list(average.values())},
        "optimizer": {"state": adam, "param_groups": [{"lr": 3e-4, "params": list(range(len(raw)))}]},
        "step": 28,
    }


# Together they take a minute of one core; tests/diffusion holds their vectors as well, by our own names.
SLOW = {name: [pytest.mark.slow] for name in ("celeba_64", "imagenet_32", "celeba_32")}


@pytest.fixture(scope="module", params=[pytest.param(n, marks=SLOW.get(n, [])) for n in REFERENCE_NAMES])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def checkpoint(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / f"{name}.pth"
    torch.save(content_of(name), path)
    return path


@pytest.fixture(scope="module")
def arrays(name: str) -> dict[str, Tensor]:
    with np.load(VECTORS / f"{name}.npz") as archive:
        return {key: torch.from_numpy(archive[key]) for key in archive.files}


def test_names_and_order_are_the_originals(name: str) -> None:
    network = build_denoiser(configs.load([config_of(name)])).network
    assert original_names(network) == [key for key, _ in DESCRIPTIONS[name]["parameters"]]


@torch.no_grad()
@pytest.mark.parametrize("kind", ["edm", "v"])
def test_a_checkpoint_gives_the_originals_outputs(
    name: str, kind: str, checkpoint: Path, arrays: dict[str, Tensor]
) -> None:
    denoiser = dpdm.load_denoiser(checkpoint, configs.load([config_of(name)], [f"model.denoiser={kind}"]))
    assert not denoiser.training
    x, sigma, labels = arrays["x"], arrays["sigma"], arrays.get("y")
    assert relative_error(denoiser.network(x, arrays["c_noise"], labels), arrays["network"]) < 1e-4
    noisy = x * (sigma**2 + 1).sqrt()[:, None, None, None]
    assert relative_error(denoiser(noisy, sigma, labels), arrays[f"{kind}_denoised"]) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("solver", ["ddim_edm", "ddim_v", pytest.param("heun_edm", marks=pytest.mark.slow)])
def test_a_checkpoint_gives_the_originals_images(
    name: str, solver: str, checkpoint: Path, arrays: dict[str, Tensor]
) -> None:
    settings = DESCRIPTIONS[name]["sampler"]
    sigmas = karras_sigmas(settings["steps"], settings["tmin"], settings["tmax"], settings["rho"])
    kind = "v" if solver == "ddim_v" else "edm"
    denoiser = dpdm.load_denoiser(checkpoint, configs.load([config_of(name)], [f"model.denoiser={kind}"]))

    def solve(x: Tensor) -> Tensor:
        method = edm if solver == "heun_edm" else ddim
        return method(denoiser, x, sigmas, labels=arrays.get("y"), guidance=Guidance(settings["guid_scale"] or 0.0))

    x = arrays["x"] * sigmas[0]
    images = solve(x)
    error = relative_error(images, arrays[solver])
    if error < 1e-4:
        return
    # Only on another CPU than the vectors': see tests/diffusion/test_sampling_vectors.py.
    network = denoiser.network(arrays["x"], arrays["c_noise"], arrays.get("y"))
    assert not torch.equal(network, arrays["network"])
    assert (name, solver) not in WELL_CONDITIONED
    nudged = [solve(x * (1 + bits * 2**-23)) for bits in (-2, 1)]
    assert error < 3 * max(relative_error(other, images) for other in nudged) < 0.2


# What is in the file, and what does not fit: on the smallest network of the five.


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    return content_of("mnist_28")


@pytest.fixture(scope="module")
def mnist() -> Config:
    return configs.load([config_of("mnist_28")])


def saved(content: Any, tmp_path: Path) -> Path:
    torch.save(content, tmp_path / "model.pth")
    return tmp_path / "model.pth"


def weights(denoiser: Denoiser) -> dict[str, Tensor]:
    return dict(denoiser.network.named_parameters())


def test_raw_weights_are_taken_by_their_names(content: dict[str, Any], mnist: Config, tmp_path: Path) -> None:
    model = content["model"]
    shuffled = {"module.sigma_table": torch.zeros(3), **dict(reversed(model.items()))}
    path = saved({"model": shuffled}, tmp_path)
    raw = weights(dpdm.load_denoiser(path, configs.load([config_of("mnist_28")], ["model.use_ema=false"])))
    assert torch.equal(raw["conv_in.weight"], model["module.model.all_modules.3.weight"])
    assert torch.equal(raw["middle_1.attention.key.weight"], model["module.model.all_modules.15.NIN_1.W"].t())
    whole = tmp_path / "whole"
    whole.mkdir()
    average = weights(dpdm.load_denoiser(saved(content, whole), mnist))
    assert all(not torch.equal(raw[key], average[key]) for key in raw)


def test_projections_are_turned_over(content: dict[str, Any], mnist: Config, tmp_path: Path) -> None:
    index = [key for key, _ in DESCRIPTIONS["mnist_28"]["parameters"]].index("all_modules.15.NIN_1.W")
    loaded = weights(dpdm.load_denoiser(saved(content, tmp_path), mnist))["middle_1.attention.key.weight"]
    assert torch.equal(loaded, content["ema"]["shadow_params"][index].t())
    assert not torch.equal(loaded, content["ema"]["shadow_params"][index])


def test_the_older_format_and_other_float_types_are_read(
    content: dict[str, Any], mnist: Config, tmp_path: Path
) -> None:
    doubles = [value.double() for value in content["ema"]["shadow_params"]]
    path = tmp_path / "old.pt"
    torch.save({"ema": {"shadow_params": doubles}}, path, _use_new_zipfile_serialization=False)
    loaded = weights(dpdm.load_denoiser(path, mnist))["conv_in.weight"]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, content["ema"]["shadow_params"][5])


def test_the_config_may_be_a_path_and_is_needed(content: dict[str, Any], mnist: Config, tmp_path: Path) -> None:
    path = saved(content, tmp_path)
    first, second = dpdm.load_denoiser(str(path), str(config_of("mnist_28"))), dpdm.load_denoiser(path, mnist)
    assert all(torch.equal(weights(first)[key], value) for key, value in weights(second).items())
    with pytest.raises(InputError, match=r"Expected a config for .*model.pth, .*configs/mnist_28/sample_eps_1.0.yaml"):
        dpdm.load_denoiser(path)


class Runs:
    """Would make a file if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_file_is_not_run(
    save: Callable[[Any, Path], None], content: dict[str, Any], mnist: Config, tmp_path: Path
) -> None:
    save({**content, "step": Runs(tmp_path / "was-run")}, tmp_path / "model.pth")
    with pytest.raises(InputError) as caught:
        dpdm.load_denoiser(tmp_path / "model.pth", mnist)
    assert not (tmp_path / "was-run").exists()
    assert "\n" not in str(caught.value)


def test_what_would_run_is_named(content: dict[str, Any], mnist: Config, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing but tensors in .*, got posix.mkdir, which could run code"):
        dpdm.load_denoiser(saved({**content, "step": Runs(tmp_path / "x")}, tmp_path), mnist)


@pytest.mark.parametrize(
    "junk", [b"", b"<!DOCTYPE html><title>Sign in</title>", b"PK\x03\x04 cut off", b"\x80\x02}q\x00"]
)
def test_a_file_of_another_kind_is_refused(junk: bytes, mnist: Config, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(junk)
    with pytest.raises(InputError, match=r"Expected a release or a checkpoint of the original in .*damaged file"):
        dpdm.load_denoiser(path, mnist)


def change_ema(change: Callable[[list[Tensor]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {**content, "ema": {"shadow_params": change(list(content["ema"]["shadow_params"]))}}


def change_model(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda content: {"model": change(dict(content["model"]))}


KEY = "module.model.all_modules.30.bias"


@pytest.mark.parametrize(
    ("change", "use_ema", "names"),
    [
        (lambda content: [1, 2], True, ["with model and ema, got a list"]),
        (lambda content: {"state_dict": 1}, True, ["ema, shadow_params", "['state_dict']", "model.use_ema=false"]),
        (lambda content: {"ema": 3}, True, ["ema, shadow_params"]),
        (change_ema(lambda ema: {"a": 1}), True, ["ema, shadow_params"]),
        (change_ema(lambda ema: ema[:-1]), True, ["got", "another network's", "--config"]),
        (
            change_ema(lambda ema: [torch.zeros(1001, 32), *ema[1:]]),
            True,
            ["all_modules.0.weight", "(11, 32)", "(1001, 32)", "--config"],
        ),
        (change_ema(lambda ema: [*ema[:-1], 1.0]), True, ["all_modules.30.bias", "float"]),
        (change_ema(lambda ema: [*ema[:-1], ema[-1].long()]), True, ["all_modules.30.bias", "torch.int64"]),
        (change_ema(lambda ema: [*ema[:-1], ema[-1] / 0]), True, ["all_modules.30.bias", "NaN or infinity"]),
        (lambda content: {"ema": content["ema"]}, False, ["raw weights (model)", "['ema']"]),
        (change_model(lambda model: {}), False, ["all_modules.0.weight", "got none"]),
        (
            change_model(lambda model: {key: model[key] for key in model if key != KEY}),
            False,
            ["all_modules.30.bias", "1 missing, 0 too many"],
        ),
        (
            change_model(lambda model: {**model, "module.model.all_modules.31.weight": model[KEY]}),
            False,
            ["all_modules.31.weight", "0 missing, 1 too many"],
        ),
        (change_model(lambda model: {**model, "all_modules.30.bias": model[KEY]}), False, ["all_modules.30.bias once"]),
    ],
)
def test_what_does_not_fit_is_named_in_one_line(
    change: Callable[[dict[str, Any]], Any], use_ema: bool, names: list[str], content: dict[str, Any], tmp_path: Path
) -> None:
    config = configs.load([config_of("mnist_28")], [f"model.use_ema={use_ema}"])
    path = saved(change(content), tmp_path)
    with pytest.raises(InputError) as caught:
        dpdm.load_denoiser(path, config)
    message = str(caught.value)
    assert "\n" not in message
    assert [name for name in [str(path), *names] if name not in message] == []


def test_another_models_config_is_named(content: dict[str, Any], tmp_path: Path) -> None:
    path = saved(content, tmp_path)
    for other in ("celeba_32", "cifar10_32"):
        with pytest.raises(InputError, match=r"another network's; check --config"):
            dpdm.load_denoiser(path, config_of(other))
    with pytest.raises(InputError, match=r"data.resolution, data.num_channels and data.num_classes"):
        dpdm.load_denoiser(path, Config())
