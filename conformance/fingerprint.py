"""What a candidate's sums are made of, from its results alone: swamping vectors, as in FPRev.

A large number M at column 0 and -M at column j, and a small one, u, in all the others: M swallows every u that meets it before -M does. How
many are gone, for each j, tells in which order and in what blocks columns are added, and where a float32 sum takes over. How large M may be
before a single u beside it is gone tells the bits.

All of it is done with linear: weights int8 or e4m3 with scales of one, x as it is, or quantized to e4m3 with a scale of one. A call has one
probe in each row of x and row of the weight, and its results are on the diagonal.
"""

import math

import torch

from ref.element import decode, encode
from ref.format import parse_format
from ref.pack import pack
from ref.qtensor import QTensor
from ref.scale import encode_scale

from .accumulators import Block, accumulator_of, parse_accumulator
from .case import DTYPES

SHORT, LONG = 256, 1024
LANES = (2, 4, 8, 16, 32, 64)
# Formats of the weights to try, for each kind of x (accumulators.KINDS); and x's own.
WEIGHTS = {
    **dict.fromkeys(("fp32", "bf16", "fp16"), ("int8_tensor", "int8", "int8_g128", "fp8_e4m3_tensor", "fp8")),
    "float": ("fp8_e4m3_tensor", "fp8", "fp8_e4m3_g128", "fp8_e4m3_b128x128"),
}
INPUTS = {"float": ("fp8_e4m3_token", "fp8_e4m3_tensor", "fp8_e4m3_g128")}
# M and u as products (x, w): as far apart as the formats allow, for each kind.
LARGE = {"fp32": (2.0**40, 64.0), "bf16": (2.0**40, 64.0), "fp16": (2.0**15, 64.0), "float": (448.0, 448.0)}
SMALL = {"fp32": (2.0**-6, 1.0), "bf16": (2.0**-6, 1.0), "fp16": (2.0**-14, 1.0), "float": (2.0**-9, 2.0**-6)}
# How far _apart reaches.
WIDEST = {"fp32": 52, "bf16": 52, "fp16": 35, "float": 28}
# For sums of 16 bits, which have no room for those.
NEARER = {"fp32": (2.0**8, 64.0), "bf16": (2.0**8, 64.0), "fp16": (2.0**8, 64.0), "float": (448.0, 32.0)}


def probe(candidate, device="cpu", impl=None, kind="bf16", declared=None):
    """The fingerprint of a candidate's linear for one kind of x, a dict for JSON; None where it takes none of the calls.

    accumulator_bits: below the leading one of a running sum (float32: 23). kept_bits: below the largest magnitude within a block.
    block_length: products that are added at once. order: "ascending", "descending", "pairwise", "interleaved by N", "unknown".
    split_k: into how many parts 1024 columns are cut, promotion: after how many a float32 sum takes over (0: never).
    flushes_subnormals: of x. final_rounding: "nearest even", "nearest away", "toward zero", "down", "up", "unknown".
    matches_declaration: True, False, or None where nothing is declared. notes: sentences.

    Args:
        declared: what the candidate declares of its sums, as accumulators.parse_accumulator takes it.
    """
    prober = _Prober(candidate, torch.device(device), impl, kind)
    if not prober.works():
        return None
    found = {"kind": kind, "impl": impl, "weight": prober.weight, "x_format": prober.x_format, "notes": prober.notes}
    found["accumulator_bits"] = bits = min(prober.bits(SHORT - 1), prober.bits(SHORT - 1, mirrored=True))
    found |= {"kept_bits": None, "block_length": None, "order": "unknown", "split_k": None, "promotion": None}
    if bits < prober.widest:
        found |= _structure(prober, bits)
        if (found["block_length"] or 1) > 2:
            found["kept_bits"] = prober.bits(2)
    else:
        prober.notes.append(f"sums have at least {bits} bits below the leading one: no order shows")
    found["flushes_subnormals"] = prober.flushes()
    found["final_rounding"] = prober.rounding()
    found["matches_declaration"] = _matches(
        found, accumulator_of(parse_accumulator(declared), kind, prober.device.type, prober.weight), prober
    )
    return found


def probe_all(candidate, device="cpu", impls=(None,), declared=None):
    """{"impl kind": fingerprint} of all that the candidate takes; declared: a function of (impl) to an accumulator, or None."""
    found = {}
    for impl in impls:
        for kind in WEIGHTS:
            try:
                one = probe(candidate, device, impl, kind, None if declared is None else declared(impl))
            except Exception as error:
                one = {"kind": kind, "impl": impl, "notes": [f"the probe ended with {type(error).__name__}: {error}"]}
            if one is not None:
                found[f"{impl or 'linear'} {kind}"] = one
    return found


def _structure(prober, bits):
    """block_length, order, split_k and promotion, from what is gone for each j."""
    forward, backward = prober.gone(SHORT, bits, False), prober.gone(SHORT, bits, True)
    for order, gone in (("ascending", forward), ("descending", backward)):
        length, chunk = _chain(gone)
        if length is None:
            continue
        _, far = _chain(prober.gone(LONG, bits, order == "descending"), LONG // SHORT)
        promotion, split = (chunk or 0, 1) if far == chunk else (0, LONG // (far or LONG))
        if far != chunk and chunk is None:
            prober.notes.append(f"{SHORT} columns are one chain, {LONG} are cut every {far}: a split, or a promotion")
        return {"block_length": length, "order": order, "split_k": split, "promotion": promotion}
    if all(gone == 1 << max(j.bit_length(), 1) for j, gone in forward.items()):
        return {"block_length": 1, "order": "pairwise", "split_k": None, "promotion": None}
    for lanes in LANES:
        if all(forward[j] < forward[1] for j in (lanes, 2 * lanes)) and all(forward[j] >= forward[1] for j in range(1, lanes)):
            return {"block_length": 1, "order": f"interleaved by {lanes}", "split_k": None, "promotion": None}
    shown = ", ".join(f"{j}: {gone}" for j, gone in list(forward.items())[:12])
    prober.notes.append(f"the order is none that is known; products gone with M at 0 and -M at j, {shown}, ...")
    return {"block_length": None, "order": "unknown", "split_k": None, "promotion": None}


def _chain(gone, step=1):
    """(block length, chunk length or None) of a chain that loses so many products for each j, or (None, None): it is no such chain."""
    largest = max(gone) + 1
    for length in (1, 2, 4, 8, 16, 32, 64, 128):
        for chunk in (None, 32, 64, 128, 256, 512):
            if chunk is not None and (chunk % length or chunk >= largest):
                continue
            if all(_lost(j, length, chunk) // step == count // step for j, count in gone.items()):
                return length, chunk
    return None, None


def _lost(j, length, chunk):
    """Products up to the end of j's block, or of its chunk where that is not the first."""
    unit = length if chunk is None or j < chunk else chunk
    return (j // unit + 1) * unit


def _matches(found, declared, prober):
    if declared is None:
        return None
    wrong = []
    if isinstance(declared, Block):
        facts = {"accumulator_bits": declared.bits, "block_length": declared.length, "promotion": declared.promote}
        if declared.length > 2:
            facts["kept_bits"] = declared.kept
        if declared.order != "any":
            facts["order"] = declared.order
        wrong = [f"{name} is {found[name]}, declared {value}" for name, value in facts.items() if found[name] not in (None, value)]
        if found["accumulator_bits"] > declared.bits:
            # More than was declared; of the rest nothing is seen.
            wrong = []
    elif found["accumulator_bits"] < 23:
        wrong = [f"accumulator_bits is {found['accumulator_bits']}, declared ieee: 23"]
    elif (found["block_length"] or 1) > 1:
        wrong = [f"block_length is {found['block_length']}, declared ieee: 1"]
    prober.notes.extend(wrong)
    return not wrong


class _Prober:
    """Calls of linear whose x and weights are given as numbers."""

    def __init__(self, candidate, device, impl, kind):
        self.candidate, self.device, self.impl, self.kind = candidate, device, impl, kind
        self.dtype = DTYPES.get(kind, torch.bfloat16)
        self.weight = self.x_format = None
        self.notes = []
        self.widest = WIDEST[kind]

    def works(self):
        """Find formats that the candidate takes, and whether it computes with them."""
        x, w = torch.ones(16, SHORT, dtype=torch.float64), torch.ones(16, SHORT, dtype=torch.float64)
        x[:, 0] = LARGE[self.kind][0] if self.kind == "float" else 2.0
        for weight in WEIGHTS[self.kind]:
            for x_format in INPUTS.get(self.kind, (None,)):
                self.weight, self.x_format = weight, x_format
                try:
                    y = self(x, w)
                except NotImplementedError:
                    continue
                except Exception as error:
                    self.notes.append(f"{weight}: {type(error).__name__}: {error}")
                    continue
                if bool(((y - x.sum(1)).abs() <= 2.0**-6 * y.abs()).all()):
                    return True
        return False

    def __call__(self, x, w):
        """Row i of x times row i of w: float64."""
        rows = len(x)
        pad = -rows % 16
        x, w = (torch.cat((t, t[:1].expand(pad, -1))) for t in (x, w))
        q = _quantized(w, self.weight)
        q = QTensor(q.format, q.shape, q.packed.to(self.device), q.scale.to(self.device))
        kwargs = {} if self.x_format is None else {"x_format": self.x_format}
        if self.x_format == "fp8_e4m3_tensor":
            kwargs["x_scale"] = torch.ones(1, device=self.device)
        y = self.candidate.call("linear", (x.to(self.dtype).to(self.device), q), kwargs, self.impl)
        return y.detach().cpu().double().diagonal()[:rows]

    def _filled(self, rows, k, small):
        x, w = torch.zeros(rows, k, dtype=torch.float64), torch.full((rows, k), SMALL[self.kind][1], dtype=torch.float64)
        return x + (SMALL[self.kind][0] if small else 0.0), w

    def bits(self, last, mirrored=False):
        """The largest p such that u at column 1 is not gone beside 2^p u at column 0 and its negative at the last; 0 where not even p = 1 is.

        Where the two are summed in different steps that is what a running sum keeps, for one direction of k; in one block, what that keeps.
        """
        powers = list(range(1, self.widest + 1))
        x, w = self._filled(len(powers), SHORT, False)
        for row, p in enumerate(powers):
            large, small = _apart(p, self.kind)
            x[row, [0, last]], w[row, [0, last]] = torch.tensor([large[0], -large[0]], dtype=torch.float64), large[1]
            x[row, 1], w[row, 1] = small
        small = x[:, 1] * w[:, 1]
        kept = (self(*((x.flip(1), w.flip(1)) if mirrored else (x, w))) == small).tolist()
        return powers[kept.index(False)] - 1 if False in kept else self.widest

    def gone(self, k, bits, mirrored):
        """{j: how many of the k products are lost, M's own included}, M at column 0 (the last one if mirrored) and -M at j columns from it."""
        step = k // SHORT
        columns = list(range(1, k)) if step == 1 else sorted({*range(15, k, 16), *range(16, k, 16), *range(step, 40, step)})
        large = NEARER[self.kind] if bits <= 11 else LARGE[self.kind]
        x, w = self._filled(len(columns), k, False)
        # At most 256 products, so that 8 bits count them.
        small_x, small_w = SMALL[self.kind]
        x[:, step - 1 :: step] = small_x
        for row, j in enumerate(columns):
            x[row, 0], x[row, j] = large[0], -large[0]
            w[row, [0, j]] = large[1]
        found = {}
        for part in torch.arange(len(columns)).split(128):
            a, b = (t[part].flip(1) if mirrored else t[part] for t in (x, w))
            counts = self(a, b) / (small_x * small_w)
            for row, count in zip(part.tolist(), counts.tolist(), strict=True):
                found[columns[row]] = k - round(count) * step if step > 1 else k - round(count)
        return found

    def flushes(self):
        """Whether a subnormal x is taken for zero; None where this cannot be told."""
        tiny = {"fp32": 2.0**-140, "bf16": 2.0**-130, "fp16": 2.0**-20, "float": 2.0**-9}[self.kind]
        x, w = self._filled(16, SHORT, False)
        w[:] = 1.0
        if self.kind == "float":
            x[:, 0], w[:, 0] = LARGE["float"][0], 0.0
        x[:, 3] = tiny
        got = self(x, w)
        return False if bool((got == tiny).all()) else True if bool((got == 0).all()) else None

    def rounding(self):
        """How results are rounded, from sums of 1 and a part of an ulp."""
        ulp = torch.finfo(self.dtype).eps
        parts = [(0.25, 1), (0.5, 1), (0.75, 1), (1.5, 1), (0.25, -1), (0.75, -1)]
        x, w = self._filled(len(parts), SHORT, False)
        w[:] = 1.0
        for row, (part, sign) in enumerate(parts):
            if self.kind == "float":
                x[row, 0], w[row, 0] = LARGE["float"][0], 0.0
                x[row, 1], x[row, 2], w[row, 2] = sign, sign * part * ulp * 32, 2.0**-5
            else:
                x[row, 1], x[row, 2] = sign, sign * part * ulp
        units = [round((value - sign) / ulp, 3) for value, (_, sign) in zip(self(x, w).tolist(), parts, strict=True)]
        return ROUNDINGS.get(tuple(units), "unknown")


# By what comes of 1/4, 1/2, 3/4, 3/2 of an ulp above 1, and 1/4 and 3/4 of one below -1, in ulps.
ROUNDINGS = {
    (0, 0, 1, 2, 0, -1): "nearest even",
    (0, 1, 1, 2, 0, -1): "nearest away",
    (0, 0, 1, 1, 0, -1): "nearest, ties toward zero",
    (0, 0, 0, 1, 0, 0): "toward zero",
    (0, 0, 0, 1, -1, -1): "down",
    (1, 1, 1, 2, 0, 0): "up",
    (1, 1, 1, 2, -1, -1): "away from zero",
}


def _apart(p, kind):
    """M and u as (x, w), each times the other 2^p (or 1.75 times that), with x and w that the kind's formats hold."""
    if kind == "float":
        if p <= 14:
            return (448.0, 1.0), (2.0 ** (8 - p), 1.0)
        return (448.0, 2.0 ** max(p - 20, 0)), (2.0**-6, 2.0 ** max(14 - p, -6))
    small = SMALL[kind]
    exponent = math.frexp(small[0] * small[1])[1] - 1 + p
    top = math.frexp(LARGE[kind][0])[1] - 1
    return (2.0 ** min(exponent, top), 2.0 ** max(exponent - top, 0)), small


def _quantized(w, name):
    """The weight w (n, k) with all scales one.

    Raises:
        ValueError: the format has no such weights.
    """
    fmt = parse_format(name)
    codes = encode(w, fmt.element)
    if not torch.equal(decode(codes, fmt.element), w):
        raise ValueError(f"{name} has no codes for these weights")
    scale = encode_scale(torch.ones(fmt.scale_shape(w.shape), dtype=torch.float64), fmt.scale)
    return QTensor(fmt, tuple(w.shape), pack(codes, fmt.element.bits), scale)
