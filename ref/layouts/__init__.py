"""Checkpoints of every ecosystem as QTensors, exactly, and back: one module a layout.

>>> from ref import layouts
>>> for layer, q in layouts.open("path/to/checkpoint"):  # doctest: +SKIP
...     w = ref.dequantize(q)
>>> parts = layouts.gptq.write(q, checkpoint_format="gptq_v2")  # doctest: +SKIP

A layout is a module with
    FORMATS                    names of the formats that read yields, one a kind
    GROUP_INDEX                where there is one: those of them that may come with a group_index
    find(names, config)        {layer: {part: tensor name}} of the quantized layers among a checkpoint's tensor names
    options(config, layer)     what the quantization config says of a layer, or None where it leaves the layer as it is
    read(parts, options)       QTensor, from {part: tensor}
    write(q, ...)              {part: tensor}, the inverse of read
    config_of(q, ...)          the quantization config of a checkpoint whose layers are all like q
All are exact: nothing is ever quantized anew. A new layout is one such module, and one entry in LAYOUTS.
"""

from . import (
    auto_round,
    awq,
    bitnet,
    bitsandbytes,
    compressed_tensors,
    fp8,
    gguf,
    gptq,
    hqq,
    humming,
    marlin,
    modelopt,
    mxfp4,
    quark,
    torchao,
    vector,
)
from .checkpoint import Checkpoint, open_checkpoint

__all__ = ["LAYOUTS", "Checkpoint", "open"]

# quant_method, as a quantization config has it: the layout.
LAYOUTS = {
    "gptq": gptq,
    "awq": awq,
    **dict.fromkeys(auto_round.METHODS, auto_round),
    **dict.fromkeys(("compressed-tensors", "sparseml"), compressed_tensors),
    **dict.fromkeys(fp8.METHODS, fp8),
    **dict.fromkeys(modelopt.QUANT_METHODS, modelopt),
    "quark": quark,
    "mxfp4": mxfp4,
    "bitnet": bitnet,
    "bitsandbytes": bitsandbytes,
    "hqq": hqq,
    "torchao": torchao,
    "humming": humming,
    "marlin": marlin,
    "gguf": gguf,
    **dict.fromkeys(vector.METHODS, vector),
}


def open(path):
    """A checkpoint, whose quantized layers are read one at a time.

    A directory is read by its model.safetensors.index.json; without one by its model.safetensors; without that by all its
    .safetensors files. The quantization config is in config.json (quantization_config, also that of a text_config or llm_config;
    compression_config), or in hf_quant_config.json (modelopt), quantize_config.json (old GPTQ) or quant_config.json (old AWQ).
    A GGUF file says itself what its tensors are; of a file that was split, any shard opens all.

    Args:
        path: a directory of safetensors files, one .safetensors file with its config beside it, or a .gguf file.

    Returns:
        Checkpoint: iterate over it for (layer, QTensor), in natural order.

    Raises:
        OSError: there is no such file, or it cannot be read.
        ValueError: a file that is broken or pickled (nothing is ever unpickled), files that contradict each other, no quantization
            config, or, when a layer is read, tensors that do not agree with it; the message names file, layer and rule.
        NotImplementedError: a layout that is not here, or a kind of weight that no QTensor can hold.
    """
    return open_checkpoint(path, LAYOUTS)
