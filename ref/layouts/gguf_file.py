"""GGUF's container: the header, the metadata, the table of tensors, and each tensor's bytes.

    "GGUF", version, tensor count, metadata count, metadata, tensor infos, padding, data

Everything is little-endian; data begins at a multiple of the alignment, and so does each tensor in it. Only the header is read
at opening; a tensor is mapped into memory when it is asked for, and let go with the torch tensor that shows it.

Source: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3.
"""

import math
import mmap
import os
import struct
from dataclasses import dataclass, field

import torch

from .gguf_blocks import BLOCKS, PLAIN, REFUSED

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = "general.alignment"
# A header with a vocabulary of 256,000 tokens has about 10 MB. Nothing more than this is read, whatever the counts say.
HEADER_LIMIT = 2**26
# Metadata value types in the order of their ids, with the code that struct knows them by.
VALUE_TYPES = {
    "UINT8": "B", "INT8": "b", "UINT16": "H", "INT16": "h", "UINT32": "I", "INT32": "i", "FLOAT32": "f", "BOOL": "?",
    "STRING": None, "ARRAY": None, "UINT64": "Q", "INT64": "q", "FLOAT64": "d",
}  # fmt: skip
TYPE_OF_ID = {id: name for name, (id, _) in PLAIN.items()} | {block.id: name for name, block in BLOCKS.items()}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: the name of its type (a key of BLOCKS or PLAIN), its shape (k last), its first byte in the file, its bytes."""

    name: str
    type: str
    shape: tuple
    offset: int
    nbytes: int


@dataclass(frozen=True)
class File:
    """A GGUF file that has been opened.

    metadata: {key: value}; numbers, bools, strings (bytes that are no UTF-8 come as surrogate escapes), and lists of one of them.
    types: {key: name of the value's type in the file}, "ARRAY INT32" for lists.
    tensors: {name: Tensor}, in the order of the file.
    """

    path: str
    version: int
    metadata: dict = field(repr=False)
    types: dict = field(repr=False)
    tensors: dict = field(repr=False)


def row_bytes(type_name, k):
    """Bytes of a row of k weights.

    Raises:
        ValueError: k is no multiple of the type's block.
    """
    if type_name in PLAIN:
        return k * PLAIN[type_name][1].itemsize
    block = BLOCKS[type_name]
    if k % block.size:
        raise ValueError(f"{type_name} has k={k}, expected a multiple of its blocks' {block.size} weights")
    return k // block.size * block.nbytes


def open_file(path):
    """Read a GGUF file's header.

    Returns:
        File.

    Raises:
        OSError: the file cannot be opened.
        ValueError: it is no GGUF file, or one whose header does not agree with itself or with the file's length.
        NotImplementedError: a big-endian file, or a tensor of a type that cannot be read (REFUSED).
    """
    path = os.fspath(path)
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length < 24:
            raise ValueError(f"{path}: gguf: the file has {length} bytes, fewer than a header")
        with mmap.mmap(file.fileno(), min(length, HEADER_LIMIT), access=mmap.ACCESS_READ) as data:
            try:
                return _header(path, _Cursor(data, length), length)
            except (ValueError, NotImplementedError) as error:
                raise type(error)(f"{path}: gguf: {error}") from None


class _Cursor:
    """Reads values from the header, one behind the other."""

    def __init__(self, data, length):
        self.data, self.length, self.at = data, length, 0

    def take(self, count, what):
        """The next count bytes begin here; the cursor moves behind them."""
        at = self.at
        if count > len(self.data) - at:
            end = f"the file ends at {self.length}" if len(self.data) == self.length else f"no header is read beyond {HEADER_LIMIT}"
            raise ValueError(f"{what} at byte {at} takes {count} bytes, but {end}")
        self.at += count
        return at

    def number(self, code, what):
        return struct.unpack_from("<" + code, self.data, self.take(struct.calcsize("<" + code), what))[0]

    def numbers(self, code, count, what):
        at = self.take(count * struct.calcsize("<" + code), what)
        return list(struct.unpack_from(f"<{count}{code}", self.data, at))

    def string(self, what, errors="strict"):
        count = self.number("Q", what)
        at = self.take(count, what)
        try:
            return self.data[at : at + count].decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} at byte {at} is no UTF-8: {error.reason}") from None

    def strings(self, count, what):
        """As string, count times; vocabularies have hundreds of thousands."""
        found, unpack, end = [], struct.Struct("<Q").unpack_from, len(self.data)
        for _ in range(count):
            at = self.at + 8
            if at > end or at + (size := unpack(self.data, self.at)[0]) > end:
                self.string(what)  # says what is wrong
            self.at = at + size
            found.append(self.data[at : self.at].decode("utf-8", "surrogateescape"))
        return found


def _header(path, cursor, length):
    magic = cursor.data[: cursor.take(4, "the magic") + 4]
    if magic != MAGIC:
        raise ValueError(f"the file begins with {magic!r}, expected {MAGIC!r}")
    version = cursor.number("I", "the version")
    if version >= 2**16 and int.from_bytes(version.to_bytes(4, "little"), "big") in (1, *VERSIONS):
        raise NotImplementedError(
            "the file is big-endian, and only little-endian ones are read; gguf's gguf-convert-endian turns it around"
        )
    if version not in VERSIONS:
        raise ValueError(f"version is {version}, expected {' or '.join(map(str, VERSIONS))}")
    tensor_count, metadata_count = cursor.number("Q", "the tensor count"), cursor.number("Q", "the metadata count")
    metadata, types = {}, {}
    for _ in range(metadata_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise ValueError(f"metadata has {key!r} twice")
        types[key], metadata[key] = _value(cursor, f"metadata {key!r}")
    alignment = _alignment(metadata, types)
    infos = [_info(cursor) for _ in range(tensor_count)]
    start = -(-cursor.at // alignment) * alignment
    tensors, end, before = {}, 0, None
    for name, type_name, shape, offset in sorted(infos, key=lambda info: info[3]):
        size = math.prod(shape[:-1]) * row_bytes(type_name, shape[-1] if shape else 1)
        if name in tensors:
            raise ValueError(f"tensor {name!r} is there twice")
        if offset % alignment:
            raise ValueError(f"tensor {name!r} has offset {offset}, expected a multiple of the alignment {alignment}")
        if offset < end:
            raise ValueError(f"tensor {name!r} has offset {offset}, but {before!r} ends at {end}")
        if start + offset + size > length:
            raise ValueError(f"tensor {name!r} takes bytes {start + offset} to {start + offset + size}, but the file ends at {length}")
        tensors[name] = Tensor(name, type_name, shape, start + offset, size)
        end, before = offset + size, name
    return File(path, version, metadata, types, {name: tensors[name] for name, *_ in infos})


def _value(cursor, what):
    """(name of the type, value) of a metadata entry."""
    name = _value_type(cursor, what)
    if name == "STRING":
        return name, cursor.string(what, "surrogateescape")
    if name != "ARRAY":
        return name, _checked(cursor.numbers(VALUE_TYPES[name].replace("?", "B"), 1, what), name, what)[0]
    item = _value_type(cursor, what)
    count = cursor.number("Q", what)
    if item == "ARRAY":
        raise ValueError(f"{what} is an array of arrays, which no reader takes")
    if item == "STRING":
        return "ARRAY STRING", cursor.strings(count, what)
    return f"ARRAY {item}", _checked(cursor.numbers(VALUE_TYPES[item].replace("?", "B"), count, what), item, what)


def _value_type(cursor, what):
    id = cursor.number("I", what)
    if id >= len(VALUE_TYPES):
        raise ValueError(f"{what} has value type {id}, expected 0 to {len(VALUE_TYPES) - 1}")
    return list(VALUE_TYPES)[id]


def _checked(values, name, what):
    if name != "BOOL":
        return values
    if values and max(values) > 1:
        raise ValueError(f"{what} has a bool of {max(values)}, expected 0 or 1")
    return [v == 1 for v in values]


def _alignment(metadata, types):
    alignment = metadata.get(ALIGNMENT, 32)
    if types.get(ALIGNMENT, "UINT32") != "UINT32" or alignment & (alignment - 1) or not alignment:
        raise ValueError(f"{ALIGNMENT} is {alignment!r} ({types.get(ALIGNMENT)}), expected a power of two (UINT32)")
    return alignment


def _info(cursor):
    """(name, type, shape, offset from the start of the data) of a tensor."""
    name = cursor.string("a tensor's name")
    what = f"tensor {name!r}"
    dims = cursor.number("I", what)
    if dims > 4:
        raise ValueError(f"{what} has {dims} dimensions, expected at most 4")
    shape = tuple(reversed(cursor.numbers("Q", dims, what)))
    if 0 in shape:
        raise ValueError(f"{what} has shape {shape}, expected no 0 in it")
    id, offset = cursor.number("I", what), cursor.number("Q", what)
    if id in REFUSED:
        raise NotImplementedError(f"{what} has type {id}: {REFUSED[id]}")
    if id not in TYPE_OF_ID:
        raise ValueError(f"{what} has the unknown type {id}")
    try:
        row_bytes(TYPE_OF_ID[id], shape[-1] if shape else 1)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    return name, TYPE_OF_ID[id], shape, offset


def read_tensor(file, name):
    """One tensor of a File, mapped from the disk.

    The map is private (writing to the tensor changes no file) and lives as long as the tensor.

    Returns:
        A plain tensor in its dtype and shape; a quantized one as uint8 (..., n, bytes of a row).

    Raises:
        KeyError: there is no such tensor.
        ValueError: the file has become shorter since it was opened.
    """
    tensor = file.tensors[name]
    *lead, k = tensor.shape or (1,)
    shape = (*lead, row_bytes(tensor.type, k))
    data = _mapped(file.path, tensor.offset, tensor.nbytes, mmap.ACCESS_COPY)
    if tensor.type in BLOCKS:
        return data.view(shape)
    return data.view(PLAIN[tensor.type][1]).view(tensor.shape)


def _mapped(path, offset, count, access):
    """count bytes of a file, from offset on, as uint8 (count,)."""
    start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with open(path, "r+b" if access == mmap.ACCESS_WRITE else "rb") as file:
        if os.fstat(file.fileno()).st_size < offset + count:
            raise ValueError(f"{path}: gguf: the file has become shorter than {offset + count} bytes since it was opened")
        data = mmap.mmap(file.fileno(), offset - start + count, access=access, offset=start)
    return torch.frombuffer(data, dtype=torch.uint8, offset=offset - start, count=count)


def write_tensors(path, tensors, metadata, types=None):
    """Write a GGUF file, version 3.

    Args:
        tensors: {name: (type, shape, function that returns the tensor as read_tensor does)}: called one at a time.
        metadata: {key: value}.
        types: {key: type}, as in File. Without one, a str is a STRING, a bool a BOOL, a float a FLOAT32 (rounded), an int the
            first of UINT32, INT32, UINT64 and INT64 that holds it, and a list an ARRAY of one of them.

    Raises:
        ValueError: metadata that no type holds, a k that is no multiple of the type's block, or a tensor of another size.
    """
    types = types or {}
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata)))
    found = {}
    for key, value in metadata.items():
        found[key] = types.get(key) or _type_of(value, f"gguf: metadata {key!r}")
        head += _string(key) + _packed_value(found[key], value, f"gguf: metadata {key!r}")
    alignment = _alignment(metadata, found)
    places, end = [], 0
    for name, (type_name, shape, make) in tensors.items():
        if type_name not in BLOCKS and type_name not in PLAIN:
            raise ValueError(f"gguf: tensor {name!r} has type {type_name!r}, expected one of {', '.join((*BLOCKS, *PLAIN))}")
        if len(shape) > 4 or 0 in shape:
            raise ValueError(f"gguf: tensor {name!r} has shape {tuple(shape)}, expected at most 4 dimensions, and no 0 in it")
        size = math.prod(shape[:-1]) * row_bytes(type_name, shape[-1] if shape else 1)
        id = BLOCKS[type_name].id if type_name in BLOCKS else PLAIN[type_name][0]
        head += _string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), id, end)
        places.append((name, end, size, make))
        end = -(-(end + size) // alignment) * alignment
    start = -(-len(head) // alignment) * alignment
    unfinished = f"{os.fspath(path)}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            file.write(head)
            file.truncate(start + end)
        for name, offset, size, make in places:
            data = make().contiguous().view(-1).view(torch.uint8)
            if data.numel() != size:
                raise ValueError(f"gguf: tensor {name!r} has {data.numel()} bytes, expected {size}")
            _mapped(unfinished, start + offset, size, mmap.ACCESS_WRITE).copy_(data)
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.remove(unfinished)


def _type_of(value, what):
    values = value if isinstance(value, list) else [value]
    kinds = {type(v) for v in values}
    if kinds == {int}:
        fitting = [n for n in ("UINT32", "INT32", "UINT64", "INT64") if all(_holds(VALUE_TYPES[n], v) for v in values)]
        name = fitting[0] if fitting else None
    else:
        name = {str: "STRING", bool: "BOOL", float: "FLOAT32"}.get(next(iter(kinds))) if len(kinds) == 1 else None
    if name is None:
        raise ValueError(f"{what} is {value!r}, expected a str, bool, int or float, or a list of one of them that is not empty")
    return f"ARRAY {name}" if isinstance(value, list) else name


def _holds(code, value):
    try:
        struct.pack("<" + code, value)
    except struct.error:
        return False
    return True


def _packed_value(name, value, what):
    is_array, item = name.startswith("ARRAY "), name.removeprefix("ARRAY ")
    ids = {n: i for i, n in enumerate(VALUE_TYPES)}
    if item not in ids or item == "ARRAY":
        raise ValueError(f"{what} has type {name!r}, expected one of {', '.join(VALUE_TYPES)}, or ARRAY and one of them")
    if is_array != isinstance(value, list):
        raise ValueError(f"{what} is {value!r}, expected {'a list' if is_array else 'no list'} for {name}")
    values = value if is_array else [value]
    head = struct.pack("<IIQ", ids["ARRAY"], ids[item], len(value)) if is_array else struct.pack("<I", ids[item])
    try:
        if item == "STRING":
            return head + b"".join(_string(v) for v in values)
        return head + struct.pack(f"<{len(values)}{VALUE_TYPES[item]}", *values)
    except (struct.error, OverflowError, AttributeError, TypeError) as error:
        raise ValueError(f"{what} is no {name}: {error}") from None


def _string(text):
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data
