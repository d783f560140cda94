"""Makes gguf.safetensors and gguf.gguf: blocks that the gguf package made or took, and what it decodes them to.

    pip install --no-deps --target DIR gguf==0.19.0
    PYTHONPATH=DIR python conformance/golden/make_gguf.py

Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0 and MXFP4 are made by the package's quantize. It has none for the other types: their
blocks are random bytes with finite float16 scales, and, as quantizers do it, the largest integer among each block's. "expected"
is what its dequantize returns, float32. "grid/<type>" are its grids. gguf.gguf is a file of its GGUFWriter.
It cannot decode Q1_0; no case here has it.
"""

import json
import os
from importlib.metadata import version

import gguf
import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from safetensors.torch import save_file

HERE = os.path.dirname(os.path.abspath(__file__))
N, K = 3, 512
MADE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
# Where float16 numbers are in a block, and how its largest stored integer is put in: {bytes: value}.
RANDOM = {
    "Q2_K": ((80, 82), {3: 0xFF}),
    "Q3_K": ((108,), {96: 0x00, 104: 0x00}),
    "Q4_K": ((0, 2), {4: 0x3F, 8: 0x3F}),
    "Q5_K": ((0, 2), {4: 0x3F, 8: 0x3F}),
    "Q6_K": ((208,), {197: 0x80}),
    "IQ2_XXS": ((0,), {9: 0xF5}),
    "IQ2_XS": ((0,), {70: 0xFF}),
    "IQ2_S": ((0,), {77: 0x3F}),
    "IQ3_XXS": ((0,), {69: 0xF1}),
    "IQ3_S": ((0,), {108: 0xF3}),
    "IQ1_S": ((0,), {39: 0xFA}),
    "IQ1_M": ((), {48: 0xFF}),
    "IQ4_NL": ((0,), {}),
    "IQ4_XS": ((0,), {2: 0x00, 4: 0x00}),
    "NVFP4": ((), {}),
}


def halves(rng, shape):
    """Float16 numbers of any sign, from 2^-24 to about 1, none of them zero."""
    x = (rng.normal(size=shape) * 2.0 ** rng.integers(-20, -2, size=shape)).astype(np.float16)
    return np.where(x == 0, np.float16(2.0**-24), x)


def random_blocks(rng, name, n, blocks):
    size = GGML_QUANT_SIZES[GGMLQuantizationType[name]][1]
    data = rng.integers(0, 256, (n, blocks, size), dtype=np.uint8)
    places, largest = RANDOM[name]
    for at in places:
        data[..., at : at + 2] = halves(rng, (n, blocks, 1)).view(np.uint8)
    if name == "IQ1_M":  # its float16 is in the top nibbles of four words
        d = halves(rng, (n, blocks, 1)).view(np.uint16)
        for i in range(4):
            data[..., 49 + 2 * i] = data[..., 49 + 2 * i] & 15 | (d[..., 0] >> (4 * i) & 15).astype(np.uint8) << 4
    if name == "NVFP4":  # no sign; the first scale of each row is the one that is zero instead of NaN
        data[..., :4] &= 127
        data[:, 0, 0] = 127
    for at, value in largest.items():
        data[..., at] = value
    return data.reshape(n, -1)


def main():
    rng = np.random.default_rng(1)
    tensors, cases = {}, {}
    for name in (*MADE, *RANDOM):
        kind = GGMLQuantizationType[name]
        if name in MADE:
            w = rng.normal(size=(N, K)).astype(np.float32)
            w[0, :256] = 0
            w[1] *= 2.0**-18
            data = quants.quantize(w, kind)
        else:
            data = random_blocks(rng, name, N, K // GGML_QUANT_SIZES[kind][0])
        tensors[f"{name}/weight"] = torch.from_numpy(data)
        tensors[f"{name}/expected"] = torch.from_numpy(quants.dequantize(data, kind))
        assert tensors[f"{name}/expected"].isfinite().all(), name
        cases[name] = {"config": {"quant_method": "gguf", "types": {"*": name}}, "made_by": "quantize" if name in MADE else "random bytes"}
    for name in ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S"):
        getattr(quants, name).init_grid()
        tensors[f"grid/{name}"] = torch.from_numpy(getattr(quants, name).grid.reshape(getattr(quants, name).grid_shape).astype(np.int8))
    metadata = {"versions": json.dumps({"gguf": version("gguf"), "numpy": np.__version__}), "cases": json.dumps(cases)}
    save_file(tensors, os.path.join(HERE, "gguf.safetensors"), metadata)
    write_file(rng, tensors)
    check_what_ref_writes(tensors)


def write_file(rng, tensors):
    """A file with every kind of metadata, plain tensors, quantized ones, an expert stack and a second-level scale."""
    writer = gguf.GGUFWriter(os.path.join(HERE, "gguf.gguf"), "test")
    writer.add_custom_alignment(64)
    kinds = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64", "bool")
    for i, kind in enumerate(kinds):
        getattr(writer, f"add_{kind}")(f"test.{kind}", kind == "bool" or (i + 0.5 if kind.startswith("float") else i - (kind[0] == "i")))
    writer.add_string("test.string", "größer")
    writer.add_array("test.strings", ["<s>", "", "▁the"])
    writer.add_array("test.numbers", [1, -2, 3])
    writer.add_array("test.floats", [0.5, -1.5])
    writer.add_array("test.bools", [True, False])
    writer.add_tensor("output_norm.weight", rng.normal(size=64).astype(np.float32))
    writer.add_tensor("plain.weight", rng.normal(size=(2, 3)).astype(np.float16))
    for layer, name in (("blk.0.up", "Q4_0"), ("blk.0.down", "Q6_K"), ("blk.0.gate", "NVFP4")):
        writer.add_tensor(f"{layer}.weight", tensors[f"{name}/weight"].numpy(), raw_dtype=GGMLQuantizationType[name])
    writer.add_tensor("blk.0.gate.scale", np.array([0.75], dtype=np.float32))
    stack = quants.quantize(rng.normal(size=(2, 3, 64)).astype(np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.up_exps.weight", stack, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def check_what_ref_writes(tensors):
    """The package's GGUFReader reads what ref.layouts.gguf writes."""
    import tempfile

    from ref.layouts import gguf as layout
    from ref.layouts import gguf_file

    ours = gguf_file.open_file(os.path.join(HERE, "gguf.gguf"))
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "again.gguf")
        stored = {f"{n}.weight": (n, layout.read({"weight": tensors[f"{n}/weight"]}, {"type": n})) for n in (*MADE, *RANDOM)}
        layout.write_file(path, stored, ours.metadata, ours.types)
        for tensor in gguf.GGUFReader(path).tensors:
            name = tensor.name.removesuffix(".weight")
            expected = tensors[f"{name}/weight"].numpy().copy()
            if name == "NVFP4":
                expected[:, 0] = 0  # 0x7F is read as the code 0
            assert np.array_equal(tensor.data, expected), name


if __name__ == "__main__":
    main()
