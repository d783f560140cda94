"""Weights whose columns are sorted by group, or rotated, before a kernel sees them: against ref, and as tensors."""

from dataclasses import replace

import pytest
import torch

import fast
import ref
from fast import rearrange
from fast.codes import pack, unpack
from fast.request import Request
from ref.format import parse_format

pytest.importorskip("triton")

from fast.triton import weight_only
from fast.triton.gather import Gather

BF16 = torch.bfloat16


def weight(name, n, k, index, seed=0):
    """Codes at random, scales and zero points of few bits, in the order of a group index."""
    fmt, generator = parse_format(name), torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**fmt.element.bits, (n, k), generator=generator)
    scale = 2.0 ** torch.randint(-2, 3, fmt.scale_shape((n, k)), generator=generator)
    zero = torch.randint(0, 2**fmt.element.bits, scale.shape, generator=generator, dtype=torch.uint8) if fmt.zero else None
    offset = torch.randint(-8, 8, scale.shape, generator=generator).half() if fmt.offset else None
    return ref.validate(ref.QTensor(fmt, (n, k), ref.pack(codes, fmt.element.bits), scale, zero, None, index.int(), offset))


def whole(m, k, seed=1):
    return torch.randint(-2, 3, (m, k), generator=torch.Generator().manual_seed(seed)).to(BF16)


def indexes(k, gk, groups):
    """Group indexes of every kind: in order, members permuted, any sizes, one group for all, groups without members."""
    generator = torch.Generator().manual_seed(k)
    return {
        "in order": torch.arange(k) // gk,
        "permuted": (torch.randperm(k, generator=generator)) // gk,
        "any": torch.randint(0, groups, (k,), generator=generator),
        "one": torch.full((k,), groups - 1),
        "few": torch.randint(0, groups, (k,), generator=generator) // 2,
    }


@pytest.mark.parametrize("kind", ["in order", "permuted", "any", "one", "few"])
@pytest.mark.parametrize("name", ["int4_g32", "uint3z_g24", "uint4_g32_ofp16", "int4_b5x32"])
def test_any_group_index_gives_the_bits_of_ref(name, kind):
    k, gk = 140, parse_format(name).group[1]
    q = weight(name, 13, k, indexes(k, gk, -(-k // gk))[kind])
    for x in (whole(5, k), whole(1, k), whole(9, 2 * k)[:, 3 : k + 3], whole(3, k).float()):
        assert torch.equal(fast.linear(x, q, impl="triton"), ref.linear(x, q))
    assert torch.equal(fast.linear(x, fast.prepare(q, x_dtype=x.dtype, impl="triton"), impl="triton"), ref.linear(x, q))


@pytest.mark.parametrize("kind", ["in order", "permuted", "any", "one", "few"])
def test_a_rearranged_weight_is_the_same_numbers(kind):
    q = weight("uint4z_g32", 6, 140, indexes(140, 32, 5)[kind])
    w, columns = rearrange.rearranged(q)
    ref.validate(w)
    assert w.group_index is None and (columns is None) == (kind in ("in order", "one"))
    assert w.shape[1] <= 140 + 32 * 5 and (kind != "permuted" or w.shape == q.shape)
    if columns is None:
        assert torch.equal(ref.dequantize(w), ref.dequantize(q))
    else:
        assert columns[columns >= 0].sort().values.tolist() == list(range(140))
        assert torch.equal(ref.dequantize(w)[:, columns >= 0], ref.dequantize(q)[:, columns[columns >= 0]])


@pytest.mark.parametrize("name", ["int4_g32_h16", "fp8_e4m3_h4", "uint4_g32_ofp16_h4"])
def test_rotated(name):
    for index in (torch.arange(144) // 32, torch.randperm(144, generator=torch.Generator().manual_seed(0)) // 32):
        q = ref.quantize(torch.randn(9, 144, generator=torch.Generator().manual_seed(1)), name)
        q = replace(q, scale=torch.ones_like(q.scale))
        q = q if not q.format.group[1] or index[0] == 0 else replace(q, group_index=index.int())
        x = whole(5, 144) * 4
        assert torch.equal(fast.linear(x, q, impl="triton"), ref.linear_variant(x, q, variant="input_rotated"))


@pytest.mark.parametrize("x_format", ["int8_token", "fp8_e4m3_tensor"])
def test_activations_quantized_by_row_or_all_together(x_format):
    q = weight("int4_g32", 13, 140, indexes(140, 32, 5)["any"])
    x = whole(4, 140).float()
    x[:, ::20] = 127 if x_format[0] == "i" else 448
    assert torch.equal(fast.linear(x, q, x_format=x_format, impl="triton"), ref.linear(x, q, x_format=x_format))


def test_refusals():
    q, x = weight("int4_g32", 13, 160, indexes(160, 32, 5)["any"]), whole(2, 160)
    assert "neighbouring columns" in fast.why_not("linear", x, q, x_format="int8_g32", impl="triton")
    rotated = replace(q, format=replace(q.format, hadamard=16), group_index=None)
    assert "rotation" in fast.why_not("linear", x, rotated, x_format="int8_token", impl="triton")
    assert fast.why_not("linear", x, q, x_format="int8_g32", impl="torch") is None
    with pytest.raises(NotImplementedError, match="neighbouring columns"):
        fast.linear(x, q, x_format="int8_g32", impl="triton")
    with pytest.raises(ValueError, match="group_index of int4_g32 reaches outside of its 5 groups"):
        fast.linear(x, replace(q, group_index=q.group_index + 5), impl="triton")


def test_every_implementation_is_asked_about_the_rearranged_weight(monkeypatch):
    from fast import dispatch, humming, registry

    asked = []
    monkeypatch.setattr(humming, "why_not", lambda request: asked.append(request))
    request = Request(parse_format("int4_g128_bf16_h64"), (64, 256), BF16, torch.device("cuda", 0), group_index=True)
    assert dispatch.refusal(registry.find("linear", "humming"), request) is None
    assert asked == [replace(request, format=parse_format("int4_g128_bf16"), group_index=False)]


def test_the_kernels_for_integers_serve_it_too():
    q = weight("int4_g32", 16, 140, indexes(140, 32, 5)["few"])
    request = Request(q.format, q.shape, BF16, q.packed.device, group_index=True)
    plan = rearrange.prepare(weight_only, q, request)
    for m in (1, 3, 20):
        out = torch.full((m, 16), float("nan"), dtype=BF16)
        plan.run(whole(m, 140), None, None, out)
        assert torch.equal(out, ref.linear(whole(m, 140), q))


def test_gather_reads_what_is_asked_for_and_nothing_else():
    for dtype in (BF16, torch.float16, torch.float32):
        x = torch.randn(7, 50, dtype=dtype)[::2, 5:40]
        columns = torch.tensor([34, 0, -1, 3, 3, -1, 34] * 200, dtype=torch.int32)
        y = Gather(columns)(x)
        assert torch.equal(y, torch.where(columns >= 0, x[:, columns.clamp(min=0).long()], 0)) and y.stride(0) % 8 == 0
    assert Gather(columns)(x[:0]).shape == (0, 1400)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_in_and_out(bits):
    codes = torch.randint(0, 2**bits, (3, 77), generator=torch.Generator().manual_seed(bits))
    assert torch.equal(pack(codes, bits), ref.pack(codes, bits))
    columns = torch.tensor([76, 0, 31, 32, 33, 5])
    assert torch.equal(unpack(ref.pack(codes, bits), bits, columns), codes[:, columns])
