"""What a run may buy from the data, decided before it starts."""

from dataclasses import dataclass

from dpdm.config import Config
from dpdm.errors import InputError
from dpdm.privacy import accounting


@dataclass(frozen=True)
class Plan:
    """What a training run may buy: at most these mechanisms, so that epsilon stays within the budget.

    Attributes:
        sampling_rate, num_iterations, noise_multiplier: of DP-SGD.
        epsilon: of everything in the plan, at ``delta``.
        warmup: the central images' mechanism, or None.
    """

    dataset_size: int
    expected_batch_size: int
    sampling_rate: float
    num_iterations: int
    noise_multiplier: float
    epsilon: float
    delta: float
    warmup: accounting.Mechanism | None

    def step(self) -> accounting.Mechanism:
        return accounting.Mechanism("DP-SGD", self.sampling_rate, self.noise_multiplier, 1)


def make_plan(config: Config, dataset_size: int) -> Plan:
    """Returns the plan of a run on ``dataset_size`` images, the noise calibrated if epsilon was given.

    Raises:
        InputError: for a delta that is too large, a batch larger than the data, no or two privacy targets.
    """
    if (config.dp.epsilon is None) == (config.dp.noise_multiplier is None):
        given = "neither" if config.dp.epsilon is None else "both"
        raise InputError(f"Expected one of dp.epsilon and dp.noise_multiplier, got {given}: give exactly one.")
    accounting.check_delta_for(config.dp.delta, dataset_size)
    batch = config.train.expected_batch_size
    rate = accounting.sampling_rate(batch, dataset_size)
    steps = config.train.num_iterations
    if steps is None:
        if config.train.num_epochs is None:
            raise InputError("Expected train.num_epochs or train.num_iterations, got neither: give one.")
        steps = accounting.num_iterations(config.train.num_epochs, dataset_size, batch)
    warmup = config.train.warmup.mechanism() if config.train.warmup.enabled else None
    others = [warmup] if warmup else []
    noise_multiplier = config.dp.noise_multiplier
    if noise_multiplier is None:
        assert config.dp.epsilon is not None  # exactly one of the two is given
        noise_multiplier = accounting.calibrate_noise_multiplier(
            config.dp.epsilon, config.dp.delta, rate, steps, others=others
        )
    dp_sgd = accounting.Mechanism("DP-SGD", rate, noise_multiplier, steps)
    epsilon = accounting.epsilon_spent([*others, dp_sgd], config.dp.delta)
    return Plan(dataset_size, batch, rate, steps, noise_multiplier, epsilon, config.dp.delta, warmup)
