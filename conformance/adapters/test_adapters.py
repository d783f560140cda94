"""Adapters: without their package they say so; with it, what they convert comes back, and what was found is still so.

A test of a defect fails where a release has repaired it: then the README's finding has to say up to which version it holds.
"""

import importlib
import json
import subprocess
import sys

import pytest
import torch

import ref
from conformance import adapters
from conformance.__main__ import main
from conformance.accumulators import U
from conformance.bounds import magnitude
from conformance.oracle import compare
from conformance.vectors import parts_of, stored
from ref.layouts import gguf as blocks

NAMES = {
    "bitsandbytes": "bitsandbytes",
    "compressed_tensors": "compressed-tensors",
    "gemlite": "gemlite",
    "gguf": "gguf",
    "humming_raw": "humming-kernels",
    "torchao": "torchao",
    "transformers_dequantizers": "transformers",
}
# What a package's own dequantizer gives back: formats, the dtype asked for (None: the scale's).
ROUND_TRIPS = {
    "bitsandbytes": (("nf4_g64", "nf4_g128"), torch.bfloat16),
    "compressed_tensors": (("int4_g32_bf16", "int4_bf16", "int8_bf16", "int3_g128_bf16", "uint4z_g128_bf16", "fp8_bf16", "mxfp4"), None),
    "gguf": (("int4_g32_fp16", "int5_g32_fp16", "int8_g32_fp16", "iq4nl_g32_fp16", "mxfp4"), torch.float32),
    "torchao": (("int8", "int4_g32_bf16", "int3_bf16", "fp8_e4m3", "mxfp8", "mxfp6_e2m3", "mxfp4"), torch.bfloat16),
    "transformers_dequantizers": (("mxfp4", "fp8", "fp8_tensor", "fp8_e4m3_b128x128_e8m0", "int8_g32_fp16"), torch.float32),
}


def adapter(name):
    return importlib.import_module(f"conformance.adapters.{name}")


def weight(fmt, n=128, k=256):
    return ref.quantize(torch.randn(n, k, generator=torch.Generator().manual_seed(0)), fmt)


@pytest.mark.parametrize("name", NAMES)
def test_without_the_package_every_function_says_so(name, monkeypatch):
    found = adapter(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    monkeypatch.setattr(found, "__version__", None)
    adapters._imported.cache_clear()
    q, reason = weight("mxfp4"), f"^{NAMES[name]} is not installed: pip install {NAMES[name]}$"
    called = 0
    for function, call in (("dequantize", lambda f: f(q, torch.float32)), ("linear", lambda f: f(torch.ones(1, 256), q))):
        if hasattr(found, function):
            called += 1
            with pytest.raises(NotImplementedError, match=reason):
                call(getattr(found, function))
    adapters._imported.cache_clear()
    assert called


@pytest.mark.parametrize("name", [*NAMES, "torch_core"])
def test_formats_parse_and_functions_are_refs(name):
    found = adapter(name)
    assert all(str(ref.parse_format(fmt)) for fmt in found.FORMATS)
    assert any(callable(getattr(found, function, None)) for function in ("linear", "dequantize"))


def test_a_package_that_does_not_import_is_named(monkeypatch, tmp_path):
    (tmp_path / "breaks_here.py").write_text("raise RuntimeError('no such device')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NotImplementedError, match=r"^breaks_here None does not import here: RuntimeError: no such device$"):
        adapters.package("breaks_here")


@pytest.mark.skipif(adapters.version_of("gguf") is not None, reason="gguf is installed")
def test_the_command_line_without_the_package():
    command = [sys.executable, "-m", "conformance", "--candidate", "conformance.adapters.gguf", "--ops", "dequantize"]
    done = subprocess.run([*command, "--formats", "mxfp4", "--examples", "3", "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert "unsupported" in done.stdout


def cells(tmp_path, *args):
    """{(operation, format): cell} of a small run."""
    report = tmp_path / "report.json"
    code = main([*args, "--device", "cpu", "--jobs", "1", "--json", str(report)])
    return code, {(cell["op"], cell["label"]): cell for cell in json.loads(report.read_text())["cells"]}


def test_torch_core_passes(tmp_path, capsys):
    formats = "int4_g128_bf16,int8_bf16,fp8"
    args = ("--candidate", "conformance.adapters.torch_core", "--ops", "linear,linear_x,grouped_linear", "--formats", formats)
    code, found = cells(tmp_path, *args, "--examples", "20")
    assert code == 0, capsys.readouterr().out
    ran = {key for key, cell in found.items() if cell["status"] == "pass"}
    assert {("linear", "int4_g128_bf16"), ("linear", "int8_bf16"), ("linear_x", "fp8"), ("grouped_linear", "int8_bf16")} <= ran
    assert {cell["status"] for cell in found.values()} <= {"pass", "unsupported"}


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_conversions_come_back(name):
    found, (formats, dtype) = adapter(name), ROUND_TRIPS[name]
    if found.__version__ is None:
        pytest.skip(f"{NAMES[name]} is not installed")
    for fmt in formats:
        q = weight(fmt)
        asked = dtype or (torch.bfloat16 if q.scale.dtype == torch.uint8 else q.scale.dtype)
        assert torch.equal(found.dequantize(q, asked), ref.dequantize(q, asked)), fmt


@pytest.mark.parametrize("name", stored("gguf")[0])
def test_gguf_blocks_in_transformers_and_gguf(name):
    cases, tensors = stored("gguf")
    q = blocks.read(parts_of(tensors, name)[0], blocks.options(cases[name]["config"], "x"))
    error = 3 * U * magnitude(q)
    ran = 0
    for found in (adapter("transformers_dequantizers"), adapter("gguf")):
        if found.__version__ is not None:
            try:
                compare(found.dequantize(q, torch.float32), ref.dequantize(q), error, "w")
                ran += 1
            except NotImplementedError as refusal:
                assert "no dequantizer" in str(refusal)
    if not ran:
        pytest.skip("neither package decodes it here")


def vector_columns():
    """How many columns the CPU's _weight_int8pack_mm of bfloat16 reads at once."""
    return {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability())


@pytest.mark.skipif(vector_columns() is None, reason="the kernel without AVX ends with the row")
def test_torchs_int8_product_reads_behind_its_rows():
    x, w = (torch.ones(64, dtype=dtype)[:4].view(1, 4) for dtype in (torch.bfloat16, torch.int8))
    y = torch.ops.aten._weight_int8pack_mm(x, w, torch.ones(1, dtype=torch.bfloat16))
    assert y.item() == vector_columns(), f"torch {torch.__version__} gives {y.item()}: 4 is right"


def test_transformers_reads_partial_blocks_as_smaller_ones():
    found = adapter("transformers_dequantizers")
    if found.__version__ is None:
        pytest.skip("transformers is not installed")
    q = weight("fp8_e4m3_b128x128", 192)
    wrong = (found.dequantize(q, torch.float32) != ref.dequantize(q, torch.float32)).any(1).nonzero()[:, 0].tolist()
    assert wrong == list(range(96, 128)), f"transformers {found.__version__}: rows {wrong} differ"
    with pytest.raises(ValueError, match="not divisible by scale grid"):
        found.dequantize(weight("fp8_e4m3_b128x128", 129), torch.float32)


def test_transformers_rounds_ggufs_scales_to_bfloat16():
    found = adapter("transformers_dequantizers")
    if found.__version__ is None:
        pytest.skip("transformers is not installed")
    data = torch.cat((torch.tensor([1.0029296875], dtype=torch.float16).view(torch.uint8), torch.full((16,), 0xFF, dtype=torch.uint8)))
    q = blocks.read({"weight": data[None]}, {"type": "Q4_0"})
    assert found.dequantize(q, torch.float32).unique().tolist() == [7.0205078125]
    got = found.dequantize(q, torch.bfloat16).unique().tolist()
    assert got == [7.0], f"transformers {found.__version__} gives {got}: {ref.dequantize(q, torch.bfloat16)[0, 0].item()} is right"


def test_bitsandbytes_begins_blocks_at_rows():
    found = adapter("bitsandbytes")
    if found.__version__ is None:
        pytest.skip("bitsandbytes is not installed")
    q = weight("nf4_b2x0", 3, 32)
    differs = (found.dequantize(q, torch.float32) != ref.dequantize(q, torch.float32)).any(1).tolist()
    assert differs == [False, True, True] or differs == [False, False, True], f"bitsandbytes {found.__version__}: {differs}"


def test_torchao_ignores_zero_points_of_rows():
    found = adapter("torchao")
    if found.__version__ is None:
        pytest.skip("torchao is not installed")
    q, x = ref.quantize(torch.full((1, 16), 1.0), "uint8z"), torch.ones(1, 16)
    right, got = ref.linear(x, q), found.linear(x, q)
    signed = ref.linear(x, ref.QTensor(ref.parse_format("int8"), q.shape, q.packed, q.scale))
    assert torch.equal(got, signed) and not torch.equal(got, right), f"torchao {found.__version__} gives {got}: {right} is right"


def test_compressed_tensors_cannot_unpack_zero_points_of_few_rows():
    found = adapter("compressed_tensors")
    if found.__version__ is None:
        pytest.skip("compressed-tensors is not installed")
    q = weight("uint4z_g128_bf16", 16)
    assert torch.equal(found.dequantize(q, torch.bfloat16), ref.dequantize(q, torch.bfloat16))
    with pytest.raises(RuntimeError, match="stride"):
        found.dequantize(weight("uint4z_g128_bf16", 8), torch.bfloat16)
