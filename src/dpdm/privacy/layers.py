"""Per-example gradients in one ordinary backward pass, for any network made of the layers below.

Inside ``per_example(parameters, num_examples)`` each use of a parameter by ``conv2d``, ``linear``, ``group_norm``,
``embedding`` or what ``dpdm.functions`` makes of them is given a backward rule that computes the parameter's gradient
for each example, (B, *shape), in place of their sum, and hands it to the collector. Any other use of a parameter is
refused by name, so that no gradient can pass unclipped.

The batch is *draw-major*: K draws of B examples lie at position k * B + b. A convolution's (K B, C, H, W) input is
then, without a copy, a (K, B C, H, W) one, and the per-example weight gradient is the weight gradient of *one*
grouped convolution with B groups. See Rochette et al. 2019 (arXiv 1912.06015) for grouped per-example convolutions.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name

from dpdm.functions import (
    conv2d_norm_silu,
    conv2d_residual,
    double,
    group_norm_silu,
    group_norm_silu_beside,
    halve,
)
from dpdm.privacy import gpu_layers

POINTWISE = ((1, 1), (0, 0), (1, 1))  # stride, padding and dilation with which a kernel of one pixel is a product
LARGEST_GRID = 2**16 - 1  # groups of all images together that torch's backward pass of group norm takes on a GPU
FEW_CHANNELS = 4  # an image's own: products of patches then beat grouped convolutions


class PerExampleGradients:
    """Collects, while one backward pass goes through the network, each parameter's gradients, one per example."""

    def __init__(self, parameters: Mapping[str, Tensor], num_examples: int) -> None:
        self.num_examples = num_examples
        self._parameters = list(parameters.values())
        self._wanted = {id(parameter) for parameter in self._parameters}
        self._found: dict[int, Tensor] = {}
        # An input of every layer with a rule, so that autograd visits all of them; it has no gradient of its own.
        device = self._parameters[0].device if self._parameters else None
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def of(self, loss: Tensor) -> list[Tensor]:
        """Returns the gradients of a sum of per-example losses, (B, *shape) for each parameter, in order.

        They have the type in which the layer computed, float32 or that of torch.autocast; a parameter that was not
        used has zeros.
        """
        torch.autograd.grad(loss, self.anchor, allow_unused=True)
        found = [self._found.get(id(p)) for p in self._parameters]
        self._found = {}
        return [
            p.new_zeros(self.num_examples, *p.shape) if g is None else g
            for p, g in zip(self._parameters, found, strict=True)
        ]

    def wants(self, parameter: Tensor) -> bool:
        """Whether it is to be differentiated: a layer may have others, which are frozen."""
        return id(parameter) in self._wanted

    def add(self, parameter: Tensor, gradients: Tensor) -> None:
        """Takes what one use of ``parameter`` gave, (B, *shape); does nothing if it is not wanted."""
        if not self.wants(parameter):
            return
        before = self._found.get(id(parameter))
        self._found[id(parameter)] = gradients if before is None else before + gradients

    def num_draws(self, rows: int) -> int:
        """Returns K for a batch axis of K B rows."""
        if rows % self.num_examples:
            raise ValueError(f"Expected the batch axis to be a multiple of {self.num_examples} examples, got {rows}.")
        return rows // self.num_examples


@contextmanager
def per_example(parameters: Mapping[str, Tensor], num_examples: int) -> Iterator[PerExampleGradients]:
    """Yields the collector of what a network inside computes: ``collector.of(losses.sum())`` are the gradients.

    Guarantee: with a loss that is a sum of per-example losses, row b of a parameter's gradients is the gradient of
    example b's own loss. Batch norm, instance norm and every use of a parameter by another way are refused. (A network
    that mixes examples without a parameter, by ``x.mean(0)`` say, is not noticed here; ours is tested not to.)

    Args:
        parameters: by name; those to be differentiated.
        num_examples: B >= 1. The first axis of every layer's input must be K * B, draw-major.

    Raises:
        ValueError: from a use of a parameter that has no rule; it names the operation and the parameter.
    """
    collector = PerExampleGradients(parameters, num_examples)
    with _PerExampleMode({id(parameter): name for name, parameter in parameters.items()}, collector):
        yield collector


class _PerExampleMode(TorchFunctionMode):
    """Sends layers to their per-example rules and refuses every other use of a parameter."""

    def __init__(self, names: dict[int, str], collector: PerExampleGradients) -> None:
        super().__init__()
        self._names, self._collector = names, collector

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = [*args, *kwargs.values()]
        given += [item for value in given if isinstance(value, list | tuple) for item in value]
        used = [id(value) for value in given if isinstance(value, Tensor) and id(value) in self._names]
        if func in COUPLING:
            raise ValueError(
                f"Expected layers that treat each example alone, got {resolve_name(func)}: use group norm."
            )
        if func in WITHOUT_PARAMETERS and gpu_layers.fits(args[0]):
            return WITHOUT_PARAMETERS[func](*args)
        if not used or func in HARMLESS:
            return func(*args, **kwargs)
        if func not in RULES:
            raise ValueError(
                f"Expected a per-example gradient rule for {resolve_name(func)}, which uses parameter "
                f"{self._names[used[0]]}, got none: use conv2d, linear, group_norm or embedding."
            )
        return RULES[func](self._collector, *args, **kwargs)


def _conv2d(
    collector: PerExampleGradients,
    input: Tensor,  # torch's own name, callers pass it by keyword
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    pairs = [(value, value) if isinstance(value, int) else tuple(value) for value in (stride, padding, dilation)]
    geometry = (pairs[0], pairs[1], pairs[2])
    if groups != 1:
        raise ValueError(f"Expected conv2d with groups=1, got {groups}: no per-example rule is written for it.")
    x = _autocast(input)
    if gpu_layers.fits_conv2d(x, weight, geometry):
        return gpu_layers.Conv2d.apply(collector.anchor, x, (weight, bias), collector)  # type: ignore
    return _Conv2d.apply(collector.anchor, x, (weight, bias), geometry, collector)  # type: ignore


def _linear(collector: PerExampleGradients, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(collector.anchor, _autocast(input), (weight, bias), collector)  # type: ignore[no-any-return]


def _group_norm(
    collector: PerExampleGradients,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if weight is None or bias is None:
        raise ValueError("Expected group_norm with both weight and bias, or with neither.")
    if gpu_layers.fits(input) and input.dim() == 4:
        return gpu_layers.GroupNorm.apply(  # type: ignore
            collector.anchor, input, num_groups, (weight, bias), eps, False, collector
        )
    return _GroupNorm.apply(collector.anchor, input, num_groups, (weight, bias), eps, collector)  # type: ignore


def _group_norm_silu(
    collector: PerExampleGradients, input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> Tensor:
    if gpu_layers.fits(input) and input.dim() == 4:
        return gpu_layers.GroupNorm.apply(  # type: ignore
            collector.anchor, input, num_groups, (weight, bias), eps, True, collector
        )
    return F.silu(_group_norm(collector, input, num_groups, weight, bias, eps))


def _group_norm_silu_beside(
    collector: PerExampleGradients, input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if gpu_layers.fits(input) and input.dim() == 4:
        return gpu_layers.GroupNormBeside.apply(  # type: ignore
            collector.anchor, input, num_groups, (weight, bias), eps, collector
        )
    return _group_norm_silu(collector, input, num_groups, weight, bias, eps), input


def _conv2d_norm_silu(
    collector: PerExampleGradients,
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    num_groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    x, margin = _autocast(input), weight.shape[2] // 2
    if gpu_layers.fits_conv2d(x, weight, ((1, 1), (margin, margin), (1, 1))):
        return gpu_layers.ConvNormSilu.apply(  # type: ignore
            collector.anchor, x, shift, (weight, bias, norm_weight, norm_bias), num_groups, eps, collector
        )
    h = _conv2d(collector, input, weight, bias, padding=margin) + shift[:, :, None, None]
    return _group_norm_silu(collector, h, num_groups, norm_weight, norm_bias, eps)


def _conv2d_residual(
    collector: PerExampleGradients, input: Tensor, weight: Tensor, bias: Tensor, other: Tensor
) -> Tensor:
    x, margin = _autocast(input), weight.shape[2] // 2
    if gpu_layers.fits_conv2d(x, weight, ((1, 1), (margin, margin), (1, 1))):
        return gpu_layers.ConvResidual.apply(  # type: ignore
            collector.anchor, x, _autocast(other), (weight, bias), collector
        )
    return (other + _conv2d(collector, input, weight, bias, padding=margin)) / math.sqrt(2.0)


def _embedding(
    collector: PerExampleGradients,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq or sparse or padding_idx is not None:
        raise ValueError("Expected a plain embedding (no padding_idx, max_norm, scale_grad_by_freq or sparse).")
    return _Embedding.apply(collector.anchor, input, (weight,), collector)  # type: ignore[no-any-return]


def _autocast(x: Tensor) -> Tensor:
    """Returns x in the type of torch.autocast where that is on, as torch does for these layers' own functions."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


# The rules. Each is given the anchor first, which gets no gradient, and the parameters in a tuple, where autograd does
# not look for inputs: their gradients go to the collector.


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        parameters: tuple[Tensor, Tensor | None],
        geometry: tuple[Any, Any, Any],
        collector: PerExampleGradients,
    ) -> Tensor:
        ctx.parameters, ctx.geometry, ctx.collector = parameters, geometry, collector
        weight, bias = parameters
        cast = weight.to(x.dtype)
        shift = None if bias is None else bias.to(x.dtype)
        ctx.save_for_backward(x, cast)
        if weight.shape[2:] == (1, 1) and geometry == POINTWISE:
            product = cast.flatten(1) @ x.flatten(2)
            product = product if shift is None else product.add_(shift[:, None])
            return product.unflatten(2, x.shape[2:])
        return F.conv2d(x, cast, shift, *geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, cast = ctx.saved_tensors
        (weight, bias), num_examples = ctx.parameters, ctx.collector.num_examples
        draws = ctx.collector.num_draws(len(x))
        grad = grad.contiguous()
        grad_x = _input_gradient(x, grad, cast, ctx.geometry) if ctx.needs_input_grad[1] else None
        if ctx.collector.wants(weight):
            ctx.collector.add(weight, _weight_gradients(x, grad, (num_examples, *weight.shape), ctx.geometry))
        if bias is not None:
            ctx.collector.add(bias, grad.sum((2, 3)).view(draws, num_examples, -1).sum(0))
        return None, grad_x, None, None, None


def _input_gradient(x: Tensor, grad: Tensor, weight: Tensor, geometry: tuple[Any, Any, Any]) -> Tensor:
    """Returns a convolution's gradient with respect to its input, of x's shape and in the usual layout."""
    if weight.shape[2:] == (1, 1) and geometry == POINTWISE:
        turned = weight.flatten(1).t().expand(len(x), -1, -1)
        return torch.bmm(turned, grad.flatten(2)).view(x.shape)
    # Only its shape and layout are read. Where x is channels_last the gradient would be, too, and cost copies later.
    like = x if x.is_contiguous() else grad.new_empty(x.shape)
    return torch.ops.aten.convolution_backward(
        grad, like, weight, None, *geometry, False, (0, 0), 1, (True, False, False)
    )[0]


def _weight_gradients(x: Tensor, grad: Tensor, shape: tuple[int, ...], geometry: tuple[Any, Any, Any]) -> Tensor:
    """Returns a convolution's weight gradient for each example, of ``shape`` (B, O, I, h, w).

    In general by one grouped convolution: draws are its batch, (example, channel) pairs its channels. Where one side
    has few channels, or the kernel one pixel, a product of matrices for each image is faster: of that side's patches
    with the other side's channels.
    """
    num_examples, out_channels, in_channels = shape[:3]
    kernel: tuple[int, int] = (shape[3], shape[4])
    draws = len(x) // num_examples
    stride, padding, dilation = geometry
    margin = (kernel[0] - 1 - padding[0], kernel[1] - 1 - padding[1])
    if kernel == (1, 1) and geometry == POINTWISE:
        # Pixels first: a view of x in the usual layout, and in torch.channels_last.
        found = grad.flatten(2) @ x.permute(0, 2, 3, 1).flatten(1, 2)
    elif in_channels <= FEW_CHANNELS:
        patches = F.unfold(x, kernel, dilation, padding, stride)  # (K B, I h w, pixels)
        found = grad.flatten(2) @ patches.transpose(1, 2)
    elif out_channels <= FEW_CHANNELS and stride == dilation == (1, 1) and min(margin) >= 0:
        # The same sum over pixels, seen from the input's: the gradient's patches, each turned by half a circle.
        patches = F.unfold(grad, kernel, 1, margin)
        turned = patches.unflatten(1, (out_channels, -1)).flip(2)
        found = (turned.flatten(1, 2) @ x.flatten(2).transpose(1, 2)).unflatten(1, (out_channels, -1)).transpose(2, 3)
    else:
        # Only shapes of the weight are read.
        return torch.ops.aten.convolution_backward(
            grad.reshape(draws, num_examples * out_channels, *grad.shape[2:]),
            x.reshape(draws, num_examples * in_channels, *x.shape[2:]),
            grad.new_empty(num_examples * out_channels, in_channels, *kernel),
            None,
            *geometry,
            False,
            (0, 0),
            num_examples,
            (False, True, False),
        )[1].view(shape)
    return found.reshape(draws, *shape).sum(0)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        parameters: tuple[Tensor, Tensor | None],
        collector: PerExampleGradients,
    ) -> Tensor:
        ctx.parameters, ctx.collector = parameters, collector
        weight, bias = parameters
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        return F.linear(x, cast, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, cast = ctx.saved_tensors
        (weight, bias), num_examples = ctx.parameters, ctx.collector.num_examples
        draws = ctx.collector.num_draws(len(x))
        grad_x = grad @ cast if ctx.needs_input_grad[1] else None
        grads = grad.reshape(draws, num_examples, -1, weight.shape[0])
        inputs = x.reshape(draws, num_examples, -1, weight.shape[1])
        if ctx.collector.wants(weight):
            grad_weights = torch.einsum("kbto,kbti->boi", grads, inputs)
            ctx.collector.add(weight, grad_weights)
        if bias is not None:
            ctx.collector.add(bias, grads.sum((0, 2)))
        return None, grad_x, None, None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        x: Tensor,
        num_groups: int,
        parameters: tuple[Tensor, Tensor],
        eps: float,
        collector: PerExampleGradients,
    ) -> Tensor:
        images, channels, positions = len(x), x.shape[1], x[0, 0].numel()
        x = x.contiguous()
        scale, shift = (p.to(x.dtype) if x.is_cuda else p for p in parameters)  # the CPU's kernel takes mixed types
        out, mean, rstd = torch.native_group_norm(x, scale, shift, images, channels, positions, num_groups, eps)
        ctx.parameters, ctx.collector, ctx.num_groups = parameters, collector, num_groups
        ctx.save_for_backward(x, scale, mean, rstd)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, cast, mean, rstd = ctx.saved_tensors
        weight, bias = ctx.parameters
        images, channels = x.shape[:2]
        most = max(1, LARGEST_GRID // ctx.num_groups if x.is_cuda else images)
        rows = [slice(start, start + most) for start in range(0, max(1, images), most)]
        grad = grad.contiguous()
        found = [_norm_gradients(grad[r], x[r], mean[r], rstd[r], cast, ctx.num_groups) for r in rows]
        grad_x, grad_scale, grad_shift = (
            torch.cat([piece[i] for piece in found]) if len(found) > 1 else found[0][i] for i in range(3)
        )
        shape = (ctx.collector.num_draws(images), ctx.collector.num_examples, channels)
        ctx.collector.add(weight, grad_scale.view(shape).sum(0))
        ctx.collector.add(bias, grad_shift.view(shape).sum(0))
        return None, grad_x, None, None, None, None


def _norm_gradients(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, num_groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns group norm's gradients: for x (n, C, ...), and for weight and bias by image, (n, C)."""
    images, channels, positions = len(x), x.shape[1], x[0, 0].numel()
    # All images as one image of images * channels channels: the native kernel then returns the scale's and shift's
    # gradients per image and channel instead of summed over the images.
    grad_x, grad_scale, grad_shift = torch.ops.aten.native_group_norm_backward(
        grad.view(1, images * channels, positions),
        x.view(1, images * channels, positions),
        mean.reshape(1, -1),
        rstd.reshape(1, -1),
        weight.repeat(images),
        1,
        images * channels,
        positions,
        images * num_groups,
        (True, True, True),
    )
    return grad_x.view(x.shape), grad_scale.view(images, channels), grad_shift.view(images, channels)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, indices: Tensor, parameters: tuple[Tensor], collector: PerExampleGradients
    ) -> Tensor:
        (ctx.weight,), ctx.collector = parameters, collector
        ctx.save_for_backward(indices)
        return F.embedding(indices, ctx.weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (indices,) = ctx.saved_tensors
        (rows, features), num_examples = ctx.weight.shape, ctx.collector.num_examples
        example = torch.arange(num_examples, device=grad.device).repeat(ctx.collector.num_draws(len(indices)))
        position = example.view(-1, *([1] * (indices.dim() - 1))) * rows + indices
        flat = grad.new_zeros(num_examples * rows, features)
        flat.index_add_(0, position.reshape(-1), grad.reshape(-1, features))
        ctx.collector.add(ctx.weight, flat.view(num_examples, rows, features))
        return None, None, None, None


RULES: dict[Callable[..., Any], Callable[..., Any]] = {
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.group_norm: _group_norm,
    group_norm_silu: _group_norm_silu,
    group_norm_silu_beside: _group_norm_silu_beside,
    conv2d_norm_silu: _conv2d_norm_silu,
    conv2d_residual: _conv2d_residual,
    F.embedding: _embedding,
}
# Faster on a GPU than torch's own; the parameters' rules are not concerned.
WITHOUT_PARAMETERS: dict[Callable[..., Tensor], Callable[[Tensor], Tensor]] = {
    halve: gpu_layers.Halve.apply,  # type: ignore[dict-item]
    double: gpu_layers.Double.apply,  # type: ignore[dict-item]
}
COUPLING = {F.batch_norm, torch.batch_norm, F.instance_norm, torch.instance_norm}  # statistics over the batch
# Questions about a parameter that read no value of it.
HARMLESS = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.is_cuda.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.size,
    Tensor.dim,
}
