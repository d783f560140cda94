"""Formats whose codes stand for several weights at once: recognised, and refused with the reason.

A QTensor has one code of up to 8 bits for each weight, and one table that says what it means. So it cannot carry

- AQLM: `codes` (n / out_group, k / in_group, C) name vectors of out_group x in_group weights (8 as a rule) in `codebooks`
  (C, 2^nbits, out_group, in_group), which are added and scaled by row. Split into weights, a 1 x 16 codebook has 2^19 values; even
  C = 1 with 8 bits has another table for each of the in_group positions.
- VPTQ: `indices` of up to 16 bits name vectors along n in `centroids`, a second table of residuals is added, some columns have tables of
  their own, and columns are permuted, scaled (`weight_scale`) and shifted (`weight_bias`).
- QuIP# and QTIP: lattice vectors, and a trellis, under rotations from both sides with random signs.
- EXL3: a trellis: a weight is what a hash makes of 16 bits of a tile's bit stream, which overlap with its neighbours'; rotations from
  both sides, with signs and scales `suh` and `svh`.
- HIGGS: pairs of weights (p = 2) are one point of a grid, under a rotation of the padded rows, in a kernel's order.
- SpQR: integers whose scales are integers themselves, plus a sparse matrix of outliers.

EXL2's codes are scalar, but of 2 to 8 bits within one weight. With all codes widened to the largest width and its scales
((q_scale + 1)^2 * q_scale_max / 256, exact in float32) under a group_index a QTensor would carry it; a writer could not choose the
widths again, and there is no reader yet.

Source: aqlm 1.1.7 (utils.py), vptq 0.0.5.post1 (layers/vqlinear.py), transformers' HiggsConfig and SpQRConfig, the READMEs of
ExLlamaV2 and V3, QuIP# and QTIP.
"""

import difflib

FORMATS = ()

REASONS = {
    "aqlm": "a code is a vector of weights, and the vectors of several codebooks are added",
    "vptq": "a code is a vector of weights along n, plus a residual vector, in permuted columns",
    "quip": "a code is a vector of a lattice, under rotations from both sides",
    "quip_sharp": "a code is a vector of a lattice, under rotations from both sides",
    "qtip": "weights are read off a trellis, under rotations from both sides",
    "exl3": "weights are read off a trellis, under rotations from both sides",
    "higgs": "a code is a point of a grid in two dimensions, for two weights",
    "spqr": "a sparse matrix of outliers is added, and scales are quantized themselves",
    "exl2": "codes have from 2 to 8 bits within one weight; it would have to be widened, and there is no reader for it yet",
}
METHODS = tuple(REASONS)


def _refuse(config):
    method = config.get("quant_method") if isinstance(config, dict) else None
    if not isinstance(method, str) or method not in REASONS:
        nearest = difflib.get_close_matches(str(method), METHODS, n=1, cutoff=0.0)[0]
        raise ValueError(f"vector: quant_method is {method!r}, expected one of {', '.join(METHODS)}; the nearest is {nearest!r}")
    end = "" if method == "exl2" else "; a QTensor has one code of up to 8 bits for each weight, and one table of what they mean"
    raise NotImplementedError(f"{method}: {REASONS[method]}{end}")


def find(names, config):
    """Raises NotImplementedError: the reason."""
    _refuse(config)


def options(config, layer):
    """Raises NotImplementedError: the reason."""
    _refuse(config)


def read(parts, options):
    """Raises NotImplementedError."""
    raise NotImplementedError(f"vector: {', '.join(sorted(parts))[:200]}: no QTensor has codes for several weights at once")


def write(q, **options):
    """Raises ValueError: no QTensor has vectors."""
    raise ValueError(f"vector: cannot store {q.format}: expected codes that stand for several weights at once")


def config_of(q, **options):
    """Raises ValueError, as write."""
    write(q)
