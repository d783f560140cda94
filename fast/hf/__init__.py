"""fast in Hugging Face's transformers: checkpoints of every layout loaded (load), models quantized while they are loaded, saved and loaded back.

Importing this registers quant_method "humming":

>>> import fast.hf
>>> from transformers import AutoModelForCausalLM
>>> config = fast.hf.FastConfig({"dtype": "int4", "group_size": 128})
>>> model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)  # doctest: +SKIP
>>> model.save_pretrained(out)  # doctest: +SKIP
>>> model = AutoModelForCausalLM.from_pretrained(out)  # doctest: +SKIP
"""

import importlib.util

from .load import NEEDED, load

__all__ = ["FastConfig", "FastQuantizer", "load"]

if importlib.util.find_spec("transformers"):
    from .quantizer import FastConfig, FastQuantizer
else:

    def __getattr__(name):
        if name in __all__:
            raise ImportError(NEEDED)
        raise AttributeError(f"module 'fast.hf' has no attribute {name!r}")
