"""A checkpoint as the 16-bit tensors that it holds or, where it is quantized already, stands for; each read when it is asked for."""

import os
from dataclasses import dataclass

import torch

from ref.layouts import open as open_checkpoint
from ref.layouts.checkpoint import CONFIG_FILES, QUANTIZATION, directory, header, located, read_json

from ..eager import dequantize

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
# Those that store their stacks of experts as x @ w takes them, (e, k, n).
TRANSPOSED = ("gpt_oss", "llama4", "llama4_text", "qwen3_vl_moe", "openai_privacy_filter")
REQUANT = "--force-requant (or force_requant in --config) dequantizes it first"


@dataclass(frozen=True)
class Entry:
    """One tensor. dtype: torch's where it is a float of 16 or 32 bits, else its name in the file. layer: whom to dequantize, or None."""

    dtype: torch.dtype | str
    shape: tuple
    nbytes: int
    layer: str | None = None


class Source:
    """A directory of safetensors files with a config.json.

    folder: its real path. config: config.json without any quantization config. entries: {tensor: Entry}.
    transposed: its stacks of experts are (e, k, n).
    """

    def __init__(self, folder, force_requant=False):
        """
        Raises:
            OSError, ValueError, NotImplementedError: files that lack, are broken or contradict each other; a checkpoint that is quantized
                already, unless force_requant.
        """
        if not os.path.isdir(folder):
            raise FileNotFoundError(f"{folder}: there is no such directory; expected one of safetensors files with a config.json")
        self.folder = os.path.realpath(folder)
        path = os.path.join(folder, "config.json")
        if not os.path.exists(path):
            raise FileNotFoundError(f"{path}: there is no such file; expected a Hugging Face checkpoint, which has one")
        with located(path):
            config = read_json(path)
        self.config = _plain(config)
        self.transposed = self.config.get("model_type") in TRANSPOSED
        quantized = self.config != config or any(os.path.exists(os.path.join(folder, file)) for file in CONFIG_FILES)
        if quantized and not force_requant:
            raise ValueError(f"{folder}: is quantized already; {REQUANT}")
        self._tensors = directory(folder)
        self._checkpoint = open_checkpoint(folder) if quantized else None
        self.entries = self._entries()

    def _entries(self):
        kept = None if self._checkpoint is None else set(self._checkpoint.plain)
        found = {}
        for path in sorted(set(self._tensors.file.values())):
            for name, entry in header(path)[0].items():
                if kept is None or name in kept:
                    dtype = FLOATS.get(entry["dtype"], entry["dtype"])
                    found[name] = Entry(dtype, tuple(entry["shape"]), self._tensors.nbytes[name])
        for layer in self._checkpoint.layers if self._checkpoint is not None else ():
            shape = tuple(self._checkpoint[layer].shape)
            shape = shape if len(shape) == 2 or not self.transposed else (shape[0], shape[2], shape[1])
            stack = len(shape) == 3 and layer.endswith("_proj")
            found[layer if stack else f"{layer}.weight"] = Entry(self._dtype(), shape, self._checkpoint.nbytes(layer), layer)
        return found

    def _dtype(self):
        """What the model computes in."""
        text = next((c[key] for c in (self.config, *_parts(self.config)) for key in ("dtype", "torch_dtype") if key in c), None)
        return {"float16": torch.float16, "float32": torch.float32}.get(text, torch.bfloat16)

    def load(self, name):
        """A tensor; one that is dequantized in float32."""
        layer = self.entries[name].layer
        if layer is None:
            with located(self._tensors.file[name]):
                return self._tensors.load(name)
        w = dequantize(self._checkpoint[layer], torch.float32)
        return w.transpose(-1, -2) if w.dim() == 3 and self.transposed else w

    def files(self):
        """{file: [bytes, time of its last change]} of all weights' files and configs: what tells one source from another."""
        configs = (os.path.join(self.folder, file) for file in ("config.json", *CONFIG_FILES))
        paths = [*set(self._tensors.file.values()), *filter(os.path.exists, configs)]
        return {os.path.basename(path): [os.stat(path).st_size, os.stat(path).st_mtime_ns] for path in sorted(paths)}

    def hidden_size(self):
        """How wide the model is, or None where config.json does not say."""
        return next((c["hidden_size"] for c in (self.config.get("text_config") or {}, self.config) if "hidden_size" in c), None)


def _plain(config):
    """A config without what says how it is quantized, of its parts neither."""
    return {key: _plain(v) if isinstance(v, dict) else v for key, v in config.items() if key not in QUANTIZATION or v is None}


def _parts(config):
    return [value for value in config.values() if isinstance(value, dict)]
