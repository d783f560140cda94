"""Shards of every format, and the layers on one rank; test_check has several."""

import pytest
import torch

import fast
import ref
from fast.parallel import ColumnParallelLinear, RowParallelLinear, shard

SIZES = (1, 2, 3, 5)


def weight(n, k, format, seed=0):
    return ref.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(seed)), format)


@pytest.mark.parametrize("format", ref.FORMATS)
@pytest.mark.parametrize("axis", ["n", "k"])
def test_shards_are_the_parts_of_the_weight(format, axis):
    q = weight(131, 390, format)
    for size in SIZES:
        parts = ref.dequantize(q).tensor_split(size, "nk".index(axis))
        for rank, expected in enumerate(parts):
            part = ref.validate(shard(q, axis, rank, size))
            assert torch.equal(ref.dequantize(part), expected)
            assert part.packed.untyped_storage().nbytes() <= q.packed.numel() * 4 / size + 4 * 131 or size == 1


def test_more_ranks_than_rows_and_columns():
    q = weight(2, 3, "int4_g128")
    assert [tuple(shard(q, "n", rank, 4).shape) for rank in range(4)] == [(1, 3), (1, 3), (0, 3), (0, 3)]
    assert [tuple(shard(q, "k", rank, 4).shape) for rank in range(4)] == [(2, 1), (2, 1), (2, 1), (2, 0)]


def test_stacks_of_experts_and_columns_in_groups_of_their_own():
    q = ref.stack([weight(24, 64, "uint4z_g128", seed) for seed in range(3)])
    ordered = ref.QTensor(
        ref.parse_format("int4_g32"), (5, 64), weight(5, 64, "int4_g32").packed, torch.rand(5, 2), group_index=torch.arange(64).int() % 2
    )
    for one in (q, ordered):
        for axis in "nk":
            parts = ref.dequantize(one).tensor_split(3, -2 if axis == "n" else -1)
            assert all(torch.equal(ref.dequantize(shard(one, axis, rank, 3)), part) for rank, part in enumerate(parts))


def test_blocks_that_no_border_cuts_stay_blocks():
    q = weight(256, 512, "fp8_e4m3_b128x128")
    assert {str(shard(q, axis, rank, 2).format) for axis in "nk" for rank in range(2)} == {"fp8_e4m3_b128x128"}
    assert str(shard(q, "n", 1, 4).format) == "fp8_e4m3_g128"


def test_a_fused_weight_is_sharded_part_by_part():
    gate, up = weight(10, 64, "nvfp4", 1), weight(10, 64, "nvfp4", 2)
    for rank in range(3):
        expected = torch.cat([ref.dequantize(part).tensor_split(3)[rank] for part in (gate, up)])
        assert torch.equal(ref.dequantize(ref.fuse([shard(part, "n", rank, 3) for part in (gate, up)])), expected)


def test_shards_that_cannot_be():
    q = weight(8, 64, "int4_g32")
    with pytest.raises(ValueError, match="shard: unknown axis 0, expected 'n' or 'k'"):
        shard(q, 0, 0, 2)
    with pytest.raises(ValueError, match="shard: got rank 2 of 2, expected 0 <= rank < size"):
        shard(q, "n", 2, 2)
    with pytest.raises(ValueError, match="cut a block of 64 that was rotated together"):
        shard(weight(8, 192, "int4_h64"), "k", 0, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 64), (64,), (0, 64)])
def test_one_rank_alone(alone, dtype, shape):
    """Without a bias nothing is added and nothing rounded twice: bit for bit the layer itself."""
    q, x, bias = weight(40, 64, "int4_g32"), torch.randn(shape).to(dtype), torch.randn(40)
    given = {"x_format": "int8_tensor", "x_scale": torch.tensor(0.03)}
    for options in ({}, given):
        assert torch.equal(RowParallelLinear(q, **options)(x), fast.linear(x, q, **options))
        for gather in (False, True):
            assert torch.equal(ColumnParallelLinear(q, bias, gather_output=gather, **options)(x), fast.linear(x, q, bias, **options))
    y = RowParallelLinear(q, bias)(x)
    assert torch.equal(y, (fast.linear(x, q).float() + bias).to(dtype))


def test_buffers_and_prepared_layers(alone):
    q, x, bias = weight(40, 64, "int4_g32"), torch.randn(5, 64), torch.randn(40)
    layer = RowParallelLinear(q, bias)
    other = RowParallelLinear(weight(40, 64, "int4_g32", 9), torch.zeros(40))
    other.load_state_dict(layer.state_dict())
    assert sorted(layer.state_dict()) == ["bias", "local.packed", "local.scale"]
    layer.local.prepare(x_dtype=torch.float32)
    assert torch.equal(layer(x), other(x))


def test_a_bias_that_does_not_fit(alone):
    q = weight(40, 64, "int4_g32")
    with pytest.raises(
        ValueError,
        match=r"RowParallelLinear: bias has shape \(20,\), weight int4_g32 has n=40 \(both must match: each rank has all of it\)",
    ):
        RowParallelLinear(q, torch.zeros(20))
    with pytest.raises(ValueError, match=r"bias has shape \(41,\), weight int4_g32 has n=40"):
        ColumnParallelLinear(q, torch.zeros(41))
    with pytest.raises(ValueError, match="x has k=32, weight int4_g32 has k=64"):
        RowParallelLinear(q)(torch.zeros(1, 32))
