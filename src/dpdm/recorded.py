"""Drawing on a GPU: the denoiser by the kernels of training, recorded once as a CUDA graph and then replayed.

A forward pass is some hundreds of kernels. For hundreds of images the host takes longer to start them than the GPU to
run them; a graph starts them all at once.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dpdm.diffusion.denoiser import Denoiser
from dpdm.privacy import gpu_layers
from dpdm.privacy.layers import per_example


def recorded(denoiser: Denoiser) -> Denoiser:
    """Returns, on a GPU, a denoiser that replays this one, sharing its weights; elsewhere ``denoiser`` itself."""
    return RecordedDenoiser(denoiser) if next(denoiser.parameters()).is_cuda else denoiser


class RecordedDenoiser(Denoiser):
    """Denoises as the one it was made of, without gradients, and up to the rounding of other kernels.

    The recording is of the last shape that was asked for, and stays true when weights change in place. It is of no use
    if they are moved, or other tensors put in their place.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__(
            denoiser.network,
            denoiser.kind,
            sigma_data=denoiser.sigma_data,
            beta_min=denoiser.beta_min,
            beta_d=denoiser.beta_d,
        )
        self.training = denoiser.training  # which the network shares
        self._recording: tuple[Any, _Recording] | None = None
        self._records = True

    @torch.no_grad()
    def forward(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None = None) -> Tensor:
        """As of Denoiser."""
        autocast = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None
        asked = x.shape, x.dtype, x.device, labels is None, autocast, self.network.training
        if self._records and len(x) and (self._recording is None or self._recording[0] != asked):
            self._recording = None  # its memory is needed
            try:
                self._recording = asked, _Recording(self, x, labels, autocast)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self._records = False
                print(f"dpdm: No CUDA graph here, so that drawing takes longer: {str(error)[:200]}", file=sys.stderr)
        if not self._records or not len(x) or self._recording is None:
            return self.denoise(x, sigma, labels)
        return self._recording[1].replay(x, sigma, labels)

    def denoise(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None) -> Tensor:
        """As ``forward``, without a recording, by the rules of training where these have kernels of their own."""
        rules: AbstractContextManager[Any] = nullcontext()
        if len(x) and gpu_layers.fits(x):
            rules = per_example(dict(self.network.named_parameters()), 1)
        with torch.no_grad(), rules:
            return super().forward(x, sigma, labels)


class _Recording:
    """One shape's graph, and the tensors that it reads and writes."""

    def __init__(
        self, denoiser: RecordedDenoiser, x: Tensor, labels: Tensor | None, autocast: torch.dtype | None
    ) -> None:
        self.x = x.clone()
        self.sigma = x.new_ones(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
        self.labels = None if labels is None else labels.clone()
        given = self.x, self.sigma, self.labels
        beside = _stream(x.device)
        # Without the cache of weights in autocast's type: it would be gone when the graph is replayed.
        kind = autocast or torch.bfloat16
        with (
            torch.cuda.device(x.device),
            torch.autocast("cuda", kind, enabled=autocast is not None, cache_enabled=False),
        ):
            beside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(beside):
                denoiser.denoise(*given)  # loads kernels, which cannot be recorded
            torch.cuda.current_stream().wait_stream(beside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=beside):
                self.out = denoiser.denoise(*given)

    def replay(self, x: Tensor, sigma: Tensor | float, labels: Tensor | None) -> Tensor:
        self.x.copy_(x)
        self.sigma.copy_(sigma) if isinstance(sigma, Tensor) else self.sigma.fill_(sigma)
        if self.labels is not None and labels is not None:
            self.labels.copy_(labels)
        self.graph.replay()
        return self.out.clone()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """Returns the one on which a device records: the libraries keep some memory for each that they see."""
    return torch.cuda.Stream(device)
