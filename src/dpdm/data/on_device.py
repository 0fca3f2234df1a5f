"""An archive's images as tensors on the device that trains on them: nothing is decoded or sent in a step."""

import numpy as np
import torch
from torch import Tensor

from dpdm.data.archive import ImageArchive
from dpdm.progress import Progress
from dpdm.transfer import to_device

PIECE = 1024  # images decoded at a time


class ImagesOnDevice:
    """All pixels and labels of an archive, on one device.

    Guarantee: gives the images, and so the losses, that the archive itself gives, bit for bit.

    Args:
        archive: decoded once, from the first image to the last.
        device: with room for ``size_of(archive)`` bytes.

    Raises:
        InputError: naming the first image that is damaged or odd.
    """

    def __init__(self, archive: ImageArchive, device: torch.device) -> None:
        self.archive = archive
        count, side = archive.num_images, archive.resolution
        self._pixels = torch.empty(count, archive.num_channels, side, side, dtype=torch.uint8, device=device)
        with Progress("Images onto the device", count, unit="images") as progress:
            for start in range(0, count, PIECE):
                piece = archive.read(np.arange(start, min(start + PIECE, count)))
                self._pixels[start : start + len(piece)] = to_device(piece, device)
                progress.advance(len(piece))
        self._labels = None if archive.labels is None else to_device(archive.labels, device)
        self._by_group = None if archive.unit == "image" else [to_device(n, device) for n in archive.group_table()]

    def take(self, records: Tensor, u: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns images and labels of ``records``; of groups one image for each entry of ``u``.

        Args:
            records: (n,) int64 on the device, in [0, num_records).
            u: (K, n) float64 in [0, 1), which ``ImageArchive.choose_images`` explains; None if a record is an image.

        Returns:
            (n, C, H, W), or (K, n, C, H, W), uint8; labels (n,), or (K, n), int64, or None.
        """
        chosen = records
        if self._by_group is not None:
            assert u is not None
            members, starts, sizes = self._by_group
            size = sizes[records]
            chosen = members[starts[records] + torch.minimum((u * size).long(), size - 1)]
        return self._pixels[chosen], None if self._labels is None else self._labels[chosen]


def size_of(archive: ImageArchive) -> int:
    """Returns the bytes of all pixels and labels."""
    return archive.num_images * (archive.num_channels * archive.resolution**2 + 8)
