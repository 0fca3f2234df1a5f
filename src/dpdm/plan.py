"""What a run may buy from the data, decided before it starts."""

import math
from dataclasses import dataclass

from dpdm import account
from dpdm.config import Config
from dpdm.errors import InputError
from dpdm.privacy import accounting
from dpdm.privacy.central import LARGEST_DATASET, MECHANISMS
from dpdm.privacy.dpsgd import LARGEST_BATCH
from dpdm.published_words import LONGEST_NAME, check_words
from dpdm.untrusted import clean

# A Poisson batch has fewer than ten standard deviations more, but for a chance of 1e-20: LARGEST_BATCH at most.
LARGEST_EXPECTED_BATCH = math.floor((math.sqrt(25 + LARGEST_BATCH) - 5) ** 2)


@dataclass(frozen=True)
class Plan:
    """What a training run may buy: at most these mechanisms, so that epsilon stays within the budget.

    Attributes:
        dataset_size: N, the number of images, or of groups.
        sampling_rate, num_iterations, noise_multiplier: of DP-SGD.
        epsilon: of everything in the plan, at ``delta``. Without privacy it is infinite, and there is no noise.
        warmup: the mechanisms of central images, covariances and cells; none without a warm-up.
        unit: what one record is, "image" or "group".
    """

    dataset_size: int
    expected_batch_size: int
    sampling_rate: float
    num_iterations: int
    noise_multiplier: float
    epsilon: float
    delta: float
    warmup: tuple[accounting.Mechanism, ...]
    unit: str = "image"

    @property
    def is_private(self) -> bool:
        return self.noise_multiplier > 0

    def step(self) -> accounting.Mechanism:
        return accounting.Mechanism("DP-SGD", self.sampling_rate, self.noise_multiplier, 1)


def make_plan(config: Config, dataset_size: int) -> Plan:
    """Returns the plan of a run on ``dataset_size`` records, the noise calibrated if epsilon was given.

    Records are images or groups, as ``data.unit`` says: what is drawn into batches, clipped, and counted here.

    Raises:
        InputError: for a delta that is too large, a batch larger than the data, no or two privacy targets.
    """
    check_keys(config)
    unit = config.data.unit
    if dataset_size > account.LARGEST_DATASET:
        raise InputError(f"Expected at most {account.LARGEST_DATASET} {unit}s, got {dataset_size}.")
    if config.dp.enabled:
        accounting.check_delta_for(config.dp.delta, dataset_size, unit)
    batch = config.train.expected_batch_size
    rate = accounting.sampling_rate(batch, dataset_size, unit)
    if batch > LARGEST_EXPECTED_BATCH:
        raise InputError(
            f"Expected train.expected_batch_size <= {LARGEST_EXPECTED_BATCH}, got {batch}: rounding is bounded up to "
            "there."
        )
    if config.train.warmup.enabled and dataset_size > LARGEST_DATASET:
        raise InputError(
            f"Expected at most {LARGEST_DATASET} {unit}s for central images, got {dataset_size}: turn off train.warmup."
        )
    if config.train.num_iterations is None:
        account.steps_of("train.num_epochs", config.train.num_epochs or 0.0, dataset_size, batch)  # refuses none
    steps = planned_steps(config, dataset_size)
    if not config.dp.enabled:
        return Plan(dataset_size, batch, rate, steps, 0.0, math.inf, config.dp.delta, (), unit)
    others = config.train.warmup.mechanisms()
    noise_multiplier = config.dp.noise_multiplier
    if noise_multiplier is None:
        assert config.dp.epsilon is not None  # exactly one of the two is given
        noise_multiplier = accounting.calibrate_noise_multiplier(
            config.dp.epsilon, config.dp.delta, rate, steps, others=others
        )
    dp_sgd = accounting.Mechanism("DP-SGD", rate, noise_multiplier, steps)
    if config.dp.noise_multiplier is not None:  # what was calibrated has its epsilon
        account.check_worth([*others, dp_sgd], config.dp.delta)
    epsilon = accounting.epsilon_spent([*others, dp_sgd], config.dp.delta)
    return Plan(dataset_size, batch, rate, steps, noise_multiplier, epsilon, config.dp.delta, others, unit)


def planned_steps(config: Config, dataset_size: int) -> int:
    """Returns how many steps of DP-SGD a config asks for, on so many images or groups."""
    train = config.train
    if train.num_iterations is not None:
        return train.num_iterations
    return accounting.num_iterations(train.num_epochs or 0.0, dataset_size, train.expected_batch_size)


def check_keys(config: Config) -> None:
    """Raises InputError for what is wrong with the privacy keys whatever the data are, before these are read."""
    dp, train = config.dp, config.train
    if dp.enabled:
        account.check_target(dp.epsilon, dp.noise_multiplier, "dp.epsilon", "dp.noise_multiplier")
        if len(set(config.sampler.class_weights)) > 1:
            raise InputError(
                "Expected no sampler.class_weights in a private training, or equal ones, got others: a release tells "
                "the classes' frequencies only as train.warmup.count_weight buys them; leave these out."
            )
    else:
        check_public(config)
    if config.model.ckpt is not None:
        raise InputError(
            f"Expected model.ckpt=null in training, got {config.model.ckpt}: it is a model to draw from; training "
            "begins with the weights of a release by model.init."
        )
    if not config.model.use_ema:
        raise InputError("Expected model.use_ema=true in training, got false: it is for checkpoints of the original.")
    if train.num_iterations is None and train.num_epochs is None:
        raise InputError("Expected train.num_epochs or train.num_iterations, got neither: give one.")
    if train.num_iterations is not None:
        account.check_steps(train.num_iterations, "train.num_iterations")
    for mechanism in train.warmup.mechanisms():
        account.check_noise_multiplier(mechanism.noise_multiplier, f"train.warmup.{MECHANISMS[mechanism.name]}")


def check_public(config: Config) -> None:
    """Raises InputError unless a run without privacy is one on images that are declared public, and wants no privacy.

    Guarantee: weights that were trained without privacy come from images of which their owner said that they are
    public; of others no such run begins, and none is released.
    """
    dp = config.dp
    if not config.data.public:
        raise InputError(
            "Expected data.public=true with dp.enabled=false, got false: Weights trained without privacy on private "
            "data cannot enter a release; say data.public=true if everybody may see these images."
        )
    if config.data.name is None:
        raise InputError(
            "Expected data.name with dp.enabled=false, got null: the statement names the images; give their name."
        )
    for name, value, wanted in (
        ("dp.epsilon", dp.epsilon, None),
        ("dp.noise_multiplier", dp.noise_multiplier, None),
        ("data.unit", config.data.unit, "image"),
        ("train.warmup.enabled", config.train.warmup.enabled, False),
    ):
        if value != wanted:
            said = {None: "null", False: "false"}.get(wanted, wanted)
            raise InputError(
                f"Expected {name}={said} with dp.enabled=false, got {str(value).lower()}: without privacy there is no "
                "noise, nothing is protected, and training reads the images themselves."
            )


def check_names(config: Config) -> None:
    """Raises InputError if words of the user's that are published seem to be a path or a key."""
    data = config.data
    if len(data.name or "") > LONGEST_NAME:
        raise InputError(
            f"Expected data.name of at most {LONGEST_NAME} characters, got {len(data.name or '')}: choose another."
        )
    published = {
        "data.name": [data.name or ""],
        "data.class_names": data.class_names,
        "dp.selection": [config.dp.selection],
    }
    for key, names in published.items():
        for name in names:
            if problems := check_words(key, name):
                raise InputError(
                    f"Expected {key} that may be published, got {clean(name, 60)!r}: {problems[0]}; choose another."
                )
