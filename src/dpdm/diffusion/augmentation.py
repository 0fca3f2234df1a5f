"""Distortions of images as between two drawings of one thing. Randomness is handed in; an image moves by itself."""

import torch
from torch import Tensor
from torch.nn import functional as F

NUM_DISTORTIONS = 6  # uniform numbers for each image
MAX_AUGMENTATION = 4.0


def distort(images: Tensor, u: Tensor, strength: float, *, shift: float = 1 / 8) -> Tensor:
    """Returns each image rotated, sheared, scaled and shifted, (n, C, H, W) in [-1, 1].

    Rotation and shear by up to 0.2, scale by up to 15 %, shift by up to ``shift`` of the side, all times ``strength``.
    What comes in from outside repeats the edge.

    Guarantee: image i depends on images[i] and u[:, i] alone.

    Args:
        images: (n, C, H, W) in [-1, 1].
        u: (6, n), uniform on (0, 1).
        strength: 0 leaves the images as they are.
        shift: largest one at strength 1, as a share of the side.
    """
    limits = torch.tensor([0.2, 0.2, 0.15, 0.15, 2 * shift, 2 * shift], device=images.device)  # a side is from -1 to 1
    angle, shear, scale_x, scale_y, shift_x, shift_y = strength * limits[:, None] * (2 * u.to(images) - 1)
    cos, sin = angle.cos(), angle.sin()
    rows = (
        torch.stack([cos * (1 + scale_x), shear - sin, shift_x], 1),
        torch.stack([sin, cos * (1 + scale_y), shift_y], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return moved.clamp(-1, 1)


def mirror(images: Tensor, u: Tensor) -> Tensor:
    """Returns images (n, C, H, W), those with u < 1/2 with left and right exchanged; ``u`` is (n,)."""
    return torch.where((u < 0.5)[:, None, None, None], images.flip(3), images)
