"""The shipped configs say what was published: a table typed from the paper's facts, not read from the files."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from dpdm import config as configs
from dpdm.config import Config
from dpdm.plan import Plan, make_plan

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Fact:
    """One row of the original's table of models; ``noise_multiplier`` is the PLD accountant's."""

    name: str
    denoiser: str
    dataset_size: int
    shape: tuple[int, int]
    num_classes: int
    batch: int
    epochs: int
    draws: int
    delta: float
    epsilon: float
    attention: tuple[int, ...]
    multipliers: tuple[int, ...]
    parameters: int
    noise_multiplier: float


def mnist(folder: str, epsilon: float, denoiser: str, noise_multiplier: float) -> Fact:
    name = f"{folder}/{{}}_eps_{epsilon}.yaml"
    network = ((7,), (1, 2, 2), 1_753_345)
    return Fact(name, denoiser, 60_000, (1, 28), 10, 4096, 300, 32, 1e-5, epsilon, *network, noise_multiplier)


CELEBA = (162_770, (3, 32), 0, 2048, 300, 32, 1e-6)
FACTS = [
    *(mnist(f, *row) for f in ("mnist_28", "fmnist_28") for row in ((0.2, "v", 73.88), (1.0, "edm", 16.92))),
    *(mnist(f, 10.0, "edm", 2.380) for f in ("mnist_28", "fmnist_28")),
    Fact("celeba_32/{}_eps_1.0.yaml", "edm", *CELEBA, 1.0, (8, 16), (1, 2, 2), 1_804_451, 8.254),
    Fact("celeba_32/{}_eps_10.0.yaml", "edm", *CELEBA, 10.0, (8, 16), (1, 2, 2), 1_804_451, 1.255),
    Fact(
        "celeba_64/{}_eps_10.0.yaml",
        "edm",
        *(162_770, (3, 64), 0, 2048, 300, 8, 1e-6, 10.0),
        *((8, 16), (1, 1, 2, 2), 1_999_907, 1.255),
    ),
    Fact(
        "cifar10_32/{}_eps_10.0.yaml",
        "edm",
        *(50_000, (3, 32), 10, 2048, 500, 8, 1e-5, 10.0),
        *((16,), (1, 2, 2), 1_754_499, 2.376),
    ),
    Fact(
        "imagenet_32/{}_eps_10.0.yaml",
        "edm",
        *(1_281_167, (3, 32), 1000, 2048, 100, 8, 7e-7, 10.0),
        *((8, 16), (1, 2, 2), 1_836_483, 0.587),
    ),
]


@pytest.fixture(params=FACTS, ids=lambda fact: fact.name.format(""))
def fact(request: pytest.FixtureRequest) -> Fact:
    return request.param


def load(fact: Fact, what: str) -> Config:
    return configs.load([CONFIGS / fact.name.format(what)])


def test_there_is_a_row_for_every_file_and_a_file_for_every_row() -> None:
    wanted = {fact.name.format(what) for fact in FACTS for what in ("train", "sample")}
    assert len(wanted) == 22
    published = [path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "pretrained"]  # that is our own
    assert {path.relative_to(CONFIGS).as_posix() for path in published} == wanted


@pytest.mark.parametrize("what", ["train", "sample"])
def test_model_and_sampler_are_the_published_ones(fact: Fact, what: str) -> None:
    config = load(fact, what)
    data, model, sampler = config.data, config.model, config.sampler
    assert (data.num_channels, data.resolution, data.num_classes) == (*fact.shape, fact.num_classes)
    assert (model.denoiser, model.ema_rate) == (fact.denoiser, 0.999)
    assert model.network.attention_resolutions == fact.attention
    assert model.network.channel_multipliers == fact.multipliers
    assert (config.dp.epsilon, config.dp.delta) == (fact.epsilon, fact.delta)
    assert (sampler.type, sampler.num_steps, sampler.num_images) == ("ddim", 50, 16)
    assert (sampler.sigma_min, sampler.sigma_max, sampler.rho, sampler.guidance_scale) == (0.002, 80.0, 7.0, 0.0)
    network = configs.build_denoiser(config).network
    assert sum(p.numel() for p in network.parameters()) == fact.parameters
    assert network.num_classes == fact.num_classes


def test_training_is_the_published_one(fact: Fact) -> None:
    config = load(fact, "train")
    train, loss, optim = config.train, config.loss, config.optim
    assert (train.expected_batch_size, train.num_epochs, train.num_iterations) == (fact.batch, fact.epochs, None)
    assert (loss.noise_multiplicity, loss.type) == (fact.draws, None)
    assert (loss.p_mean, loss.p_std, loss.logsnr_min, loss.logsnr_max) == (-1.2, 1.2, -9.0, 13.0)
    assert loss.label_dropout == 0.1
    assert (optim.learning_rate, optim.weight_decay, optim.schedule) == (3e-4, 0.0, "constant")
    assert (config.dp.clipping_norm, config.dp.noise_multiplier, config.dp.seed) == (1.0, None, None)
    assert not train.warmup.enabled


@pytest.mark.slow  # half a minute; tests/privacy/test_accounting.py holds those of MNIST
def test_the_noise_is_what_the_budget_asks_for(fact: Fact) -> None:
    config = load(fact, "train")
    plan = calibrated(config.train.expected_batch_size, config.train.num_epochs, config.dp, fact.dataset_size)
    assert plan.num_iterations == int(fact.epochs * fact.dataset_size / fact.batch)
    digits = 5e-4 if fact.noise_multiplier > 1 else 1e-3  # half a unit in the last digit of what was published
    assert plan.noise_multiplier == pytest.approx(fact.noise_multiplier, rel=digits)
    assert plan.epsilon <= fact.epsilon


@cache
def calibrated(batch: int, epochs: float, dp: configs.DPConfig, dataset_size: int) -> Plan:
    """Several configs differ in what is no concern of the accountant."""
    train = configs.TrainConfig(expected_batch_size=batch, num_epochs=epochs)
    return make_plan(Config(dp=dp, train=train), dataset_size)
