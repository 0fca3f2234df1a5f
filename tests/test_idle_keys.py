"""Keys that change nothing are named, and no others: held against what the loss and the sampler compute."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpdm import config as configs
from dpdm.diffusion.loss import diffusion_loss, noise_level
from dpdm.generate import draw_some
from dpdm.idle_keys import idle_keys, in_words
from dpdm.recipes import recipe

CONFIGS = Path(__file__).parent.parent / "configs"
KINDS = ("edm", "v", "vp", "ve")
TINY = (
    "data.resolution=8",
    "data.num_channels=1",
    "data.num_classes=2",
    "model.network.width=8",
    "model.network.channel_multipliers=[1]",
    "model.network.num_res_blocks=1",
    "model.network.attention_resolutions=[]",
)
LOSS = {
    "p_mean": "0.5",
    "p_std": "0.9",
    "logsnr_min": "-5",
    "logsnr_max": "7",
    "beta_min": "0.3",
    "beta_d": "12",
    "eps_t": "0.01",
    "sigma_min": "0.1",
    "sigma_max": "30",
    "sigma_data": "0.3",
}
SAMPLER = {"s_min": "0.5", "s_max": "2", "s_noise": "1.1", "guidance_min": "0.5", "guidance_max": "2"}


def _loss(words: list[str]) -> tuple[torch.Tensor, set[str]]:
    config = configs.load([], [*TINY, *words])
    denoiser = configs.build_denoiser(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.network.parameters():  # the last layer begins as zeros
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    images, noise = torch.rand(3, 1, 8, 8, generator=generator), torch.randn(1, 3, 1, 8, 8, generator=generator)
    u = torch.rand(1, 3, generator=generator)
    sigma = noise_level(config.loss, denoiser.kind, u).float()
    drop = torch.zeros(1, 3, dtype=torch.bool)
    labels = torch.tensor([0, 1, 1])
    found = diffusion_loss(denoiser, images, labels, sigma=sigma, noise=noise, drop_label=drop, kind=config.loss.type)
    return found, set(idle_keys(config))


@pytest.mark.parametrize("levels", [None, *KINDS])
@pytest.mark.parametrize("denoiser", KINDS)
def test_a_key_of_the_loss_is_idle_if_and_only_if_it_does_not_change_the_loss(denoiser, levels):
    words = [f"model.denoiser={denoiser}", *([f"loss.type={levels}"] if levels else [])]
    before, idle = _loss(words)
    assert not idle
    for name, value in LOSS.items():
        after, idle = _loss([*words, f"loss.{name}={value}"])
        assert idle == ({f"loss.{name}"} if torch.equal(before, after) else set())


@pytest.mark.parametrize(
    "words", [(), ("sampler.type=edm",), ("sampler.type=edm", "sampler.s_churn=2"), ("sampler.guidance_scale=100",)]
)
def test_a_key_of_the_sampler_is_idle_if_and_only_if_it_does_not_change_the_images(words):
    def drawn(*more: str) -> tuple[torch.Tensor, set[str]]:
        config = configs.load([], [*TINY, "sampler.num_steps=8", *words, *more])
        denoiser = configs.build_denoiser(config).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in denoiser.network.parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
        return torch.from_numpy(draw_some(denoiser, config, range(4))), set(idle_keys(config))

    before, _ = drawn()
    for name, value in SAMPLER.items():
        after, idle = drawn(f"sampler.{name}={value}")
        assert idle == ({f"sampler.{name}"} if torch.equal(before, after) else set())


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (["train.num_epochs=5"], {}),
        (
            ["train.num_epochs=5", "train.num_iterations=7"],
            {"train.num_epochs": "train.num_iterations is given"},
        ),
        (["optim.noise_correction=true", "optim.noise_floor=0.2"], {}),
        (["optim.noise_floor=0.2"], {"optim.noise_floor": "optim.noise_correction is off"}),
        (
            ["optim.noise_correction=true", "dp.enabled=false"],
            {"optim.noise_correction": "there is no noise without privacy"},
        ),
        (["train.log_every=5", "train.log_threshold=10"], {}),
        (["train.log_threshold=10"], {"train.log_threshold": "train.log_every is null"}),
        (["train.snapshot_threshold=10"], {"train.snapshot_threshold": "train.snapshot_every is null"}),
        (["train.warmup.enabled=true", "train.warmup.noise_multiplier=7"], {}),
        (["train.warmup.noise_multiplier=7"], {"train.warmup.noise_multiplier": "train.warmup.enabled is false"}),
        (["train.warmup.covariance_scale=2"], {"train.warmup.covariance_scale": "train.warmup.enabled is false"}),
        (
            ["train.warmup.enabled=true", "train.warmup.covariance_scale=2"],
            {"train.warmup.covariance_scale": "no covariances are bought"},
        ),
        (
            [
                "train.warmup.enabled=true",
                "train.warmup.covariance_scale=2",
                "train.warmup.covariance_noise_multiplier=9",
            ],
            {},
        ),
    ],
)
def test_reasons(words, idle):
    found = idle_keys(configs.load([], words))
    assert found == idle
    assert all(f"{key} ({why})" in in_words(found) for key, why in idle.items())


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*_*/*.yaml")), ids=lambda f: f"{f.parent.name}/{f.name}")
def test_no_shipped_config_has_one(file):
    assert not idle_keys(configs.load([file], quiet=True))


@pytest.mark.parametrize("size", [200, 60_000, 10**6])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 10.0])
def test_no_recipe_has_one(size, epsilon):
    facts = {"dataset_size": size, "resolution": 28, "num_channels": 1, "num_classes": 10, "epsilon": epsilon}
    assert not idle_keys(configs.load([], recipe(**facts, delta=1e-7)))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            "train -- data.path=digits dp.epsilon=10 train.num_iterations=1 model.network.width=8 loss.logsnr_min=-3",
            "  Without effect: loss.logsnr_min (noise levels are not v's).",
        ),
        (
            "sample --pretrained mnist_small_eps_1.0 -- sampler.num_images=1 sampler.num_steps=1 sampler.s_noise=1.1",
            "dpdm: Without effect: sampler.s_noise (sampler.s_churn is 0).",
        ),
    ],
)
def test_the_commands_say_so(tmp_path, command, said):
    name, _, words = command.partition(" ")
    asked = [sys.executable, "-m", "dpdm", name, "--workdir", str(tmp_path / "run"), *words.split(), "setup.device=cpu"]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert said in done.stderr.splitlines()
