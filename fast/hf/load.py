"""Quantized checkpoints straight into transformers' model classes."""

import os

import torch

from ref.layouts import open as open_checkpoint

NEEDED = "fast.hf needs transformers 5 or later: pip install transformers"


def load(path, dtype=None, device=None):
    """A model of transformers with the quantized layers of a checkpoint, as they are stored: nothing is dequantized, and nothing quantized anew.

    Layers are fast.Linear and fast.FusedExperts, read one after the other; no 16-bit copy of them ever exists. Their inputs are quantized to what
    the checkpoint's config says; experts take scales of their own in the place of stored ones.

    Args:
        path: a directory with config.json and the tensors, in any layout that ref.layouts reads.
        dtype: of all that is not quantized; None for that of config.json. device: where the model goes; None for the CPU.

    Returns:
        The model, for inference: no parameter requires a gradient.

    Raises:
        ImportError: transformers is not installed.
        OSError: there is no such directory, or it lacks a file.
        ValueError: tensors that are missing, left over or of another shape than the model's; the message names layer and tensor.
        NotImplementedError: a layout, a model class or a quantized module that there is nothing for. RuntimeError: no such device.

    >>> model = fast.load("path/to/checkpoint")  # doctest: +SKIP
    """
    try:
        import transformers
    except ImportError:
        raise ImportError(NEEDED) from None
    from .quantizer import FastConfig

    path = os.fspath(path)
    if not os.path.isdir(path):
        raise NotADirectoryError(f"load: {path}: there is no such directory; expected one with config.json and safetensors files")
    device = None if device is None else torch.device(device)
    open_checkpoint(path)  # what is wrong with its files is said before a model is built
    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    dtype = dtype or config.dtype or torch.bfloat16
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for key in ("quantization_config", "compression_config"):
            if hasattr(part, key):
                delattr(part, key)
    stored = FastConfig({})
    stored.stored, stored.device = True, device
    return model_class(config).from_pretrained(path, config=config, dtype=dtype, quantization_config=stored, local_files_only=True)


def model_class(config):
    """The class of transformers that a config.json names."""
    import transformers

    name = next(iter(config.architectures or ()), None)
    if name is None:
        return transformers.AutoModelForCausalLM
    found = getattr(transformers, name, None)
    if found is None:
        raise NotImplementedError(f"load: config.json names the class {name}, which transformers {transformers.__version__} does not have")
    return found
