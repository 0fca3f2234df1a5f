import io
import random
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest

from dpdm.data import zips
from dpdm.data.zips import ZipReader, directory, local_header
from dpdm.errors import InputError


def theirs(members: dict[str, bytes]) -> bytes:
    """What Python's zipfile writes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as file:
        for name, content in members.items():
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            file.writestr(info, content)
    return buffer.getvalue()


def ours(members: dict[str, bytes]) -> bytes:
    sizes, crcs = [len(x) for x in members.values()], [zlib.crc32(x) for x in members.values()]
    parts = [local_header(n, len(x), zlib.crc32(x)) + x for n, x in members.items()]
    return b"".join([*parts, *directory(members, sizes, crcs)])


def random_members(count: int) -> dict[str, bytes]:
    source = random.Random(0)
    return {f"{i:03d}/x{i}.png": source.randbytes(source.randrange(40)) for i in range(count)}


@pytest.mark.parametrize("limits", [(2**31 - 1, 2**16 - 1), (600, 2**16 - 1), (2**31 - 1, 20), (600, 20)])
@pytest.mark.parametrize("count", [0, 1, 20, 21, 60])
def test_bytes_are_those_of_zipfile(monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], count: int) -> None:
    """With the limits lowered also those of a zip with 64-bit fields, which would have 2 GiB."""
    for module, names in (
        (zipfile, ("ZIP64_LIMIT", "ZIP_FILECOUNT_LIMIT")),
        (zips, ("LARGEST_32_BIT", "LARGEST_COUNT")),
    ):
        for name, limit in zip(names, limits, strict=True):
            monkeypatch.setattr(module, name, limit)
    members = random_members(count)
    assert ours(members) == theirs(members)


@pytest.mark.parametrize("limits", [(2**31 - 1, 2**16 - 1), (600, 20)])
@pytest.mark.parametrize("around", [(b"", b""), (b"a program that unpacks itself", b""), (b"", b"a comment")])
def test_what_zipfile_writes_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], around: tuple[bytes, bytes]
) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limits[0])
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", limits[1])
    members = random_members(40) | {"folder/": b"", "ö/日本.png": b"x" * 1000, "a\nb": b""}
    path = tmp_path / "a.zip"
    path.write_bytes(around[0])
    with zipfile.ZipFile(path, "a") as file:
        for index, (name, content) in enumerate(members.items()):
            file.writestr(name, content, zipfile.ZIP_DEFLATED if index % 2 else zipfile.ZIP_STORED)
        file.comment = around[1]
    with ZipReader(path) as reader:
        assert reader.names == sorted(members)
        assert {name: reader.read(name, "x") for name in reader.names} == members
        assert [reader.size("ö/日本.png"), reader.checksum("folder/")] == [1000, 0]
        assert "ö/日本.png" in reader
        assert "z" not in reader
        with pytest.raises(KeyError):
            reader.read("z", "x")


class Stream(io.BytesIO):
    """A file that cannot go back: zipfile then writes lengths behind the content."""

    def seekable(self) -> bool:
        return False

    def tell(self) -> int:
        raise io.UnsupportedOperation


def test_lengths_behind_the_content_and_code_page_437(tmp_path: Path) -> None:
    stream = Stream()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("abc.png", b"content")
    path = tmp_path / "a.zip"
    path.write_bytes(stream.getvalue().replace(b"abc.png", b"\x81bc.png"))
    assert ZipReader(path).names == ["übc.png"]
    assert ZipReader(path).read("übc.png", "x") == b"content"


def test_names_of_unix_that_do_not_say_that_they_are_utf_8(tmp_path: Path) -> None:
    """As Info-ZIP writes them; the same folder unzipped has the same classes."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name in ("Zoë/1.png", "Zoe/2.png"):
            file.writestr(name, name)
    content = (tmp_path / "a.zip").read_bytes()
    position = content.index(b"PK\1\2")
    for place in (content.index(b"PK\3\4") + 6, position + 8):  # flags of the first member, in both headers
        content = content[:place] + bytes(2) + content[place + 2 :]
    (tmp_path / "a.zip").write_bytes(content)
    assert ZipReader(tmp_path / "a.zip").names == ["Zoe/2.png", "Zoë/1.png"]
    (tmp_path / "a.zip").write_bytes(content[: position + 5] + b"\0" + content[position + 6 :])  # made on MS-DOS
    assert ZipReader(tmp_path / "a.zip").names == ["Zoe/2.png", "Zo├½/1.png"]


def test_every_damage_is_an_input_error(tmp_path: Path) -> None:
    """Whatever byte is changed: the zip is refused, or every member is right or refused."""
    members = random_members(3)
    whole = ours(members)
    path = tmp_path / "a.zip"
    cases = [whole[:end] for end in range(0, len(whole), 3)]
    cases += [
        whole[:i] + bytes([whole[i] ^ flip]) + whole[i + 1 :] for i in range(len(whole)) for flip in (1, 0x80, 0xFF)
    ]
    refused = wrong = 0
    for case in cases:
        path.write_bytes(case)
        try:
            with ZipReader(path) as reader:
                for name in reader.names:
                    wrong += reader.read(name, name) not in members.values()
        except InputError:
            refused += 1
    assert wrong == 0
    assert refused > len(cases) // 2


def test_hostile_members_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.zip"
    bomb = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = bomb.compress(bytes(10**7)) + bomb.flush()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("bomb", bytes(10**7))
    # The directory and the header announce 5 bytes.
    path.write_bytes(
        path.read_bytes().replace(struct.pack("<LL", len(packed), 10**7), struct.pack("<LL", len(packed), 5))
    )
    with pytest.raises(InputError, match=r"b: .*length or checksum"):
        ZipReader(path).read("bomb", "b")
    with monkeypatch.context() as patch:
        patch.setattr(zips, "MAX_MEMBER_BYTES", 4)
        with pytest.raises(InputError, match="b: 5 bytes, expected at most 4"):
            ZipReader(path).read("bomb", "b")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as file:
        file.writestr("a", b"abc")
    with pytest.raises(InputError, match="method 12"):
        ZipReader(path).read("a", "b")
    content = bytearray(ours({"a": b"abc"}))
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="encrypted"):
        ZipReader(path).read("a", "b")
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings(action="ignore"):
        file.writestr("a.png", b"1")
        file.writestr("a.png", b"2")
    with pytest.raises(InputError, match=r"more than once: a\.png"):
        ZipReader(path)
