"""Every layout, through files: what write and config_of make, for each format that the layout has, is what open reads; and so is
every golden case, with the config that its maker wrote."""

import functools
import json
import pathlib
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from conformance.weights import draw_weight

from .. import layouts
from ..format import parse_format
from ..pack import pack, unpack
from ..qtensor import equal, validate

# Without formats is what only says why it cannot be read.
MODULES = {module.__name__.rpartition(".")[2]: module for module in layouts.LAYOUTS.values() if module.FORMATS}
SHAPE = (128, 256)
LAYERS = ("model.layers.2.mlp.up_proj", "model.layers.10.mlp.up_proj")
CASES = [(name, str(parse_format(fmt))) for name, module in MODULES.items() for fmt in module.FORMATS]

GOLDEN = pathlib.Path(__file__).parents[2] / "conformance" / "golden"
# Golden cases that no QTensor can hold.
REFUSED = {"modelopt": ("int4_awq", "w4a8_awq", "int8_smoothquant")}


@functools.cache
def golden(name):
    """{case: ({tensor name: tensor}, quantization config, the header's metadata or None)} of a layout's golden checkpoints."""
    found = {}
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        for case, about in json.loads(file.metadata()["cases"]).items():
            parts = {key.removeprefix(f"{case}/"): file.get_tensor(key) for key in file.keys() if key.startswith(f"{case}/")}  # noqa: SIM118
            del parts["expected"]
            tensors = tensors_of(MODULES[name], "layer", parts, about["config"])
            found[case] = (tensors, about["config"], about.get("metadata"))
    return found


def ternary(q):
    """q with the value -2 of its codes made -1."""
    codes = unpack(q.packed, 2, q.shape[-1]).clamp(min=1)
    return replace(q, packed=pack(codes, 2), scale=q.scale if q.scale_2 is None else torch.ones_like(q.scale))


def llm_int8(q):
    return q if q.scale_2 is None else replace(q, scale_2=torch.full_like(q.scale_2, 127))


def blocks(q):
    """A QTensor that GGUF's blocks hold: what random bytes mean."""
    type = gguf_type(q)
    *_, n, k = q.shape
    row = layouts.gguf_file.row_bytes(type, k)
    data = draw_weight(1, "uint8_tensor", (n, row)).packed.view(torch.uint8)[:, :row] & 0x77  # no NaN, no inf
    return layouts.gguf.read({"weight": data.contiguous()}, {"type": type})


def gguf_type(q):
    return next(name for name, block in layouts.gguf.BLOCKS.items() if block.format == q.format)


# What a layout cannot write of arbitrary values is made so that it can; and the options that write needs for a format.
MAKE = {"bitnet": ternary, "bitsandbytes": llm_int8, "gguf": blocks}
OPTIONS = {
    "awq": lambda q: {"version": "gemv_fast" if q.offset is not None else "gemm"},
    "gptq": lambda q: {"checkpoint_format": "gptq_p" if q.format.element.bits == 5 else "gptq_v2"},
    "gguf": lambda q: {"type": gguf_type(q)},
}


def example(name, fmt, seed):
    """(a QTensor of the format that the layout can write, options for write)."""
    q = draw_weight(seed, next(f for f in MODULES[name].FORMATS if str(parse_format(f)) == fmt), SHAPE)
    q = MAKE.get(name, lambda q: q)(q)
    return q, OPTIONS.get(name, lambda q: {})(q)


def tensors_of(module, layer, parts, config):
    """{tensor name: tensor} by which the layout finds the layer's parts."""
    for names in ({p: f"{layer}.{p}" for p in parts}, {p: f"{layer}_{p}" for p in parts}):
        if module.find(list(names.values()), config) == {layer: names}:
            return {names[p]: tensor for p, tensor in parts.items()}
    raise AssertionError(f"{module.__name__} does not find {list(parts)} of {layer}")


def write(folder, name, fmt):
    """A checkpoint of two layers and a plain tensor; returns (path, {layer: QTensor})."""
    module, tensors, written = MODULES[name], {}, {}
    for seed, layer in enumerate(LAYERS):
        q, options = example(name, fmt, 4 * seed + 3)
        written[layer] = q
        if name == "gguf":
            tensors[f"{layer}.weight"] = (options["type"], q)
        else:
            config = module.config_of(q, **options)
            tensors |= tensors_of(module, layer, module.write(q, **options), config)
    if name == "gguf":
        module.write_file(folder / "model.gguf", tensors | {"norm.weight": ("F32", torch.ones(3))}, {"general.name": "test"})
        return folder / "model.gguf", written
    save_file({**tensors, "norm.weight": torch.ones(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": config}))
    return folder, written


def test_every_layout_is_covered():
    assert {module for module in layouts.LAYOUTS.values() if module not in MODULES.values()} == {layouts.vector}
    assert {name for name, _ in CASES} == set(MODULES) and len(MODULES) >= 15
    for name, module in MODULES.items():
        for function in ("find", "options", "read", "write", "config_of"):
            assert callable(getattr(module, function, None)), f"{name} has no {function}"


@pytest.mark.parametrize(("name", "fmt"), CASES)
def test_what_is_written_is_read(tmp_path, name, fmt):
    path, written = write(tmp_path, name, fmt)
    found = layouts.open(path)
    assert found.layout == name and found.layers == LAYERS and found.plain == ("norm.weight",)
    for layer, q in found:
        assert equal(q, written[layer]), layer
    assert torch.equal(found.tensor("norm.weight"), torch.ones(3))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "gguf"])
def test_golden_checkpoints(tmp_path, name):
    for case, (tensors, config, metadata) in golden(name).items():
        save_file({**tensors, "norm.weight": torch.ones(3)}, tmp_path / "model.safetensors", metadata=metadata)
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        found = layouts.open(tmp_path)
        assert found.layout == name and found.layers == ("layer",) and found.plain == ("norm.weight",), case
        if case in REFUSED.get(name, ()):
            with pytest.raises(NotImplementedError, match="layer: modelopt: "):
                found["layer"]
        else:
            validate(found["layer"])


def test_the_golden_gguf_file():
    found = layouts.open(GOLDEN / "gguf.gguf")
    assert found.layout == "gguf" and len(found) >= 1
    for _, q in found:
        validate(q)


def test_a_split_gguf_file(tmp_path):
    paths = [tmp_path / f"model-0000{i}-of-00002.gguf" for i in (1, 2)]
    q, options = example("gguf", CASES[-1][1], 3)
    for path, layer in zip(paths, LAYERS, strict=True):
        layouts.gguf.write_file(path, {f"{layer}.weight": (options["type"], q)}, {"general.name": "test"})
    assert layouts.open(paths[0]).layers == layouts.open(paths[1]).layers == LAYERS
    paths[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00002\.gguf: there is no such file, but there is model-00002"):
        layouts.open(paths[1])


def test_what_the_header_says_of_torchao(tmp_path):
    """Its metadata decides, and not quant_type, which says int8 here."""
    q, _ = example("torchao", "int4_g32_bf16", 3)
    module = layouts.torchao
    metadata = module.metadata_of({LAYERS[0]: q})
    save_file({f"{LAYERS[0]}.{part}": t for part, t in module.write(q).items()}, tmp_path / "model.safetensors", metadata=metadata)
    config = module.config_of(example("torchao", "int8", 3)[0])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    found = layouts.open(tmp_path)
    assert found.config == config and equal(found[LAYERS[0]], q)
