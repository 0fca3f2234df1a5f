"""Differentially private diffusion models: sensitive images in, shareable synthetic images out."""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpdm.release import load_denoiser

__version__ = version("dpdm")
__all__ = ["__version__", "load_denoiser"]


def __getattr__(name: str) -> Any:
    # torch takes seconds to import; ``dpdm account`` and ``dpdm --help`` need none of it.
    if name == "load_denoiser":
        from dpdm.release import load_denoiser

        return load_denoiser
    raise AttributeError(f"module 'dpdm' has no attribute {name!r}")
