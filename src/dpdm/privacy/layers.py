"""Per-example gradients in one ordinary backward pass, for any network made of the layers below.

Inside ``per_example(parameters, num_examples)`` each use of a parameter by ``conv2d``, ``linear``, ``group_norm`` or
``embedding`` is given a copy per example (an expanded view: no memory), and a backward rule that returns the gradients
of the copies, (B, *shape), in place of their sum. Any other use of a parameter is refused by name, so that no gradient
can pass unclipped.

The batch is *draw-major*: K draws of B examples lie at position k * B + b. A convolution's (K B, C, H, W) input is
then, without a copy, a (K, B C, H, W) one, and the per-example weight gradient is the weight gradient of *one*
grouped convolution with B groups. See Rochette et al. 2019 (arXiv 1912.06015) for grouped per-example convolutions.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, resolve_name


@contextmanager
def per_example(parameters: Mapping[str, Tensor], num_examples: int) -> Iterator[list[Tensor]]:
    """Yields one leaf (B, *shape) per parameter, in order: gradients with respect to it are per example.

    Guarantee: with a loss that is a sum of per-example losses, row b of a leaf's gradient is the gradient of example
    b's own loss. Batch norm, instance norm and every use of a parameter by another way are refused. (A network that
    mixes examples without a parameter, by ``x.mean(0)`` say, is not noticed here; ours is tested not to.)

    Args:
        parameters: by name; those to be differentiated.
        num_examples: B >= 1. The first axis of every layer's input must be K * B, draw-major.

    Raises:
        ValueError: from a use of a parameter that has no rule; it names the operation and the parameter.
    """
    leaves = [p.detach().expand(num_examples, *p.shape).requires_grad_() for p in parameters.values()]
    names = {id(parameter): name for name, parameter in parameters.items()}
    table = {id(parameter): leaf for parameter, leaf in zip(parameters.values(), leaves, strict=True)}
    with _PerExampleMode(names, table):
        yield leaves


class _PerExampleMode(TorchFunctionMode):
    """Sends the four layers to their per-example rules and refuses every other use of a parameter."""

    def __init__(self, names: dict[int, str], leaves: dict[int, Tensor]) -> None:
        super().__init__()
        self._names, self._leaves = names, leaves

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
        if not used or func in HARMLESS:
            return func(*args, **kwargs)
        if func not in RULES:
            raise ValueError(
                f"Expected a per-example gradient rule for {resolve_name(func)}, which uses parameter "
                f"{self._names[used[0]]}, got none: use conv2d, linear, group_norm or embedding."
            )
        return RULES[func](self._leaves, *args, **kwargs)


def _conv2d(
    leaves: dict[int, Tensor],
    input: Tensor,  # torch's own name, callers pass it by keyword
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    pairs = [(value, value) if isinstance(value, int) else tuple(value) for value in (stride, padding, dilation)]
    if groups != 1:
        raise ValueError(f"Expected conv2d with groups=1, got {groups}: no per-example rule is written for it.")
    return _Conv2d.apply(input, leaves[id(weight)], _leaf(leaves, bias), *pairs)  # type: ignore[no-any-return]


def _linear(leaves: dict[int, Tensor], input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _Linear.apply(input, leaves[id(weight)], _leaf(leaves, bias))  # type: ignore[no-any-return]


def _group_norm(
    leaves: dict[int, Tensor],
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if weight is None or bias is None:
        raise ValueError("Expected group_norm with both weight and bias, or with neither.")
    return _GroupNorm.apply(input, num_groups, leaves[id(weight)], leaves[id(bias)], eps)  # type: ignore[no-any-return]


def _embedding(
    leaves: dict[int, Tensor],
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
    return _Embedding.apply(input, leaves[id(weight)])  # type: ignore[no-any-return]


def _leaf(leaves: dict[int, Tensor], parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else leaves[id(parameter)]


def _num_draws(rows: int, num_examples: int) -> int:
    if rows % num_examples:
        raise ValueError(f"Expected the batch axis to be a multiple of {num_examples} examples, got {rows}.")
    return rows // num_examples


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, biases: Tensor | None, stride: Any, padding: Any, dilation: Any
    ) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.geometry = (stride, padding, dilation)
        return F.conv2d(x, weights[0], None if biases is None else biases[0], stride, padding, dilation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weights = ctx.saved_tensors
        num_examples, out_channels, in_channels = weights.shape[:3]
        draws = _num_draws(len(x), num_examples)
        grad = grad.contiguous()
        geometry = (*ctx.geometry, False, (0, 0))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.ops.aten.convolution_backward(grad, x, weights[0], None, *geometry, 1, (True, False, False))[
                0
            ]
        # One grouped convolution: draws are its batch, (example, channel) pairs its channels; only shapes of the
        # weight are read.
        grad_weights = torch.ops.aten.convolution_backward(
            grad.reshape(draws, num_examples * out_channels, *grad.shape[2:]),
            x.reshape(draws, num_examples * in_channels, *x.shape[2:]),
            weights.new_empty(num_examples * out_channels, *weights.shape[2:]),
            None,
            *geometry,
            num_examples,
            (False, True, False),
        )[1].view(weights.shape)
        grad_biases = None
        if ctx.needs_input_grad[2]:
            grad_biases = grad.sum((2, 3)).view(draws, num_examples, out_channels).sum(0)
        return grad_x, grad_weights, grad_biases, None, None, None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, biases: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weights)
        return F.linear(x, weights[0], None if biases is None else biases[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weights = ctx.saved_tensors
        num_examples, out_features, in_features = weights.shape
        draws = _num_draws(len(x), num_examples)
        grad_x = grad @ weights[0] if ctx.needs_input_grad[0] else None
        grads = grad.reshape(draws, num_examples, -1, out_features)
        inputs = x.reshape(draws, num_examples, -1, in_features)
        grad_weights = torch.einsum("kbto,kbti->boi", grads, inputs)
        return grad_x, grad_weights, grads.sum((0, 2)) if ctx.needs_input_grad[2] else None


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_groups: int, weights: Tensor, biases: Tensor, eps: float) -> Tensor:
        images, channels, positions = len(x), x.shape[1], x[0, 0].numel()
        out, mean, rstd = torch.native_group_norm(
            x.contiguous(),
            weights[0].contiguous(),
            biases[0].contiguous(),
            images,
            channels,
            positions,
            num_groups,
            eps,
        )
        ctx.save_for_backward(x, weights, mean, rstd)
        ctx.num_groups = num_groups
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weights, mean, rstd = ctx.saved_tensors
        num_examples, channels = weights.shape
        images, positions = len(x), x[0, 0].numel()
        # All images as one image of images * channels channels: the native kernel then returns the scale's and shift's
        # gradients per image and channel instead of summed over the images.
        grad_x, grad_scale, grad_shift = torch.ops.aten.native_group_norm_backward(
            grad.contiguous().view(1, images * channels, positions),
            x.contiguous().view(1, images * channels, positions),
            mean.view(1, -1),
            rstd.view(1, -1),
            weights[0].repeat(images),
            1,
            images * channels,
            positions,
            images * ctx.num_groups,
            (True, True, True),
        )
        shape = (_num_draws(images, num_examples), num_examples, channels)
        return grad_x.view(x.shape), None, grad_scale.view(shape).sum(0), grad_shift.view(shape).sum(0), None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, indices: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(indices, weights)
        return F.embedding(indices, weights[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        indices, weights = ctx.saved_tensors
        num_examples, rows, features = weights.shape
        draws = _num_draws(len(indices), num_examples)
        example = torch.arange(num_examples, device=grad.device).repeat(draws)
        position = example.view(-1, *([1] * (indices.dim() - 1))) * rows + indices
        flat = grad.new_zeros(num_examples * rows, features)
        flat.index_add_(0, position.reshape(-1), grad.reshape(-1, features))
        return None, flat.view(weights.shape)


RULES: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.conv2d: _conv2d,
    F.linear: _linear,
    F.group_norm: _group_norm,
    F.embedding: _embedding,
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
