"""Whether torch may be let at a stranger's pickle: it runs no code of it, but can be kept busy for ever.

``torch.load(weights_only=True)`` builds what a pickle asks for out of plain values, tensors and a few containers. A
tuple that holds a tuple twice that holds a tuple twice, fifty times over, has few bytes and a hash that takes for ever,
and one that is a million levels deep ends the process. Here the opcodes are gone through beforehand, in a time that
grows with the file, on a stack of what kind each value is; nothing is built, imported or called.
"""

import pickle
import pickletools
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch

LEGACY_PICKLES = 5  # of torch's older format: magic number, version, machine, the object, keys of its storages
MAX_TUPLE = 1000  # values in a tuple and in all tuples in it
MAX_WORK = 10_000_000  # values handed to functions, in all
PLAIN = frozenset(
    "NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 BINFLOAT BINUNICODE SHORT_BINSTRING LONG1".split()  # noqa: SIM905
)
CONTAINERS = ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET")
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class StrangePickleError(ValueError):
    """A pickle that no checkpoint needs to be; the message says what is in it."""


@dataclass(slots=True)
class _Value:
    """What is known of a value.

    Attributes:
        kind: plain, name, tuple or other.
        size: at least as many values as are in it; those in containers in it are not counted.
        items: of a tuple.
    """

    kind: str
    size: int = 1
    items: "tuple[_Value, ...]" = ()


PLAIN_VALUE = _Value("plain")


def check_pickles(path: Path) -> None:
    """Looks whether torch can read a checkpoint in a time that grows with the file alone.

    What is looked at is what torch reads: ``data.pkl`` by torch's own reader of zips, or the pickles of its older
    format. Keys of dictionaries must be plain, so that none has a hash that takes long; no tuple may hold more than
    1000 values, with those of the tuples in it; what is called must be a name, and all calls together get ten million
    values at most.

    Raises:
        StrangePickleError: if it is none such.
        pickle.UnpicklingError: if it is damaged.
    """
    with path.open("rb") as file:
        if file.peek(4)[:4] == b"PK\x03\x04":
            _Machine().run(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl"))
            return
        for _ in range(LEGACY_PICKLES):
            if not file.peek(1):
                return  # torch finds nothing more either
            _Machine().run(file)


class _Machine:
    """The pickle machine's stack and memo, with kinds in place of values."""

    def __init__(self) -> None:
        self.stack: list[_Value] = []
        self.below: list[list[_Value]] = []  # what lies below each mark
        self.memo: dict[int, _Value] = {}
        self.work = 0

    def run(self, content: bytes | BufferedReader) -> None:
        try:
            for opcode, argument, _ in pickletools.genops(content):
                self.step(opcode.name, argument)
        except StrangePickleError:
            raise
        except (IndexError, KeyError, ValueError) as error:
            raise pickle.UnpicklingError(str(error)) from None

    def step(self, name: str, argument: Any) -> None:
        if name in PLAIN:
            self.stack.append(PLAIN_VALUE)
        elif name in CONTAINERS:
            self.stack.append(_Value("other", 0))
        elif name == "MARK":
            self.below.append(self.stack)
            self.stack = []
        elif name in TUPLES or name == "TUPLE":
            items = self._popped(TUPLES.get(name))
            self.stack.append(_tuple(items))
        elif name == "GLOBAL":
            self.stack.append(_Value("name"))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name in ("APPEND", "APPENDS"):
            self._grow(self._popped(1 if name == "APPEND" else None))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._popped(2 if name == "SETITEM" else None)
            if any(key.kind != "plain" for key in items[::2]):
                raise StrangePickleError("a pickle with a dictionary of other keys than texts and numbers")
            self._grow(items)
        elif name == "BINPERSID":
            (stored,) = self._popped(1)
            if any(item.kind not in ("plain", "name") for item in stored.items):
                raise StrangePickleError("a pickle with a tensor whose storage has more than texts and numbers to say")
            self.stack.append(_Value("other"))
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = self._popped(2)
            if function.kind != "name":
                raise StrangePickleError("a pickle that calls what is no function")
            self.stack.append(_Value("other", self._count(arguments)))
        elif name == "BUILD":
            (state,) = self._popped(1)
            count, built = self._count(state), self.stack[-1]
            if built.kind == "other":  # others have no state, which torch says
                built.size += count
        elif name not in ("PROTO", "STOP"):
            raise StrangePickleError(f"a pickle with {name}, which no checkpoint needs")

    def _grow(self, items: list[_Value]) -> None:
        container = self.stack[-1]
        if container.kind != "other":
            raise StrangePickleError("a pickle that puts something into what is no container")
        container.size += len(items)

    def _count(self, value: _Value) -> int:
        """Notes that a function goes through a value, and returns how many values that are."""
        count, left = 0, [value]
        while left:
            value = left.pop()
            count += 1 if value.kind == "tuple" else value.size
            left += value.items
        self.work += count
        if self.work > MAX_WORK:
            raise StrangePickleError("a pickle that asks for more work than any checkpoint")
        return count

    def _popped(self, count: int | None) -> list[_Value]:
        """Takes the last ``count`` values from the stack; None: all above the last mark, and the mark."""
        if count is None:
            items, self.stack = self.stack, self.below.pop()
            return items
        if count > len(self.stack):
            raise IndexError("its stack is empty")
        start = len(self.stack) - count
        items = self.stack[start:]
        del self.stack[start:]
        return items


def _tuple(items: list[_Value]) -> _Value:
    size = 1 + sum(item.size if item.kind == "tuple" else 1 for item in items)
    if size > MAX_TUPLE:
        raise StrangePickleError(f"a pickle with a tuple of more than {MAX_TUPLE} values")
    return _Value("tuple", size, tuple(items))
