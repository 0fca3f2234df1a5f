"""The script behind the table and the chart of docs/samplers.md."""

import importlib.util
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from dpdm import config as configs
from dpdm.config import build_denoiser
from dpdm.diffusion.sampling import sample
from dpdm.released_files import redacted

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "solvers.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("solvers", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "EVALUATIONS", (6, 15))
    return module


@pytest.fixture
def release(tmp_path: Path) -> Path:
    keys = ["data.resolution=8", "data.num_channels=1", "data.num_classes=3", "model.network.width=4"]
    config = configs.load([], [*keys, "model.network.channel_multipliers=[1]", "model.network.num_res_blocks=1"])
    network = build_denoiser(config).network
    generator = torch.Generator().manual_seed(0)
    weights = {k: v + 0.1 * torch.randn(v.shape, generator=generator) for k, v in network.state_dict().items()}
    folder = tmp_path / "release"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(redacted(config)))
    return folder


def test_distances_table_and_chart(
    script: ModuleType, release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "docs" / "samplers.md"
    (page.parent / "images").mkdir(parents=True)
    page.write_text("before\n<!-- solvers: begin -->\nold\n<!-- solvers: end -->\nafter\n")
    arguments = ["--release", str(release), "--images", "3", "--reference-steps", "60", "--docs"]
    script.main([*arguments, "--json"], page)
    result = json.loads(capsys.readouterr().out)
    counts = {solver: list(values) for solver, values in result["distances"].items()}
    assert counts == {"ddim": ["6", "15"], "edm": ["5", "15"], "dpm_solver_pp": ["6", "15"]}
    before, table, after = page.read_text().split("\n<!-- solvers: ")
    assert (before, after) == ("before", "end -->\nafter\n")
    values = [
        f"{values[count]:.4f}" for values, count in zip(result["distances"].values(), ("6", "5", "6"), strict=True)
    ]
    assert f"| 5 or 6 | {' | '.join(values)} |" in table
    picture = ElementTree.fromstring((page.parent / "images" / "solvers.svg").read_text())
    assert len(picture.findall("{http://www.w3.org/2000/svg}polyline")) == 3
    script.main(arguments[:-1], page)
    assert f"| 5 or 6 | {' | '.join(values)} |" in capsys.readouterr().out
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="one place for the table"):
        script.main(arguments, page)


def test_a_distance_is_between_what_dpdm_draws(
    script: ModuleType, release: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpdm.diffusion.sampling.to_uint8", lambda images: images)  # neither rounded nor cut off
    arguments = ["--release", str(release), "--images", "3", "--reference-steps", "40", "--json"]
    script.main([*arguments, "--sigma-min", "0.1", "--rho", "3"])
    result = json.loads(capsys.readouterr().out)
    denoiser = script.load_denoiser(release)

    def pixels(*changes: str) -> torch.Tensor:
        sampler = configs.load([str(release / "config.json")], [*changes]).sampler
        shape = {"num_classes": 3, "resolution": 8, "num_channels": 1}
        images, _ = sample(denoiser, sampler, seed=0, indices=range(3), device="cpu", **shape)
        return images.double()

    reference = pixels("sampler.num_steps=40", "sampler.type=edm")
    keys = ("sampler.sigma_min=0.1", "sampler.rho=3", "sampler.type=dpm_solver_pp", "sampler.num_steps=6")
    seen = (pixels(*keys) - reference).square().mean().sqrt().item()
    assert seen == pytest.approx(result["distances"]["dpm_solver_pp"]["6"], rel=1e-4)
