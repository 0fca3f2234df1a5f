"""What a run says before it spends anything: its guarantee, what it will publish, and where its weights begin."""

from collections.abc import Sequence

from dpdm.evaluation.guarantee import round_up
from dpdm.idle_keys import idle_keys, in_words
from dpdm.initial import Source
from dpdm.privacy import accounting
from dpdm.run import Run
from dpdm.untrusted import clean


def announcement(run: Run, sources: Sequence[Source] = ()) -> str:
    """Returns what will be spent, before anything is, where the first weights are from, which keys change nothing."""
    plan = run.plan
    if not plan.is_private:
        return "\n".join([_public_announcement(run), *_alike(run, sources)])
    lines = [
        f"Privacy: at most epsilon={round_up(plan.epsilon)} at delta={plan.delta:g}, adding or removing one of "
        f"{plan.dataset_size} {plan.unit}s.",
        f"  DP-SGD: {plan.num_iterations} steps, sampling rate {plan.sampling_rate:.4g}, noise multiplier "
        f"{plan.noise_multiplier:g}, clipping norm {run.config.dp.clipping_norm:g}.",
    ]
    for bought in plan.warmup:
        name, sigma = bought.name.capitalize(), bought.noise_multiplier
        lines.append(f"  {name}: one Gaussian mechanism, noise multiplier {sigma:g}.")
    if run.config.train.warmup.counts(run.denoiser.network.num_classes):
        lines.append("  Published with that noise: how frequent each class is.")
    if run.config.data.class_names:
        lines.append(f"  Published as they are: the class names {', '.join(map(clean, run.config.data.class_names))}.")
    if run.archive.groups is not None and plan.unit == "image":
        lines.append(
            "  Warning: data.unit=image, though the images have groups: k images of one person are protected only as k "
            "images together (group_privacy in the statement); data.unit=group protects persons."
        )
    lines += _alike(run, sources)
    warning = accounting.check_delta_for(plan.delta, plan.dataset_size, plan.unit)
    if warning:
        lines.append(f"  Warning: {warning}")
    if run.config.dp.seed is not None:
        lines.append("  NO GUARANTEE: dp.seed is set, so anybody can compute the noise. For tests alone.")
    return "\n".join(lines)


def _public_announcement(run: Run) -> str:
    plan = run.plan
    return (
        f"NO PRIVACY: {plan.num_iterations} ordinary steps on {plan.dataset_size} images that are declared public "
        f"(data.public): {clean(run.config.data.name)}. The release gives no guarantee for them."
    )


def _alike(run: Run, sources: Sequence[Source]) -> list[str]:
    """Returns what is said of any run: on the first weights, how many of all are trained, keys that change nothing."""
    lines = []
    if sources:
        fresh = f", all but {', '.join(sources[0].fresh)}" if sources[0].fresh else ""
        lines.append(f"  Weights begin with those of a {sources[0].kind}{fresh} (sha256 {sources[0].sha256[:12]}...).")
    parameters = list(run.denoiser.network.parameters())
    total, trained = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    if trained < total:
        lines.append(f"  Trained are {trained} of {total} numbers; the others stay as they are.")
    if idle := idle_keys(run.config):
        lines.append(f"  {in_words(idle)}")
    return lines
