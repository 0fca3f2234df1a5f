"""What leaves the house: weights, redacted config, statement and model card, by an allow-list.

``release/`` holds these files and no others: ``model.safetensors``, ``config.json``, ``privacy.json``, ``README.md``.
A converted checkpoint of the original gets the same four, and a statement that gives no guarantee; so does a public
model, trained without privacy on public images.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from dpdm import checkpoint, pretrained, reference_checkpoint
from dpdm import config as configs
from dpdm.config import Config
from dpdm.diffusion.adapters import merged
from dpdm.diffusion.denoiser import Denoiser
from dpdm.errors import InputError, RunError
from dpdm.evaluation.guarantee import UNITS, round_up
from dpdm.files import fsync, write_json, write_text
from dpdm.initial import Source, read_sources, sentences
from dpdm.plan import check_public
from dpdm.privacy import accounting
from dpdm.privacy.accounting import Selection, Spend, parts
from dpdm.privacy.ledger import Ledger
from dpdm.released_files import network_shapes, to_half
from dpdm.workdir import Workdir

ALLOWED = ("model.safetensors", "config.json", "privacy.json", "README.md")
SECTIONS = ("data", "model", "loss", "optim", "dp", "train", "sampler")
REDACTED = ("data.path", "model.ckpt", "model.init", "dp.seed", "train.seed", "sampler.seed")  # no paths, no seeds
CONVERTED_SECTIONS = ("data", "model", "loss", "sampler")  # what sampling needs; dp.epsilon would read as a promise
SECURE_NOISE = (
    "noise is added in integers on a public grid and sampled exactly, so that no gap between floats is left to attack "
    "(Mironov 2012)"
)
ROUNDING = "rounded to float16 after training; what is computed from private weights alone gives away no more than they"
FLOAT_NOISE = "Gaussians are float64 Box-Muller, open to attacks on the gaps between floats (Mironov 2012)"
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
        assumptions=(
            "The groups are right: all images that show a person are in one group. Whoever is in several groups is "
            "protected as so many persons are together (see group_privacy).",
        ),
        not_covered=(
            "The public facts: the number of persons, the size of the images, the list of classes and the split.",
            "One image more or less of a person who stays: it is protected as two persons are together (see "
            "group_privacy).",
        ),
    ),
}


def make_release(workdir: Workdir, ema_rate: float | None = None, *, half: bool = False) -> Path:
    """Writes ``release/`` from a run's checkpoint and ledger, then deletes the run's keys; returns the folder.

    Released is the moving average of ``model.ema_rate``, or of another rate that the run kept (``model.ema_rates``).
    All of them are functions of the same mechanisms. A choice made by looking at samples costs nothing; one made by
    looking at real images is not accounted for.

    With ``half`` the weights are rounded to float16, which halves the file.

    Guarantee: every released tensor is a weight of the moving average, a function of the mechanisms in the ledger and
    of the weights that the statement names as their beginning; the statement's epsilon is computed from the ledger.
    Nothing else is read from ``private/``. What was trained without privacy is released if its images were declared
    public, under a statement that gives no guarantee.

    Raises:
        InputError: if there is no run, it is released already, ``dp.seed`` makes its noise public, or no average of
            ``ema_rate`` was kept.
        RunError: if checkpoint, ledger or config are damaged or do not belong together.
    """
    with workdir.lock():  # a run that is still training would go on after its release
        return _make_release(workdir, ema_rate, half=half)


def _make_release(workdir: Workdir, ema_rate: float | None, *, half: bool) -> Path:
    if workdir.release.exists():
        forget_keys(workdir)  # a release that was killed right after its renaming may have left them
        raise InputError(f"Expected no release in {workdir.root}, got one: a run is released once.")
    if not workdir.checkpoint.exists():
        raise InputError(f"Expected a trained model in {workdir.private}, found none: run dpdm train first.")
    config = configs.load([workdir.config])
    if config.dp.seed is not None:
        raise InputError(
            f"Expected dp.seed=null for a release, got {config.dp.seed}: its noise is public; train again."
        )
    state, facts = checkpoint.load(workdir.checkpoint)
    ledger = Ledger(workdir.ledger)
    checkpoint.check_accounted(state, facts, ledger)
    if configs.run_hash(config) not in ledger.header.get("candidates", [ledger.header["config"]]):
        raise RunError(
            f"Expected {workdir.config} as the run was begun with it, got another: the statement would be wrong; undo "
            "the change."
        )
    kept = config.model.ema_rates
    if ema_rate not in (None, config.model.ema_rate, *kept):
        rates = [config.model.ema_rate, *kept]
        raise InputError(f"Expected --ema to be one of {rates}, which the run kept, got {ema_rate}: name another.")
    average = merged(state.average(ema_rate) if ema_rate in kept else state.ema)
    rate = ema_rate if ema_rate is not None else config.model.ema_rate
    config = replace(config, model=replace(config.model, ema_rate=rate, ema_rates=()))
    weights = to_half(average) if half else {name: tensor.contiguous() for name, tensor in average.items()}
    plan, sources = ledger.header["plan"], read_sources(ledger.header["initial_weights"])
    if config.dp.enabled:
        statement = make_statement(config, ledger.mechanisms(), plan, sources, half=half)
        card = model_card(statement, config)
    else:
        check_public(config)
        statement = public_statement(config, plan["dataset_size"], sources, half=half)
        card = public_card(statement, config)
    write_release(workdir, weights, redacted(config), statement, card)
    forget_keys(workdir)
    return workdir.release


def convert(file: Path, config: Config, workdir: Workdir, *, half: bool = False) -> Path:
    """Writes ``release/`` from a checkpoint of the original, rounded to float16 with ``half``; returns the folder.

    Guarantee: none. The statement has no epsilon and no mechanism, so that it cannot pass for a private model's:
    ``verify`` fails on it, reports and totals refuse it.

    Raises:
        InputError: if the file is no such checkpoint or does not fit the config, or there is a run or a release.
    """
    if not file.is_file():
        raise InputError(f"Expected a checkpoint of the original at {file}, found none: check --from.")
    check_unused(workdir)
    network = reference_checkpoint.load_denoiser(file, config).network
    weights = {name: parameter.detach() for name, parameter in network.named_parameters()}
    weights = to_half(weights) if half else weights
    sections = {name: section for name, section in redacted(config).items() if name in CONVERTED_SECTIONS}
    statement = claim_statement(config, _sha256(file))
    if half:
        statement["rounding"] = ROUNDING
    write_release(workdir, weights, sections, statement, claim_card(statement, config))
    return workdir.release


def check_unused(workdir: Workdir) -> None:
    """Raises InputError if there is a run or a release in the folder."""
    for path in (workdir.release, workdir.ledger, workdir.checkpoint):
        if path.exists():
            raise InputError(f"Expected no run and no release in {workdir.root}, got one: choose another --workdir.")


def write_release(
    workdir: Workdir, weights: dict[str, Tensor], config: dict[str, Any], statement: dict[str, Any], card: str
) -> None:
    """Writes the release folder, which appears as a whole or not at all."""
    temporary = workdir.root / ".release.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        checkpoint.write_tensors(weights, temporary / "model.safetensors")
        write_json(temporary / "config.json", config)
        write_text(temporary / "README.md", card)
        statement["files"] = {name: _sha256(temporary / name) for name in ALLOWED if name != "privacy.json"}
        write_json(temporary / "privacy.json", statement)
        fsync(temporary / "model.safetensors")
        temporary.rename(workdir.release)
        fsync(workdir.root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def forget_keys(workdir: Workdir) -> None:
    """Deletes the run's keys from its folder (copies and the disk's old blocks are the owner's business)."""
    for key in (workdir.key, workdir.holdout_key):
        key.unlink(missing_ok=True)


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
        "kernels is not (below 1e-4 of a gradient in tests on a CPU, when another image joins the batch); "
        + (SECURE_NOISE if dp.secure_noise else FLOAT_NOISE),
        "group_privacy": {str(k): _group(epsilon, dp.delta, k, words.several) for k in (2, 5)},
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
        if len(warmup) > 1:
            statement["warmup"] += f"; {words.covariances}"
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
        "unit": None,
        "adjacency": None,
        "accountant": None,
        "dataset_size": None,
        "clipping_norm": None,
        "mechanisms": [],
        "assumptions": ["The images are public, as whoever trained the model has declared (data.public=true)."],
        "not_covered": [
            "Everything about these images: the weights, and what is drawn from them, may show any of them as it is.",
            *sentences(sources, None),
        ],
        "versions": {name: version(name) for name in LIBRARIES},
    }
    return statement | _further(sources, half)


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
        "unit": None,
        "adjacency": None,
        "accountant": None,
        "dataset_size": None,
        "clipping_norm": None,
        "mechanisms": [],
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


def redacted(config: Config) -> dict[str, Any]:
    """Returns the config that may be shared: no paths, no set-up, no seeds."""
    sections = {name: asdict(getattr(config, name)) for name in SECTIONS}
    for key in REDACTED:
        section, name = key.split(".")
        del sections[section][name]
    return json.loads(json.dumps(sections))


def load_denoiser(path: str | Path, config: Config | str | Path | None = None) -> Denoiser:
    """Returns the denoiser of a release or of a checkpoint of the original, in evaluation mode, on the CPU.

    Args:
        path: a release folder, or its ``model.safetensors``, or the original's file; or, where there is no such path,
            the name of a pretrained release (see ``pretrained.names``).
        config: loaded, or the path of its file; replaces a release's own, is needed for a checkpoint of the original.

    Raises:
        InputError: if there is no such model, or weights and config do not fit each other.
    """
    path = pretrained.resolve(Path(path))
    if config is not None and not isinstance(config, Config):
        config = configs.load([config])
    weights = path / "model.safetensors" if path.is_dir() else path
    if not weights.is_file():
        raise InputError(f"Expected a release folder or a weights file at {path}, found none: check model.ckpt.")
    if reference_checkpoint.is_original(weights):
        if config is None:
            raise InputError(
                f"Expected a config for {weights}, which is no release, got none: give the model's, such as --config "
                "configs/mnist_28/sample_eps_1.0.yaml."
            )
        return reference_checkpoint.load_denoiser(weights, config)
    config = config or load_config(weights.parent)
    if not config.model.use_ema:
        raise InputError(f"Expected model.use_ema=true for {weights}, got false: a release holds the average alone.")
    try:
        _check_shapes(weights, config)  # before memory is taken for what a stranger's config asks for
        denoiser = configs.build_denoiser(config)
        denoiser.network.load_state_dict(load_file(weights))
    except (SafetensorError, OSError) as error:
        raise InputError(f"Expected safetensors weights in {weights}, could not read them: {error}.") from None
    except (RuntimeError, LookupError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"Expected weights that fit the config in {weights}, got others: {reason}") from None
    return denoiser.eval()


def _check_shapes(weights: Path, config: Config) -> None:
    with safe_open(weights, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # not a dict
    try:
        expected = network_shapes(config, len(found))
    except ValueError as error:
        raise RuntimeError(f"it {error}") from None
    for name in sorted(found.keys() ^ expected.keys()) + [
        name for name in expected if found.get(name) != expected[name]
    ]:
        raise RuntimeError(
            f"{name} is {found.get(name, 'missing')}, by the config it is {expected.get(name, 'unknown')}"
        )


def own_config(path: Path) -> Path | None:
    """Returns the config file of the release at ``path`` (as ``load_denoiser`` takes it); None if it is no release."""
    path = pretrained.resolve(path)
    if path.is_file() and reference_checkpoint.is_original(path):
        return None
    file = (path if path.is_dir() else path.parent) / "config.json"
    return file if file.is_file() else None


def load_config(release: Path) -> Config:
    """Returns a release's config; what was redacted has its default."""
    path = release / "config.json"
    if not path.is_file():
        raise InputError(f"Expected {path} beside the weights, found none: give --config.")
    return configs.load([path])


def model_card(statement: dict[str, Any], config: Config) -> str:
    data = config.data
    classes = f", {data.num_classes} classes" if data.num_classes else ""
    images, label = f"{statement['dataset_size']} private images", " and its label"
    if data.unit == "group":
        images, label = f"the private images of {statement['dataset_size']} persons", ""
    mechanisms = "\n".join(line for entry in statement["mechanisms"] for line in _bullets(entry))
    beginning = _beginning(statement)
    return f"""# {data.name or "Private images"}: a differentially private diffusion model

A model of {data.resolution} x {data.resolution} images with {data.num_channels} channel(s){classes}, trained by dpdm
{statement["versions"]["dpdm"]} on {images}. The weights, and every image drawn from
them, are ({round_up(statement["epsilon"])}, {statement["delta"]:g})-differentially private with respect to
adding or removing {statement["unit"]}{label}, under the assumptions in `privacy.json`.
{beginning}
{mechanisms}
{_rounding_note(statement)}
What is assumed and what is not covered stands in `privacy.json`. Check it by `dpdm verify .`; draw images by
`dpdm sample --workdir OUT -- model.ckpt=. sampler.num_images=100`.
"""


def public_card(statement: Mapping[str, Any], config: Config) -> str:
    data, images = config.data, statement["public_images"]
    classes = f", {data.num_classes} classes" if data.num_classes else ""
    return f"""# {images["name"]}: a public diffusion model, without privacy

A model of {data.resolution} x {data.resolution} images with {data.num_channels} channel(s){classes}, trained by dpdm
{statement["versions"]["dpdm"]} on {images["number"]} images that are declared public.

**There is no privacy guarantee.** The model was trained without differential privacy: it may show any of these images
as it is. `dpdm verify --public .` says so.
{_beginning(statement)}{_rounding_note(statement)}
Begin a private training with it by `dpdm train ... -- model.init=.`; draw images by
`dpdm sample --workdir OUT -- model.ckpt=. sampler.num_images=100`.
"""


def _beginning(statement: Mapping[str, Any]) -> str:
    """Returns the paragraph of a model card on the weights with which training began."""
    kinds = [f"a {source['kind']} ({source['images'] or 'no name'})" for source in statement.get("initial_weights", [])]
    if not kinds:
        return ""
    then = "".join(f", and that with {kind}" for kind in kinds[1:])
    return f"\nTraining began with the weights of {kinds[0]}{then}; `privacy.json` says whom that leaves uncovered.\n"


def _bullets(entry: Mapping[str, Any]) -> list[str]:
    """Returns a mechanism of a statement as a line, a selection as one and those of what it repeats."""
    if "base" in entry:
        head = (
            f"- {entry['name']}: {entry['mean_runs']:g} runs on average ({entry['distribution']}), of which the one of "
            "the best noisy score was kept; each of"
        )
        return [head, *(f"  {line}" for part in entry["base"] for line in _bullets(part))]
    return [
        f"- {entry['name']}: {entry['num_steps']} uses, sampling rate {entry['sampling_rate']:.4g}, noise multiplier "
        f"{entry['noise_multiplier']:g}"
    ]


def claim_card(statement: Mapping[str, Any], config: Config) -> str:
    data, claim = config.data, statement["claim"]
    classes = f", {data.num_classes} classes" if data.num_classes else ""
    said = "It was given without a claim."
    if claim["epsilon"] is not None:
        said = f"The config that was given with it claims epsilon {claim['epsilon']:g} at delta {claim['delta']:g}."
    return f"""# {data.name or "Images"}: a diffusion model, converted

A model of {data.resolution} x {data.resolution} images with {data.num_channels} channel(s){classes}, converted by dpdm
{statement["versions"]["dpdm"]} from a checkpoint of the original DPDM.

**No privacy guarantee of this model can be verified.** The checkpoint records neither how it was trained nor what was
spent. {said}
Nothing in the checkpoint could support or refute a claim, and `dpdm verify .` says so.
{_rounding_note(statement)}
Draw images by `dpdm sample --workdir OUT -- model.ckpt=. sampler.num_images=100`.
"""


def _rounding_note(statement: Mapping[str, Any]) -> str:
    return "\nThe weights are rounded to float16 and are computed with as float32.\n" if "rounding" in statement else ""


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
