"""How fast ref.dequantize is beside other people's, on the CPU: python -m conformance.measure_dequantize [--size 4096] [--rounds 9].

Ours is ref.layouts.<x>.read and ref.dequantize, from the bytes of a checkpoint to a weight (size x size) in the dtype that the peer
returns; the peer is handed the same bytes. Results have to be equal bit by bit, then both run in turns: the median of the rounds, with
the smallest and the largest. With one thread (OMP_NUM_THREADS=1) CPU time is taken, which other load on the machine moves less.

    gguf                gguf.quants.dequantize (numpy, one thread)
    compressed-tensors  the decompress of pack-quantized
    gptqmodel           TorchLinear.dequantize_weight, eager, the module made beforehand

A peer that cannot be imported is named. Memory: a process of its own, in which malloc hands back what is freed (MALLOC_MMAP_THRESHOLD_),
resets the kernel's mark of its resident size (Linux, /proc/self/clear_refs), calls ref.dequantize and reads the mark.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from importlib.metadata import PackageNotFoundError, version

import torch

import ref
from conformance.weights import draw_weight
from ref import layouts

# Where a block of a GGUF type has the high bytes of its float16 factors.
FACTORS = {"Q4_K": (1, 3), "Q6_K": (209,), "Q8_0": (1,), "IQ4_XS": (1,)}
MEMORY = ("int4_g128_bf16", "uint4z_g128_fp16", "uint4_g32_ofp32", "nf4_g64", "nvfp4", "int8_h128")


def gguf(name, size):
    import gguf

    kind = gguf.GGMLQuantizationType[name]
    weights, length = gguf.GGML_QUANT_SIZES[kind]
    blocks = torch.randint(0, 256, (size, size // weights, length), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    blocks[..., FACTORS[name]] &= 0x3B  # below one, and no NaN
    data = blocks.flatten(1)
    return (
        lambda: torch.from_numpy(gguf.quants.dequantize(data.numpy(), kind)),
        lambda: ref.dequantize(layouts.gguf.read({"weight": data}, {"type": name}), torch.float32),
    )


def compressed_tensors(size):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    layout, q = layouts.compressed_tensors, draw_weight(0, "int4_g128_bf16", (size, size))
    parts, options = layout.write(q), layout.options(layout.config_of(q), "layer")
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(num_bits=4, strategy="group", group_size=128))
    peer = BaseCompressor.get_value_from_registry("pack-quantized")
    return lambda: peer.decompress(parts, scheme)["weight"], lambda: ref.dequantize(layout.read(parts, options), torch.bfloat16)


def gptqmodel(size):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layout, q = layouts.gptq, draw_weight(0, "uint4z_g128_fp16", (size, size))
    parts, options = layout.write(q, "gptq_v2"), layout.options(layout.config_of(q, "gptq_v2"), "layer")
    peer = TorchLinear(bits=4, group_size=128, sym=False, desc_act=False, in_features=size, out_features=size, bias=False)
    peer.load_state_dict(parts)
    peer.eval()
    return lambda: peer.dequantize_weight().t(), lambda: ref.dequantize(layout.read(parts, options), torch.float16)


PEERS = [
    *(("gguf", name, partial(gguf, name)) for name in FACTORS),
    ("compressed-tensors", "pack-quantized int4 g128, bf16", compressed_tensors),
    ("gptqmodel", "int4 g128 with zeros, fp16", gptqmodel),
]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m conformance.measure_dequantize", description=__doc__.split(":")[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.memory:
        memory(args.size)
        return
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    clock = time.process_time if threads == 1 else time.perf_counter
    print(f"{args.size} x {args.size}, torch {torch.__version__}, {threads} threads, load {load:.1f}", end="")
    print(f", {'CPU' if threads == 1 else 'wall'} time, median of {args.rounds} (min to max)\n")
    print("| peer | weight | ref, ms | peer, ms | speed, ref / peer |\n|---|---|---:|---:|---:|")
    for peer, name, make in PEERS:
        try:
            theirs, ours = make(args.size)
        except ImportError as error:
            print(f"| {peer} | {name} | | not installed: {error} | |")
            continue
        if not torch.equal(theirs(), ours()):
            raise SystemExit(f"measure_dequantize: {peer} {name}: results differ")
        times = [(seconds(clock, ours), seconds(clock, theirs)) for _ in range(args.rounds)]
        ours, theirs = zip(*times, strict=True)
        ratio = statistics.median(theirs) / statistics.median(ours)
        print(f"| {peer} {version_of(peer)} | {name} | {span(ours)} | {span(theirs)} | {ratio:.2f} |", flush=True)
    print("\nPeak memory of ref.dequantize, in sizes of its result (1 is the result alone)\n", flush=True)
    command = [sys.executable, "-m", "conformance.measure_dequantize", "--memory", "--size", str(args.size)]
    subprocess.run(command, check=True, env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"})


def version_of(package):
    try:
        return version(package)
    except PackageNotFoundError:  # a folder of sources on the path
        return ""


def seconds(clock, function):
    start = clock()
    function()
    return clock() - start


def span(times):
    return f"{statistics.median(times) * 1e3:.0f} ({min(times) * 1e3:.0f} to {max(times) * 1e3:.0f})"


def memory(size):
    """Print a table of formats and dtypes: how far the resident size rises during dequantize, over the size of the result."""
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    print(f"| format | {' | '.join(str(dtype)[6:] for dtype in dtypes)} |\n|---|{'---:|' * len(dtypes)}")
    for name in MEMORY:
        q, peaks = draw_weight(0, name, (size, size)), []
        ref.dequantize(draw_weight(0, name, (256, 256)))  # code and threads that the first call brings in
        for dtype in dtypes:
            before = resident("VmRSS")
            with open("/proc/self/clear_refs", "w") as reset:
                reset.write("5")
            w = ref.dequantize(q, dtype)
            peaks.append((resident("VmHWM") - before) / w.nbytes)
            del w
        print(f"| {name} | {' | '.join(f'{peak:.2f}' for peak in peaks)} |", flush=True)


def resident(field):
    with open("/proc/self/status") as status:
        return int(dict(line.split(":", 1) for line in status)[field].split()[0]) * 1024


if __name__ == "__main__":
    main()
