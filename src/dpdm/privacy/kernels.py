"""Triton kernels for a step on a GPU: weight gradients of convolutions, group norm with SiLU, and clipping.

Images are *pixels first*: (N, P, C) for N of them with P = H W pixels and C channels, which is torch.channels_last.
N = K B images are draw-major (see ``layers``). The network's sums are in float32, whatever the tensors' type; those of
clipping, on which the bound of the sensitivity rests, in float64.

Guarantee: row b of a result that is per example, and row n of one that is per image, is a function of the images b, or
n, alone: a program reads no others and writes nowhere else, and how it is cut into programs depends on K and the
images' shape, not on how many examples there are.

Triton comes with torch for CUDA on Linux. Defined under TRITON_INTERPRET=1 the kernels run on a CPU, for tests.
"""

# Triton, which is not everywhere, compiles its own dialect: loops over tensors, plain numbers for constants.
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024  # enough of them to fill any GPU
BLOCK_PIXELS = 64
POSITIONS = 4096  # of the pixels of all of an example's draws, that one program takes
BLOCK_COLUMNS = 1024
BLOCK_CHANNELS = 64


@triton.jit
def _weight_gradients(
    x, grad, out, num_examples, share, positions, inputs, outputs,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, KERNEL: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One row of the kernel, for a block of channels of one example, over a share of its draws' pixels."""
    PIXELS: tl.constexpr = HEIGHT * WIDTH
    example, part = tl.program_id(0), tl.program_id(2)
    dy = tl.program_id(1) % KERNEL
    block = tl.program_id(1) // KERNEL
    blocks_in = (inputs + BLOCK_IN - 1) // BLOCK_IN
    i = (block % blocks_in) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    o = (block // blocks_in) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    left = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)  # dx = 0, 1, 2; the middle alone for a kernel of one pixel
    middle = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    right = tl.zeros((BLOCK_OUT, BLOCK_IN), tl.float32)
    for start in range(part * share, tl.minimum((part + 1) * share, positions), BLOCK_P):
        t = start + tl.arange(0, BLOCK_P)  # among the pixels of all draws of the example
        inside = t < positions
        p = t % PIXELS
        column = p % WIDTH
        row = p // WIDTH + dy - KERNEL // 2
        on_line = inside & (row >= 0) & (row < HEIGHT)
        image = ((t // PIXELS) * num_examples + example).to(tl.int64) * PIXELS
        at = image + row * WIDTH + column
        known = (o < outputs)[None, :]
        g = tl.load(grad + (image + p)[:, None] * outputs + o[None, :], mask=inside[:, None] & known, other=0.0)
        g = tl.trans(g)
        known = (i < inputs)[None, :]
        shown = tl.load(x + at[:, None] * inputs + i[None, :], mask=on_line[:, None] & known, other=0.0)
        middle += tl.dot(g, shown, input_precision="ieee")
        if KERNEL == 3:
            ok = on_line & (column > 0)
            shown = tl.load(x + (at - 1)[:, None] * inputs + i[None, :], mask=ok[:, None] & known, other=0.0)
            left += tl.dot(g, shown, input_precision="ieee")
            ok = on_line & (column < WIDTH - 1)
            shown = tl.load(x + (at + 1)[:, None] * inputs + i[None, :], mask=ok[:, None] & known, other=0.0)
            right += tl.dot(g, shown, input_precision="ieee")
    # (parts, B, dy, dx, O, I)
    size = outputs * inputs
    to = out + ((part * num_examples + example).to(tl.int64) * KERNEL + dy) * KERNEL * size
    to += o[:, None] * inputs + i[None, :]
    ok = (o < outputs)[:, None] & (i < inputs)[None, :]
    if KERNEL == 3:
        tl.store(to, left.to(out.dtype.element_ty), mask=ok)
        tl.store(to + size, middle.to(out.dtype.element_ty), mask=ok)
        tl.store(to + 2 * size, right.to(out.dtype.element_ty), mask=ok)
    else:
        tl.store(to, middle.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _sums(x, out, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Sum and sum of squares of each channel of one image, less its first pixel, and that pixel: (3, C)."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = tl.load(x + n * P * C + c, mask=c < C, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        ok = (p < P)[:, None] & (c < C)[None, :]
        value = tl.load(x + n * P * C + p[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        value = tl.where(ok, value - first[None, :], 0.0)
        total += value
        squares += value * value
    tl.store(out + n * 3 * C + c, tl.sum(total, 0), mask=c < C)
    tl.store(out + n * 3 * C + C + c, tl.sum(squares, 0), mask=c < C)
    tl.store(out + n * 3 * C + 2 * C + c, first, mask=c < C)


@triton.jit
def _gradient_before_silu(value, g, scale, shift, SILU: tl.constexpr):
    if SILU:
        z = value * scale[None, :] + shift[None, :]
        s = tl.sigmoid(z)
        g = g * s * (1 + z * (1 - s))
    return g


@triton.jit
def _gradient_sums(
    x, grad, affine, out, P, C, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sum of gradient times value, and of the gradient, of each channel of one image: (2, C)."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    scale = tl.load(affine + n * 2 * C + c, mask=c < C, other=0.0)
    shift = tl.load(affine + n * 2 * C + C + c, mask=c < C, other=0.0)
    products = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = n * P * C + p[:, None] * C + c[None, :]
        ok = (p < P)[:, None] & (c < C)[None, :]
        value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
        g = _gradient_before_silu(value, g, scale, shift, SILU)
        products += g * value
        total += g
    tl.store(out + n * 2 * C + c, tl.sum(products, 0), mask=c < C)
    tl.store(out + n * 2 * C + C + c, tl.sum(total, 0), mask=c < C)


@triton.jit
def _normalise(
    x, affine, out, P, C, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = n * P * C + p[:, None] * C + c[None, :]
    ok = (p < P)[:, None] & (c < C)[None, :]
    scale = tl.load(affine + n * 2 * C + c, mask=c < C, other=0.0)
    shift = tl.load(affine + n * 2 * C + C + c, mask=c < C, other=0.0)
    z = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if SILU:
        z = z * tl.sigmoid(z)
    tl.store(out + at, z.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _input_gradient(
    x, grad, affine, through_mean, out, P, C, SILU: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = n * P * C + p[:, None] * C + c[None, :]
    ok = (p < P)[:, None] & (c < C)[None, :]
    scale = tl.load(affine + n * 2 * C + c, mask=c < C, other=0.0)
    shift = tl.load(affine + n * 2 * C + C + c, mask=c < C, other=0.0)
    slope = tl.load(through_mean + n * 2 * C + c, mask=c < C, other=0.0)
    constant = tl.load(through_mean + n * 2 * C + C + c, mask=c < C, other=0.0)
    value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
    g = _gradient_before_silu(value, g, scale, shift, SILU)
    g = g * scale[None, :] + value * slope[None, :] + constant[None, :]
    tl.store(out + at, g.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _squared_norms(rows, out, columns, span, BLOCK: tl.constexpr):
    """Sum of squares of one row over ``span`` columns."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(part * span, tl.minimum((part + 1) * span, columns), BLOCK):
        c = start + tl.arange(0, BLOCK)
        value = tl.load(rows + row * columns + c, mask=c < columns, other=0.0).to(tl.float64)
        total += value * value
    tl.store(out + row * tl.num_programs(1) + part, tl.sum(total, 0))


@triton.jit
def _weighted_sums(rows, scales, out, num_rows, columns, share, BLOCK: tl.constexpr):
    """Sum of ``share`` rows, each times its scale, for a block of columns; a row of scale 0 is not looked at."""
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.program_id(1)
    total = tl.zeros((BLOCK,), tl.float64)
    for k in range(share):
        row = part.to(tl.int64) * share + k + tl.zeros((BLOCK,), tl.int64)
        ok = (c < columns) & (row < num_rows)
        scale = tl.load(scales + row, mask=ok, other=0.0)
        value = tl.load(rows + row * columns + c, mask=ok, other=0.0).to(tl.float64)
        total += tl.where(scale > 0.0, scale * value, 0.0)
    tl.store(out + part.to(tl.int64) * columns + c, total, mask=c < columns)


def squared_norms(rows: Tensor) -> Tensor:
    """Returns the squared L2 norm of each row of (b, p), contiguous, as (b,) float64; all arithmetic is in float64."""
    num_rows, columns = rows.shape
    span = triton.cdiv(max(1, columns), BLOCK_COLUMNS * 8) * BLOCK_COLUMNS  # at most 8 programs a row
    parts = triton.cdiv(columns, span)
    out = torch.empty((num_rows, parts), dtype=torch.float64, device=rows.device)
    _squared_norms[(num_rows, parts)](rows, out, columns, span, BLOCK_COLUMNS)
    return out.sum(1)


def weighted_sum(rows: Tensor, scales: Tensor) -> Tensor:
    """Returns scales @ rows, (p,) float64; all arithmetic is in float64.

    Args:
        rows: (b, p), contiguous; a row of scale 0 counts as zeros, whatever it holds.
        scales: (b,) float64, >= 0.
    """
    num_rows, columns = rows.shape
    blocks = triton.cdiv(columns, BLOCK_COLUMNS)
    share = max(16, triton.cdiv(num_rows * blocks, PROGRAMS))
    parts = triton.cdiv(num_rows, share)
    out = torch.empty((parts, columns), dtype=torch.float64, device=rows.device)
    _weighted_sums[(blocks, parts)](rows, scales, out, num_rows, columns, share, BLOCK_COLUMNS)
    return out.sum(0)


def conv_weight_gradients(x: Tensor, grad: Tensor, side: tuple[int, int], num_examples: int, kernel: int) -> Tensor:
    """Returns the weight gradients of a convolution of stride 1 that keeps the side, (B, O, I, kernel, kernel).

    Args:
        x: the convolution's input, (K B, P, I), contiguous.
        grad: of its output, (K B, P, O), contiguous, of x's type.
        side: height and width of the images, P pixels together.
        num_examples: B.
        kernel: 1 or 3 pixels.
    """
    inputs, outputs = x.shape[2], grad.shape[2]
    most = 32 if x.dtype == torch.float32 else BLOCK_CHANNELS  # channels of each side that a program's registers hold
    block_in, block_out = (min(most, max(16, triton.next_power_of_2(channels))) for channels in (inputs, outputs))
    blocks = kernel * triton.cdiv(inputs, block_in) * triton.cdiv(outputs, block_out)
    positions = len(x) // num_examples * x.shape[1]
    parts = triton.cdiv(positions, POSITIONS)
    shape = (parts, num_examples, kernel, kernel, outputs, inputs)
    out = x.new_empty(shape, dtype=x.dtype if parts == 1 else torch.float32)
    sizes = (num_examples, POSITIONS, positions, inputs, outputs)
    _weight_gradients[(num_examples, blocks, parts)](
        x, grad, out, *sizes, *side, kernel, block_in, block_out, BLOCK_PIXELS
    )
    found = out[0] if parts == 1 else out.sum(0).to(x.dtype)
    return found.permute(0, 3, 4, 1, 2).contiguous()


def group_norm(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns silu(group_norm(x)), or without ``silu`` group_norm(x), and what its backward pass needs.

    Args:
        x: (N, P, C), contiguous.
        num_groups: G, of channels.
        weight: (C,) float32.
        bias: (C,) float32.
        eps: added to the variance.
        silu: whether SiLU follows.

    Returns:
        The result, of x's shape and type; scale and shift of each image's channels, (N, 2, C); mean and reciprocal
        standard deviation of its groups, (N, G), all float32.
    """
    images, pixels, channels = x.shape
    block_p, block_c = _blocks(pixels, channels)
    sums = x.new_empty((images, 3, channels), dtype=torch.float32)
    _sums[(images, triton.cdiv(channels, block_c))](x, sums, pixels, channels, block_p, block_c)
    # Less each channel's first pixel, so that squares do not cancel where the mean is far from 0.
    total, squares, first = sums.view(images, 3, num_groups, -1).unbind(1)
    means = first + total / pixels  # of channels
    mean = means.mean(2)
    within = (squares - total * total / pixels).mean(2) / pixels
    rstd = (within + (means - mean[:, :, None]).square().mean(2)).clamp_(min=0).add_(eps).rsqrt_()
    scale = rstd[:, :, None] * weight.view(num_groups, -1)
    shift = bias.view(num_groups, -1) - mean[:, :, None] * scale
    affine = torch.stack([scale, shift], 1).view(images, 2, channels)
    out = torch.empty_like(x)
    grid = (images, triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c))
    _normalise[grid](x, affine, out, pixels, channels, silu, block_p, block_c)
    return out, affine, mean, rstd


def group_norm_backward(
    grad: Tensor, x: Tensor, affine: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, *, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of what ``group_norm`` returned: for x, and for weight and bias by image, (N, C) float32.

    Args:
        grad: of the result, (N, P, C), contiguous.
        x: as given to ``group_norm``.
        affine: as it returned.
        mean: likewise.
        rstd: likewise.
        weight: (C,) float32.
        silu: as given to it.
    """
    (images, pixels, channels), groups = x.shape, mean.shape[1]
    block_p, block_c = _blocks(pixels, channels)
    sums = x.new_empty((images, 2, channels), dtype=torch.float32)
    grid = (images, triton.cdiv(channels, block_c))
    _gradient_sums[grid](x, grad, affine, sums, pixels, channels, silu, block_p, block_c)
    products, totals = sums.view(images, 2, groups, -1).unbind(1)  # of each channel
    by_group = (sums.view(images, 2, groups, -1) * weight.view(groups, -1)).sum(3)
    slope = (by_group[:, 1] * mean - by_group[:, 0]) * rstd**3 / (pixels * channels // groups)
    constant = -slope * mean - by_group[:, 1] * rstd / (pixels * channels // groups)
    through_mean = torch.stack([slope, constant], 1).repeat_interleave(channels // groups, 2)
    out = torch.empty_like(x)
    grid = (images, triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c))
    _input_gradient[grid](x, grad, affine, through_mean, out, pixels, channels, silu, block_p, block_c)
    weight_gradients = (products - mean[:, :, None] * totals) * rstd[:, :, None]
    return out, weight_gradients.view(images, channels), totals.reshape(images, channels)


def _blocks(pixels: int, channels: int) -> tuple[int, int]:
    """Returns how many pixels and channels a program of group norm holds at a time, powers of two."""
    block_c = min(64, triton.next_power_of_2(channels))
    return min(triton.next_power_of_2(pixels), 2048 // block_c), block_c
