"""How much memory layouts.open takes: python -m conformance.measure_open [--gib 5] [--folder /tmp].

Writes a GPTQ int4 checkpoint of that size in shards of about 320 MiB (one weight of 14336 x 4096, under many names), and then, each
in a fresh process, does nothing, opens it, reads every layer, and dequantizes some: prints the peak resident size (mapped pages count)
and the seconds. Deletes the checkpoint.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time

import torch
from safetensors.torch import save_file

import ref
from conformance.weights import draw_weight
from ref import layouts

SHAPE, FORMAT = (14336, 4096), "int4_g128_fp16"
SHARD_BYTES = 320 * 2**20
DEQUANTIZED = 8  # layers that are dequantized, too


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m conformance.measure_open", description=__doc__)
    parser.add_argument("--gib", type=float, default=5.0)
    parser.add_argument("--folder", help="where the checkpoint is made; default: the system's folder for temporary files")
    parser.add_argument("--measure", nargs=2, metavar=("PATH", "WHAT"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        measure(*args.measure)
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        print(f"{write(folder, int(args.gib * 2**30)) / 2**30:.2f} GiB in {len(os.listdir(folder)) - 2} shards")
        for what in ("nothing", "open", "read", "dequantize"):
            subprocess.run([sys.executable, "-m", "conformance.measure_open", "--measure", folder, what], check=True)


def write(folder, size):
    """A checkpoint of at least that many bytes; returns how many."""
    q = draw_weight(0, FORMAT, SHAPE)
    parts, config = layouts.gptq.write(q), layouts.gptq.config_of(q)
    one = sum(t.nbytes for t in parts.values())
    count, in_shard = -(-size // one), max(SHARD_BYTES // one, 1)
    weight_map = {}
    for start in range(0, count, in_shard):
        file = f"model-{start // in_shard + 1:05d}-of-{-(-count // in_shard):05d}.safetensors"
        tensors = {f"layers.{i}.up_proj.{part}": t.clone() for i in range(start, min(start + in_shard, count)) for part, t in parts.items()}
        save_file(tensors, os.path.join(folder, file))
        weight_map |= dict.fromkeys(tensors, file)
    for file, document in (("model.safetensors.index.json", {"weight_map": weight_map}), ("config.json", {"quantization_config": config})):
        with open(os.path.join(folder, file), "w") as target:
            json.dump(document, target)
    return one * count


def measure(path, what):
    """Open the checkpoint, read or dequantize its layers, and print what it took; "nothing": what Python and torch take by themselves."""
    start = time.perf_counter()
    checkpoint = () if what == "nothing" else layouts.open(path)
    layers = {"read": len(checkpoint), "dequantize": DEQUANTIZED}.get(what, 0)
    for _, q in itertools.islice(checkpoint, layers):
        if what == "dequantize":
            ref.dequantize(q)
    seconds = time.perf_counter() - start
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    peak, own, mapped = (int(fields[name].split()[0]) / 1024 for name in ("VmHWM", "RssAnon", "RssFile"))
    print(f"{what:10} {layers:4} layers {seconds:7.1f} s  peak {peak:5.0f} MiB resident (at the end {own:.0f} own, {mapped:.0f} mapped)")


if __name__ == "__main__":
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    main()
