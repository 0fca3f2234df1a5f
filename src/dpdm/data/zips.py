"""Zips of many small files, without an object per member: a million members take about 110 MB, not 600.

Written are stored members in the very bytes that Python's ``zipfile`` writes; read is what other programs write as
well: stored or deflated, with 64-bit sizes and offsets, with something before or behind. Format: PKWARE, APPNOTE.TXT,
.ZIP File Format Specification, version 6.3.10.
"""

import os
import struct
import zlib
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from dpdm.data.records import list_names
from dpdm.errors import InputError

MAX_MEMBER_BYTES = 256 * 2**20
# What unpacks to more than this and to 100 times its size is no image; the bytes of zeros that deflate packs best take
# 1/1000 of their size.
MAX_PACKED_BYTES, MAX_RATIO = 16 * 2**20, 100
LARGEST_32_BIT = 2**31 - 1  # of sizes and offsets, above which 64-bit fields are written; zipfile's limit
LARGEST_COUNT = 2**16 - 1

LOCAL = struct.Struct("<4s2B4HL2L2H")
CENTRAL = struct.Struct("<4s4B4HL2L5H2L")
END = struct.Struct("<4s4H2LH")
END_64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR_64 = struct.Struct("<4sLQL")
LONGEST_COMMENT = 2**16 - 1

VERSION, VERSION_64, UNIX, MACOS = 20, 45, 3, 19
# The format's first day: without a fixed time two runs would give different bytes.
TIME, DATE = 0, 1 << 5 | 1
MODE = 0o644 << 16
ENCRYPTED, UTF_8 = 1, 0x800
STORED, DEFLATED = 0, 8


def local_header(name: str, size: int, crc: int) -> bytes:
    """Returns what stands before the ``size`` bytes of a stored member with this ASCII name and CRC-32."""
    raw = name.encode("ascii")
    return LOCAL.pack(b"PK\3\4", VERSION, 0, 0, STORED, TIME, DATE, crc, size, size, len(raw), 0) + raw


def directory(names: Iterable[str], sizes: Iterable[int], crcs: Iterable[int]) -> Iterator[bytes]:
    """Yields the end of a zip whose stored members follow each other from its first byte on."""
    offset = count = length = 0
    for name, size, crc in zip(names, sizes, crcs, strict=True):
        raw = name.encode("ascii")
        far = offset > LARGEST_32_BIT
        extra = struct.pack("<HHQ", 1, 8, offset) if far else b""
        version = VERSION_64 if far else VERSION
        entry = CENTRAL.pack(
            *(b"PK\1\2", version, UNIX, version, 0, 0, STORED, TIME, DATE, crc, size, size),
            *(len(raw), len(extra), 0, 0, 0, MODE, 0xFFFFFFFF if far else offset),
        )
        yield entry + raw + extra
        length += len(entry) + len(raw) + len(extra)
        offset += LOCAL.size + len(raw) + size
        count += 1
    if count > LARGEST_COUNT or offset > LARGEST_32_BIT or length > LARGEST_32_BIT:
        size_64 = END_64.size - 12  # as the format counts it
        yield END_64.pack(b"PK\6\6", size_64, VERSION_64, VERSION_64, 0, 0, count, count, length, offset)
        yield LOCATOR_64.pack(b"PK\6\7", 0, offset + length, 1)
    count, length, offset = min(count, 0xFFFF), min(length, 0xFFFFFFFF), min(offset, 0xFFFFFFFF)
    yield END.pack(b"PK\5\6", 0, 0, count, count, length, offset, 0)


class ZipReader:
    """Reads members in memory; nothing is ever extracted. Reading is safe from several threads.

    Attributes:
        names: of all members, sorted; those of folders end in a slash.

    Raises:
        InputError: if the file is absent or no zip, or names a member twice (which one counts?).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise InputError(f"Cannot open {path} as a zip: {error}.") from error
        try:
            self._read_directory(*_find_directory(self._file))
        except (OSError, ValueError, OverflowError, struct.error) as error:
            self.close()
            raise InputError(f"Cannot open {path} as a zip: {error}.") from error
        pairs = zip(self.names, self.names[1:], strict=False)
        twice = sorted({name for name, following in pairs if name == following})
        if twice:
            self.close()
            raise InputError(f"{path}: members that occur more than once: {list_names(twice)}")
        if sum(self._packed_sizes) > os.fstat(self._file.fileno()).st_size:
            self.close()
            raise InputError(f"{path}: its members take more bytes than the file has, so they overlap: write it anew.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        position = bisect_left(self.names, name)
        return position < len(self.names) and self.names[position] == name

    def size(self, name: str) -> int:
        """Returns the length of a member's content."""
        return self._sizes[self._index(name)]

    def is_too_large(self, name: str) -> bool:
        """Whether a member is of more than 256 MiB, or a bomb: of more than 16 MiB and 100 times its packed size."""
        index = self._index(name)
        size = self._sizes[index]
        return size > MAX_MEMBER_BYTES or size > max(MAX_PACKED_BYTES, MAX_RATIO * self._packed_sizes[index])

    def checksum(self, name: str) -> int:
        """Returns the CRC-32 of a member's content."""
        return self._crcs[self._index(name)]

    def read(self, name: str, where: str) -> bytes:
        """Returns a member's content; its checksum is verified.

        Raises:
            InputError: with ``where``, if it is damaged, encrypted, too large, or neither stored nor deflated.
        """
        index = self._index(name)
        if self.is_too_large(name):
            raise InputError(
                f"{where}: {self._sizes[index]} bytes, expected at most {MAX_MEMBER_BYTES}, and {MAX_RATIO} times "
                f"the {self._packed_sizes[index]} that they are packed into"
            )
        try:
            return self._content(index)
        except (OSError, ValueError, OverflowError, struct.error, zlib.error) as error:
            raise InputError(f"{where}: cannot be read from the zip ({error})") from error

    def _index(self, name: str) -> int:
        position = bisect_left(self.names, name)
        if position == len(self.names) or self.names[position] != name:
            raise KeyError(name)
        return position

    def _content(self, index: int) -> bytes:
        if self._flags[index] & ENCRYPTED:
            raise ValueError("it is encrypted")
        start, size, packed = self._offsets[index], self._sizes[index], self._packed_sizes[index]
        if packed > 2 * MAX_MEMBER_BYTES:
            raise ValueError(f"it says that it takes {packed} bytes")
        header = LOCAL.unpack(self._at(start, LOCAL.size))
        if header[0] != b"PK\3\4":
            raise ValueError("its header is damaged")
        content = self._at(start + LOCAL.size + header[-2] + header[-1], packed)
        if self._methods[index] == DEFLATED:
            # At most one byte more than announced: what unpacks to gigabytes is not unpacked.
            content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        elif self._methods[index] != STORED:
            raise ValueError(f"compressed by method {self._methods[index]}, expected stored or deflated")
        if len(content) != size or zlib.crc32(content) != self._crcs[index]:
            raise ValueError("its length or checksum is wrong")
        return content

    def _at(self, offset: int, size: int) -> bytes:
        content = os.pread(self._file.fileno(), size, offset)
        if len(content) != size:
            raise ValueError("it ends too early")
        return content

    def _read_directory(self, content: bytes, count: int, shift: int) -> None:
        names: list[str] = []
        columns = tuple(array(kind) for kind in "HHIQQQ")  # flags, method, CRC, packed size, size, offset
        position = 0
        for _ in range(count):
            entry = CENTRAL.unpack_from(content, position)
            if entry[0] != b"PK\1\2":
                raise ValueError("its directory is damaged")
            flags, method, crc, packed, size = entry[5], entry[6], entry[9], entry[10], entry[11]
            name_size, extra_size, comment_size, offset = entry[12], entry[13], entry[14], entry[18]
            position += CENTRAL.size
            raw = content[position : position + name_size]
            names.append(_name(raw, by=entry[2], is_utf_8=bool(flags & UTF_8)))
            extra = content[position + name_size : position + name_size + extra_size]
            if 0xFFFFFFFF in (size, packed, offset):
                size, packed, offset = _wide_fields(extra, [size, packed, offset])
            for column, value in zip(columns, (flags, method, crc, packed, size, offset + shift), strict=True):
                column.append(value)
            position += name_size + extra_size + comment_size
        order = sorted(range(count), key=names.__getitem__)
        columns = tuple(array(column.typecode, (column[index] for index in order)) for column in columns)
        self._flags, self._methods, self._crcs, self._packed_sizes, self._sizes, self._offsets = columns
        self.names = [names[index] for index in order]


def _name(raw: bytes, *, by: int, is_utf_8: bool) -> str:
    """Returns a member's name. Unix and macOS write theirs in UTF-8, often without saying so as the format asks for."""
    if not is_utf_8 and by in (UNIX, MACOS):
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            pass
    return raw.decode("utf-8" if is_utf_8 else "cp437")


def _wide_fields(extra: bytes, values: list[int]) -> list[int]:
    """Returns size, packed size and offset with the 64-bit ones, in this order, in place of 0xFFFFFFFF."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, position + 4))
            return [next(wide, value) if value == 0xFFFFFFFF else value for value in values]
        position += 4 + length
    return values


def _find_directory(file: BinaryIO) -> tuple[bytes, int, int]:
    """Returns the directory, its number of entries, and how many bytes stand before the zip's own first one."""
    length = file.seek(0, os.SEEK_END)
    tail_start = max(0, length - LOCATOR_64.size - END.size - LONGEST_COMMENT)
    file.seek(tail_start)
    tail = file.read()
    found = tail.rfind(b"PK\5\6")
    if found < 0 or found + END.size > len(tail):
        raise ValueError("it has no directory")
    position = tail_start + found
    _, _, _, _, count, size, offset, _ = END.unpack_from(tail, found)
    end = position
    if found >= LOCATOR_64.size and tail[found - LOCATOR_64.size :][:4] == b"PK\6\7":
        end = position - LOCATOR_64.size - END_64.size
        file.seek(end)
        record = END_64.unpack(file.read(END_64.size))
        if record[0] != b"PK\6\6":
            raise ValueError("its 64-bit directory record is damaged")
        count, size, offset = record[7:10]
    if not 0 <= size <= end or end - size < offset or count * CENTRAL.size > size:
        raise ValueError("its directory is damaged")
    file.seek(end - size)
    return file.read(size), count, end - size - offset
