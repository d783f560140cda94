"""Speed of experts on a CUDA GPU: fast.fused_experts beside its own products and raw Humming's: python -m conformance.bench_moe.

A cell is a CUDA graph of ROUTES launches, each with its own routing of the same tokens, so that a weight is read again only after those of
many others: at m = 1 the routes have no expert in common, and from m = 16 on a launch alone reads several times the L2 cache. The result of each
peer is checked first, on a sample of tokens, against the bound of conformance's fused_experts. Then the graphs take turns, as in
conformance.bench. Progress goes to stderr, Markdown to stdout. Exit status: 0, 1 if fast failed, 2 without a GPU.
"""

import argparse
import importlib
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ref import Int, QTensor, parse_format
from ref.format import SCALE_DTYPES

from . import bench
from .bench import BF16, say
from .candidate import load, nearest
from .case import DTYPES
from .experts_case import ExpertsCase
from .moe_case import Route
from .ops.experts_data import ExpertsData
from .ops.fused_experts import Truth
from .oracle import Disagreement


@dataclass(frozen=True)
class Model:
    """Shapes of one layer. h: columns of x. i: rows of each of gate and up, on this rank. biased: both products have biases, bf16."""

    experts: int
    top_k: int
    h: int
    i: int
    format: str = "int4_g128_bf16"
    activation: str = "silu"
    biased: bool = False

    @property
    def shapes(self):
        return (self.experts, 2 * self.i, self.h), (self.experts, self.h, self.i)


MODELS = {
    "Qwen3-30B-A3B": Model(128, 8, 2048, 768),
    "GPT-OSS-120B": Model(128, 4, 2880, 2880, "mxfp4", "swigluoai", biased=True),
    "DeepSeek-V3 TP8": Model(256, 8, 7168, 256),
}
ROWS, ROUTINGS, ROUTES, SAMPLE = (1, 16, 64, 256, 1024, 4096), ("uniform", "zipf"), 16, 6
# moe_fused_mul_sum: tokens, slots and columns, and how many ranks share the experts where there is a map.
SUM_ROWS, SUM_SLOTS, SUM_COLUMNS, RANKS = (1, 16, 64, 256, 1024, 4096), 8, 7168, 4
LAYER, AGAIN, TRITON, HUMMING = "layer", "layer again", "layer, triton", "layer, humming"
PRODUCTS, RAW = "our products", "Humming's products"
SUM, MAPPED, COMPILED = "fast", "fast, with a map", "torch.compile"


def draw_ids(model, m, routing, seed, device):
    """int32 (m, top_k), distinct in a row: the same at every call. Where m is 1, other seeds have other experts."""
    if m == 1:
        order = torch.randperm(model.experts, generator=torch.Generator().manual_seed(0))
        return order.roll(-seed * model.top_k)[None, : model.top_k].to(device, torch.int32)
    random = torch.Generator().manual_seed(seed)
    worth = torch.ones(model.experts) if routing == "uniform" else 1 / torch.arange(1.0, model.experts + 1)
    # One order of the experts for all routes: the busy ones stay busy.
    ids = torch.multinomial(worth.expand(m, -1), model.top_k, generator=random)
    names = torch.randperm(model.experts, generator=torch.Generator().manual_seed(0))
    return names[ids].to(device, torch.int32)


def draw_weights(model, device):
    """w13 and w2 of random codes, QTensors whose products are about as large as their inputs."""
    found, fmt = [], parse_format(model.format)
    random = {"device": device, "generator": torch.Generator(device).manual_seed(model.h)}
    for shape in model.shapes:
        packed = torch.randint(-(2**31), 2**31 - 1, (*shape[:2], shape[2] * fmt.element.bits // 32), dtype=torch.int32, **random)
        size = 0.5 / shape[2] ** 0.5 / (4 if isinstance(fmt.element, Int) else 2)
        scale = size * (0.5 + torch.rand(fmt.scale_shape(shape), **random))
        if fmt.scale == "e8m0":
            scale = (torch.log2(scale).round() + 127).to(torch.uint8)
        found.append(QTensor(fmt, shape, packed, scale.to(SCALE_DTYPES[fmt.scale]) if scale.is_floating_point() else scale))
    return found


def draw_biases(model, device):
    """(experts, n) of both products, bf16, or two times None."""
    random = torch.Generator(device).manual_seed(model.i)
    return [torch.randn(e, n, device=device, generator=random).to(BF16) if model.biased else None for e, n, _ in model.shapes]


def draw_router(m, top_k, device):
    """Weights (m, top_k), float32, that add up to one."""
    return torch.randn(m, top_k, device=device, generator=torch.Generator(device).manual_seed(m)).softmax(1)


def floor_us(model, m, active, bandwidth, peak):
    """The least time, in microseconds: the active experts' weights, x and y moved once; or all operations."""
    moved = active * expert_bytes(model) + 4 * m * model.h
    return max(moved / bandwidth, 6 * m * model.top_k * model.h * model.i / peak) * 1e6


def expert_bytes(model):
    """Bytes of one expert's weights, with their scales."""
    fmt, bytes_of_all = parse_format(model.format), 0
    for _, n, k in model.shapes:
        groups = torch.Size(fmt.scale_shape((n, k))).numel()
        bytes_of_all += n * k * fmt.element.bits // 8 + groups * (1 if fmt.scale == "e8m0" else 2)
    return bytes_of_all


def judge_of(model, weights, biases, x, router, ids):
    """A function of y (m, h): what is wrong with a sample of its tokens, as a sentence, or None."""
    rows = torch.linspace(0, len(x) - 1, min(len(x), SAMPLE), dtype=torch.float64).long().unique().to(x.device)
    route = Route(len(rows), model.top_k, model.experts)
    (dtype,) = (name for name, known in DTYPES.items() if known == x.dtype)
    case = ExpertsCase(route, model.h, model.i, model.h, model.format, activation=model.activation, dtype=dtype, data="normal")
    data = ExpertsData(case, x[rows], *weights, *biases, router[rows], False)
    data.ids, data.local, data.live = ids[rows], ids[rows].long(), torch.ones_like(ids[rows], dtype=torch.bool)
    truth = Truth(data, x.device)

    def judge(y):
        try:
            truth.check(y[rows])
        except Disagreement as disagreement:
            return str(disagreement)

    return judge


class Layer:
    """One model's weights as every peer has them, and the launches of each peer, one a route."""

    def __init__(self, fast, name, device):
        self.fast, self.name, self.model, self.device = fast, name, MODELS[name], device
        self.weights, self.biases = draw_weights(self.model, device), draw_biases(self.model, device)
        # By name: conformance depends on no candidate and on no kernel library.
        self.experts, self.stacks = (importlib.import_module(f"{fast.__name__}.moe.{part}") for part in ("experts", "stack"))
        self.held = [self.stacks.remember(w) for w in self.weights]

    def plan(self, stack):
        """A weight in Humming's layout, without its bias; compiles at the first call."""
        return stack.plan("bench", BF16, None, "humming", True, None, None, 64)

    def humming(self):
        return [self.plan(stack) for stack in self.held]

    def default(self, plan, rows):
        """(kernel, rows of a block) as Humming's own table chooses it for so many slots; compiles at the first call."""
        tune, kernels = (importlib.import_module(f"humming.{name}") for name in ("tune", "kernel.humming"))
        tuning = dict(tune.get_heuristics_config(plan.config, shape_m=rows, gemm_type="indexed", device=self.device))
        options = json.dumps({"gemm_type": "indexed"}), json.dumps(tuning)
        return kernels.HummingKernel.prepare_kernels(plan.config.to_str(), *options, self.device), tuning["block_shape"][0]

    def calls(self, peer, cell):
        """What a graph is made of."""
        if peer in (LAYER, AGAIN, TRITON, HUMMING):
            impl = {TRITON: "triton", HUMMING: "humming"}.get(peer)
            return [lambda ids=ids: self.layer(cell, ids, impl) for ids in cell.ids]
        products = self.ours(cell) if peer == PRODUCTS else self.raw(cell)
        return [lambda run=run: (run[0](), run[1]()) for run in products]

    def layer(self, cell, ids, impl=None):
        given = {"activation": self.model.activation, "impl": impl, "out": cell.y} | self.given()
        return self.fast.fused_experts(cell.x, *self.held, cell.router, ids, **given)

    def given(self):
        return {"bias13": self.biases[0], "bias2": self.biases[1]}

    def ours(self, cell):
        """For each route: its two products alone, the blocks made beforehand."""
        kind, slots = (BF16, None, None, True), cell.x.shape[0] * self.model.top_k
        block, plans = self.experts.plans_for(*self.held, kind, self.biases, slots, self.model.experts)
        return [self._pair(plans, cell, blocks, block) for blocks in cell.blocks(block)]

    def _pair(self, plans, cell, blocks, block):
        ids, owners, end = blocks
        given = {"sorted_token_ids": ids, "expert_ids": owners, "num_tokens_post_padded": end, "block_size": block}
        told = [{"trusted": True} if hasattr(plan, "block_sizes") else {} for plan in plans]
        return (
            lambda: plans[0].run(cell.x, self.biases[0], None, cell.gate_up, top_k=self.model.top_k, **given, **told[0]),
            lambda: plans[1].run(cell.hidden, self.biases[1], None, cell.down, top_k=1, **given, **told[1]),
        )

    def raw(self, cell):
        """The same by Humming as its table has it, launched with nothing in between."""
        slots = cell.x.shape[0] * self.model.top_k
        plans = self.humming()
        kernels = [self.default(plan, slots) for plan in plans]
        made = [cell.blocks(block) for _, block in kernels]
        operands = ((cell.x, cell.gate_up, self.model.top_k), (cell.hidden, cell.down, 1))

        def launch(which, blocks):
            (a, y, top_k), plan, t = operands[which], plans[which], plans[which].tensors
            plan.launch(
                kernels[which][0], a, t["weight"], t["weight_scale"], t.get("weight_scale_2"), None, None, t.get("zero_point"), None, y,
                *blocks, None, cell.locks, top_k, 0, False,
            )  # fmt: skip

        return [(lambda a=a: launch(0, a), lambda b=b: launch(1, b)) for a, b in zip(*made, strict=True)]

    def result(self, peer, cell):
        """The layer's result for the first route; of products alone, with fast's activation and sum around them."""
        if peer in (LAYER, AGAIN, TRITON, HUMMING):
            self.calls(peer, cell)[0]()
            return cell.y
        first, second = (self.ours(cell) if peer == PRODUCTS else self.raw(cell))[0]
        first()
        self.fast.moe_activation(cell.gate_up, self.model.activation, out=cell.hidden)
        second()
        m, t = cell.ids[0].shape
        return self.fast.moe_fused_mul_sum(cell.down.view(m, t, -1), cell.router, cell.ids[0])


class Cell:
    """The tensors of one number of tokens and one way of routing."""

    def __init__(self, layer, m, routing):
        model, device, t = layer.model, layer.device, layer.model.top_k
        self.layer, self.made = layer, {}
        self.ids = [draw_ids(model, m, routing, seed, device) for seed in range(ROUTES)]
        self.x, self.router = bench.draw_x(m, model.h, device), draw_router(m, t, device)
        self.y = self.x.new_empty(m, model.h)
        self.gate_up, self.down = self.x.new_empty(m * t, 2 * model.i), self.x.new_empty(m * t, model.h)
        self.hidden = bench.draw_x(m * t, model.i, device)
        self.locks = torch.zeros(4096, dtype=torch.int32, device=device)
        self.active = sum(len(ids.unique()) for ids in self.ids) / ROUTES

    def blocks(self, size):
        if size not in self.made:
            align = self.layer.fast.moe_align_block_size
            self.made[size] = [align(ids, size, self.layer.model.experts) for ids in self.ids]
        return self.made[size]


def measure(layer, m, routing, peers, bandwidth, peak):
    """One cell: all peers checked, then timed."""
    cell = Cell(layer, m, routing)
    floor = floor_us(layer.model, m, cell.active, bandwidth, peak)
    found = {
        "model": layer.name,
        "m": m,
        "routing": routing,
        "active": cell.active,
        "floor_us": round(floor, 3),
        "outside": {},
        "errors": {},
    }
    judge, graphs = judge_of(layer.model, layer.weights, layer.biases, cell.x, cell.router, cell.ids[0]), {}
    for peer in peers:
        try:
            cell.y.fill_(float("nan"))
            # Humming's own products come without the bias that their layer has.
            wrong = None if peer == AGAIN or (peer == RAW and layer.model.biased) else judge(layer.result(peer, cell))
            captured = bench.capture(layer.calls(peer, cell)) if wrong is None or peer == RAW else None
        except Exception as error:
            found["errors"][peer] = f"{type(error).__name__}: {error}"[:500]
            continue
        found["outside"] |= {} if wrong is None else {peer: wrong}
        graphs |= {} if captured is None else {peer: captured}
    found["us"] = bench.interleaved(graphs)
    times = [f"{name} {us[0]:.1f} ({us[1]:.1f}..{us[2]:.1f})" for name, us in found["us"].items()]
    say(f"{layer.name} m={m} {routing}, {cell.active:.0f} experts: {', '.join(times)}; floor {floor:.1f}")
    for name, text in (*found["outside"].items(), *found["errors"].items()):
        say(f"    {name}: {text}")
    return found


def measure_sum(fast, m, device, bandwidth):
    """One size of moe_fused_mul_sum: (m, SUM_SLOTS, SUM_COLUMNS), bf16."""
    t, k, e = SUM_SLOTS, SUM_COLUMNS, 8 * RANKS
    size = m * t * k * 2
    random = torch.Generator(device).manual_seed(m)
    inputs = [torch.randn(m, t, k, device=device, generator=random).to(BF16) for _ in range(bench.copies(size))]
    weights, y = draw_router(m, t, device), torch.empty(m, k, dtype=BF16, device=device)
    ids = draw_ids(Model(e, t, k, 1), max(m, 2), "uniform", 0, device)[:m]
    here = fast.expert_map(e, RANKS, 0, device=device)
    local = here[ids.long()] >= 0
    plain = torch.compile(lambda x, w: (x.float() * w[..., None]).sum(1).to(BF16), dynamic=False)
    kinds = {
        SUM: lambda x: fast.moe_fused_mul_sum(x, weights, out=y),
        MAPPED: lambda x: fast.moe_fused_mul_sum(x, weights, ids, here, out=y),
        COMPILED: lambda x: plain(x, weights),
    }
    exact = (inputs[0].double() * weights.double()[..., None]).sum(1)
    wanted = {SUM: exact, COMPILED: exact, MAPPED: (inputs[0].double() * (weights.double() * local)[..., None]).sum(1)}
    room = (inputs[0].double().abs() * weights.double()[..., None]).sum(1) * (2.0**-8 + t * 2.0**-24)
    found, graphs = {"m": m, "errors": {}}, {}
    for name, call in kinds.items():
        try:
            wrong = (call(inputs[0]).double() - wanted[name]).abs() > room
            if bool(wrong.any()):
                raise ValueError(f"{int(wrong.sum())} of {wrong.numel()} results are wrong")
            graphs[name] = bench.capture([lambda x=x, call=call: call(x) for x in inputs])
        except Exception as error:
            found["errors"][name] = f"{type(error).__name__}: {error}"[:500]
    found["us"] = bench.interleaved(graphs)
    read = {name: size for name in (SUM, COMPILED)} | {MAPPED: int(local.sum()) * k * 2}
    found["bytes"] = {name: size + 2 * m * k for name, size in read.items()}
    found["floor_us"] = round((size + 2 * m * k) / bandwidth * 1e6, 3)
    say(f"moe_fused_mul_sum m={m}: " + ", ".join(f"{name} {us[0]:.2f}" for name, us in found["us"].items()) + f"; {found['errors'] or ''}")
    return found


def compile_ahead(layers, rows, peers):
    """Compile what will be asked for, in as many threads as there are processors; an error comes again where it matters."""
    device = layers[0].device

    def attempt(job):
        try:
            job()
        except Exception as error:
            return f"{type(error).__name__}: {error}"[:300]

    def warm(layer, m, peer):
        ids = draw_ids(layer.model, m, "uniform", 0, layer.device)
        x = bench.draw_x(m, layer.model.h, layer.device)
        impl = {TRITON: "triton", HUMMING: "humming"}.get(peer)
        layer.fast.fused_experts(
            x,
            *layer.held,
            draw_router(m, layer.model.top_k, layer.device),
            ids,
            activation=layer.model.activation,
            impl=impl,
            **layer.given(),
        )

    with ThreadPoolExecutor(os.cpu_count(), initializer=torch.cuda.set_device, initargs=(device,)) as pool:
        first = [pool.submit(attempt, lambda stack=stack, a=layer: a.plan(stack)) for layer in layers for stack in layer.held]
        # Triton's kernels meanwhile, for as few tokens as they are the choice for.
        few = [(layer, m) for layer in layers for m in rows if m <= 64 or TRITON in peers]
        first += [pool.submit(attempt, lambda a=a, m=m: warm(a, m, TRITON)) for a, m in few]
        errors = [job.result() for job in first]
        second = [
            pool.submit(attempt, lambda a=layer, m=m, p=p: warm(a, m, p))
            for layer in layers
            for m in rows
            for p in peers
            if p in (LAYER, HUMMING)
        ]
        if RAW in peers:
            jobs = [(layer, which, m) for layer in layers for which in (0, 1) for m in rows]
            second += [
                pool.submit(attempt, lambda a=a, which=which, m=m: a.default(a.humming()[which], m * a.model.top_k)) for a, which, m in jobs
            ]
        errors += [job.result() for job in second]
    errors = [error for error in errors if error is not None]
    say(f"compiled, {len(errors)} of {len(first) + len(second)} jobs failed" + "".join(f"\n    {error}" for error in errors[:6]))


def run(names, rows, routings, peers):
    """Everything measured, as a value for JSON."""
    device, fast = torch.device("cuda", torch.cuda.current_device()), load("fast").target
    document = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__, "cells": []}
    document["bandwidth"], document["peak"] = bench.ceilings(device)
    say(str(document))
    layers = [Layer(fast, name, device) for name in names]
    compile_ahead(layers, rows, peers)
    document["sums"] = [measure_sum(fast, m, device, document["bandwidth"]) for m in SUM_ROWS]
    for layer in layers:
        for m in rows:
            # One token has no favourites.
            for routing in routings if m > 1 else routings[:1]:
                document["cells"].append(measure(layer, m, routing, peers, document["bandwidth"], document["peak"]))
    return document | {"seconds": round(time.perf_counter() - bench.START, 1)}


def report(document):
    """The document as Markdown."""
    peers = list(dict.fromkeys(name for cell in document["cells"] for name in cell["us"] if name != AGAIN))
    rows = []
    for cell in document["cells"]:
        us, floor = cell["us"], cell["floor_us"]
        times = [f"{us[name][0]:.1f}" + "\\*" * (name in cell["outside"]) if name in us else "-" for name in peers]
        spread = f"{us[LAYER][1]:.1f} to {us[LAYER][2]:.1f}" if LAYER in us else "-"
        share = f"{100 * floor / us[LAYER][0]:.0f} %" if LAYER in us else "-"
        ratios = [f"{us[LAYER][0] / us[name][0]:.2f}" if LAYER in us and name in us else "-" for name in (PRODUCTS, RAW)]
        rows.append((cell["model"], cell["m"], cell["routing"], f"{cell['active']:.0f}", *times, spread, f"{floor:.1f}", share, *ratios))
    head = (
        "model",
        "m",
        "routing",
        "active experts",
        *(f"{name}, us" for name in peers),
        "layer, least to most",
        "floor, us",
        "share of floor",
    )
    parts = [
        f"{document['device']}, torch {document['torch']}. Floors: {document['bandwidth'] / 1e12:.2f} TB/s (a copy) and"
        f" {document['peak'] / 1e12:.0f} TFLOP/s (cuBLAS bf16), both measured in this run, which took {document['seconds']:.0f} s.",
        bench.markdown((*head, "layer / our products", "layer / Humming's"), rows),
    ]
    noise = [abs(c["us"][AGAIN][0] / c["us"][LAYER][0] - 1) for c in document["cells"] if AGAIN in c["us"] and LAYER in c["us"]]
    if noise:
        parts.append(f"The noise: the two times of the layer in a cell differ by at most {100 * max(noise):.1f} %.")
    if any(cell["outside"] for cell in document["cells"]):
        parts.append("\\* Outside the bound that `fast` is held to: partial sums were rounded on the way.")
    columns = (SUM, COMPILED, MAPPED)
    lines = []
    for cell in document["sums"]:
        us = cell["us"]
        times = [f"{us[name][0]:.2f} ({us[name][1]:.2f} to {us[name][2]:.2f})" if name in us else "-" for name in columns]
        speeds = [f"{cell['bytes'][name] / us[name][0] / 1e6:.2f}" if name in us else "-" for name in (SUM, MAPPED)]
        lines.append((f"{cell['m']} x {SUM_SLOTS} x {SUM_COLUMNS}", *times, *speeds))
    head = ("moe_fused_mul_sum, bf16", *(f"{name}, us" for name in columns), "TB/s", f"TB/s of the rows of one of {RANKS} ranks")
    return "\n\n".join([*parts, bench.markdown(head, lines)])


def main(argv=None):
    """Run the benchmark; 0, 1 if fast failed in a cell, 2 without a GPU or for bad usage."""
    parser = argparse.ArgumentParser(prog="python -m conformance.bench_moe", description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS), help=f"comma-separated; default: {','.join(MODELS)}")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)), help="numbers of tokens, comma-separated")
    parser.add_argument("--all", action="store_true", help="the layer by each implementation, too")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there, too")
    args = parser.parse_args(argv)
    names = args.models.split(",")
    if unknown := [name for name in names if name not in MODELS]:
        parser.error(f"unknown model {unknown[0]!r}, expected {', '.join(MODELS)}{nearest(unknown[0], MODELS)}")
    if not all(number.isdigit() and int(number) for number in args.rows.split(",")):
        parser.error(f"--rows is {args.rows!r}, expected numbers of tokens")
    if args.json and not os.path.isdir(os.path.dirname(os.path.abspath(args.json))):
        parser.error(f"--json: there is no folder {os.path.dirname(args.json)!r}")
    if not torch.cuda.is_available():
        print("bench_moe: times are measured on a CUDA GPU, and there is none here", file=sys.stderr)
        return 2
    # Before any thread imports Triton: torch's compiler looks for it as a whole.
    importlib.import_module("triton.backends.compiler")
    importlib.import_module("torch._inductor")
    peers = (LAYER, *((TRITON, HUMMING) if args.all else ()), PRODUCTS, RAW, AGAIN)
    document = run(names, [int(number) for number in args.rows.split(",")], ROUTINGS, peers)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(document, file, indent=1)
    print(report(document))
    failed = any(name in cell["outside"] or name in cell["errors"] for cell in document["cells"] for name in (LAYER, PRODUCTS))
    return int(failed or any(cell["errors"] for cell in document["sums"]))


if __name__ == "__main__":
    sys.exit(main())
