"""Quantizes a Hugging Face checkpoint, one tensor at a time: a directory of safetensors files with a config.json, 16 bits a weight.

Linear layers and stacks of experts are quantized; embeddings, norms, routers, the lm_head and what is ignored stay as they are. Called again, an
interrupted run goes on behind the last complete file.
"""

import contextlib
import resource
import signal
import sys
import time

import torch

from ref.layouts.checkpoint import located

from ..layers.config import read_config
from ..layers.inputs import input_of
from ..layers.weight import moved
from ..quantize import quantize
from . import arguments, output, plan
from .layout import IGNORE, MODULES
from .source import Source


def add_arguments(parser):
    parser.add_argument("source", metavar="IN", help="a directory with a config.json and safetensors files")
    parser.add_argument("out", metavar="OUT", help="a new or empty directory, or that of an interrupted run")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--format", type=arguments.format_name, metavar="FORMAT", help="of the weights, as int4_g128, fp8, mxfp4")
    how.add_argument(
        "--config", metavar="JSON", help="what quantize_ takes: JSON or the path of a JSON file, with its ignore lists and overrides"
    )
    parser.add_argument(
        "--ignore",
        type=arguments.pattern,
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave layers alone that have this in their name, or re:...",
    )
    parser.add_argument(
        "--layout",
        type=lambda text: arguments.one_of(IGNORE)(text.replace("-", "_")),
        default="humming",
        help=f"{', '.join(IGNORE)} (default: humming)",
    )
    parser.add_argument(
        "--device", type=arguments.device, default=torch.device("cpu"), help="where it is computed: cpu, cuda, cuda:1 (default: cpu)"
    )
    parser.add_argument(
        "--shard-size", type=arguments.size, default=4 * 2**30, metavar="SIZE", help="of each file at most, as 500MB (default: 4GiB)"
    )
    parser.add_argument("--force-requant", action="store_true", help="take a checkpoint that is quantized already, and dequantize it first")


def run(args):
    """The command; returns its exit code."""
    try:
        config = None if args.config is None else read_config(args.config)
        source = Source(args.source, args.force_requant or (config is not None and config.force_requant))
        choose = _chooser(args.format, config)
        made = plan.make(source, choose, args.ignore, args.layout, args.shard_size)
        out = output.Output(args.out, _state(args, config, source, made))
    except (ValueError, NotImplementedError, OSError) as error:
        return arguments.fail("quantize", error, 2)
    print(f"{source.folder}: {', '.join(f'{count} layers in {name}' for name, count in plan.formats(made.items).items())}")
    first = next(item for item in made.items if item.format is not None)
    if x_format := input_of(args.layout, made.config, first.layer)[0]:
        print(f"--layout {args.layout} means inputs that are quantized, too: to {x_format}")
    print("left as they are:", *plan.left_alone(made.items) or ["nothing"], sep="\n  ", flush=True)
    try:
        with contextlib.closing(out), interrupts() as stop_if_interrupted:
            lines = write(source, made, out, args.device, stop_if_interrupted)
    except KeyboardInterrupt:
        return arguments.fail("quantize", "interrupted; the same command goes on from here", 130)
    except OSError as error:
        return arguments.fail("quantize", output.explain(error, args.out), 1)
    except (ValueError, NotImplementedError) as error:
        return arguments.fail("quantize", error, 1)
    print(*lines, sep="\n")
    return 0


@contextlib.contextmanager
def interrupts():
    """A function that raises KeyboardInterrupt where one has come: in the middle of a library in C it would be taken for another error."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: None
        return
    came = []

    def note(number, frame):
        came.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one counts at once

    def stop_if_interrupted():
        if came:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield stop_if_interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def write(source, made, out, device, stop_if_interrupted):
    """Write every file of a plan that is not there yet. Returns lines of text: what it took."""
    from tqdm import tqdm

    start, done = time.perf_counter(), 0
    with tqdm(total=sum(item.nbytes for item in made.items), unit="B", unit_scale=True, disable=None) as bar:
        for file, items in made.files().items():
            if out.has(file):
                bar.update(sum(item.nbytes for item in items))
                continue
            tensors = {}
            for item in items:
                tensors |= converted(source, item, made, device)
                bar.update(item.nbytes)
                stop_if_interrupted()
            out.write(file, lambda path: output.save_tensors(tensors, path))
            done += sum(item.nbytes for item in items)
    left = out.finish(source.folder, source.config | {"quantization_config": made.config}, list(made.files()))
    seconds = time.perf_counter() - start
    peak = f", {torch.cuda.max_memory_allocated(device) / 2**20:.0f} MiB on {device}" if device.type == "cuda" else ""
    return [
        *([f"not copied: {', '.join(left)}"] if left else []),
        f"{out.folder}: {len(made.shards)} files, {done / 1e9:.2f} GB read in {seconds:.1f} s, {done / 1e9 / seconds:.2f} GB/s",
        f"peak memory: {resident() / 2**20:.0f} MiB resident{peak}",
    ]


def converted(source, item, made, device):
    """The tensors, on the CPU, that one of the source becomes: {name: tensor}."""
    w = source.load(item.tensor)
    if item.format is None:
        dtype = source.entries[item.tensor].dtype
        return {item.tensor: (w.to(dtype) if isinstance(dtype, torch.dtype) else w).contiguous()}
    w = w.to(device)
    if w.dim() == 3 and source.transposed:
        w = w.transpose(-1, -2)
    with located(item.tensor):
        q = moved(quantize(w, item.format), "cpu")
        parts = MODULES[made.layout].write(q)
    return {f"{item.layer}{made.separator}{part}": tensor.contiguous() for part, tensor in parts.items()}


def resident():
    """Bytes of memory that this process has had at its peak."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _chooser(fmt, config):
    """(layer, dtype) to Format or None."""
    if config is None:
        return lambda layer, dtype: fmt
    config.check_online("--config")

    def choose(layer, dtype):
        chosen = config.layer(layer, dtype)
        return None if chosen is None else chosen.weight

    return choose


def _state(args, config, source, made):
    """All that the result depends on."""
    return {
        "source": source.folder,
        "source's files": source.files(),
        "format": None if args.format is None else str(args.format),
        "config": None if config is None else config.weight,
        "ignore": args.ignore,
        "layout": args.layout,
        "shard_size": args.shard_size,
        "device": args.device.type,
        "plan": {file: [item.tensor for item in items] for file, items in made.files().items()},
    }
