"""The QTensor: every invariant broken in turn, and what a plain value has to be able to do."""

import copy
import math
import pickle
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from torch.utils import _pytree as pytree

from .qtensor import TENSORS, validate
from .quantize import dequantize, quantize
from .test_quantize import normal

GOOD = {
    name: quantize(normal(6, 64), name)
    for name in ("int4_g16", "uint3z_g16", "uint4_g16_zfp16", "nvfp4", "fp8_channel2", "int5_h16", "fp8", "fp8_g16_e5m2", "mxfp4")
}


def at(tensor, index, value):
    """The tensor with one entry changed."""
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


BROKEN = [
    ("int4_g16", {"format": "int4_g16"}, TypeError, "format is str, expected a Format"),
    ("int4_g16", {"shape": (64,)}, ValueError, r"weight int4_g16 has shape \(64,\), expected \(..., n, k\)"),
    ("int4_g16", {"shape": (-6, 64)}, ValueError, r"weight int4_g16 has shape \(-6, 64\), expected \(..., n, k\)"),
    ("int4_g16", {"shape": (7, 64)}, ValueError, r"packed of int4_g16 has shape \(6, 8\), expected \(7, 8\)"),
    ("int4_g16", {"shape": (6, 65)}, ValueError, r"packed of int4_g16 has shape \(6, 8\), expected \(6, 9\)"),
    ("int4_g16", {"packed": torch.zeros(6, 8, dtype=torch.int64)}, TypeError, "packed of int4_g16 has dtype torch.int64, expected torch.int32"),
    ("int4_g16", {"packed": None}, ValueError, "has no packed, expected one"),
    ("int4_g16", {"scale": None}, ValueError, "has no scale, expected one"),
    ("int4_g16", {"scale": torch.ones(6, 5)}, ValueError, r"scale of int4_g16 has shape \(6, 5\), expected \(6, 4\)"),
    ("int4_g16", {"scale": torch.ones(6, 4).half()}, TypeError, "scale of int4_g16 has dtype torch.float16, expected torch.float32"),
    ("int4_g16", {"scale": torch.full((6, 4), math.nan)}, ValueError, r"scale of int4_g16 is NaN or inf at \(0, 0\)"),
    ("int4_g16", {"scale": at(torch.ones(6, 4), (2, 3), math.inf)}, ValueError, r"scale of int4_g16 is NaN or inf at \(2, 3\)"),
    ("int4_g16", {"scale": at(torch.ones(6, 4), (5, 0), -math.inf)}, ValueError, r"scale of int4_g16 is NaN or inf at \(5, 0\)"),
    ("int4_g16", {"zero": torch.zeros(6, 4, dtype=torch.uint8)}, ValueError, "has a zero, expected none"),
    ("int4_g16", {"scale_2": torch.ones(1, 1)}, ValueError, "has a scale_2, expected none"),
    ("int4_g16", {"group_index": torch.zeros(63, dtype=torch.int32)}, ValueError, r"group_index of int4_g16 has shape \(63,\), expected \(64,\)"),
    ("int4_g16", {"group_index": torch.zeros(64, dtype=torch.int64)}, TypeError, "group_index of int4_g16 has dtype torch.int64"),
    ("int4_g16", {"group_index": torch.full((64,), 4, dtype=torch.int32)}, ValueError, "group_index ranges from 4 to 4, expected 0 to 3"),
    ("int4_g16", {"group_index": torch.full((64,), -1, dtype=torch.int32)}, ValueError, "group_index ranges from -1 to -1, expected 0 to 3"),
    ("int4_g16", {"scale": torch.ones(6, 4, device="meta")}, ValueError, r"packed of int4_g16 is on cpu, scale on meta \(both must match\)"),
    ("uint3z_g16", {"zero": None}, ValueError, "has no zero, expected one"),
    ("uint3z_g16", {"zero": torch.ones(6, 4)}, TypeError, "zero of uint3z_g16 has dtype torch.float32, expected torch.uint8"),
    ("uint3z_g16", {"zero": torch.full((6, 4), 8, dtype=torch.uint8)}, ValueError, "zero of uint3z_g16 reaches 8, expected at most 7"),
    ("uint4_g16_zfp16", {"zero": torch.ones(6, 4)}, TypeError, "zero of .* has dtype torch.float32, expected torch.float16"),
    ("uint4_g16_zfp16", {"zero": torch.ones(6, 1).half()}, ValueError, "zero of .* has shape"),
    ("nvfp4", {"scale": torch.full((6, 4), 0x7F, dtype=torch.uint8)}, ValueError, r"scale of nvfp4 is NaN or inf at \(0, 0\)"),
    ("nvfp4", {"scale": at(GOOD["nvfp4"].scale, (1, 2), 0xFF)}, ValueError, r"scale of nvfp4 is NaN or inf at \(1, 2\)"),
    ("fp8_g16_e5m2", {"scale": at(GOOD["fp8_g16_e5m2"].scale, (1, 2), 0x7C)}, ValueError, r"scale of .* is NaN or inf at \(1, 2\)"),
    ("mxfp4", {"scale": at(GOOD["mxfp4"].scale, (1, 1), 0xFF)}, ValueError, r"scale of mxfp4 is NaN or inf at \(1, 1\)"),
    ("nvfp4", {"scale_2": torch.full((1, 1), math.nan)}, ValueError, r"scale_2 of nvfp4 is NaN or inf at \(0, 0\)"),
    ("nvfp4", {"scale_2": torch.full((1, 1), math.inf)}, ValueError, r"scale_2 of nvfp4 is NaN or inf at \(0, 0\)"),
    ("fp8_channel2", {"scale_2": at(torch.ones(6, 1), (4, 0), -math.inf)}, ValueError, r"scale_2 of .* is NaN or inf at \(4, 0\)"),
    ("uint4_g16_zfp16", {"zero": at(GOOD["uint4_g16_zfp16"].zero, (3, 1), math.nan)}, ValueError, r"zero of .* is NaN or inf at \(3, 1\)"),
    ("uint4_g16_zfp16", {"zero": at(GOOD["uint4_g16_zfp16"].zero, (0, 3), math.inf)}, ValueError, r"zero of .* is NaN or inf at \(0, 3\)"),
    ("nvfp4", {"scale": torch.ones(6, 4)}, TypeError, "scale of nvfp4 has dtype torch.float32, expected torch.uint8"),
    ("nvfp4", {"scale_2": None}, ValueError, "nvfp4 has no scale_2, expected one"),
    ("nvfp4", {"scale_2": torch.ones(6, 1)}, ValueError, r"scale_2 of nvfp4 has shape \(6, 1\), expected \(1, 1\)"),
    ("fp8_channel2", {"scale_2": torch.ones(1, 1)}, ValueError, r"scale_2 of .* has shape \(1, 1\), expected \(6, 1\)"),
    ("fp8_channel2", {"scale_2": torch.ones(6, 1).double()}, TypeError, "scale_2 of .* has dtype torch.float64, expected torch.float32"),
    ("int5_h16", {"shape": (6, 63)}, ValueError, "k=63 is no multiple of the rotation's block 16"),
]  # fmt: skip


@pytest.mark.parametrize("name, change, error, message", BROKEN, ids=[f"{n}-{'-'.join(c)}-{i}" for i, (n, c, _, _) in enumerate(BROKEN)])
def test_every_broken_invariant_has_its_error(name, change, error, message):
    assert validate(GOOD[name]) is GOOD[name]
    with pytest.raises(error, match=f"validate: .*{message}|validate: {message}"):
        validate(replace(GOOD[name], **change))


@pytest.mark.parametrize("name, k", [("int3", 5), ("int4", 7), ("int5", 13), ("fp8", 3), ("int1", 31)])
def test_padding_bits_have_to_be_zero(name, k):
    """From the first bit behind the last code to the word's sign, in any row; the bit before it is a code's own."""
    q = quantize(normal(3, k), name)
    used = k * q.format.element.bits % 32
    for bit in {used, 31}:
        packed = q.packed.clone()
        packed[1, -1] |= 1 << bit if bit < 31 else -(2**31)
        with pytest.raises(ValueError, match=rf"validate: packed of {name} has bits set behind the last code of a row \(k={k}\)"):
            validate(replace(q, packed=packed))
    assert validate(replace(q, packed=q.packed ^ 1 << (used - 1)))


def test_only_a_qtensor_validates():
    with pytest.raises(TypeError, match="validate: got Tensor, expected a QTensor"):
        validate(torch.ones(2, 2))


@pytest.mark.parametrize("name", GOOD)
def test_a_qtensor_is_a_pytree(name):
    q = GOOD[name]
    leaves, spec = pytree.tree_flatten(q)
    present = [getattr(q, part) for part in TENSORS if getattr(q, part) is not None]
    assert [leaf for leaf in leaves if leaf is not None] == present or all(
        a is b for a, b in zip([x for x in leaves if x is not None], present, strict=True)
    )
    again = pytree.tree_unflatten(leaves, spec)
    assert again is not q and (again.format, again.shape) == (q.format, q.shape) and again.packed is q.packed
    moved = pytree.tree_map(lambda t: t.clone() if isinstance(t, torch.Tensor) else t, {"w": [q]})["w"][0]
    assert torch.equal(dequantize(validate(moved)), dequantize(q))


def test_a_qtensor_is_frozen_and_compares_by_identity():
    q = GOOD["int4_g16"]
    twin = replace(q)
    assert q == q and q != twin and len({q, twin, q}) == 2
    with pytest.raises(FrozenInstanceError):
        q.scale = None
    assert repr(q) == "QTensor(int4_g16, shape=(6, 64), device=cpu)"


@pytest.mark.parametrize("name", GOOD)
def test_a_qtensor_copies_and_pickles(name):
    q = GOOD[name]
    for other in (copy.deepcopy(q), pickle.loads(pickle.dumps(q))):
        assert validate(other) is not q and torch.equal(dequantize(other), dequantize(q))
