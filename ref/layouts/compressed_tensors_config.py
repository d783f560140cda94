"""compressed-tensors' config: which scheme a layer has, and what the scheme says about its tensors."""

import re

from .check import check_keys, integer, one_of
from .rules import by_name_or_re, strings

L = "compressed-tensors"
HERE = f"{L}: quantization_config"
KEYS = (
    *("quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "quantization_status", "global_compression_ratio"),
    *("version", "sparsity_config", "transform_config", "moe_sparsity_config", "run_compressed", "dequantize", "use_optimized_inference"),
    *("provider", "autoround_version", "packed_modules_mapping"),
)
SCHEME_KEYS = ("targets", "weights", "input_activations", "output_activations", "format")
ARGS_KEYS = (
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "dynamic", "actorder", "scale_dtype", "zp_dtype"),
    *("observer", "observer_kwargs", "is_mx"),
)
SPARSITY_KEYS = ("format", "targets", "ignore", "global_sparsity", "sparsity_structure", "registry_requires_subclass")
TRANSFORM_KEYS = ("type", "apply", "randomize", "requires_grad", "head_dim", "precision")
APPLY_KEYS = ("targets", "location", "inverse", "ignore")

DENSE = ("dense", "fakequant")
# Sparse weights wrap another format, mixed precision names none: the library infers it from the arguments.
INFERRED = ("mixed-precision", "sparse-24-bitmask", "sparse-bitmask")
# A format: what its weights are, as (type, bits).
QUANTIZED = {
    "pack-quantized": [("int", bits) for bits in range(1, 9)],
    "int-quantized": [("int", bits) for bits in range(1, 9)],
    "float-quantized": [("float", 8)],
    "naive-quantized": [("int", bits) for bits in range(1, 9)] + [("float", 8)],
    "nvfp4-pack-quantized": [("float", 4)],
    "mxfp4-pack-quantized": [("float", 4)],
    "mxfp6-pack-quantized": [("float", 6)],
    "mxfp8-quantized": [("float", 8)],
}
STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")
OFFLINE = ("weight_input", "weight_output", "q_attn", "k_cache")


def options(config, layer):
    """What config says about the tensors of a layer; None where it leaves the layer as it was.

    The scheme is that of the first target that fits, in the library's own order: names, then regular expressions ("re:",
    matched from the start), both in alphabetical order, then classes. A checkpoint does not say of what class a layer is:
    "Linear" fits every layer, "Embedding" those that are called so, any other class fits where nothing else does.

    Returns:
        dict: format (with "mixed-precision" resolved), type, bits, symmetric, strategy, group_size and block (None where the
        strategy has none), packing ("dense", "padded" or None: what `version` says of 3, 5, 6 and 7 bits), hadamard (block of an online
        rotation of the layer's input, -1: all of it, 0: none).

    Raises:
        ValueError: unknown keys or values, or contradictions.
        NotImplementedError: marlin-24, presets by name, and rotations that a QTensor does not carry.

    Source: compressed_tensors 0.20.0: quant_config, quant_scheme, quant_args, utils/match, compressors/format, transform.
    """
    group = scheme(config, layer)
    if group is None or group.get("weights") is None:
        return None
    found = arguments(group["weights"], f"{HERE}: weights of {layer}")
    name = _format(config, group, found)
    if name in DENSE:
        return None
    hadamard = rotation(config.get("transform_config"), layer)
    return {"format": name, **found, "packing": packing(config.get("version")), "hadamard": hadamard}


def scheme(config, layer):
    """The config group of a layer (targets, weights, input_activations, ...), as the config has it; None where no group or ignore means it.

    Raises:
        ValueError, NotImplementedError: as options.
    """
    check_keys(config, KEYS, HERE)
    one_of(config.get("quant_method", "compressed-tensors"), ("compressed-tensors", "sparseml"), f"{HERE}: quant_method")
    check_sparsity(config.get("sparsity_config"))
    if config.get("kv_cache_scheme") is not None:
        check_keys(config["kv_cache_scheme"], ARGS_KEYS, f"{HERE}: kv_cache_scheme")
    schemes = {}
    groups = config.get("config_groups") or {}
    for name, group in _dict(groups, f"{HERE}: config_groups").items():
        for target in _targets(group, f"{HERE}: config_groups[{name!r}]"):
            if schemes.setdefault(target, group) != group:
                raise ValueError(f"{HERE}: config_groups have the target {target!r} twice, with different schemes")
    ignore = strings(config.get("ignore"), f"{HERE}: ignore")
    return None if _fits(layer, ignore) else _scheme(layer, schemes)


def arguments(args, where):
    """QuantizationArgs of weights as type, bits, symmetric, strategy, group_size, block."""
    check_keys(args, ARGS_KEYS, where)
    kind, bits = args.get("type") or "int", args.get("num_bits", 8)
    kind = one_of(kind.lower() if isinstance(kind, str) else kind, ("int", "float"), f"{where}: type")
    integer(bits, f"{where}: num_bits", 1, 8)
    symmetric = one_of(args.get("symmetric", True), (True, False), f"{where}: symmetric")
    one_of(args.get("dynamic") or False, (False,), f"{where}: dynamic")
    size, block, strategy = args.get("group_size"), args.get("block_structure"), args.get("strategy")
    size = None if size is None else integer(size, f"{where}: group_size", -1, 2**31 - 1)
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    strategy = one_of(strategy.lower() if isinstance(strategy, str) else strategy, STRATEGIES, f"{where}: strategy")
    if strategy in ("group", "tensor_group"):
        integer(size, f"{where}: group_size (strategy {strategy})", 1, 2**31 - 1)
    elif size is not None and size > 0:
        raise ValueError(f"{where}: group_size is {size} and strategy {strategy!r}, expected strategy 'group'")
    if (block is None) == (strategy == "block"):
        raise ValueError(f"{where}: block_structure is {block!r} and strategy {strategy!r}: expected both or neither to be about blocks")
    return {
        **{"type": kind, "bits": bits, "symmetric": symmetric, "strategy": strategy},
        **{"group_size": size if strategy in ("group", "tensor_group") else None, "block": block and _block(block, where)},
    }


def packing(version):
    """How the packer of this version lays out codes of 3, 5, 6 and 7 bits: "padded" up to 0.17, "dense" from 0.18 on; None: not said.

    Source: pack_to_int32 in the wheels 0.10.2, 0.15.0, 0.16.0, 0.17.0, 0.17.1 (padded), 0.18.0 and 0.20.0 (dense).
    """
    if version is None:
        return None
    match = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    if match is None:
        raise ValueError(f"{HERE}: version is {version!r}, expected one such as '0.17.0'")
    return "dense" if (int(match[1]), int(match[2])) >= (0, 18) else "padded"


def rotation(config, layer):
    """The block of the Hadamard rotation that the model applies to the layer's input: 0, a size, or -1 for the whole input.

    What has been rotated offline is in the stored weight already, and so is what belongs to attention, not to a layer. An
    online rotation of the input belongs to the layer: it computes x H W'^T, so its weight is W' H, a QTensor with
    hadamard. A rotated output, or a matrix other than Sylvester's, is nothing that a QTensor has.

    Source: compressed_tensors 0.20.0 transform/factory/base.py, transform/utils/matrix.py (apply_transform_weight).
    """
    where = f"{HERE}: transform_config"
    if config is None:
        return 0
    check_keys(config, ("config_groups",), where)
    block = 0
    for name, group in _dict(config.get("config_groups") or {}, where).items():
        here = f"{where}[{name!r}]"
        check_keys(group, TRANSFORM_KEYS, here)
        if not isinstance(group.get("apply", []), list):
            raise ValueError(f"{here}: apply is {group['apply']!r}, expected a list")
        for apply in group.get("apply", []):
            check_keys(apply, APPLY_KEYS, here)
            location = one_of(apply.get("location"), (*OFFLINE, "input", "output"), f"{here}: location")
            targets, ignore = (_names(apply.get(key), f"{here}: {key}") for key in ("targets", "ignore"))
            if location in OFFLINE or not _fits(layer, targets) or _fits(layer, ignore):
                continue
            kind, randomize = group.get("type"), group.get("randomize", False)
            if location == "output" or kind != "hadamard" or randomize or block:
                raise NotImplementedError(
                    f"compressed-tensors: transform {name!r} rotates the {location} of {layer} as the model runs (type {kind!r}, "
                    f"randomize {randomize!r}): a QTensor carries one rotation of the input, by Sylvester's Hadamard matrix"
                )
            head = group.get("head_dim")
            block = -1 if head is None else integer(head, f"{here}: head_dim", 1, 2**31 - 1)
            if head is not None and block & (block - 1):
                raise ValueError(f"{here}: head_dim is {head}, expected a power of two, as type 'hadamard' needs")
    return block


def check_sparsity(config):
    """Refuse a sparsity_config that is unknown, or that stands for tensors without a reader."""
    if config is None or config == {}:
        return
    check_keys(config, SPARSITY_KEYS, f"{HERE}: sparsity_config")
    name = config.get("format", "dense")
    _refuse_marlin(name)
    one_of(name, ("dense", "sparse-24-bitmask", "sparse-bitmask"), f"{HERE}: sparsity_config: format")


def _format(config, group, args):
    name = group.get("format")
    name = config.get("format") if name is None else name
    _refuse_marlin(name)
    one_of(name, (*QUANTIZED, *INFERRED, *DENSE), f"{HERE}: format")
    if name in INFERRED:
        name = _infer(args, group)
    if name not in DENSE and (args["type"], args["bits"]) not in QUANTIZED[name]:
        raise ValueError(f"{HERE}: format {name!r} cannot hold weights of type {args['type']!r} and {args['bits']} bits")
    return name


def _infer(args, group):
    # The library's order of priority, for a linear layer.
    kind, size, inputs = (args["type"], args["bits"]), args["group_size"], group.get("input_activations")
    if kind in (("float", 4), ("float", 6)):
        return {(4, 16): "nvfp4-pack-quantized", (4, 32): "mxfp4-pack-quantized", (6, 32): "mxfp6-pack-quantized"}.get(
            (kind[1], size), "naive-quantized"
        )
    if kind == ("float", 8):
        mx = size == 32 and group["weights"].get("scale_dtype") in ("torch.uint8", "uint8")
        return "mxfp8-quantized" if mx else "naive-quantized" if inputs is None else "float-quantized"
    return "pack-quantized" if inputs is None else "int-quantized"


def _refuse_marlin(name):
    if name == "marlin-24":
        raise NotImplementedError(
            "compressed-tensors: marlin-24 is the layout of one GPU kernel (2:4 metadata of CUTLASS, codes permuted in tiles), which "
            "compressed-tensors itself writes and never reads"
        )


def _scheme(layer, schemes):
    names = sorted(schemes, key=lambda target: (target.startswith("re:"), target))
    target = _match(layer, names)
    if target is None:
        classes = [name for name in names if re.fullmatch(r"[A-Z]\w*", name)]
        embedding = "Embedding" in classes and re.search(r"embed|wte", layer.rpartition(".")[2])
        target = "Embedding" if embedding else "Linear" if "Linear" in classes else None
        others = [name for name in classes if name != "Embedding"]
        if target is None and others:
            if any(schemes[name] != schemes[others[0]] for name in others):
                raise ValueError(f"{HERE}: config_groups target the classes {', '.join(others)}: nothing says of which one {layer} is")
            target = others[0]
    return None if target is None else schemes[target]


def _fits(layer, patterns):
    return "Linear" in patterns or _match(layer, patterns) is not None


def _match(layer, patterns):
    try:
        return by_name_or_re(layer, patterns)
    except ValueError as error:
        raise ValueError(f"{HERE}: {error}") from None


def _targets(group, where):
    if isinstance(group, list):
        raise NotImplementedError(f"{where} is a list: a preset by its name, which stored configs spell out")
    check_keys(group, SCHEME_KEYS, where)
    targets = strings(group.get("targets"), f"{where}: targets")
    if not targets:
        raise ValueError(f"{where} has no targets")
    for key in ("weights", "input_activations", "output_activations"):
        if group.get(key) is not None:
            check_keys(group[key], ARGS_KEYS, f"{where}: {key}")
    return targets


def _names(value, where):
    return [value] if isinstance(value, str) else strings(value, where)


def _dict(value, where):
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}, expected a dict")
    return value


def _block(value, where):
    sizes = [int(s) for s in value.split("x")] if isinstance(value, str) and re.fullmatch(r"\d{1,9}x\d{1,9}", value) else value
    if not isinstance(sizes, (list, tuple)) or len(sizes) != 2:
        raise ValueError(f"{where}: block_structure is {value!r}, expected [rows, columns]")
    return tuple(integer(size, f"{where}: block_structure", 1, 2**31 - 1) for size in sizes)
