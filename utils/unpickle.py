"""What ``torch.save`` wrote, built from bytes that nobody vouches for.

``torch.load(…, weights_only=True)`` runs no foreign code either, but builds whatever a file asks for: a kilobyte is
enough for a terabyte of zeros, or for a dictionary key that takes years to hash. Here nothing that a pickle names is
called, and nothing becomes larger than a few times the file.
"""

from __future__ import annotations

import io
import math
import pickletools
import struct
import sys
import zipfile
from collections.abc import Iterable
from typing import IO, Any

import torch
from torch import Tensor

from .errors import UserError

MAX_PICKLE = 2**24  # bytes beside the tensors; a small object takes 60 times what its pickle does
MAX_DEPTH = 32
_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_REBUILD_TENSOR = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_REBUILD_PARAMETER = ("torch._utils._rebuild_parameter", "torch.nn.parameter.Parameter")
_EXPECTED = {
    *_REBUILD_TENSOR, *_REBUILD_PARAMETER, *(f"torch.{name}" for name in _DTYPES),
    *(f"torch.cuda.{name}" for name in _DTYPES), *(str(kind) for kind in {torch.bool, *_DTYPES.values()}),
    "collections.OrderedDict", "collections.Counter", "torch.Size", "torch.device", "_codecs.encode",
    "builtins.set", "__builtin__.set", "builtins.bytearray", "builtins.complex",
}  # fmt: skip


class Refused(UserError):
    """A file that is made to harm: it asks for what no checkpoint needs."""


class Inert:
    """Stands for an object of a class that only its author has, such as the meters in published checkpoints."""


class _Name(str):
    """module.name of something in Python: all that is ever made of it."""


def unpickle(content: bytes) -> Any:
    """The object in the bytes of a file that ``torch.save`` wrote, today's zip archive or the format before
    PyTorch 1.6, on the CPU. Objects of unknown classes become ``Inert``.

    Raises:
        Refused: it asks for code of Python or PyTorch, or for more memory than its bytes stand for.
        Exception: nearly any, where the bytes are no such file.
    """
    state = _Zip(content).read() if content.startswith(b"PK") else _Legacy(content).read()
    _refuse_expansion(state, len(content))
    return state


class _Pickles:
    """Builds objects of one file. ``room`` is how many bytes its tensors may still claim: storages once, and views of
    them twice, since weights may be tied."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.room = 3 * len(content)
        self.storages: dict[str, Tensor] = {}

    def storage(self, key: str, dtype: torch.dtype, number: int) -> Tensor:
        raise NotImplementedError

    def claim(self, size: int) -> None:
        self.room -= size
        if self.room < 0:
            raise Refused("refused: its tensors claim more memory than it has bytes")

    def build(self, stream: IO[bytes]) -> Any:
        """The object of the pickle at the stream's position: the operations of pickle that ``torch.save`` uses."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[Any, Any] = {}

        def since_mark() -> list[Any]:
            first = marks.pop()
            items = stack[first:]
            del stack[first:]
            return items

        for operation, argument, position in pickletools.genops(stream):
            if (position or 0) > MAX_PICKLE:
                raise Refused(f"refused: more than {MAX_PICKLE} bytes beside the tensors")
            match operation.name:
                case "PROTO" | "FRAME":
                    pass
                case "MARK":
                    marks.append(len(stack))
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    stack.append(_named(str(argument).replace(" ", ".")))
                case "STACK_GLOBAL":
                    stack[-2:] = [_named(".".join(stack[-2:]))]
                case "NONE" | "NEWTRUE" | "NEWFALSE":
                    stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[operation.name])
                case "EMPTY_DICT" | "EMPTY_LIST" | "EMPTY_TUPLE":
                    stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[operation.name]())
                case "TUPLE":
                    stack.append(tuple(since_mark()))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    number = int(operation.name[-1])
                    stack[-number:] = [tuple(stack[-number:])]
                case "APPEND" | "APPENDS":
                    items = since_mark() if operation.name == "APPENDS" else [stack.pop()]
                    _extend(stack[-1], items)
                case "SETITEM" | "SETITEMS":
                    items = since_mark() if operation.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                    _update(stack[-1], zip(items[::2], items[1::2], strict=True))
                case "NEWOBJ" | "REDUCE":
                    arguments = stack.pop()
                    stack.append(self.call(stack.pop(), arguments))
                case "BUILD":  # the attributes of an object that is Inert, or those of an ordered dictionary
                    stack.pop()
                case "BINPERSID":
                    kind, storage, key, _, number, *view = stack.pop()
                    if kind != "storage" or type(key) is not str or any(view):
                        raise ValueError("no storage of a kind that is known")
                    if key not in self.storages:
                        dtype = _DTYPES[storage.split(".")[-1]]
                        self.claim(number * dtype.itemsize)
                        self.storages[key] = self.storage(key, dtype, number)
                    stack.append(self.storages[key])
                case "STOP":
                    return stack.pop()
                case name:
                    if operation.stack_before or argument is None:
                        raise ValueError(f"unsupported operation {name}")
                    if isinstance(argument, int) and argument.bit_length() > 1024:
                        raise ValueError("a number of more than 1024 bits")
                    stack.append(argument)  # a number or text
        raise EOFError

    def call(self, name: Any, arguments: tuple[Any, ...]) -> Any:
        """What a call would give, for the few names that are known."""
        if not isinstance(name, _Name):
            raise ValueError(f"{name!r} is no name")
        if name in _REBUILD_TENSOR:
            storage, offset, size, stride = arguments[:4]
            number = math.prod(size)
            if number > len(storage):
                raise Refused(f"refused: a tensor of shape {tuple(size)} over {len(storage)} values")
            self.claim(number * storage.itemsize)
            return torch.as_strided(storage, size, stride, offset)
        if name in _REBUILD_PARAMETER or name == "torch.Size":
            return arguments[0]
        if name == "collections.OrderedDict":
            pairs = arguments[0] if arguments else []  # Python 2 gives them here
            self.claim(100 * len(pairs))
            ordered: dict[Any, Any] = {}
            _update(ordered, pairs)
            return ordered
        return Inert()


class _Zip(_Pickles):
    def read(self) -> Any:
        self.archive = zipfile.ZipFile(io.BytesIO(self.content))
        members = self.archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise Refused("refused: it is compressed, which PyTorch never does; it could unpack to anything")
        if sum(member.file_size for member in members) > len(self.content):
            raise Refused("refused: its entries claim more than its bytes")
        (name,) = (member.filename for member in members if member.filename.endswith("/data.pkl"))
        self.folder = name.removesuffix("data.pkl")
        return self.build(io.BytesIO(self.archive.read(name)))

    def storage(self, key: str, dtype: torch.dtype, number: int) -> Tensor:
        values = bytearray(self.archive.read(f"{self.folder}data/{key}"))
        if len(values) != number * dtype.itemsize:
            raise ValueError(f"storage {key} has {len(values)} bytes")
        return torch.frombuffer(values, dtype=dtype) if values else torch.empty(0, dtype=dtype)


class _Legacy(_Pickles):
    def read(self) -> Any:
        stream = io.BytesIO(self.content)
        *_, state, keys = (self.build(stream) for _ in range(5))  # after a magic number, a version and a description
        for key in keys:
            storage = self.storages[key]
            (number,) = struct.unpack("<q", stream.read(8))
            if number != len(storage):
                raise ValueError(f"storage {key} has {number} values")
            if number:
                values = bytearray(stream.read(storage.nbytes))
                storage.copy_(torch.frombuffer(values, dtype=storage.dtype, count=number))
        return state

    def storage(self, key: str, dtype: torch.dtype, number: int) -> Tensor:
        return torch.zeros(number, dtype=dtype)


def _named(name: str) -> _Name:
    if len(name) > 1000:
        raise ValueError("a name of more than 1000 letters")
    module = name.split(".")[0]
    if name not in _EXPECTED and (module in sys.stdlib_module_names or module in ("__builtin__", "torch")):
        raise Refused(f"refused: it asks for {name}, which a checkpoint has no use for and an attack has")
    return _Name(name)


def _extend(target: Any, items: list[Any]) -> None:
    """Add to a list; what goes into an object of unknown class is dropped."""
    if not isinstance(target, (list, Inert)):
        raise ValueError(f"{type(target).__name__} where a list is filled")
    if isinstance(target, list):
        target.extend(items)


def _update(target: Any, items: Iterable[tuple[Any, Any]]) -> None:
    """Add to a dictionary; what goes into an object of unknown class is dropped."""
    if not isinstance(target, (dict, Inert)):
        raise ValueError(f"{type(target).__name__} where a dictionary is filled")
    for key, value in items:
        if not isinstance(key, (str, bytes, int, float, type(None))):  # a tuple may hold itself a million times
            raise ValueError(f"{type(key).__name__} as a key")
        if isinstance(target, dict):
            target[key] = value


def _refuse_expansion(state: Any, limit: int) -> None:
    """Lists that hold each other many times are small in memory and endless to whoever walks through them."""
    pending = [(state, 0)]
    while pending:
        value, depth = pending.pop()
        limit -= 1
        if limit < 0 or depth > MAX_DEPTH:
            raise Refused("refused: its lists hold each other, over and over")
        if isinstance(value, (dict, list, tuple)):
            pending += [(part, depth + 1) for part in (value.values() if isinstance(value, dict) else value)]
