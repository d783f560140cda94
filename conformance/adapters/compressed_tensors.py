"""compressed-tensors' decompressors, by its own registry: the dense weight in the dtype that the package chooses, mostly that of the scales.

Source: compressed-tensors 0.20.0, compressors/ and quantization/lifecycle/forward.py.
"""

import torch

from ref.layouts import compressed_tensors as layout

from . import need, package, plain, version_of, written

DISTRIBUTION = "compressed-tensors"
__version__ = version_of(DISTRIBUTION)

FORMATS = layout.FORMATS


def dequantize(q, dtype=torch.float64):
    compressors = package("compressed_tensors.compressors", DISTRIBUTION)
    plain(q, DISTRIBUTION)
    gk = q.format.group[1] if q.format.group[0] == 1 else 0
    need(len(q.shape) == 2 and (not gk or q.shape[1] % gk == 0), "compressed-tensors decompresses (n, k) in whole groups")
    parts = written(layout, q)
    config = layout.config_of(q)
    scheme = package("compressed_tensors.quantization", DISTRIBUTION).QuantizationScheme(**config["config_groups"]["group_0"])
    decompressor = compressors.BaseCompressor.get_value_from_registry(config["format"])
    w = decompressor.decompress(parts, scheme)["weight"]
    need(w.dtype == dtype, f"compressed-tensors decompresses {q.format} to {w.dtype}")
    return w
