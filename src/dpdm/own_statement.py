"""``privacy.json`` as dpdm itself writes it: of a run, of a public model, of converted weights.

``statement.py`` holds a stranger's against it, word by word.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from dpdm.config import Config
from dpdm.evaluation.guarantee import COUNTED, UNITS
from dpdm.initial import Source, sentences
from dpdm.privacy import accounting
from dpdm.privacy.accounting import Selection, Spend, parts

SECURE_NOISE = (
    "noise is added in integers on a public grid and sampled exactly, so that no gap between floats is left to attack "
    "(Mironov 2012)"
)
ROUNDING = "rounded to float16 after training; what is computed from private weights alone gives away no more than they"
FLOAT_NOISE = "Gaussians are float64 Box-Muller, open to attacks on the gaps between floats (Mironov 2012)"
GROUPS = (2, 5)  # images of one person, or persons of one family, whose guarantee together a statement tells
LIBRARIES = ("dpdm", "torch", "numpy", "dp-accounting", "cryptography", "safetensors")


@dataclass(frozen=True)
class Words:
    """What a statement says of its unit of privacy."""

    adjacency: str
    split: str
    others: str
    several: str
    central: str
    covariances: str
    cells: str
    assumptions: tuple[str, ...]
    not_covered: tuple[str, ...]


WORDS = {
    "image": Words(
        adjacency=accounting.ADJACENCY,
        split="which images are for training is public; where dpdm made the split, a keyed hash of each image decided, "
        "except for scikit-learn's digits, of which every sixth is held out",
        others="every other image",
        several="images of one person",
        central="each image clipped and added to one of them",
        covariances="noisy covariances of each class ('central covariances'), to which each image adds the product of "
        "its clipped distance from its class's noisy mean with itself",
        cells="noisy sizes, means and covariances of parts of each class ('central cells'), to one of which, told by "
        "what was bought before, each image adds the product of a vector with itself: a constant and its distance from "
        "where that part is expected, clipped together",
        assumptions=(
            "Each person has one image. Whoever has several is protected less, or not at all (see group_privacy).",
        ),
        not_covered=("The public facts: the number of images, their size, the list of classes and the split.",),
    ),
    "group": Words(
        adjacency="add or remove one person (all of their images)",
        split="which persons are for training is public; where dpdm made the split, a keyed hash of each person's name "
        "in the list of groups decided, for all of their images",
        others="all images of every other person",
        several="persons",
        central="of each person one image, chosen at random, clipped and added to one of them",
        covariances="noisy covariances of each class ('central covariances'), to which one image of each person, "
        "chosen at random, adds the product of its clipped distance from its class's noisy mean with itself",
        cells="noisy sizes, means and covariances of parts of each class ('central cells'), to one of which, told by "
        "what was bought before, one image of each person, chosen at random, adds the product of a vector with itself: "
        "a constant and its distance from where that part is expected, clipped together",
        assumptions=(
            "Each group holds all images that show one person, and none that shows anybody else. Whoever is in k "
            "groups, with others in some of them, is protected as up to 2 k persons are together; with nobody else in "
            "them, as k (see group_privacy).",
        ),
        not_covered=(
            "The public facts: the number of persons, the size of the images, the list of classes and the split.",
            "One image more or less of a person who stays: it is protected as two persons are together (see "
            "group_privacy).",
        ),
    ),
}


def make_statement(
    config: Config,
    mechanisms: Sequence[Spend],
    plan: dict[str, Any],
    sources: Sequence[Source] = (),
    *,
    half: bool = False,
) -> dict[str, Any]:
    """Returns the privacy statement, all but its ``files``, from what was done; ``plan`` is the ledger's.

    ``half`` says that the weights were rounded to float16.

    Guarantee: whoever's images are behind the weights with which training began, its ``sources``, is named: the
    statement's epsilon is not theirs.
    """
    dp, data, words = config.dp, config.data, WORDS[config.data.unit]
    selects = any(isinstance(spend, Selection) for spend in mechanisms)
    kept = "of the selected run" if selects else "that was kept"
    # Above 0, where the formula for groups would divide by 0; a larger epsilon is a weaker and so a true statement.
    epsilon = max(accounting.epsilon_spent(mechanisms, dp.delta), 1e-6)
    statement = {
        "epsilon": epsilon,
        "delta": dp.delta,
        "unit": UNITS[data.unit],
        "adjacency": words.adjacency,
        "accountant": accounting.accountant_of(mechanisms),
        "dataset_size": plan["dataset_size"],
        "clipping_norm": dp.clipping_norm,
        "mechanisms": [m.as_dict() for m in mechanisms],
        "public_facts": {
            "dataset_size": plan["dataset_size"],
            "resolution": data.resolution,
            "num_channels": data.num_channels,
            "num_classes": data.num_classes,
            "class_names": list(data.class_names),
            "split": words.split,
        },
        "threat_model": f"the attacker sees the weights after every step {kept}, knows the code, the config and "
        f"{words.others}, and has no key",
        "randomness": "ChaCha20 under a 256-bit key of the operating system, deleted from the run's folder at release",
        "floating_point": "clipping and summing are bounded with their rounding; the rounding inside the network's "
        "kernels is not (below 1e-4 of a gradient in tests in float32 on a CPU, when another image joins the batch; "
        "more in bf16, in which a GPU computes unless told otherwise); "
        + (SECURE_NOISE if dp.secure_noise else FLOAT_NOISE),
        "group_privacy": {str(k): _group(epsilon, dp.delta, k, words.several) for k in GROUPS},
        "composition_scope": "this release alone; other releases from the same images add up (dpdm account --compose)",
        "hyperparameters": dp.selection,
        "holdout": "images that dpdm held out took no part in training; figures on them are private and not released",
        "assumptions": [*words.assumptions, *_assumptions(mechanisms, plan["num_iterations"])],
        "not_covered": [
            *words.not_covered,
            *sentences(sources, UNITS[data.unit]),
            "The choice of the candidates that the private selection had, and of this release among several."
            if selects
            else "The choice of hyperparameters, and the choice of this run among several.",
            "Everything in the private report: curves, timings, and figures computed on real images.",
            "What an observer of the machine sees: time, memory, power; copies of the run's folder that are continued.",
            "What can be concluded about a population: that is what the model is for.",
        ],
        "versions": {name: version(name) for name in LIBRARIES},
    }
    if warmup := config.train.warmup.mechanisms():
        statement["warmup"] = f"noisy class means ('central images'), {words.central}"
        if config.train.warmup.counts(data.num_classes or 0):
            statement["warmup"] += f", and with them, in the same vector, {COUNTED}"
        bought = {mechanism.name for mechanism in warmup}
        if "central covariances" in bought:
            statement["warmup"] += f"; {words.covariances}"
        if "central cells" in bought:
            statement["warmup"] += f"; {words.cells}"
    return statement | _further(sources, half)


def public_statement(
    config: Config, num_images: int, sources: Sequence[Source] = (), *, half: bool = False
) -> dict[str, Any]:
    """Returns the statement of a public model, all but its ``files``.

    Guarantee: none, and it cannot pass for a private model's: it has no epsilon and no mechanism, so that reports and
    totals refuse it, and ``verify`` says what it is.
    """
    statement = {
        "epsilon": None,
        "delta": None,
        "guarantee": "none: the weights were trained without differential privacy on images that are declared public, "
        "for which no guarantee is needed or given",
        "public_images": {"name": config.data.name, "number": num_images},
        **_nothing_bought(),
        "assumptions": ["The images are public, as whoever trained the model has declared (data.public=true)."],
        "not_covered": [
            "Everything about these images: the weights, and what is drawn from them, may show any of them as it is.",
            *sentences(sources, None),
        ],
        "versions": {name: version(name) for name in LIBRARIES},
    }
    return statement | _further(sources, half)


def _nothing_bought() -> dict[str, Any]:
    """Returns what statements without a guarantee say where others name what was bought."""
    return {
        "unit": None,
        "adjacency": None,
        "accountant": None,
        "dataset_size": None,
        "clipping_norm": None,
        "mechanisms": [],
    }


def _further(sources: Sequence[Source], half: bool) -> dict[str, Any]:
    """Returns what only some statements have: the weights with which training began, and rounding."""
    found: dict[str, Any] = {}
    if half:
        found["rounding"] = ROUNDING
    if sources:
        found["initial_weights"] = [source.as_dict() for source in sources]
    return found


def claim_statement(config: Config, checkpoint_sha256: str) -> dict[str, Any]:
    """Returns the statement of converted weights, all but its ``files``: there is a claim at most, and no guarantee."""
    claimed = config.dp.epsilon is not None
    return {
        "epsilon": None,
        "delta": None,
        "guarantee": "none that could be verified: the weights come from a checkpoint of the original DPDM, which "
        "records neither accountant nor config nor randomness",
        "claim": {
            "epsilon": config.dp.epsilon,
            "delta": config.dp.delta if claimed else None,
            "source": "the config that was given with the checkpoint; nothing in the checkpoint supports it",
        },
        "checkpoint_sha256": checkpoint_sha256,
        "weights": "moving average" if config.model.use_ema else "raw",
        **_nothing_bought(),
        "assumptions": [],
        "not_covered": ["Everything: what these weights, and all images drawn from them, give away is not known here."],
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _assumptions(mechanisms: Sequence[Spend], planned_steps: int) -> list[str]:
    assumptions = [
        "Batches are independent (Poisson) samples and the noise is Gaussian, up to ChaCha20 being "
        "indistinguishable from true randomness by any feasible computation.",
        "The software, the libraries and the machine did what their code says; a statement cannot prove that.",
        "The key, the checkpoints and the ledger stay with the owner of the images.",
        "If several processes trained together, nobody saw what they sent each other: sums of gradients without noise, "
        "not encrypted.",
    ]
    if any(isinstance(spend, Selection) for spend in mechanisms):
        assumptions.append(
            "Of the runs that were not selected nobody saw anything: no weights, no score, no curve, nor how many runs "
            "there were."
        )
    steps = sum(m.num_steps for m in parts(mechanisms) if m.name == "DP-SGD")
    if steps < planned_steps:
        assumptions.append(
            f"Training ended after {steps} of {planned_steps} steps, not because of anything seen in the "
            "images, the curves or the model."
        )
    return assumptions


def _group(epsilon: float, delta: float, size: int, several: str) -> dict[str, Any]:
    group_epsilon, group_delta = accounting.group_privacy(epsilon, delta, size)
    if group_delta >= 1:
        return {"epsilon": None, "delta": 1.0, "note": f"no guarantee for so many {several}"}
    return {"epsilon": group_epsilon, "delta": group_delta}
