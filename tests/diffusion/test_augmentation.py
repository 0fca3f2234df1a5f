import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform

from dpdm.diffusion.augmentation import NUM_DISTORTIONS, distort, mirror
from dpdm.diffusion.loss import LossConfig
from dpdm.errors import InputError


def images(count: int = 4, side: int = 12) -> torch.Tensor:
    return torch.rand(count, 2, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def uniform(count: int = 4) -> torch.Tensor:
    return torch.rand(NUM_DISTORTIONS, count, generator=torch.Generator().manual_seed(1))


def test_numbers_in_the_middle_and_no_strength_leave_images_as_they_are() -> None:
    assert torch.allclose(distort(images(), torch.full((NUM_DISTORTIONS, 4), 0.5), 1.0), images(), atol=1e-5)
    assert torch.allclose(distort(images(), uniform(), 0.0), images(), atol=1e-5)


def test_an_image_moves_by_its_own_numbers_alone() -> None:
    moved = distort(images(), uniform(), 1.0)
    others, numbers = images(), uniform()
    others[2], numbers[:, 2] = 0.3, 0.9
    again = distort(others, numbers, 1.0)
    assert torch.equal(moved[[0, 1, 3]], again[[0, 1, 3]])
    assert not torch.allclose(moved[2], again[2], atol=1e-2)
    assert moved.abs().max() <= 1


def test_the_largest_shift_is_an_eighth_of_the_side() -> None:
    u = torch.full((NUM_DISTORTIONS, 1), 0.5)
    u[4] = 1.0
    smooth = torch.linspace(-1, 1, 16).expand(1, 1, 16, 16)
    moved = distort(smooth, u, 1.0)
    assert torch.allclose(moved[..., 4:12], smooth[..., 6:14], atol=1e-5)  # two pixels of 16
    moved = distort(smooth, u, 2.0, shift=1 / 32)
    assert torch.allclose(moved[..., 4:12], smooth[..., 5:13], atol=1e-5)


def test_a_rotation_against_scipy() -> None:
    u = torch.full((NUM_DISTORTIONS, 1), 0.5)
    u[0] = 1.0
    axis = np.linspace(-1, 1, 21)
    blob = np.exp(-8 * ((axis[:, None] - 0.3) ** 2 + (axis[None, :] + 0.2) ** 2)) * 2 - 1
    angle = 0.2
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centred = np.array([[1, 0, 10], [0, 1, 10], [0, 0, 1]])
    matrix = centred @ np.block([[turn, np.zeros((2, 1))], [np.zeros((1, 2)), 1]]) @ np.linalg.inv(centred)
    expected = affine_transform(blob, matrix, order=3, mode="nearest")
    found = distort(torch.from_numpy(blob)[None, None].float(), u, 1.0)[0, 0].numpy()
    assert np.abs(found - expected).max() < 0.05  # two kinds of cubic interpolation
    assert np.abs(found - blob).max() > 0.2


def test_mirrored_are_those_whose_number_is_below_one_half() -> None:
    found = mirror(images(), torch.tensor([0.1, 0.5, 0.49, 0.9]))
    assert torch.equal(found[[0, 2]], images()[[0, 2]].flip(3))
    assert torch.equal(found[[1, 3]], images()[[1, 3]])


@pytest.mark.parametrize("strength", [-0.1, 5.0, float("nan")])
def test_strength_out_of_range_is_refused(strength: float) -> None:
    with pytest.raises(InputError, match=r"loss\.augmentation"):
        LossConfig(augmentation=strength)
