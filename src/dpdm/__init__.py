"""Differentially private diffusion models: sensitive images in, shareable synthetic images out."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpdm.release import draw_images, load_denoiser

__version__ = version("dpdm")
__all__ = ["__version__", "draw_images", "load_denoiser"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; ``dpdm account`` and ``dpdm --help`` need none of it.
    if name in ("draw_images", "load_denoiser"):
        from dpdm import release

        return getattr(release, name)
    raise AttributeError(f"module 'dpdm' has no attribute {name!r}")
