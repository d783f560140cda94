"""Golden vectors of compressed-tensors, by its own compressors and decompressors.

Run once with each of the versions 0.20.0 (what is written today), 0.15.0 (padded 3, 5, 6 and 7 bits, g_idx) and 0.10.2 (sparsity
masks); each run replaces the cases of its own version and keeps the others:

    pip install --no-deps --target SITE compressed-tensors==VERSION loguru psutil
    PYTHONPATH=SITE python conformance/golden/make_compressed_tensors.py

Keys are "<case>/<part>", as the compressor wrote them, and "<case>/expected", what the decompressor returns.
"""

import json
import pathlib
import sys

import compressed_tensors
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors import safe_open
from safetensors.torch import save_file

VERSION = compressed_tensors.__version__
FILE = pathlib.Path(__file__).with_name("compressed_tensors.safetensors")
N, K = 10, 96


def weight(seed, shape=(N, K), dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def ranges(w, args):
    """The minimum and maximum of each group, in the shape of the scales."""
    if args.strategy == "tensor":
        w = w.reshape(1, -1)
        return w.amin(-1), w.amax(-1)
    if args.strategy == "channel":
        return w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
    if args.strategy == "block":
        bn, bk = args.block_structure
        padded = torch.nn.functional.pad(w, (0, -w.shape[1] % bk, 0, -w.shape[0] % bn))
        blocks = padded.unflatten(1, (-1, bk)).unflatten(0, (-1, bn))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = w.unflatten(-1, (-1, args.group_size))
    return groups.amin(-1), groups.amax(-1)


def config_of(fmt, args, **more):
    config = {"quant_method": "compressed-tensors", "format": fmt, "quantization_status": "compressed", "ignore": [], "version": VERSION}
    stored = {key: value for key, value in json.loads(args.model_dump_json()).items() if value is not None}
    group = {"targets": ["Linear"], "weights": stored, "input_activations": None, "output_activations": None}
    return config | {"config_groups": {"group_0": group}} | more


def today(fmt, w, global_scale=None, g_idx=None, **arguments):
    """Parts, expected and config, by the class method compressors of 0.12 and later."""
    from compressed_tensors.compressors import BaseCompressor

    args = QuantizationArgs(**arguments)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    low, high = ranges(w if g_idx is None else w[:, torch.argsort(g_idx, stable=True)], args)
    more = {} if global_scale is None else {"global_scale": global_scale}
    scale, zero = calculate_qparams(low, high, args, **more)
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero}
    state |= {"weight_global_scale": global_scale} if global_scale is not None else {}
    state |= {"weight_g_idx": g_idx} if g_idx is not None else {}
    compressor = BaseCompressor.get_value_from_registry(fmt)
    parts = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(parts), scheme)["weight"]
    return parts, expected, config_of(fmt, args)


def cases_0_20():
    group = {"type": "int", "strategy": "group", "group_size": 32}
    for bits in range(1, 9):
        yield f"pack_int{bits}_group", today("pack-quantized", weight(bits), num_bits=bits, **group)
        yield f"pack_uint{bits}_group", today("pack-quantized", weight(10 + bits), num_bits=bits, symmetric=False, **group)
    channel = {"type": "int", "strategy": "channel"}
    yield "pack_int4_channel_odd", today("pack-quantized", weight(20, (5, 50), torch.float16), num_bits=4, **channel)
    yield "pack_uint4_channel", today("pack-quantized", weight(21, dtype=torch.float32), num_bits=4, symmetric=False, **channel)
    yield "pack_int4_tensor", today("pack-quantized", weight(22), num_bits=4, type="int", strategy="tensor")
    yield "pack_uint4_tensor", today("pack-quantized", weight(23), num_bits=4, type="int", strategy="tensor", symmetric=False)
    yield "pack_int3_ambiguous", today("pack-quantized", weight(24, (5, 20)), num_bits=3, **channel)
    yield "pack_int4_stack", today("pack-quantized", weight(25, (3, 6, 64)), num_bits=4, **group)
    yield "pack_uint5_stack", today("pack-quantized", weight(26, (2, 33, 64)), num_bits=5, symmetric=False, **group)
    yield "int8_channel", today("int-quantized", weight(30), num_bits=8, **channel)
    yield "int8_tensor", today("int-quantized", weight(31), num_bits=8, type="int", strategy="tensor")
    yield "uint8_channel", today("int-quantized", weight(32), num_bits=8, symmetric=False, **channel)
    yield "uint8_group", today("int-quantized", weight(33), num_bits=8, symmetric=False, **group)
    yield "int4_naive", today("naive-quantized", weight(34), num_bits=4, **group)
    for strategy in ("tensor", "channel"):
        yield f"fp8_{strategy}", today("float-quantized", weight(40), num_bits=8, type="float", strategy=strategy)
    yield "fp8_group", today("float-quantized", weight(41), num_bits=8, type="float", strategy="group", group_size=48)
    block = {"type": "float", "strategy": "block", "block_structure": [4, 32]}
    yield "fp8_block_partial", today("float-quantized", weight(42, (10, 80)), num_bits=8, **block)
    yield "fp8_naive", today("naive-quantized", weight(43), num_bits=8, type="float", strategy="channel")
    nv = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "scale_dtype": torch.float8_e4m3fn}
    from compressed_tensors.quantization.utils import generate_gparam

    w = weight(50)
    yield "nvfp4", today("nvfp4-pack-quantized", w, generate_gparam(w.amin(), w.amax()), **nv)
    yield "nvfp4_power_of_two", today("nvfp4-pack-quantized", w, torch.tensor([512.0]), **nv)
    for name, bits, fmt in (("mxfp4", 4, "mxfp4-pack-quantized"), ("mxfp6", 6, "mxfp6-pack-quantized"), ("mxfp8", 8, "mxfp8-quantized")):
        mx = {"num_bits": bits, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}
        yield name, today(fmt, weight(60 + bits) * torch.logspace(-3, 3, N)[:, None].bfloat16(), **mx)
    yield "rotated", rotated(*today("pack-quantized", weight(70, (N, 64)), num_bits=4, **group))


def rotated(parts, expected, config):
    """A layer whose input the model rotates in blocks of 16: expected is what it computes from the identity.

    Scales are powers of two, and 16 has a square root, so that all sums are exact.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.transform.utils.hadamard import deterministic_hadamard_matrix
    from compressed_tensors.transform.utils.matrix import apply_transform_weight

    parts["weight_scale"] = torch.exp2(torch.arange(N)[:, None] - torch.arange(2)).bfloat16()
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    stored = BaseCompressor.get_value_from_registry("pack-quantized").decompress(dict(parts), scheme)["weight"]
    matrix = deterministic_hadamard_matrix(16, torch.float64)
    x = apply_transform_weight(matrix, torch.eye(64, dtype=torch.float64), "input", torch.nn.Linear) / 4
    apply = [{"targets": ["Linear"], "location": "weight_input", "inverse": True}, {"targets": "re:.*", "location": "input"}]
    transform = {"R": {"type": "hadamard", "head_dim": 16, "apply": apply, "randomize": False, "precision": "torch.float32"}}
    return parts, (x @ stored.double().T).T.contiguous(), config | {"transform_config": {"config_groups": transform}}


def cases_0_15():
    group = {"type": "int", "strategy": "group", "group_size": 32}
    for bits in (3, 5, 6, 7):
        yield f"padded_int{bits}_group", today("pack-quantized", weight(bits), num_bits=bits, **group)
        yield f"padded_uint{bits}_group", today("pack-quantized", weight(10 + bits), num_bits=bits, symmetric=False, **group)
    yield "padded_int3_ambiguous", today("pack-quantized", weight(24, (5, 20)), num_bits=3, type="int", strategy="channel")
    order = torch.randperm(K, generator=torch.Generator().manual_seed(1))
    g_idx = (torch.arange(K, dtype=torch.int32) // 32)[order]
    for name, symmetric in (("int4", True), ("uint4", False)):
        yield f"g_idx_{name}", today("pack-quantized", weight(80), g_idx=g_idx, num_bits=4, symmetric=symmetric, actorder="group", **group)
    none = torch.full((K,), -1, dtype=torch.int32)
    parts, expected, config = today("pack-quantized", weight(81), num_bits=4, **group)
    yield "g_idx_none", (parts | {"weight_g_idx": none}, expected, config)


def cases_0_10():
    from compressed_tensors.compressors.quantized_compressors.naive_quantized import FloatQuantizationCompressor, IntQuantizationCompressor
    from compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask import Sparse24BitMaskTensor, get_24_bytemasks
    from compressed_tensors.compressors.sparse_compressors.sparse_bitmask import BitmaskTensor

    kinds = {"float": ("float-quantized", FloatQuantizationCompressor), "int": ("int-quantized", IntQuantizationCompressor)}
    for sparse in ("sparse-24-bitmask", "sparse-bitmask"):
        for kind, strategy in (("float", "channel"), ("float", "tensor"), ("int", "channel")):
            fmt, compressor_type = kinds[kind]
            args = QuantizationArgs(num_bits=8, type=kind, strategy=strategy)
            w = weight(90, (N, 40))
            w = w * (get_24_bytemasks(w) if sparse == "sparse-24-bitmask" else weight(91, (N, 40)) > 0.5)
            scale, zero = calculate_qparams(*ranges(w, args), args)
            compressor = compressor_type()
            data = compressor.compress_weight(w, scale, args, zero_point=zero)["weight"]
            if sparse == "sparse-24-bitmask":
                parts = Sparse24BitMaskTensor.from_dense(data, "2:4").dict("")
                parts = {key.strip("."): tensor for key, tensor in parts.items()}
                whole = Sparse24BitMaskTensor.from_compressed_data(**parts).decompress()
            else:
                parts = {key.strip("."): tensor for key, tensor in BitmaskTensor.from_dense(data).dict("").items()}
                whole = BitmaskTensor(**parts).decompress()
            expected = compressor.decompress_weight({"weight": whole, "weight_scale": scale}, args)
            sparsity = {"format": sparse, "targets": ["Linear"], "ignore": [], "global_sparsity": 0.5, "sparsity_structure": "2:4"}
            config = config_of(fmt, args, sparsity_config=sparsity)
            yield f"{sparse.replace('-', '_')}_{kind}8_{strategy}", (parts | {"weight_scale": scale}, expected, config)


CASES = {"0.20.0": cases_0_20, "0.15.0": cases_0_15, "0.10.2": cases_0_10}


def main():
    tensors, versions, cases = {}, {}, {}
    if FILE.exists():
        with safe_open(FILE, "pt") as file:
            versions, cases = json.loads(file.metadata()["versions"]), json.loads(file.metadata()["cases"])
            cases = {name: case for name, case in cases.items() if case["version"] != VERSION}
            tensors = {key: file.get_tensor(key) for key in file.keys() if key.split("/")[0] in cases}  # noqa: SIM118
    for name, (parts, expected, config) in CASES[VERSION]():
        for part, tensor in (parts | {"expected": expected}).items():
            tensors[f"{name}/{part}"] = tensor.data.clone().contiguous()
        cases[name] = {"version": VERSION, "config": config}
    versions |= {f"compressed-tensors {VERSION}": {"torch": torch.__version__, "python": sys.version.split()[0]}}
    save_file(tensors, FILE, {"versions": json.dumps(versions, sort_keys=True), "cases": json.dumps(cases, sort_keys=True)})
    print(f"{len(cases)} cases, {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
