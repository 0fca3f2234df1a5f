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
        normed, mean, rstd = kernels.group_norm(x, 16, ones, ones, 1e-6, silu=False)
        back = kernels.group_norm_backward(normed, x, mean, rstd, ones, ones, silu=False)[0]
        shift, given = torch.zeros(2, 64, device=device), (x, mean, rstd, ones, ones)
        kernels.group_norm(x, 16, ones, ones, 1e-6, silu=True, shift=shift)
        kernels.group_norm_backward(normed, *given, silu=True, shift=shift, beside=x)
        kernels.residual_backward(kernels.residual(x, ones, kernels.double(kernels.halve(x, 2, 0.25), 2, 1.0)))
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
        ctx.save_for_backward(x, cast)
        return _convolve(x, cast, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, cast = ctx.saved_tensors
        weight, bias = ctx.parameters
        grad = grad.contiguous(memory_format=torch.channels_last)
        if bias is not None and ctx.collector.wants(bias):
            by_draw = _pixels_first(grad).unflatten(0, (-1, ctx.collector.num_examples))
            ctx.collector.add(bias, by_draw.sum((0, 2), dtype=torch.float32))
        return None, _convolution_gradients(ctx, grad, x, weight, cast), None, None


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
        return _norm(ctx, x, num_groups, parameters, eps, silu, collector)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, _norm_gradients(ctx, grad, None), None, None, None, None, None


class GroupNormBeside(torch.autograd.Function):
    """Group norm with SiLU, and its input; the gradients of both are added in one pass over them."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        num_groups: int,
        parameters: tuple[Tensor, Tensor],
        eps: float,
        collector: Any,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        out, x = _norm(ctx, x, num_groups, parameters, eps, True, collector)
        return out, x.view_as(x)

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor | None, beside: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, beside, None, None, None, None
        return None, _norm_gradients(ctx, grad, beside), None, None, None, None


class ConvNormSilu(torch.autograd.Function):
    """Convolution, a shift of each image's channels, group norm and SiLU: the sum is never written to memory."""

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        shift: Tensor,
        parameters: tuple[Tensor, Tensor, Tensor, Tensor],
        num_groups: int,
        eps: float,
        collector: Any,
    ) -> Tensor:
        from dpdm.privacy import kernels

        ctx.parameters, ctx.collector, ctx.shift_type = parameters, collector, shift.dtype
        weight, bias, norm_weight, norm_bias = parameters
        x = x.contiguous(memory_format=torch.channels_last)
        cast = weight.to(x.dtype)
        h = _convolve(x, cast, None)
        moved = (shift.float() + bias.float()).contiguous()
        out, *kept = kernels.group_norm(
            _pixels_first(h), num_groups, norm_weight, norm_bias, eps, silu=True, shift=moved
        )
        ctx.save_for_backward(x, cast, h, moved, *kept)
        return _images(out, h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from dpdm.privacy import kernels

        x, cast, h, moved, mean, rstd = ctx.saved_tensors
        weight, bias, norm_weight, norm_bias = ctx.parameters
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_h, of_weight, of_bias, of_shift = kernels.group_norm_backward(
            _pixels_first(grad), _pixels_first(h), mean, rstd, norm_weight, norm_bias, silu=True, shift=moved
        )
        assert of_shift is not None
        _add_by_image(ctx.collector, (norm_weight, of_weight), (norm_bias, of_bias), (bias, of_shift))
        grad_x = _convolution_gradients(ctx, _images(grad_h, h), x, weight, cast)
        return None, grad_x, of_shift.to(ctx.shift_type), None, None, None, None


class ConvResidual(torch.autograd.Function):
    """(other + convolution) / sqrt(2)."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x: Tensor, other: Tensor, parameters: tuple[Tensor, Tensor], collector: Any
    ) -> Tensor:
        from dpdm.privacy import kernels

        ctx.parameters, ctx.collector = parameters, collector
        weight, bias = parameters
        x, other = (t.contiguous(memory_format=torch.channels_last) for t in (x, other))
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        h = _convolve(x, cast, None)
        return _images(kernels.residual(_pixels_first(h), bias, _pixels_first(other)), h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        from dpdm.privacy import kernels

        x, cast = ctx.saved_tensors
        weight, bias = ctx.parameters
        grad = grad.contiguous(memory_format=torch.channels_last)
        found, of_bias = kernels.residual_backward(_pixels_first(grad))
        part = _images(found, grad)
        _add_by_image(ctx.collector, (bias, of_bias))
        return None, _convolution_gradients(ctx, part, x, weight, cast), part, None, None


class Halve(torch.autograd.Function):
    """As ``functions.halve``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _halved(x, 0.25)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _doubled(grad, 0.25)


class Double(torch.autograd.Function):
    """As ``functions.double``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _doubled(x, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _halved(grad, 1.0)


def _halved(x: Tensor, factor: float) -> Tensor:
    """Returns sums over squares of 2 by 2 pixels of images x (N, C, 2 H, 2 W), times ``factor``, (N, C, H, W)."""
    from dpdm.privacy import kernels

    x = x.contiguous(memory_format=torch.channels_last)
    height, width = x.shape[2] // 2, x.shape[3] // 2
    small = kernels.halve(_pixels_first(x), width, factor)
    return small.view(len(x), height, width, -1).permute(0, 3, 1, 2)


def _doubled(x: Tensor, factor: float) -> Tensor:
    """Returns images x (N, C, H, W), each pixel as a square of 2 by 2, times ``factor``, (N, C, 2 H, 2 W)."""
    from dpdm.privacy import kernels

    x = x.contiguous(memory_format=torch.channels_last)
    large = kernels.double(_pixels_first(x), x.shape[3], factor)
    return large.view(len(x), 2 * x.shape[2], 2 * x.shape[3], -1).permute(0, 3, 1, 2)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns the convolution of x (N, C, H, W), which keeps the side, as x in torch.channels_last."""
    if weight.shape[2] == 1:
        return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
    out = F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)
    return out.contiguous(memory_format=torch.channels_last)


def _convolution_gradients(ctx: Any, grad: Tensor, x: Tensor, weight: Tensor, cast: Tensor) -> Tensor | None:
    """Adds a convolution's weight gradients to the collector; returns its input's gradient, if that is needed.

    Args:
        ctx: of the rule: which inputs need a gradient, x being the second, and the collector.
        grad: of the convolution's output, in torch.channels_last, as x.
        x: its input.
        weight: the parameter.
        cast: its values, of x's type.
    """
    from dpdm.privacy import kernels

    size, grad_x = weight.shape[2], None
    if ctx.needs_input_grad[1] and size == 1:
        grad_x = (grad.permute(0, 2, 3, 1) @ cast.flatten(1)).permute(0, 3, 1, 2)
    elif ctx.needs_input_grad[1]:
        margin = (size // 2, size // 2)
        grad_x = torch.ops.aten.convolution_backward(
            grad, x, cast, None, (1, 1), margin, (1, 1), False, (0, 0), 1, (True, False, False)
        )[0]
    num_examples = ctx.collector.num_examples
    ctx.collector.num_draws(len(x))  # refuses what is no whole number of draws
    if not ctx.collector.wants(weight):
        return grad_x
    found = kernels.conv_weight_gradients(
        _pixels_first(x), _pixels_first(grad), (x.shape[2], x.shape[3]), num_examples, size
    )
    ctx.collector.add(weight, found)
    return grad_x


def _norm(
    ctx: Any, x: Tensor, num_groups: int, parameters: tuple[Tensor, Tensor], eps: float, silu: bool, collector: Any
) -> tuple[Tensor, Tensor]:
    """Returns the normed images, and x in torch.channels_last."""
    from dpdm.privacy import kernels

    ctx.parameters, ctx.collector, ctx.silu = parameters, collector, silu
    x = x.contiguous(memory_format=torch.channels_last)
    out, *kept = kernels.group_norm(_pixels_first(x), num_groups, *parameters, eps, silu=silu)
    ctx.save_for_backward(x, *kept)
    return _images(out, x), x


def _norm_gradients(ctx: Any, grad: Tensor, beside: Tensor | None) -> Tensor:
    """Adds the parameters' gradients to the collector; returns the input's, with what it has ``beside``."""
    from dpdm.privacy import kernels

    x, mean, rstd = ctx.saved_tensors
    weight, bias = ctx.parameters
    grad = grad.contiguous(memory_format=torch.channels_last)
    if beside is not None:
        beside = _pixels_first(beside.contiguous(memory_format=torch.channels_last))
    grad_x, of_weight, of_bias, _ = kernels.group_norm_backward(
        _pixels_first(grad), _pixels_first(x), mean, rstd, weight, bias, silu=ctx.silu, beside=beside
    )
    _add_by_image(ctx.collector, (weight, of_weight), (bias, of_bias))
    return _images(grad_x, x)


def _add_by_image(collector: Any, *gradients: tuple[Tensor, Tensor]) -> None:
    """Takes parameters and their gradients by image, (K B, C)."""
    for parameter, found in gradients:
        collector.add(parameter, found.view(collector.num_draws(len(found)), collector.num_examples, -1).sum(0))


def _pixels_first(x: Tensor) -> Tensor:
    """Returns images (N, C, H, W) in torch.channels_last as (N, H W, C), without a copy."""
    return x.permute(0, 2, 3, 1).reshape(len(x), x.shape[2] * x.shape[3], x.shape[1])


def _images(pixels: Tensor, like: Tensor) -> Tensor:
    """Returns (N, H W, C) as images (N, C, H, W) in torch.channels_last, without a copy."""
    return pixels.view(len(like), *like.shape[2:], like.shape[1]).permute(0, 3, 1, 2)
