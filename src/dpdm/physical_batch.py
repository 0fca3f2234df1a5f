"""How many examples go through the network at a time: as many as the machine's memory suits, by a public rule."""

import math

import torch

from dpdm import config as configs
from dpdm.config import Config
from dpdm.device import total_memory, use_bf16
from dpdm.privacy import gpu_layers

# On a CPU: 128 images of 28 x 28 keep the cores busy, about 2 GiB with the widest network.
PIXELS_PER_PASS = 100_352
GRADIENT_BYTES_PER_PASS = 2**29
BYTES_PER_PASS = 4 * 2**30  # of memory, for each time that a user may ask for as much
# A GPU is not kept busy by less than thousands of images, as each pass takes its host a tenth of a second.
SHARE_OF_GPU = 0.4  # of its memory, for images and gradients of one pass by the rule
LARGEST_SHARE = 0.7  # the same for who asks for more
TENSORS_PER_BLOCK = 8.5  # of a block's size, kept for the backward pass or alive in it: measured on the MNIST network
WITHOUT_TRITON = 2.5  # times as many by layers' other rules, as the plain step has
TENSORS_OF_GRADIENTS = 3  # of all per-example gradients, while they are clipped


def physical_batch_size(
    config: Config, device: torch.device, memory: int | None = None, *, triton: bool | None = None
) -> int:
    """Returns how many examples go through the network at a time, from the config, public facts and the machine alone.

    Args:
        config: a wish in it is cut to what the memory can hold: it may come from a larger machine.
        device: that computes the steps.
        memory: its bytes; None: they are asked for.
        triton: whether a GPU has the rules of ``gpu_layers``; None: it is tried.
    """
    memory = total_memory(device) if memory is None else memory
    if device.type == "cuda":
        bf16 = use_bf16(config.setup.precision, device)
        if triton is None:
            triton = gpu_layers.fits(torch.empty(0, dtype=torch.bfloat16 if bf16 else torch.float32, device=device))
        chosen, largest = _by_gpu(config, memory, bf16=bf16, triton=triton)
    else:
        chosen, largest = _by_cpu(config, memory)
    if config.train.physical_batch_size is not None:
        chosen = min(config.train.physical_batch_size, largest)
    return max(1, min(chosen, -(-config.train.expected_batch_size // config.train.n_splits)))


def _by_cpu(config: Config, memory: int) -> tuple[int, int]:
    """Returns the examples by rule, and at most."""
    pixels = config.loss.noise_multiplicity * (config.data.resolution or 1) ** 2
    gradients = 4 * _num_parameters(config)

    def examples(passes: int) -> int:
        return min(passes * PIXELS_PER_PASS // pixels, passes * GRADIENT_BYTES_PER_PASS // gradients)

    return examples(1), examples(max(1, memory // BYTES_PER_PASS))


def _by_gpu(config: Config, memory: int, *, bf16: bool, triton: bool) -> tuple[int, int]:
    """Returns the examples by rule, and at most."""
    size = 2 if bf16 else 4
    gradients = TENSORS_OF_GRADIENTS * size * _num_parameters(config)
    image = size * _numbers_per_image(config) * (1.0 if triton else WITHOUT_TRITON)
    example = config.loss.noise_multiplicity * image + gradients
    return math.floor(SHARE_OF_GPU * memory / example), math.floor(LARGEST_SHARE * memory / example)


def _numbers_per_image(config: Config) -> int:
    """Returns about how many numbers one image keeps in memory during a step."""
    network, side = config.model.network, config.data.resolution or 1
    blocks = 2 * network.num_res_blocks + 1
    total = 0.0
    for level, multiplier in enumerate(network.channel_multipliers):
        own = side // 2**level
        total += TENSORS_PER_BLOCK * blocks * multiplier * network.width * own**2
        if own in network.attention_resolutions:
            total += 3 * blocks * own**4  # scores, before and after softmax, and their gradient
    return math.ceil(total)


def _num_parameters(config: Config) -> int:
    with torch.device("meta"):  # laid out, not made
        return sum(p.numel() for p in configs.build_denoiser(config).parameters())
