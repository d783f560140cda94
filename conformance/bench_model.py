"""Whole layers on one CUDA GPU: quantization as weights arrive, and a decoder layer's host time and graph.

    python -m conformance.bench_model [--json FILE]

Online: the linear layers of a 7-billion-parameter model (32 layers, hidden 4096, intermediate 11008), random bfloat16 weights. "in place":
fast.quantize_ on a model whose weights are on the GPU. "as it arrives": fast.LinearLoader, one weight after the other, so that the 16-bit
model is never held; what is timed is the loader alone.

Decoder: one layer of Llama-3-8B, m = 1, quantized: seven products, and norms, attention to 256 tokens and the gate in plain torch. Host: calls in
a row, none of which waits for the GPU. Graph: the layer replayed, against the sum of what each of its kernels takes in a graph of its
own; weights of several layers take turns, so that none is in the cache.
"""

import argparse
import functools
import importlib
import json
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from . import bench

BF16 = torch.bfloat16
ONLINE = {
    "int4_g128": {"dtype": "int4", "group_size": 128},
    "int8": {"dtype": "int8"},
    "fp8": {"dtype": "float8e4m3"},
    "mxfp4": {"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"},
    "uint4z_g128": {"dtype": "int4", "group_size": 128, "has_zero_point": True},
}
LAYERS, RUNS = 32, 5
HIDDEN, SEVEN = 4096, 11008
SHAPES_7B = {"q": (HIDDEN, HIDDEN), "k": (HIDDEN, HIDDEN), "v": (HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN)}
SHAPES_7B |= {"gate": (SEVEN, HIDDEN), "up": (SEVEN, HIDDEN), "down": (HIDDEN, SEVEN)}
# Llama-3-8B: 32 heads of 128, 8 of keys and values.
SHAPES_8B = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
SHAPES_8B |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
HEADS, KEYS, HEAD, CONTEXT = 32, 8, 128, 256
# Layers called in a row for the host's time: with more, a driver's queue of a thousand launches fills up, and the host waits for the GPU.
HOST_CALLS = 20
DECODER = (None, "int4_g128_bf16", "int8_bf16", "fp8_e4m3_bf16", "mxfp4")


def plain_layer(device):
    layer = nn.Module()
    for name, (n, k) in SHAPES_7B.items():
        linear = nn.Linear(k, n, bias=False, dtype=BF16, device="meta").to_empty(device=device)
        layer.add_module(name, linear)
        linear.weight.data.normal_(std=0.02)
    return layer


def in_place(fast, config, device):
    """Seconds, bytes of 16-bit weights, and the peak of memory beyond the 16-bit model."""
    model = nn.ModuleList(plain_layer(device) for _ in range(LAYERS))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.perf_counter()
    fast.quantize_(model, config)
    torch.cuda.synchronize()
    return time.perf_counter() - start, size, torch.cuda.max_memory_allocated() - before


def as_it_arrives(fast, config, device):
    """Seconds, bytes of 16-bit weights, the peak of memory and the quantized model's, both beyond the weights that arrive."""
    arriving = {name: torch.randn(shape, device=device).mul_(0.02).to(BF16) for name, shape in SHAPES_7B.items()}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before, start, held = torch.cuda.memory_allocated(), time.perf_counter(), []
    chosen = fast.read_config(config).layer("mlp", BF16).weight
    for i in range(LAYERS):
        for name, (n, k) in SHAPES_7B.items():
            loader = fast.LinearLoader(fast.Linear.empty(n, k, chosen), f"{i}.{name}", online=True)
            loader.load(arriving[name])
            held.append(loader.finish())
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    size = LAYERS * sum(w.numel() * w.element_size() for w in arriving.values())
    return seconds, size, torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before


def online_rows(fast, device):
    rows = []
    for name, config in ONLINE.items():
        fast.quantize_(nn.ModuleList([plain_layer(device)]), config)  # compiles
        place = [in_place(fast, config, device) for _ in range(RUNS)]
        arrive = [as_it_arrives(fast, config, device) for _ in range(RUNS)]
        rates = [sorted(size / seconds / 1e9 for seconds, size, *_ in runs) for runs in (place, arrive)]
        row = {
            "format": name,
            "in_place": rates[0],
            "arrives": rates[1],
            "beyond": place[0][2],
            "peak": arrive[0][2],
            "model": arrive[0][3],
        }
        rows.append(row)
        bench.say(f"online {row}")
    return rows


class Decoder:
    """One decoder layer: linears as callables by name."""

    def __init__(self, linears, device):
        self.linears = linears
        self.norms = [torch.ones(HIDDEN, dtype=BF16, device=device) for _ in range(2)]
        self.keys, self.values = (torch.randn(1, KEYS, CONTEXT, HEAD, device=device).to(BF16) for _ in range(2))

    def steps(self, x):
        """The call of each kernel, the products first, with what it reads fixed: what a graph of its own times."""
        q, gate = (torch.randn(shape, device=x.device).to(BF16) for shape in ((1, HEADS, 1, HEAD), (1, SHAPES_8B["gate"][0])))
        products = [functools.partial(self.linears[of], torch.randn(1, k, device=x.device).to(BF16)) for of, (_, k) in SHAPES_8B.items()]
        norms = [functools.partial(self.norm, x, i) for i in range(2)]
        return [*products, *norms, lambda: self.attention(q), lambda: x + x, lambda: x + x, lambda: F.silu(gate), lambda: gate * gate]

    def norm(self, x, i):
        return F.rms_norm(x, (HIDDEN,), self.norms[i])

    def attention(self, q):
        return F.scaled_dot_product_attention(q, self.keys, self.values, enable_gqa=True)

    def __call__(self, x):
        of = self.linears
        h = self.norm(x, 0)
        q, _, _ = of["q"](h), of["k"](h), of["v"](h)  # the cache is full: keys and values of this token are not put into it
        x = x + of["o"](self.attention(q.view(1, HEADS, 1, HEAD)).view(1, -1))
        h = self.norm(x, 1)
        return x + of["down"](F.silu(of["gate"](h)) * of["up"](h))


def linears_of(fast, name, device):
    """The products of one layer, by name: quantized, or F.linear where there is no format."""
    found = {}
    for of, (n, k) in SHAPES_8B.items():
        w = torch.randn(n, k, device=device).mul_(0.02).to(BF16)
        if name is None:
            found[of] = functools.partial(F.linear, weight=w)
        else:
            found[of] = fast.Linear(fast.quantize(w, name)).prepare(BF16, m=1)
    return found


def decoder_row(fast, name, device):
    x = torch.randn(1, HIDDEN, device=device).to(BF16)
    number = bench.copies(sum(n * k for n, k in SHAPES_8B.values()) // 2)
    layers = [Decoder(linears_of(fast, name, device), device) for _ in range(number)]
    for layer in layers:
        layer(x)
    first, inputs = layers[0], {of: torch.randn(1, k, device=device).to(BF16) for of, (_, k) in SHAPES_8B.items()}
    seven = bench.host_cost(lambda: [first.linears[of](h) for of, h in inputs.items()], HOST_CALLS)
    whole = bench.host_cost(lambda: first(x), HOST_CALLS)
    graphs = {"layer": bench.capture([functools.partial(layer, x) for layer in layers])}
    steps = [layer.steps(x) for layer in layers]
    graphs |= {i: bench.capture([of[i] for of in steps]) for i in range(len(steps[0]))}
    us = bench.interleaved(graphs)
    return {
        "format": name or "bfloat16 (F.linear)",
        "host_linear": [t / len(SHAPES_8B) for t in seven],
        "host_layer": whole,
        "graph": us.pop("layer"),
        "kernels": sum(time[0] for time in us.values()),
        "linears": sum(us[i][0] for i in range(len(SHAPES_8B))),
    }


def report(document):
    """The tables, as Markdown."""
    head = (
        "weights to",
        "in place, GB/s of 16-bit weights (min to max)",
        "as they arrive",
        "peak as they arrive, GB",
        "quantized model, GB",
    )
    lines = [
        (row["format"], _spread(row["in_place"]), _spread(row["arrives"]), f"{row['peak'] / 1e9:.2f}", f"{row['model'] / 1e9:.2f}")
        for row in document["online"]
    ]
    text = bench.markdown(head, lines)
    head = (
        "weights",
        "host, us a linear (min to max)",
        "host, us the layer",
        "graph, us",
        "sum of its kernels, us",
        "of these its linears",
        "graph / sum",
    )
    lines = [
        (
            row["format"],
            *(f"{row[of][0]:.1f} ({row[of][1]:.1f} to {row[of][2]:.1f})" for of in ("host_linear", "host_layer", "graph")),
            f"{row['kernels']:.1f}",
            f"{row['linears']:.1f}",
            f"{row['graph'][0] / row['kernels']:.2f}",
        )
        for row in document["decoder"]
    ]
    return f"{text}\n\n{bench.markdown(head, lines)}"


def _spread(values):
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m conformance.bench_model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers there, too")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    fast, device = importlib.import_module("fast"), torch.device("cuda", torch.cuda.current_device())
    document = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
    document |= {"online": online_rows(fast, device), "decoder": []}
    for name in DECODER:
        document["decoder"].append(decoder_row(fast, name, device))
        bench.say(f"decoder {document['decoder'][-1]}")
    print(report(document))
    if args.json:
        with open(args.json, "w") as file:
            json.dump(document, file, indent=1)


if __name__ == "__main__":
    main()
