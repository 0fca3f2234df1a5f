"""Operations that the network uses by a name of their own, so that the DP-SGD engine can give them a faster rule.

Each is, for anybody else, the composition of torch's functions that its docstring says.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import handle_torch_function, has_torch_function


def group_norm_silu(input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Returns silu(group_norm(input)), of input's shape, (N, C, *); arguments as of F.group_norm."""
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(group_norm_silu, (input, weight, bias), input, num_groups, weight, bias, eps)
    return F.silu(F.group_norm(input, num_groups, weight, bias, eps))


def group_norm_silu_beside(
    input: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Returns ``group_norm_silu`` and the input itself, which takes another way: their gradients meet here."""
    if has_torch_function((input, weight, bias)):
        return handle_torch_function(  # type: ignore[no-any-return]
            group_norm_silu_beside, (input, weight, bias), input, num_groups, weight, bias, eps
        )
    return group_norm_silu(input, num_groups, weight, bias, eps), input


def conv2d_norm_silu(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    shift: Tensor,
    num_groups: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """Returns silu(group_norm(conv2d(input) + shift)), (N, outputs, H, W); the convolution keeps the side.

    Args:
        input: (N, inputs, H, W).
        weight: of the convolution, (outputs, inputs, kernel, kernel), kernel odd.
        bias: likewise, (outputs,).
        shift: of each image's channels, (N, outputs).
        num_groups: of the norm.
        norm_weight: likewise, (outputs,).
        norm_bias: likewise, (outputs,).
        eps: likewise.
    """
    given = (input, weight, bias, shift, norm_weight, norm_bias)
    if has_torch_function(given):
        return handle_torch_function(  # type: ignore[no-any-return]
            conv2d_norm_silu, given, input, weight, bias, shift, num_groups, norm_weight, norm_bias, eps
        )
    h = F.conv2d(input, weight, bias, padding=weight.shape[2] // 2) + shift[:, :, None, None]
    return group_norm_silu(h, num_groups, norm_weight, norm_bias, eps)


def conv2d_residual(input: Tensor, weight: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """Returns (other + conv2d(input)) / sqrt(2), (N, outputs, H, W), as other has; the convolution keeps the side."""
    given = (input, weight, bias, other)
    if has_torch_function(given):
        return handle_torch_function(conv2d_residual, given, input, weight, bias, other)  # type: ignore[no-any-return]
    return (other + F.conv2d(input, weight, bias, padding=weight.shape[2] // 2)) / math.sqrt(2.0)


def halve(x: Tensor) -> Tensor:
    """Returns means over squares of 2 by 2 pixels of x (N, C, H, W), H and W even."""
    if has_torch_function((x,)):
        return handle_torch_function(halve, (x,), x)  # type: ignore[no-any-return]
    if x.is_cuda:  # the slices' gradients would be several tensors of x's size, in another layout
        return F.avg_pool2d(x, 2)
    # On a CPU F.avg_pool2d adds in another order, and mean takes far longer.
    x = x[..., ::2] + x[..., 1::2]
    return (x[..., ::2, :] + x[..., 1::2, :]) / 4


def double(x: Tensor) -> Tensor:
    """Returns x (N, C, H, W) with each pixel as a square of 2 by 2, in its own type."""
    if has_torch_function((x,)):
        return handle_torch_function(double, (x,), x)  # type: ignore[no-any-return]
    with torch.autocast(x.device.type, enabled=False):  # on a GPU it would be float32
        return F.interpolate(x, scale_factor=2)
