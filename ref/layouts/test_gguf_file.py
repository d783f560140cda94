"""GGUF's container: files of the gguf package, written back; lying and broken ones."""

import contextlib
import gc
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ref
from ref.layouts import gguf, gguf_file

GOLDEN = Path(__file__).parents[2] / "conformance" / "golden" / "gguf.gguf"


def test_golden():
    file = gguf_file.open_file(GOLDEN)
    assert file.version == 3
    values = {
        "general.architecture": "test", "general.alignment": 64, "test.uint8": 0, "test.int8": 0, "test.uint16": 2, "test.int16": 2,
        "test.uint32": 4, "test.int32": 4, "test.uint64": 6, "test.int64": 6, "test.float32": 8.5, "test.float64": 9.5,
        "test.bool": True, "test.string": "größer", "test.strings": ["<s>", "", "▁the"], "test.numbers": [1, -2, 3],
        "test.floats": [0.5, -1.5], "test.bools": [True, False],
    }  # fmt: skip
    assert file.metadata == values
    assert file.types["test.bool"] == "BOOL"
    assert file.types["test.strings"] == "ARRAY STRING"
    assert file.types["test.numbers"] == "ARRAY INT32"
    shapes = {name: (tensor.type, tensor.shape) for name, tensor in file.tensors.items()}
    assert shapes == {
        "output_norm.weight": ("F32", (64,)), "plain.weight": ("F16", (2, 3)), "blk.0.up.weight": ("Q4_0", (3, 512)),
        "blk.0.down.weight": ("Q6_K", (3, 512)), "blk.0.gate.weight": ("NVFP4", (3, 512)), "blk.0.gate.scale": ("F32", (1,)),
        "blk.0.up_exps.weight": ("Q8_0", (2, 3, 64)),
    }  # fmt: skip
    assert gguf_file.read_tensor(file, "plain.weight").dtype == torch.float16
    qs = {layer: gguf.read(parts, options) for layer, parts, options in gguf.layers(file)}
    assert {layer: (str(q.format), q.shape) for layer, q in qs.items()} == {
        "blk.0.down": ("int6_g16", (3, 512)), "blk.0.gate": ("nvfp4", (3, 512)), "blk.0.up": ("int4_g32_fp16", (3, 512)),
        "blk.0.up_exps": ("int8_g32_fp16", (2, 3, 64)),
    }  # fmt: skip
    assert qs["blk.0.gate"].scale_2.item() == 0.75


def test_written_back_byte_for_byte(tmp_path):
    file = gguf_file.open_file(GOLDEN)
    tensors = {name: (t.type, gguf_file.read_tensor(file, name)) for name, t in file.tensors.items()}
    gguf_file.write_tensors(
        tmp_path / "a.gguf", {n: (t, file.tensors[n].shape, lambda x=x: x) for n, (t, x) in tensors.items()}, file.metadata, file.types
    )
    assert (tmp_path / "a.gguf").read_bytes() == GOLDEN.read_bytes()


def test_write_file(tmp_path):
    """Weights and plain tensors through a file of our own; types of metadata where none are given."""
    torch.manual_seed(0)
    golden = gguf_file.open_file(GOLDEN)
    qs = {layer: (options["type"], gguf.read(parts, options)) for layer, parts, options in gguf.layers(golden)}
    tensors = {f"{layer}.weight": q for layer, q in qs.items()}
    plain = {"a": ("F32", torch.randn(3, 5).t()), "b": ("BF16", torch.randn(7).bfloat16()), "c": ("I64", torch.arange(24).view(1, 2, 3, 4)),
             "d": ("F64", torch.tensor(2.0, dtype=torch.float64)), "e": ("I8", torch.tensor([-1], dtype=torch.int8))}  # fmt: skip
    metadata = {"a": 1, "b": -1, "c": 2**40, "d": -(2**40), "e": 0.1, "f": True, "g": "\udcff", "h": [1, -1], "i": [True], "j": ["", "b"]}
    path = tmp_path / "model.gguf"
    gguf.write_file(path, tensors | plain, metadata, {"a": "INT8", "i": "ARRAY BOOL"})
    file = gguf_file.open_file(path)
    assert file.metadata == metadata | {"e": torch.tensor(0.1).item()}
    types = ("INT8", "INT32", "UINT64", "INT64", "FLOAT32", "BOOL", "STRING", "ARRAY INT32", "ARRAY BOOL", "ARRAY STRING")
    assert tuple(file.types.values()) == types
    assert list(file.tensors)[:3] == ["blk.0.down.weight", "blk.0.gate.weight", "blk.0.gate.scale"]
    for name, (_, tensor) in plain.items():
        assert torch.equal(gguf_file.read_tensor(file, name), tensor)
    for layer, parts, options in gguf.layers(file):
        assert ref.equal(gguf.read(parts, options), qs[layer][1]), layer
    assert not list(tmp_path.glob("*.unfinished"))


def test_maps_are_private_and_let_go(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(GOLDEN.read_bytes())
    file = gguf_file.open_file(path)
    tensor = gguf_file.read_tensor(file, "output_norm.weight")
    tensor.zero_()
    assert bool(gguf_file.read_tensor(file, "output_norm.weight").any())
    maps = Path("/proc/self/maps")
    if maps.exists():
        gc.collect()
        assert str(path) in maps.read_text()
        del tensor
        assert str(path) not in maps.read_text()
    path.write_bytes(GOLDEN.read_bytes()[:-4000])
    with pytest.raises(ValueError, match="the file has become shorter than"):
        gguf_file.read_tensor(file, "blk.0.up_exps.weight")


def string(text):
    return struct.pack("<Q", len(text)) + text


def info(name=b"a", dims=(32,), type=0, offset=0):
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, type, offset)


def entry(key=b"k", type=4, value=b"\0\0\0\0"):
    return string(key) + struct.pack("<I", type) + value


def header(*parts, version=3, tensors=None, entries=None):
    """A header; entries and infos in parts are counted unless the counts are given."""
    found = [p for p in parts if isinstance(p, tuple)]
    count = {kind: sum(k == kind for k, _ in found) for kind in ("t", "e")}
    counts = struct.pack("<QQ", count["t"] if tensors is None else tensors, count["e"] if entries is None else entries)
    return b"GGUF" + struct.pack("<I", version) + counts + b"".join(p for _, p in found)


def T(**kwargs):
    return "t", info(**kwargs)


def E(*args, **kwargs):
    return "e", entry(*args, **kwargs)


def padded(data, size=4096):
    return data + bytes(-len(data) % 32) + bytes(size)


HUGE = 2**64 - 1
BROKEN = {
    "has 23 bytes, fewer than a header": b"GGUF".ljust(23),
    "has 0 bytes, fewer than a header": b"",
    "begins with b'GGML', expected b'GGUF'": b"GGML".ljust(40),
    "version is 1, expected 2 or 3": header(version=1),
    "version is 4, expected 2 or 3": header(version=4),
    "a metadata key at byte 24 takes 8 bytes, but the file ends at 24": header(entries=HUGE),
    "a tensor's name at byte 24 takes 8 bytes, but the file ends at 24": header(tensors=HUGE),
    "a metadata key at byte 32 takes 18446744073709551615 bytes, but the file ends at 52": header(
        ("e", struct.pack("<Q", HUGE) + bytes(20))
    ),
    "metadata 'k' at byte 49 takes 18446744073709551615 bytes": padded(header(E(type=9, value=struct.pack("<IQ", 0, HUGE)))),
    "metadata 'k' at byte 49 takes 147573952589676412920 bytes": padded(header(E(type=9, value=struct.pack("<IQ", 12, HUGE)))),
    "metadata 'k' at byte 49 takes 8 bytes, but the file ends at 52": header(E(type=9, value=struct.pack("<IQ", 8, 1) + bytes(3))),
    "metadata 'k' at byte 57 takes 5 bytes, but the file ends at 59": header(E(type=9, value=struct.pack("<IQQ", 8, 1, 5) + bytes(2))),
    "metadata 'k' has value type 13, expected 0 to 12": header(E(type=13)),
    "metadata 'k' is an array of arrays": padded(header(E(type=9, value=struct.pack("<IQ", 9, 1)))),
    "metadata 'k' has a bool of 2, expected 0 or 1": header(E(type=7, value=b"\2")),
    "metadata has 'k' twice": header(E(), E()),
    "a metadata key at byte 32 is no UTF-8": header(E(key=b"\xff")),
    "a tensor's name at byte 32 is no UTF-8": padded(header(T(name=b"\xff"))),
    "general.alignment is 48 .UINT32., expected a power of two": header(E(key=b"general.alignment", value=struct.pack("<I", 48))),
    "general.alignment is 0 .UINT32., expected a power of two": header(E(key=b"general.alignment")),
    "general.alignment is '' .STRING., expected a power of two": header(E(key=b"general.alignment", type=8, value=string(b""))),
    "tensor 'a' has 5 dimensions, expected at most 4": padded(header(T(dims=(1,) * 5))),
    r"tensor 'a' has shape \(3, 0\), expected no 0 in it": padded(header(T(dims=(0, 3)))),
    "tensor 'a' has the unknown type 99": padded(header(T(type=99))),
    "tensor 'a': Q4_K has k=128, expected a multiple of its blocks' 256 weights": padded(header(T(dims=(128, 2), type=12))),
    "tensor 'a' is there twice": padded(header(T(), T(offset=128))),
    "tensor 'a' has offset 4, expected a multiple of the alignment 32": padded(header(T(offset=4))),
    "tensor 'b' has offset 96, but 'a' ends at 128": padded(header(T(), T(name=b"b", offset=96))),
    "tensor 'a' takes bytes 64 to 4096, but the file ends at 544": padded(header(T(dims=(1008,))), 480),
    "tensor 'a' takes bytes 96 to 73786976294838206560, but": padded(header(T(dims=(2**64 // 2, 2)))),
    "tensor 'a' takes bytes 18446744073709551648 to": padded(header(T(offset=2**64 - 32))),
}
UNREAD = {
    "is big-endian, and only little-endian ones are read": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "tensor 'a' has type 9: Q8_1 is for activations": padded(header(T(type=9))),
    "tensor 'a' has type 31: Q4_0_4_4 was removed from the format": padded(header(T(type=31))),
    "tensor 'a' has type 42: Q2_0 has blocks of 64 weights in some writers and of 128 in others": padded(header(T(type=42))),
}


@pytest.mark.parametrize("message", [*BROKEN, *UNREAD])
def test_broken_headers(message, tmp_path):
    path = tmp_path / "broken.gguf"
    path.write_bytes(BROKEN.get(message, UNREAD.get(message)))
    with pytest.raises(ValueError if message in BROKEN else NotImplementedError, match=r"broken.gguf: gguf: .*" + message):
        gguf_file.open_file(path)


def test_versions_2_and_3_are_alike(tmp_path):
    path = tmp_path / "a.gguf"
    for version in (2, 3):
        path.write_bytes(padded(header(E(), T(), version=version), 128))
        assert gguf_file.open_file(path).version == version


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        gguf_file.open_file(tmp_path / "a.gguf")


def read_all(path):
    """Opens a file and reads all of it; the errors that may come out are the documented ones."""
    try:
        file = gguf_file.open_file(path)
    except (ValueError, NotImplementedError):
        return
    for name in file.tensors:
        gguf_file.read_tensor(file, name)
    for _, parts, options in gguf.layers(file):
        with contextlib.suppress(ValueError, NotImplementedError):
            gguf.read(parts, options)


def test_truncated_anywhere(tmp_path):
    path, data = tmp_path / "a.gguf", GOLDEN.read_bytes()
    end = max(t.offset + t.nbytes for t in gguf_file.open_file(GOLDEN).tensors.values())
    for size in (*range(0, 1300, 3), *range(1300, end, 97), end - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"a\.gguf: gguf: "):
            gguf_file.open_file(path)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 1300), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0, 8000))
def test_mutated(tmp_path, changes, cut):
    data = bytearray(GOLDEN.read_bytes())
    for at, value in changes:
        data[at] = value
    path = tmp_path / "a.gguf"
    path.write_bytes(data[:cut] if cut < len(data) else data)
    read_all(path)


@pytest.mark.parametrize(
    ("metadata", "types", "message"),
    [
        ({"a": None}, {}, "gguf: metadata 'a' is None, expected a str, bool, int or float"),
        ({"a": []}, {}, r"gguf: metadata 'a' is \[\], expected a str"),
        ({"a": [1, "b"]}, {}, "gguf: metadata 'a' is .*, expected a str"),
        ({"a": 2**64}, {}, "gguf: metadata 'a' is 18446744073709551616, expected"),
        ({"a": 300}, {"a": "UINT8"}, "gguf: metadata 'a' is no UINT8"),
        ({"a": "b"}, {"a": "INT32"}, "gguf: metadata 'a' is no INT32"),
        ({"a": 1}, {"a": "STRING"}, "gguf: metadata 'a' is no STRING"),
        ({"a": 1}, {"a": "ARRAY INT32"}, "gguf: metadata 'a' is 1, expected a list for ARRAY INT32"),
        ({"a": 1}, {"a": "INT"}, "gguf: metadata 'a' has type 'INT', expected one of UINT8"),
        ({"general.alignment": 3}, {}, "general.alignment is 3"),
    ],
)
def test_metadata_that_no_type_holds(metadata, types, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        gguf.write_file(tmp_path / "a.gguf", {}, metadata, types)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (("F32", torch.zeros(2).half()), "gguf: a has dtype torch.float16, expected torch.float32 for F32"),
        (("Q4_0", torch.zeros(2, 32)), "gguf: type of a is 'Q4_0', expected one of 'F32'"),
        (("Q4_0", ref.quantize(torch.ones(2, 32), "int4_g32")), "gguf: no Q4_0: the format is int4_g32, expected int4_g32_fp16"),
        (("F32", torch.zeros(1, 1, 1, 1, 2)), r"gguf: tensor 'a' has shape \(1, 1, 1, 1, 2\), expected at most 4 dimensions"),
        (("F32", torch.zeros(0)), r"gguf: tensor 'a' has shape \(0,\), expected at most 4 dimensions, and no 0"),
    ],
)
def test_tensors_that_no_file_holds(tensor, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        gguf.write_file(tmp_path / "a.gguf", {"a": tensor}, {})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match="gguf: tensor 'a' has 4 bytes, expected 8"):
        gguf_file.write_tensors(path, {"a": ("F32", (2,), lambda: torch.zeros(1))}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.gguf"]
    assert path.read_bytes() == b"old"
