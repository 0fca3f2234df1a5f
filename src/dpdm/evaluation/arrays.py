"""Arrays in npz files, which may be a stranger's."""

import io
import math
import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np


def read_arrays(path: Path, names: Collection[str], max_bytes: int) -> dict[str, np.ndarray]:
    """Returns those of an npz file's arrays that are called ``names``; pickled objects are refused.

    Each may take ``max_bytes``, or as much as the whole file does on the disk: what is packed more tightly is not
    unpacked, and memory is taken for what is there, not for what a head says.

    Raises:
        ValueError: with the reason, if it is no such file.
    """
    most = max(max_bytes, path.stat().st_size)
    try:
        with zipfile.ZipFile(path) as members:
            present = {info.filename.removesuffix(".npy"): info for info in members.infolist()}
            return {name: _read_array(members, present[name], most) for name in names if name in present}
    except Exception as error:  # zipfile, numpy's heads and four ways of packing fail in a dozen ways
        raise ValueError((str(error).splitlines() or [type(error).__name__])[0]) from None


def _read_array(members: zipfile.ZipFile, info: zipfile.ZipInfo, most: int) -> np.ndarray:
    if info.file_size > most:
        raise ValueError(f"{info.filename} takes {info.file_size} bytes, expected at most {most}")
    content = members.read(info)
    with io.BytesIO(content) as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"{info.filename} is of version {version}, expected (1, 0) or (2, 0)")
        shape, fortran, dtype = readers[version](file)
        if dtype.hasobject:
            raise ValueError(f"{info.filename} holds pickled objects")
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != len(content) - file.tell():
            raise ValueError(f"{info.filename} is of another length than its head says")
        array = np.frombuffer(content, dtype, offset=file.tell()) if math.prod(shape) else np.empty(0, dtype)
        return array.reshape(shape, order="F" if fortran else "C")
