"""Defaults for a data set, from public facts alone: (N, resolution, channels, classes, epsilon)."""

SELECTION = (
    "by a recipe from the number of images, their size, the number of classes and epsilon alone; the recipe was "
    "developed on scikit-learn's digits, so for those digits themselves this choice is not accounted for"
)


def recipe(*, dataset_size: int, resolution: int, num_channels: int, num_classes: int, epsilon: float) -> list[str]:
    """Returns overrides ``key=value`` for ``config.load``."""
    multipliers = [1, 2] if resolution <= 16 else [1, 2, 2]
    return [
        "model.network.width=16",
        f"model.network.channel_multipliers={multipliers}",
        "model.network.num_res_blocks=1",
        "model.ema_rate=0.95",
        "loss.noise_multiplicity=4",
        "optim.learning_rate=1e-3",
        "optim.schedule=linear",
        f"train.expected_batch_size={-(-dataset_size // 2)}",
        "train.num_iterations=30",
        "train.warmup.enabled=true",
        "train.checkpoint_every=10",
        "sampler.num_steps=20",
        f"dp.selection={SELECTION!r}",
    ]
