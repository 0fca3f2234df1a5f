"""Reads the plain values of a pickle; what a pickle would have Python import or call is noted, never done.

The opcodes are taken apart by ``pickletools``, which decodes and executes nothing, and put together here: the few
that a file of lists, strings, numbers and arrays consists of (protocol 2, as CIFAR-10's files are). Any other opcode,
and any name but those that numpy's arrays are made of, is refused by name.
"""

import pickletools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARRAY, DTYPE, MAKE_ARRAY = "numpy ndarray", "numpy dtype", "numpy.core.multiarray _reconstruct"
MAX_NAME = 80
PLAIN = ("BININT", "BININT1", "BININT2", "NONE", "NEWTRUE", "NEWFALSE", "SHORT_BINSTRING", "BINSTRING")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class _Name:
    """A name that the pickle mentions."""

    name: str


@dataclass
class _Call:
    """A call that the pickle asks for, and the state that the result is to be given."""

    name: str
    arguments: tuple
    state: Any = None


class _Mark:
    """Where a list, tuple or dictionary begins."""

    __slots__ = ()


MARK = _Mark()


def read_pickle(content: bytes) -> Any:
    """Returns the value in a pickle: dictionaries, lists, tuples, numbers, byte strings and uint8 arrays.

    Strings are Python 2's, that is bytes. What is none of these stands in as a note without any effect: check the
    types of what you take.

    Raises:
        ValueError: if the pickle is damaged, or holds anything else.
    """
    try:
        machine = _Machine()
        for opcode, argument, _ in pickletools.genops(content):
            if opcode.name == "STOP":
                break
            machine.step(opcode.name, argument)
        (value,) = machine.stack
    except (IndexError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a damaged pickle ({error})") from error
    return value


class _Machine:
    """The pickle machine's stack and memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in PLAIN:
            value = CONSTANTS.get(name, argument)
            stack.append(value.encode("latin-1") if isinstance(value, str) else value)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": {}, "EMPTY_LIST": [], "EMPTY_TUPLE": ()}[name])
        elif name == "MARK":
            stack.append(MARK)
        elif name in ("APPEND", "APPENDS"):
            items = self._popped(1 if name == "APPEND" else None)
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._popped(2 if name == "SETITEM" else None)
            if not all(isinstance(key, bytes | int) for key in items[::2]):
                # The hash of a tuple that holds itself twice, and so on, forty times over, takes for ever.
                raise ValueError("a pickle with a dictionary of other keys than texts and numbers")
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name == "TUPLE" or name in TUPLES:
            stack.append(tuple(self._popped(TUPLES.get(name))))
        elif name == "GLOBAL":
            if argument not in (ARRAY, DTYPE, MAKE_ARRAY):
                raise ValueError(f"a pickle that asks for {argument[:MAX_NAME]!r}, which is none of numpy's arrays")
            stack.append(_Name(argument))
        elif name == "REDUCE":
            function, arguments = self._popped(2)
            stack.append(_Call(function.name, arguments))
        elif name == "BUILD":
            (state,) = self._popped(1)
            stack[-1].state = state
            if stack[-1].name != DTYPE:
                stack[-1] = _array(stack[-1])
        elif name != "PROTO":
            raise ValueError(f"a pickle with {name}, which no file of plain arrays needs")

    def _popped(self, count: int | None) -> list[Any]:
        """Takes the last ``count`` values from the stack; None: all above the last mark, and the mark."""
        start = len(self.stack) - 1 if count is None else len(self.stack) - count
        while count is None and self.stack[start] is not MARK:
            start -= 1
        if start < 0:
            raise IndexError("its stack is empty")
        items = self.stack[start if count else start + 1 :]
        del self.stack[start:]
        return items


def _array(call: _Call) -> NDArray[np.uint8]:
    """Returns the array that the call and its state describe."""
    match call:
        case _Call(
            name="numpy.core.multiarray _reconstruct",
            arguments=(_Name(name="numpy ndarray"), (0,), b"b"),
            state=(
                1,
                (*shape,),
                _Call(name="numpy dtype", arguments=(b"u1", 0, 1), state=element),
                False,
                bytes(content),
            ),
        ) if element and element[:2] == (3, b"|"):
            return np.frombuffer(content, np.uint8).reshape(shape)
    raise ValueError("a pickle with an array that is not of plain bytes")
