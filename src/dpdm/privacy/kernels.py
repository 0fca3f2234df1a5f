"""Triton kernels for a step on a GPU: convolutions' weight gradients, group norm, residual sums, resampling, clipping.

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

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 1024  # enough of them to fill any GPU
BLOCK_PIXELS = 64
POSITIONS = 4096  # of the pixels of all of an example's draws, that one program takes
BLOCK_COLUMNS = 1024
BLOCK_CHANNELS = 64
BLOCK_VALUES = 2048  # of an image, in group norm


@triton.jit(do_not_specialize=["num_examples"])  # another number in each step, which is to compile nothing anew
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
def _lanes(groups, SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr):
    """Channels of this program's groups, each group's in BLOCK_S lanes; which of them there are; their groups."""
    lane = tl.arange(0, BLOCK_G * BLOCK_S)
    g = tl.program_id(1) * BLOCK_G + lane // BLOCK_S
    if SIZE == BLOCK_S:  # said so that the compiler sees neighbours, and loads several at once
        c = tl.program_id(1) * BLOCK_G * BLOCK_S + lane
        known = c < groups * SIZE
    else:
        c = g * SIZE + lane % BLOCK_S
        known = (g < groups) & (lane % BLOCK_S < SIZE)
    return c, known, g


@triton.jit
def _of_group(values, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr):
    """The sum over each group's lanes, in each of them."""
    sums = tl.sum(tl.reshape(values, (BLOCK_G, BLOCK_S)), 1)
    return tl.reshape(tl.broadcast_to(sums[:, None], (BLOCK_G, BLOCK_S)), (BLOCK_G * BLOCK_S,))


@triton.jit
def _group_norm(
    x, shift, weight, bias, out, means, rstds, P, C, groups, eps, SHIFTED: tl.constexpr, SILU: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Some groups of one image: their statistics, and then the result, for which the image is read once more."""
    n = tl.program_id(0).to(tl.int64)
    c, known, g = _lanes(groups, SIZE, BLOCK_G, BLOCK_S)
    # Less each channel's first pixel, so that squares do not cancel where the mean is far from 0.
    first = tl.load(x + n * P * C + c, mask=known, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_G * BLOCK_S), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_G * BLOCK_S), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        ok = (p < P)[:, None] & known[None, :]
        value = tl.load(x + n * P * C + p[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        value = tl.where(ok, value - first[None, :], 0.0)
        total += value
        squares += value * value
    of_channel = tl.sum(total, 0) / P
    within = tl.sum(squares, 0) / P - of_channel * of_channel
    moved = first
    if SHIFTED:
        moved += tl.load(shift + n * C + c, mask=known, other=0.0)
    of_channel = tl.where(known, of_channel + moved, 0.0)
    mean = _of_group(of_channel, BLOCK_G, BLOCK_S) / SIZE
    between = tl.where(known, of_channel - mean, 0.0)
    variance = _of_group(tl.where(known, within, 0.0) + between * between, BLOCK_G, BLOCK_S) / SIZE
    rstd = 1.0 / tl.sqrt(tl.maximum(variance, 0.0) + eps)
    one = known & (c == g * SIZE)  # of a group's lanes
    tl.store(means + n * groups + g, mean, mask=one)
    tl.store(rstds + n * groups + g, rstd, mask=one)
    scale = rstd * tl.load(weight + c, mask=known, other=0.0)
    offset = tl.load(bias + c, mask=known, other=0.0) + (moved - first - mean) * scale
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = n * P * C + p[:, None] * C + c[None, :]
        ok = (p < P)[:, None] & known[None, :]
        z = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) * scale[None, :] + offset[None, :]
        if SILU:
            z = z * tl.sigmoid(z)
        tl.store(out + at, z.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _before_silu(deviation, g, scale, offset, SILU: tl.constexpr):
    if SILU:
        z = deviation * scale[None, :] + offset[None, :]
        s = tl.sigmoid(z)
        g = g * s * (1 + z * (1 - s))
    return g


@triton.jit
def _group_norm_backward(
    x, shift, grad, beside, weight, bias, means, rstds, out, of_weight, of_bias, of_shift, P, C, groups,
    SHIFTED: tl.constexpr, BESIDE: tl.constexpr, SILU: tl.constexpr,
    SIZE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Some groups of one image: sums over its pixels, and then the gradient, for which all is read once more."""
    n = tl.program_id(0).to(tl.int64)
    c, known, g = _lanes(groups, SIZE, BLOCK_G, BLOCK_S)
    rstd = tl.load(rstds + n * groups + g, mask=known, other=0.0)
    centre = tl.load(means + n * groups + g, mask=known, other=0.0)  # of what is in memory, without the shift
    if SHIFTED:
        centre -= tl.load(shift + n * C + c, mask=known, other=0.0)
    factor = tl.load(weight + c, mask=known, other=0.0)
    scale = rstd * factor
    offset = tl.load(bias + c, mask=known, other=0.0)
    products = tl.zeros((BLOCK_P, BLOCK_G * BLOCK_S), tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_G * BLOCK_S), tl.float32)
    deviations = tl.zeros((BLOCK_P, BLOCK_G * BLOCK_S), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = n * P * C + p[:, None] * C + c[None, :]
        ok = (p < P)[:, None] & known[None, :]
        deviation = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) - centre[None, :]
        upstream = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
        upstream = _before_silu(deviation, upstream, scale, offset, SILU)
        products += upstream * deviation
        total += upstream
        if SHIFTED:
            deviations += tl.where(ok, deviation, 0.0)
    product, sums = tl.sum(products, 0), tl.sum(total, 0)
    tl.store(of_weight + n * C + c, product * rstd, mask=known)
    tl.store(of_bias + n * C + c, sums, mask=known)
    slope = -_of_group(factor * product, BLOCK_G, BLOCK_S) * rstd * rstd * rstd / (P * SIZE)
    constant = -_of_group(factor * sums, BLOCK_G, BLOCK_S) * rstd / (P * SIZE)
    if SHIFTED:  # the sum of the gradient over the pixels
        through = sums * scale + tl.sum(deviations, 0) * slope + P * constant
        tl.store(of_shift + n * C + c, through, mask=known)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = n * P * C + p[:, None] * C + c[None, :]
        ok = (p < P)[:, None] & known[None, :]
        deviation = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) - centre[None, :]
        upstream = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
        upstream = _before_silu(deviation, upstream, scale, offset, SILU)
        found = upstream * scale[None, :] + deviation * slope[None, :] + constant[None, :]
        if BESIDE:
            found += tl.load(beside + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(out + at, found.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _residual(x, bias, other, out, factor, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    at = n * P * C + p[:, None] * C + c[None, :]
    ok = (p < P)[:, None] & (c < C)[None, :]
    value = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) + tl.load(other + at, mask=ok, other=0.0).to(tl.float32)
    value = (value + tl.load(bias + c, mask=c < C, other=0.0)[None, :]) * factor
    tl.store(out + at, value.to(out.dtype.element_ty), mask=ok)


@triton.jit
def _residual_backward(grad, out, sums, factor, P, C, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Some channels of one image: the gradient times ``factor``, and its sum over the pixels."""
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        at = n * P * C + p[:, None] * C + c[None, :]
        ok = (p < P)[:, None] & (c < C)[None, :]
        value = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32) * factor
        total += value
        tl.store(out + at, value.to(out.dtype.element_ty), mask=ok)
    tl.store(sums + n * C + c, tl.sum(total, 0), mask=c < C)


@triton.jit
def _halve(x, out, factor, P, C, WIDTH, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """``factor`` times the sum of each 2 by 2 pixels; P and WIDTH of the smaller image."""
    n = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (p < P)[:, None] & (c < C)[None, :]
    at = n * 4 * P * C + (4 * WIDTH * (p // WIDTH) + 2 * (p % WIDTH))[:, None] * C + c[None, :]
    total = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    total += tl.load(x + at + C, mask=ok, other=0.0).to(tl.float32)
    total += tl.load(x + at + 2 * WIDTH * C, mask=ok, other=0.0).to(tl.float32)
    total += tl.load(x + at + 2 * WIDTH * C + C, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + n * P * C + p[:, None] * C + c[None, :], (factor * total).to(out.dtype.element_ty), mask=ok)


@triton.jit
def _double(x, out, factor, P, C, WIDTH, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """``factor`` times each pixel, as 2 by 2 of them; P and WIDTH of the smaller image."""
    n = tl.program_id(0).to(tl.int64)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    ok = (p < P)[:, None] & (c < C)[None, :]
    value = tl.load(x + n * P * C + p[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
    value = (factor * value).to(out.dtype.element_ty)
    to = out + n * 4 * P * C + (4 * WIDTH * (p // WIDTH) + 2 * (p % WIDTH))[:, None] * C + c[None, :]
    tl.store(to, value, mask=ok)
    tl.store(to + C, value, mask=ok)
    tl.store(to + 2 * WIDTH * C, value, mask=ok)
    tl.store(to + 2 * WIDTH * C + C, value, mask=ok)


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


@triton.jit(do_not_specialize=["num_rows", "share"])
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
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, *, silu: bool, shift: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns silu(group_norm(x + shift)), or without ``silu`` group_norm(x + shift), and what its backward pass needs.

    Args:
        x: (N, P, C), contiguous.
        num_groups: G, of channels.
        weight: (C,) float32.
        bias: (C,) float32.
        eps: added to the variance.
        silu: whether SiLU follows.
        shift: of each image's channels, (N, C) float32, contiguous; None is 0.

    Returns:
        The result, of x's shape and type; mean and reciprocal standard deviation of each image's groups, (N, G)
        float32.

    Raises:
        ValueError: if the groups are of unequal size.
    """
    images, pixels, channels = x.shape
    if channels % num_groups:
        raise ValueError(f"Expected the channels to be divisible into {num_groups} groups, got {channels}.")
    out = torch.empty_like(x)
    mean, rstd = (x.new_empty((images, num_groups), dtype=torch.float32) for _ in range(2))
    blocks = _group_blocks(channels, num_groups)
    _group_norm[(images, triton.cdiv(num_groups, blocks[2]))](
        x, shift, weight, bias, out, mean, rstd, pixels, channels, num_groups, eps, shift is not None, silu, *blocks
    )
    return out, mean, rstd


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    silu: bool,
    shift: Tensor | None = None,
    beside: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Returns the gradients of what ``group_norm`` returned: for x, and by image for weight, bias and shift, (N, C).

    Args:
        grad: of the result, (N, P, C), contiguous.
        x: as given to ``group_norm``.
        mean: as it returned.
        rstd: likewise.
        weight: (C,) float32.
        bias: (C,) float32.
        silu: as given to it.
        shift: likewise.
        beside: what x's gradient gets on another way, of x's shape, contiguous, to be added; None is 0.
    """
    images, pixels, channels = x.shape
    groups = mean.shape[1]
    out = torch.empty_like(x)
    of_weight, of_bias = (x.new_empty((images, channels), dtype=torch.float32) for _ in range(2))
    of_shift = None if shift is None else torch.empty_like(of_bias)
    blocks = _group_blocks(channels, groups)
    found = (out, of_weight, of_bias, of_shift)
    _group_norm_backward[(images, triton.cdiv(groups, blocks[2]))](
        x, shift, grad, beside, weight, bias, mean, rstd, *found, pixels, channels, groups,
        shift is not None, beside is not None, silu, *blocks,
    )  # fmt: skip
    return found


def residual(x: Tensor, bias: Tensor, other: Tensor) -> Tensor:
    """Returns (x + bias + other) / sqrt(2), (N, P, C).

    Args:
        x: (N, P, C), contiguous.
        bias: (C,) float32.
        other: as x.
    """
    images, pixels, channels = x.shape
    block_p, block_c = _blocks(pixels, channels)
    out = torch.empty_like(x)
    grid = (images, triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c))
    _residual[grid](x, bias, other, out, math.sqrt(0.5), pixels, channels, block_p, block_c)
    return out


def residual_backward(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of what ``residual`` returned: for x, which is other's, too, and for bias by image.

    Args:
        grad: of the result, (N, P, C), contiguous.

    Returns:
        (N, P, C) of grad's type, and (N, C) float32.
    """
    images, pixels, channels = grad.shape
    block_p, block_c = _blocks(pixels, channels)
    out, sums = torch.empty_like(grad), grad.new_empty((images, channels), dtype=torch.float32)
    grid = (images, triton.cdiv(channels, block_c))
    _residual_backward[grid](grad, out, sums, math.sqrt(0.5), pixels, channels, block_p, block_c)
    return out, sums


def halve(x: Tensor, width: int, factor: float) -> Tensor:
    """Returns ``factor`` times the sums over squares of 2 by 2 pixels of x (N, 4 P, C), contiguous: (N, P, C).

    Args:
        x: images of even height and of 2 ``width`` pixels in a row.
        width: of the result.
        factor: 1 / 4 for means.
    """
    images, pixels, channels = len(x), x.shape[1] // 4, x.shape[2]
    block_p, block_c = _blocks(pixels, channels)
    out = x.new_empty((images, pixels, channels))
    grid = (images, triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c))
    _halve[grid](x, out, factor, pixels, channels, width, block_p, block_c)
    return out


def double(x: Tensor, width: int, factor: float) -> Tensor:
    """Returns x (N, P, C), contiguous, of ``width`` pixels in a row, each as 2 by 2, times ``factor``: (N, 4 P, C)."""
    images, pixels, channels = x.shape
    block_p, block_c = _blocks(pixels, channels)
    out = x.new_empty((images, 4 * pixels, channels))
    grid = (images, triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c))
    _double[grid](x, out, factor, pixels, channels, width, block_p, block_c)
    return out


def _blocks(pixels: int, channels: int) -> tuple[int, int]:
    """Returns how many pixels and channels a program holds at a time, powers of two."""
    block_c = min(64, triton.next_power_of_2(channels))
    return min(triton.next_power_of_2(pixels), BLOCK_VALUES // block_c), block_c


def _group_blocks(channels: int, groups: int) -> tuple[int, int, int, int]:
    """Returns a group's channels, and how many pixels, groups and lanes for a group a program holds at a time."""
    size = channels // groups
    lanes = triton.next_power_of_2(size)
    many = max(1, min(64 // lanes, triton.next_power_of_2(groups)))
    return size, max(1, BLOCK_VALUES // (many * lanes)), many, lanes
