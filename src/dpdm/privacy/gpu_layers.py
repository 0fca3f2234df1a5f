"""The per-example rules of ``layers`` on a GPU, by Triton's kernels, pixels first.

Why not torch's own operations: cuDNN converts between layouts in each convolution, and its grouped weight gradients
have no fast way. Here all that a rule hands on is in torch.channels_last, which the operations between keep.
"""

import sys
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = False  # tests set it, to run the kernels on a CPU; a run's steps must not depend on the environment


def fits(x: Tensor) -> bool:
    """Whether the rules here are for ``x``: on a GPU where Triton works, and not in float64."""
    return (x.is_cuda or INTERPRETED) and x.dtype in TYPES and _triton_works(x.device, x.dtype)


@cache
def _triton_works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton is there and its largest kernels compile, for which it needs a C compiler, too, and run."""
    if find_spec("triton") is None:
        return False
    try:
        from dpdm.privacy import kernels

        x = torch.ones(2, 16, 64, device=device, dtype=dtype)
        ones = torch.ones(64, device=device)
        normed, affine, mean, rstd = kernels.group_norm(x, 16, ones, ones, 1e-6, silu=False)
        back = kernels.group_norm_backward(normed, x, affine, mean, rstd, ones, silu=False)[0]
        rows = kernels.conv_weight_gradients(x + back, normed, (4, 4), 2, 3).flatten(1)  # of images that are 1
        norms = kernels.squared_norms(rows)
        # Each weight sees 9, 12 or 16 of the 16 pixels.
        return bool((norms == 64 * 64 * (4 * 81 + 4 * 144 + 256)).all()) and bool(
            (kernels.weighted_sum(rows, norms) == norms[0] * rows.double().sum(0)).all()
        )
    except Exception as error:  # of any kind: the other rules do as well, in more time
        print(f"dpdm: Triton does not work here, so that steps take longer: {str(error)[:200]}", file=sys.stderr)
        return False


def fits_conv2d(x: Tensor, weight: Tensor, geometry: tuple[Any, Any, Any]) -> bool:
    """Whether a convolution of ``geometry`` (stride, padding, dilation) keeps the side, by 1 or 3 pixels."""
    side = weight.shape[2]
    same = ((1, 1), (side // 2, side // 2), (1, 1))
    return fits(x) and weight.shape[2:] in ((1, 1), (3, 3)) and geometry == same


class Conv2d(torch.autograd.Function):
    """Arguments as of ``layers``' own rule."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, parameters: tuple[Tensor, Tensor | None], collector: Any
    ) -> Tensor:
        ctx.parameters, ctx.collector = parameters, collector
        weight, bias = parameters
        x = x.contiguous(memory_format=torch.channels_last)
        cast = weight.to(x.dtype)
        shift = None if bias is None else bias.to(x.dtype)
        ctx.save_for_backward(x, cast)
        if weight.shape[2] == 1:
            return F.linear(x.permute(0, 2, 3, 1), cast.flatten(1), shift).permute(0, 3, 1, 2)
        out = F.conv2d(x, cast, shift, padding=weight.shape[2] // 2)
        return out.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from dpdm.privacy import kernels

        x, cast = ctx.saved_tensors
        (weight, bias), num_examples = ctx.parameters, ctx.collector.num_examples
        draws, size = ctx.collector.num_draws(len(x)), weight.shape[2]
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = None
        if ctx.needs_input_grad[1] and size == 1:
            grad_x = (grad.permute(0, 2, 3, 1) @ cast.flatten(1)).permute(0, 3, 1, 2)
        elif ctx.needs_input_grad[1]:
            margin = (size // 2, size // 2)
            grad_x = torch.ops.aten.convolution_backward(
                grad, x, cast, None, (1, 1), margin, (1, 1), False, (0, 0), 1, (True, False, False)
            )[0]
        shown, wanted = _pixels_first(x), _pixels_first(grad)
        found = kernels.conv_weight_gradients(shown, wanted, (x.shape[2], x.shape[3]), num_examples, size)
        ctx.collector.add(weight, found)
        if bias is not None:
            by_draw = wanted.view(draws, num_examples, *wanted.shape[1:])
            ctx.collector.add(bias, by_draw.sum((0, 2), dtype=torch.float32))
        return None, grad_x, None, None


class GroupNorm(torch.autograd.Function):
    """Group norm, and SiLU after it if asked for; arguments as of ``layers``' own rule."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        num_groups: int,
        parameters: tuple[Tensor, Tensor],
        eps: float,
        silu: bool,
        collector: Any,
    ) -> Tensor:
        from dpdm.privacy import kernels

        ctx.parameters, ctx.collector, ctx.silu = parameters, collector, silu
        weight, bias = parameters
        x = x.contiguous(memory_format=torch.channels_last)
        out, *kept = kernels.group_norm(_pixels_first(x), num_groups, weight, bias, eps, silu=silu)
        ctx.save_for_backward(x, *kept)
        return _images(out, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from dpdm.privacy import kernels

        x, affine, mean, rstd = ctx.saved_tensors
        weight, bias = ctx.parameters
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x, of_weight, of_bias = kernels.group_norm_backward(
            _pixels_first(grad), _pixels_first(x), affine, mean, rstd, weight, silu=ctx.silu
        )
        by_draw = (ctx.collector.num_draws(len(x)), ctx.collector.num_examples, -1)
        ctx.collector.add(weight, of_weight.view(by_draw).sum(0))
        ctx.collector.add(bias, of_bias.view(by_draw).sum(0))
        return None, _images(grad_x, x), None, None, None, None, None


def _pixels_first(x: Tensor) -> Tensor:
    """Returns images (N, C, H, W) in torch.channels_last as (N, H W, C), without a copy."""
    return x.permute(0, 2, 3, 1).reshape(len(x), -1, x.shape[1])


def _images(pixels: Tensor, like: Tensor) -> Tensor:
    """Returns (N, H W, C) as images (N, C, H, W) in torch.channels_last, without a copy."""
    return pixels.view(len(like), *like.shape[2:], like.shape[1]).permute(0, 3, 1, 2)
