"""Speed on a CUDA GPU: fast.linear beside Humming and cuBLAS, in one process, weights cold: python -m conformance.bench.

A cell is a CUDA graph of launches over copies of a random weight that together exceed ROTATED bytes. Its result is checked first,
on a sample, against the bound of conformance's linear. Then the graphs of all peers take turns; times are medians over REPLAYS, and
fast.linear is timed twice to show the noise. Progress goes to stderr, Markdown to stdout. Exit status: 0, 1 if fast failed, 2 without a GPU.
"""

import argparse
import functools
import importlib
import json
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from ref import Int, QTensor, dequantize, parse_format
from ref.format import SCALE_DTYPES
from ref.rounding import round_to

from .candidate import load, nearest
from .ops.linear import truth_of
from .oracle import Disagreement

# Weight formats, and how x is quantized for each: in the tables, and where the cost of a call is measured.
FORMATS = {"int4_g128_bf16": None, "fp8": "fp8_e4m3_token"}
HOST_FORMATS = {"int4_g128_bf16": None, "int4_g128": None, "fp8": "fp8_e4m3_token"}
SHAPES = ((4096, 4096), (8192, 8192), (28672, 4096), (4096, 14336))
ROWS, MEMORY_ROWS = (1, 4, 16, 64, 256, 1024), (1, 1024)
# Several times any GPU's L2 cache; and so many launches in a graph, or more, that its own start does not count.
ROTATED, LAUNCHES, REPLAYS = 240e6, 24, 20
CHECKED_ROWS, CHECKED_COLUMNS, HOST_CALLS, HOST_BATCHES = 16, 64, 200, 20
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
FAST, AGAIN, DEFAULT, FIXED = "fast", "fast again", "Humming", "Humming, deterministic"
CUBLAS, PRODUCT, QUANTIZE = "cuBLAS bf16", "product alone", "quantizing x alone"
COLUMNS = {None: (FAST, DEFAULT, FIXED, CUBLAS), "fp8_e4m3_token": (FAST, DEFAULT, FIXED, PRODUCT, QUANTIZE)}
START = time.perf_counter()


def floor_us(m, n, k, weight_bytes, bandwidth, peak):
    """The least time, in microseconds: weight, x and y (16 bits each) moved once, or 2 m n k operations."""
    return max((weight_bytes + 2 * m * (n + k)) / bandwidth, 2 * m * n * k / peak) * 1e6


def copies(size):
    """How many copies of so many bytes exceed ROTATED together."""
    return int(ROTATED // size) + 1


def table(cells, x_format):
    """The cells of one format as a Markdown table, and what there is to say about it."""
    columns, rows = COLUMNS[x_format], []
    for cell in cells:
        us, floor = cell["us"], cell["floor_us"]
        times = [f"{us[name][0]:.1f}" + "\\*" * (name in cell["outside"]) if name in us else "-" for name in columns]
        share = f"{100 * floor / us[FAST][0]:.0f} %" if FAST in us else "-"
        ratio = f"{us[FAST][0] / us[DEFAULT][0]:.2f}" if FAST in us and DEFAULT in us else "-"
        rows.append((f"{cell['n']} x {cell['k']}", cell["m"], *times, f"{floor:.1f}", share, ratio))
    text = markdown(("n x k", "m", *(f"{name}, us" for name in columns), "floor, us", "share of floor", "fast / Humming"), rows)
    noise = [abs(c["us"][AGAIN][0] / c["us"][FAST][0] - 1) for c in cells if AGAIN in c["us"] and FAST in c["us"]]
    if noise:
        text += f"\n\nThe noise: the two times of `fast` in a cell differ by at most {100 * max(noise):.1f} %."
    if any(name in cell["outside"] for cell in cells for name in columns):
        text += "\n\n\\* Outside the bound that `fast` is held to: partial sums or scales were rounded on the way."
    return text


def host_table(rows):
    """What a call costs the host, and its peak memory beyond its arguments, as a Markdown table."""
    head = [f"{what}, m={m}" for m in MEMORY_ROWS for what in ("peak memory", "output")]
    sizes = [[f"{size / 1024:.0f} KiB" for m in MEMORY_ROWS for size in row["memory"][m]] for row in rows]
    lines = [(row["call"], *(f"{us:.1f}" for us in row["us"]), *size) for row, size in zip(rows, sizes, strict=True)]
    return markdown(("call", "host at m=1, us", "least", "most", *head), lines)


def markdown(head, rows):
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---:"] * len(head), *rows))


def draw_weight(name, n, k, device):
    """A QTensor of random codes (integers alike, floats normally distributed) and of scales that bf16 represents."""
    fmt = parse_format(name)
    random = {"device": device, "generator": torch.Generator(device).manual_seed(n + k)}
    if isinstance(fmt.element, Int):
        packed = torch.randint(-(2**31), 2**31 - 1, (n, k * fmt.element.bits // 32), dtype=torch.int32, **random)
    else:
        packed = (torch.randn(n, k, **random) * 64).clamp(-448, 448).to(FP8).view(torch.int32)
    scale = torch.rand(fmt.scale_shape((n, k)), **random) * 0.02 + 0.002
    return QTensor(fmt, (n, k), packed, scale.to(BF16).to(SCALE_DTYPES[fmt.scale]))


def draw_x(m, k, device):
    return torch.randn(m, k, device=device, generator=torch.Generator(device).manual_seed(m)).to(BF16)


def judge_of(q, x, x_format):
    """A function of y (m, n): what is wrong with it in a sample of rows and columns, as a sentence, or None."""
    sizes, k = ((x.shape[0], CHECKED_ROWS), (q.shape[0], CHECKED_COLUMNS)), q.shape[1]
    rows, columns = (torch.linspace(0, size - 1, min(size, most), dtype=torch.float64).long() for size, most in sizes)
    part = QTensor(q.format, (len(columns), k), q.packed[columns].cpu(), q.scale[columns].cpu())
    truth = truth_of(x[rows].cpu(), part, None, x.device, x_format)

    def judge(y):
        try:
            truth.check(y[rows][:, columns].cpu())
        except Disagreement as disagreement:
            return str(disagreement)

    return judge


class Humming:
    """Humming's kernels as its tables choose them, launched with nothing in between; the deterministic ones by use_batch_invariant."""

    def __init__(self, device):
        # By name: conformance depends on no kernel library.
        names = [f"humming.{name}" for name in ("config", "kernel.humming", "layer", "ops.input", "ops.utils", "transform", "tune")]
        self.config, kernel, self.layers, self.inputs, utils, self.transform, self.tune = map(importlib.import_module, names)
        utils.init_humming_launcher()
        self.prepare_kernels, self.launch = kernel.HummingKernel.prepare_kernels, torch.ops.humming.launch_kernel.out
        self.device, self.locks = device, torch.zeros(2048, dtype=torch.int32, device=device)

    def layer(self, q):
        common = {"shape_n": q.shape[0], "shape_k": q.shape[1], "c_dtype": "bfloat16", "bs_dtype": "bfloat16"}
        if isinstance(q.format.element, Int):
            common |= {"weight_scale_group_size": q.format.group[1], "weight_scale_type": "group"}
            return self.config.LayerConfig(a_dtype="bfloat16", b_dtype=f"uint{q.format.element.bits}", **common)
        return self.config.LayerConfig(a_dtype="float8e4m3", b_dtype="float8e4m3", weight_scale_type="channel", **common)

    def weight(self, q):
        return self.transform.transform_humming_tensors(self.layer(q), {"weight": q.packed, "weight_scale": q.scale.to(BF16)})

    def tuning(self, q, m, fixed):
        return json.dumps(dict(self.tune.get_heuristics_config(self.layer(q), shape_m=m, use_batch_invariant=fixed, device=self.device)))

    def kernel(self, q, m, fixed):
        """The kernel for m rows, compiled at the first call, as the launcher takes it."""
        compute = json.dumps({"use_batch_invariant": True} if fixed else {})
        return self.prepare_kernels(self.layer(q).to_str(), compute, self.tuning(q, m, fixed), self.device)

    def quantize(self, x):
        codes, _, scale = self.inputs.process_input(x, quant_mode="dynamic_token", quant_dtype="float8e4m3")
        return codes, scale

    def run(self, configs, w, x, eight, y):
        a, scale = self.quantize(x) if eight else (x, None)
        rest = (None, None, None, None, self.locks, 1, 0, False)
        self.launch(configs, a, w["weight"], w["weight_scale"], None, scale, None, None, None, y, *rest)

    def public(self, q, m):
        """x to y as a user of the library calls a layer of it, but that only the kernel for m rows is compiled."""
        module = torch.nn.Module()
        module.humming_metas = {"": self.layers.HummingLayerMeta.from_layer_config(self.layer(q))}
        for name, tensor in self.weight(q).items():
            module.register_parameter(name, torch.nn.Parameter(tensor, requires_grad=False))
        module.register_buffer("locks", self.locks)
        tuning = self.tuning(q, m, False)
        return lambda x: self.layers.HummingMethod.forward_layer(module, x, tuning_config=tuning)


class Layer:
    """One weight, as many times as it takes, in the layout of every peer."""

    def __init__(self, fast, humming, name, n, k, device):
        self.fast, self.humming, self.name, self.x_format, self.n, self.k = fast, humming, name, FORMATS[name], n, k
        self.q = draw_weight(name, n, k, device)
        self.bytes = self.q.packed.nbytes + self.q.scale.nbytes

    @functools.cached_property
    def ours(self):
        q = self.q
        clones = (QTensor(q.format, q.shape, q.packed.clone(), q.scale.clone()) for _ in range(copies(self.bytes)))
        return [self.fast.prepare(one, x_format=self.x_format, m=ROWS) for one in clones]

    @functools.cached_property
    def theirs(self):
        w = self.humming.weight(self.q)
        return [{name: tensor.clone() for name, tensor in w.items()} for _ in range(copies(self.bytes))]

    @functools.cached_property
    def plain(self):
        w = dequantize(self.q, BF16) if self.x_format is None else self.q.packed.view(FP8)
        return [w.clone() for _ in range(copies(w.nbytes))]

    def calls(self, name, x, y):
        """The launches of one peer, one a copy."""
        if name in (FAST, AGAIN):
            return [lambda p=p: self.fast.linear(x, p, x_format=self.x_format, out=y) for p in self.ours]
        if name in (DEFAULT, FIXED):
            kernel = self.humming.kernel(self.q, x.shape[0], name == FIXED)
            return [lambda w=w: self.humming.run(kernel, w, x, self.x_format is not None, y) for w in self.theirs]
        if name == QUANTIZE:
            return [lambda: self.humming.quantize(x)]
        if name == CUBLAS:
            return [lambda w=w: torch.mm(x, w.T, out=y) for w in self.plain]
        codes, one = (x.float() / self.scale(x)).to(FP8), torch.ones((), device=x.device)
        options = {"scale_a": one, "scale_b": one, "out_dtype": BF16, "use_fast_accum": False, "out": y}
        return [lambda w=w: torch._scaled_mm(codes, w.T, **options) for w in self.plain]

    def scale(self, x):
        return x.float().abs().amax(1, keepdim=True) / 448

    def result(self, name, x, y):
        """The layer's result, of what a peer left in y."""
        return round_to(y.double() * self.scale(x).double() * self.q.scale.double().T, BF16) if name == PRODUCT else y


def capture(calls):
    """A CUDA graph of every call, around again up to LAUNCHES: (graph, the calls, whose tensors it reads)."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph, calls = torch.cuda.CUDAGraph(), calls * -(-LAUNCHES // len(calls))
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph, calls


def interleaved(graphs):
    """Microseconds a call, [median, least, most] over REPLAYS, of graphs that take turns: {name: (graph, calls)}."""
    times = {name: [] for name in graphs}
    for name, (graph, _) in [*graphs.items()] * (REPLAYS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        times[name].append((start, end))
    torch.cuda.synchronize()
    # Without the first turn.
    return {name: summary([a.elapsed_time(b) * 1e3 / len(graphs[name][1]) for a, b in pairs[1:]]) for name, pairs in times.items()}


def summary(times):
    return [round(f(times), 3) for f in (statistics.median, min, max)]


def measure(layer, m, bandwidth, peak):
    """One cell: all peers checked, then timed."""
    x = draw_x(m, layer.k, layer.q.packed.device)
    y = torch.empty(m, layer.n, dtype=BF16, device=x.device)
    judge = judge_of(layer.q, x, layer.x_format)
    floor = floor_us(m, layer.n, layer.k, layer.bytes, bandwidth, peak if layer.x_format is None else 2 * peak)
    cell = {"format": layer.name, "n": layer.n, "k": layer.k, "m": m, "floor_us": round(floor, 3), "outside": {}, "errors": {}}
    graphs = {}
    for name in (*COLUMNS[layer.x_format], AGAIN):
        if layer.humming is None and name in (DEFAULT, FIXED, QUANTIZE):
            continue
        try:
            captured = capture(layer.calls(name, x, y))
            y.fill_(float("nan"))
            captured[0].replay()
            wrong = None if name == QUANTIZE else judge(layer.result(name, x, y))
        except Exception as error:
            cell["errors"][name] = f"{type(error).__name__}: {error}"[:500]
            continue
        cell["outside"] |= {} if wrong is None else {name: wrong}
        if wrong is None or name not in (FAST, AGAIN):
            graphs[name] = captured
    cell["us"] = interleaved(graphs)
    times = [f"{name} {us[0]:.2f} ({us[1]:.2f}..{us[2]:.2f})" for name, us in cell["us"].items()]
    say(f"{layer.name} {layer.n}x{layer.k} m={m}: {', '.join(times)}; floor {floor:.2f}")
    for name, text in (*cell["outside"].items(), *cell["errors"].items()):
        say(f"    {name}: {text}")
    return cell


def ceilings(device):
    """What the GPU does in a second: bytes, read and written, of a copy; operations of cuBLAS on large bf16 matrices."""
    # A kernel's copy: in a graph, copy_ would be a memcpy node, whose engine is slower than the memory.
    here, there = torch.randn(2, 2**28, device=device)
    a, b, y = (torch.randn(8192, 8192, device=device).to(BF16) for _ in range(3))
    us = interleaved({"copy": capture([lambda: torch.neg(there, out=here)]), "mm": capture([lambda: torch.mm(a, b.T, out=y)])})
    return 2 * there.nbytes / us["copy"][0] * 1e6, 2 * 8192**3 / us["mm"][0] * 1e6


def host_cost(call, calls=HOST_CALLS):
    """Microseconds of the host a call, [median, least, most] over batches of calls; before each the GPU is waited for."""
    times = []
    for _ in range(HOST_BATCHES + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return summary(times[1:])


def memory_of(call):
    """Bytes that a call holds at its peak beyond what was there before, and those of its result."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = call()
    return torch.cuda.max_memory_allocated() - before, y.nbytes


def host_rows(fast, humming, device):
    """What one call of each kind costs the host and holds in memory, at the first of SHAPES."""
    (n, k), kinds = SHAPES[0], {}
    for name, f in HOST_FORMATS.items():
        q, label = draw_weight(name, n, k, device), f"{name} x {f or 'bf16'}"
        prepare = functools.partial(fast.prepare, q, x_format=f)
        kinds[f"`fast.linear`, {label}"] = lambda m, p=prepare, f=f: functools.partial(lambda p, x: fast.linear(x, p, x_format=f), p(m=m))
        if humming is not None and name in FORMATS:
            kinds[f"Humming's public call, {label}"] = functools.partial(humming.public, q)
    w, rows = torch.randn(n, k, device=device).to(BF16), []
    kinds["`F.linear`, bf16 x bf16"] = lambda m: lambda x: torch.nn.functional.linear(x, w)
    for label, kind in kinds.items():
        try:
            calls = {m: functools.partial(kind(m), draw_x(m, k, device)) for m in MEMORY_ROWS}
            rows.append({"call": label, "memory": {m: memory_of(call) for m, call in calls.items()}, "us": host_cost(calls[1])})
            say(f"{label}: host {rows[-1]['us']} us, memory and output {rows[-1]['memory']}")
        except Exception as error:
            say(f"{label}: {type(error).__name__}: {error}"[:500])
    return rows


def compile_ahead(fast, humming, names, shapes, device):
    """Compile what will be asked for, in as many threads as there are processors; an error comes again where it matters."""
    weights = {(name, shape): draw_weight(name, *shape, device) for shape in shapes for name in names}
    single = {(name, SHAPES[0]): draw_weight(name, *SHAPES[0], device) for name in HOST_FORMATS}
    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        jobs = [pool.submit(fast.prepare, q, x_format=HOST_FORMATS[name], m=ROWS) for (name, _), q in (single | weights).items()]
        if humming is not None:
            jobs += [pool.submit(humming.weight, q) for q in weights.values()]
            jobs += [pool.submit(humming.quantize, draw_x(1, k, device)) for k in {k for _, k in shapes}]
            jobs += [pool.submit(humming.kernel, q, m, fixed) for m in ROWS for fixed in (False, True) for q in weights.values()]
        say(f"compiling: {len(jobs)} jobs")
        errors = [job.exception() for job in jobs if job.exception() is not None]
    say(f"compiled, {len(errors)} jobs failed" + "".join(f"\n    {type(error).__name__}: {error}"[:300] for error in errors[:3]))


def say(text):
    print(f"[{time.perf_counter() - START:6.1f}] {text}", file=sys.stderr, flush=True)


def run(names, shapes):
    """Everything measured, as a value for JSON."""
    device, fast = torch.device("cuda", torch.cuda.current_device()), load("fast").target
    document = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "cells": []}
    try:
        humming, document["humming"] = Humming(device), importlib.import_module("humming").__version__
    except Exception as error:
        humming, document["humming"] = None, f"missing ({type(error).__name__}: {error})"[:200]
    document["bandwidth"], document["peak"] = ceilings(device)
    say(str(document))
    compile_ahead(fast, humming, names, shapes, device)
    for layer in (Layer(fast, humming, name, *shape, device) for name in names for shape in shapes):
        document["cells"] += [measure(layer, m, document["bandwidth"], document["peak"]) for m in ROWS]
    document["host"] = host_rows(fast, humming, device)
    return document | {"seconds": round(time.perf_counter() - START, 1)}


def report(document):
    """The document as Markdown."""
    parts = [
        f"{document['device']}, torch {document['torch']}, humming-kernels {document['humming']}. Weights are cold, and x is quantized"
        f" within the time. Floors: {document['bandwidth'] / 1e12:.2f} TB/s (a copy) and {document['peak'] / 1e12:.0f} TFLOP/s (cuBLAS"
        f" bf16; fp8 twice that), both measured in this run, which took {document['seconds']:.0f} s."
    ]
    for name in dict.fromkeys(cell["format"] for cell in document["cells"]):
        parts += [f"### {name} x {FORMATS[name] or 'bf16'}", table([c for c in document["cells"] if c["format"] == name], FORMATS[name])]
        if FORMATS[name] is not None:
            parts.append(f"*{PRODUCT}*: `torch._scaled_mm` of codes made before, not scaled. *{QUANTIZE}*: by Humming's kernel.")
    return "\n\n".join([*parts, "### One call, n x k = {} x {}".format(*SHAPES[0]), host_table(document["host"])])


def main(argv=None):
    """Run the benchmark; 0, 1 if fast.linear failed in a cell, 2 without a GPU or for bad usage."""
    parser = argparse.ArgumentParser(prog="python -m conformance.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--formats", default=",".join(FORMATS), help=f"comma-separated; default: {','.join(FORMATS)}")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there, too")
    parser.add_argument("--quick", action="store_true", help="{} x {} only".format(*SHAPES[0]))
    args = parser.parse_args(argv)
    names = args.formats.split(",")
    if unknown := [name for name in names if name not in FORMATS]:
        parser.error(f"unknown format {unknown[0]!r}, expected {' or '.join(FORMATS)}{nearest(unknown[0], FORMATS)}")
    if args.json and not os.path.isdir(os.path.dirname(os.path.abspath(args.json))):
        parser.error(f"--json: there is no folder {os.path.dirname(args.json)!r}")
    if not torch.cuda.is_available():
        print("bench: times are measured on a CUDA GPU, and there is none here", file=sys.stderr)
        return 2
    document = run(names, SHAPES[:1] if args.quick else SHAPES)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(document, file, indent=1)
    print(report(document))
    return int(any(name in cell["outside"] or name in cell["errors"] for cell in document["cells"] for name in (FAST, AGAIN)))


if __name__ == "__main__":
    sys.exit(main())
