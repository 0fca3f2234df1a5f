"""``README.md`` of a release, its model card: what its statement says, for a reader."""

from collections.abc import Mapping
from typing import Any

from dpdm.config import Config
from dpdm.evaluation.guarantee import round_up


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
{_classes_note(config)}{_rounding_note(statement)}
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


def _classes_note(config: Config) -> str:
    if len(set(config.sampler.class_weights)) < 2:
        return ""
    return """
Classes are drawn by their noisy frequencies, which central images told and the guarantee covers
(`sampler.class_weights` in `config.json`); `sampler.class_weights=[]` draws them equally often.
"""


def _rounding_note(statement: Mapping[str, Any]) -> str:
    return "\nThe weights are rounded to float16 and are computed with as float32.\n" if "rounding" in statement else ""
