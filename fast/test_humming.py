"""The "humming" and "cublas" implementations, as far as they go without a GPU: what they refuse, tiles, layers' tensors, lazy imports."""

import itertools
import subprocess
import sys

import pytest
import torch

import ref
from fast import cublas, humming
from fast.humming import layer, rules, tiles
from fast.request import Request
from ref.format import FORMATS, parse_format

CUDA = torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch):
    """A device of compute capability 9.0, as far as why_not looks, with all libraries installed."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


def request(name, x_format=None, dtype=torch.bfloat16, shape=(256, 512), device=CUDA, **more):
    return Request(parse_format(name), shape, dtype, device, x_format and parse_format(x_format), **more)


TAKEN = [
    *[(f"int{bits}_g128_bf16", None) for bits in range(1, 9)],
    *[(f"uint{bits}z_g64_bf16", None) for bits in range(1, 9)],
    *[
        (name, None)
        for name in ("int4_bf16", "int4_tensor", "mxfp4", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp8", "nvfp4", "fp8_bf16", "fp4_e0m3_g96_bf16")
    ],
    *[(f"int{bits}_g128_bf16", "int8_token") for bits in range(1, 9)],
    *[(f"uint{bits}z_g64_bf16", "int8_token") for bits in range(1, 8)],
    *[(f"int{bits}_g128_bf16", "fp8_e4m3_token") for bits in range(1, 6)],
    *[(f"uint{bits}z_g128_bf16", "fp8_e4m3_token") for bits in range(1, 5)],
    *[
        (name, "fp8_e4m3_token")
        for name in ("mxfp4", "mxfp6_e2m3", "fp8_bf16", "fp8_tensor", "fp8_e4m3_b128x128", "fp4_e0m3_g64_bf16", "int4_g128_fp16")
    ],
    *[("fp8_e4m3_b128x128", x_format) for x_format in ("fp8_e4m3_g128", "fp8_e4m3_tensor")],
    *[("int4_g128_bf16", x_format) for x_format in ("int8_g32", "int8_g128", "int8_tensor")],
]

REFUSED = [
    ("int4_g128", None, "float32 ones would be rounded"),
    ("int8", "int8_token", "float32 ones would be rounded"),
    ("int4_g128_fp16", None, "keeps scales in x's dtype"),
    ("nf4_g64", None, "no look-up table"),
    ("uint4_g64_zfp16", None, "float zero point"),
    ("int4_g24_bf16", None, "powers of two from 16"),
    ("int4_g16_bf16", "int8_token", "powers of two from 32"),
    ("nvfp4", "fp8_e4m3_token", "powers of two from 32"),
    ("int8_g64_bf16_channel2", None, "second scale"),
    ("int8_g64_bf16_tensor2", None, "before the second scale"),
    ("int4_tensor_tensor2", None, "one tensor scale"),
    ("uint4_g32_bf16_obf16", None, "nothing to a weight"),
    ("fp4_e2m1_g16_e4m3_tensor2div", None, "one over a divisor"),
    ("fp6_e3m2fn_g64_bf16", None, "no inf or NaN codes"),
    ("fp8_e8m0_g64_bf16", None, "signed floats"),
    ("uint8z_g128_bf16", "int8_token", "at most 7 bits"),
    ("int6_g128_bf16", "fp8_e4m3_token", "at most 5 bits"),
    ("uint5z_g128_bf16", "fp8_e4m3_token", "at most 4 bits"),
    ("mxfp4", "int8_token", "by int8"),
    ("fp8_e5m2_g128_bf16", "fp8_e4m3_token", "does not fit"),
    ("int4_g128_bf16", "int4_token", "int8 or e4m3"),
    ("int4_g128_bf16", "fp8_e5m2_token", "int8 or e4m3"),
    ("int4_g128_bf16", "int8_token_bf16", "float32"),
    ("int4_g128_bf16", "int8_g16", "power of two from 32"),
    ("int4_g32_bf16", "int8_g128", "no multiple of 128"),
    ("int4_g128_bf16", "int8_token_h64", "rotate"),
    ("fp8_e4m3_b64x128", "fp8_e4m3_token", "float32 ones would be rounded"),
]


@pytest.mark.parametrize("name, x_format", TAKEN, ids=str)
def test_takes(hopper, name, x_format):
    assert humming.why_not(request(name, x_format)) is None


@pytest.mark.parametrize("name, x_format, reason", REFUSED, ids=str)
def test_refuses(hopper, name, x_format, reason):
    assert reason in humming.why_not(request(name, x_format))


def test_refuses_by_call(hopper, monkeypatch):
    one = "int4_g128_bf16"
    assert "bias" in humming.why_not(request(one, bias=True))
    assert humming.why_not(request(one, bias=True, deterministic=False)) is None
    assert "float16 or bfloat16" in humming.why_not(request(one, dtype=torch.float32))
    assert "empty" in humming.why_not(request(one, shape=(0, 512)))
    assert "NVIDIA" in humming.why_not(request(one, device=torch.device("cpu")))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert humming.why_not(request(one)) is None
    assert "9.0" in humming.why_not(request(one, "int8_token"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert "compute capability" in humming.why_not(request(one))
    assert "compute capability" in cublas.why_not(request("fp8", "fp8_e4m3_token"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_cublas_takes_fp8(hopper, dtype):
    for name in ("fp8", "fp8_tensor", "fp8_bf16", "fp8_e5m2"):
        for x_format in ("fp8_e4m3_token", "fp8_e4m3_tensor"):
            assert cublas.why_not(request(name, x_format, dtype, bias=True)) is None
    assert cublas.why_not(request("fp8", "fp8_e5m2_token", dtype)) is None


def test_cublas_refuses(hopper):
    for name, x_format in (("fp8", None), ("int8", "int8_token"), ("fp8_e5m2", "fp8_e5m2_token"), ("fp8_e4m3_g128", "fp8_e4m3_token"), ("fp8", "fp8_e4m3_g128"),
                           ("fp8", "fp8_e4m3_token_h64"), ("fp8_ofp32", "fp8_e4m3_token"), ("fp8_tensor2div", "fp8_e4m3_token"), ("fp8_tensor_tensor2", "fp8_e4m3_token"), ("fp8", "fp8_e4m3_token_bf16")):  # fmt: skip
        assert cublas.why_not(request(name, x_format)), name
    assert cublas.why_not(request("fp8", "fp8_e4m3_token", device=torch.device("cpu")))


@pytest.mark.parametrize("name", FORMATS)
def test_says_something_about_every_format(hopper, name):
    for module in (humming, cublas):
        for x_format in (None, "int8_token", "fp8_e4m3_token", "fp8_e4m3_g128"):
            reason = module.why_not(request(name, x_format))
            assert reason is None or (reason and not reason.endswith("."))


@pytest.mark.parametrize("table", [tiles.HALF, tiles.FP8_BLOCKS], ids=["half", "fp8_blocks"])
@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (4096, 4096), (8192, 8192), (28672, 4096), (128, 65536), (131072, 128)], ids=str)
def test_tiles_cover_every_m(table, shape):
    made = tiles.intervals(table, shape, 132)
    assert made[0][0] == 0 and made[-1][1] == 1 << 30
    assert all(a[1] == b[0] for a, b in itertools.pairwise(made))
    for _, _, config in made:
        _, n, k = config["block_shape"]
        assert shape[0] % n == 0 and shape[1] % k == 0 and not config["use_stream_k"]


def test_tiles_are_what_was_measured_as_fastest():
    def chosen(m, *shape):
        tile = tiles.choose(tiles.HALF, m, shape, 132)
        return tile.m, tile.n

    assert chosen(64, 4096, 4096) == (32, 64) and chosen(64, 28672, 4096) == (64, 128)
    assert chosen(256, 4096, 4096) == chosen(256, 4096, 14336) == (64, 128)
    assert chosen(256, 8192, 8192) == (128, 128) and chosen(256, 28672, 4096) == (128, 256)
    assert chosen(1024, 4096, 4096) == chosen(1024, 8192, 8192) == chosen(1024, 28672, 4096) == (128, 256)


def test_tiles_fit_shared_memory_and_the_warps_add_up():
    for tile in tiles.HALF + tiles.FP8_BLOCKS:
        m, n, k = tile.warp
        warps = (tile.m // m) * (tile.n // n) * (tile.k // k)
        assert (tile.m % m, tile.n % n, tile.k % k) == (0, 0, 0) and warps <= 28
        bytes_of_x = 2 if tile in tiles.HALF else 1
        # Weights of at most 8 bits, scales of 16 bits for each 16 of them.
        assert tile.stages * tile.k * (tile.m * bytes_of_x + tile.n * 1.125) <= 227 * 1024


def test_group_sizes():
    assert [rules.group_size(parse_format(name)) for name in ("int4", "int4_tensor", "int4_g96", "int4_g512", "int4_b64x48")] == [
        128,
        128,
        32,
        128,
        16,
    ]
    assert rules.group_size(parse_format("int4_g128"), parse_format("int8_g64")) == 64


def test_scales_by_group_are_repeated_and_padded_with_zeros():
    fmt = parse_format("int4_b64x96_bf16")
    n, k = 130, 200
    scale = torch.arange(1.0, 10.0).view(3, 3)
    made = layer._grid(scale, fmt, n, k, 32)
    assert made.shape == (256, 8)
    for row in (0, 63, 64, 129):
        assert made[row].tolist() == [float(scale[row // 64, column * 32 // 96]) if column * 32 < k else 0 for column in range(8)]
    assert not made[130:].any()


def test_values_that_would_change_are_refused():
    q = ref.quantize(torch.randn(8, 128), "int8_g128_bf16")
    with pytest.raises(NotImplementedError, match="subnormal"):
        layer._check_scales(q.scale.float() * 2.0**-118, request("int8_g128_bf16"))
    layer._check_scales(q.scale.float() * 2.0**-118, request("int4_g128_bf16"))
    with pytest.raises(NotImplementedError, match="subnormal"):
        layer._check_scales(q.scale.float() * 2.0**-118, request("int4_g128_bf16", "int8_token"))
    nan = ref.QTensor(parse_format("fp8_bf16"), (1, 4), torch.tensor([[0x7F]], dtype=torch.int32), torch.ones(1, 1, dtype=torch.bfloat16))
    with pytest.raises(NotImplementedError, match="NaN"):
        layer._check_codes(nan)
    wide = ref.QTensor(parse_format("mxfp4"), (1, 32), torch.zeros(1, 4, dtype=torch.int32), torch.tensor([[1]], dtype=torch.uint8))
    with pytest.raises(NotImplementedError, match="not representable"):
        layer._scales(wide, torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sums_are_scaled_and_rounded_once(dtype):
    from fast.cublas.plan import COLUMNS, scale_kernel

    m, n = 3, COLUMNS + 5
    sums, bias = torch.randn(m, n + 11), torch.randn(n)
    x_scale, w_scale = torch.tensor([0.5, 2.0, 0.25]), 2.0 ** torch.randint(-3, 3, (n,))
    for by_row, added in ((True, None), (False, bias)):
        out = torch.empty(m, n, dtype=dtype)
        scale_kernel.interpret((m, 2), out, sums, x_scale, w_scale, bias, n, n + 11, BY_ROW=by_row, BIAS=added is not None, COLUMNS=COLUMNS)
        want = sums[:, :n] * (x_scale[:, None] if by_row else x_scale[0]) * w_scale
        assert torch.equal(out, (want if added is None else want + bias).to(dtype))


def test_nothing_heavy_is_imported():
    code = "import sys, fast.humming, fast.cublas; sys.exit(any(name in sys.modules for name in ('humming', 'triton.language')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
