"""What every source is turned into: named records that are read one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpdm.untrusted import clean

NAMES_SHOWN = 20
LONGEST_NAME = 200


@dataclass(frozen=True)
class Split:
    """The training or the hold-out part of a source.

    Attributes:
        names: one per record, for messages.
        read: content of record i, an encoded file or a grey (H, W) or RGB (H, W, 3) uint8 array; may be called
            from several threads. Raises InputError naming the record.
        stamp: what tells that record i is still the same, without reading a file: its checksum, or its size and
            time of change.
        labels: (N,) class indices, or None for a source without classes.
        class_names: one per class, also for classes without images; None without labels or names.
        groups: the name of each record's group (of a person, say), or None; not to be kept or shown.
    """

    names: Sequence[str]
    read: Callable[[int], bytes | NDArray[np.uint8]]
    stamp: Callable[[int], bytes]
    labels: NDArray[np.int64] | None
    class_names: list[str] | None
    groups: Sequence[str] | None = None

    @property
    def num_images(self) -> int:
        return len(self.names)

    def label(self, index: int) -> int | None:
        return None if self.labels is None else int(self.labels[index])


def list_names(names: Sequence[str]) -> str:
    """Returns the first 20 names, then how many more there are, for use in a one-line message."""
    shown = ", ".join(clean(name, LONGEST_NAME) for name in names[:NAMES_SHOWN])
    return shown if len(names) <= NAMES_SHOWN else f"{shown} and {len(names) - NAMES_SHOWN} more"
