"""Opens checkpoints: finds the files, their quantization config and their layers, and reads one layer at a time.

The one module that opens safetensors files. Nothing is ever unpickled.
"""

import contextlib
import difflib
import json
import os
import re

from safetensors import SafetensorError, safe_open

from . import gguf, gguf_file

INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Where a config is, beside config.json, and whose it is where it does not say so: modelopt's, old GPTQ's, old AWQ's.
CONFIG_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
QUANTIZATION = ("quantization_config", "compression_config")  # its key in config.json; the second is compressed-tensors' old one
# A file that is mapped counts as resident memory as far as it has been read; after this many bytes all maps are let go.
MAPPED_BYTES = 64 * 2**20
# No config is nested as deep, and what compares and prints values recursively stays far from Python's limit.
DEEPEST = 100


class Checkpoint:
    """The layers of a checkpoint that are quantized, each read when it is asked for.

    Iterating yields (layer, QTensor) in natural order (layer 10 behind layer 9); len is the number of quantized layers;
    checkpoint[layer] reads one. Layers are those that are stored: a projection, a shard, an expert or a stack of experts.

    layers: the names of the quantized layers.
    plain: the names of all tensors that belong to none of them (norms, embeddings, biases).
    layout: the name of the layout, as "gptq".
    config: the quantization config, as it is in its file.
    """

    def __init__(self, tensors, module, config, where):
        self.layout = module.__name__.rpartition(".")[2]
        self.config = config
        self._tensors, self._module = tensors, module
        # What the headers say beside the tensors, for layouts that keep there how they are quantized (torchao).
        self._config = config | {"_metadata": tensors.metadata} if getattr(module, "READS_METADATA", False) else config
        with located(where):
            found = module.find(list(tensors.file), self._config)
            if not found:
                raise ValueError(f"{self.layout}: no layer has its tensors, but the config says that the checkpoint is quantized")
        self._parts = {layer: found[layer] for layer in sorted(found, key=natural)}
        used = {name for parts in found.values() for name in parts.values()}
        self.layers = tuple(self._parts)
        self.plain = tuple(sorted((name for name in tensors.file if name not in used), key=natural))

    def __repr__(self):
        return f"Checkpoint({self.layout}, {len(self.layers)} quantized layers, {len(self.plain)} plain tensors)"

    def __len__(self):
        return len(self.layers)

    def __iter__(self):
        return ((layer, self[layer]) for layer in self.layers)

    def __getitem__(self, layer):
        """The layer's QTensor.

        Raises:
            KeyError: there is no such quantized layer.
            ValueError, NotImplementedError: file, layer, and what is wrong there.
        """
        names = self._parts[layer]
        files = sorted({self._tensors.file[name] for name in names.values()})
        with located(", ".join(files), layer):
            options = self._module.options(self._config, layer)
            if options is None:
                raise ValueError(f"{self.layout}: the config leaves the layer unquantized, but {next(iter(names.values()))} is stored")
            return self._module.read({part: self._tensors.load(name) for part, name in names.items()}, options)

    def parts(self, layer):
        """{part: tensor name} of a quantized layer, those of its input's scales among them."""
        return dict(self._parts[layer])

    def shape(self, name):
        """The shape of a tensor as it is stored, of any name."""
        return self._tensors.shape[name]

    def nbytes(self, name):
        """Bytes that a quantized layer's tensors, or the one tensor of this name, take in their files."""
        return sum(self._tensors.nbytes[part] for part in self._parts.get(name, {name: name}).values())

    def tensor(self, name):
        """A tensor as it is stored, of any name: a plain one, or one part of a quantized layer.

        Raises:
            KeyError: there is no such tensor.
            ValueError: file, tensor, and what is wrong there.
        """
        with located(self._tensors.file[name]):
            return self._tensors.load(name)


class Tensors:
    """The tensors of safetensors files, by name, each read when it is asked for.

    file: {name: path}. nbytes: {name: bytes in the file}. shape: {name: tuple}. metadata: {key: text} of all headers.
    """

    def __init__(self, paths):
        self.file, self.nbytes, self.shape, self.metadata = {}, {}, {}, {}
        self._handles, self._read = {}, 0
        for path in paths:
            entries, metadata = header(path)
            self.metadata |= metadata
            _add(self.file, path, entries)
            self.nbytes |= {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
            self.shape |= {name: tuple(entry["shape"]) for name, entry in entries.items()}

    def load(self, name):
        path = self.file[name]
        if self._read > MAPPED_BYTES:
            self._handles, self._read = {}, 0
        self._read += self.nbytes[name]
        with safetensors_errors(f"{name}: "):
            if path not in self._handles:
                self._handles[path] = safe_open(path, "pt")
            return self._handles[path].get_tensor(name).clone()  # what is handed out holds no map


class Blocks:
    """The tensors of GGUF files: as Tensors."""

    def __init__(self, paths):
        self.file, self.nbytes, self.shape = {}, {}, {}
        self._files = {path: gguf_file.open_file(path) for path in paths}
        for path, file in self._files.items():
            _add(self.file, path, file.tensors)
            self.nbytes |= {name: tensor.nbytes for name, tensor in file.tensors.items()}
            self.shape |= {name: tuple(tensor.shape) for name, tensor in file.tensors.items()}

    def config(self):
        """What says how each tensor is quantized, as other checkpoints' config.json does."""
        types = [gguf.file_config(file)["types"] for file in self._files.values()]
        return {"quant_method": "gguf", "types": {name: t for of_file in types for name, t in of_file.items()}}

    def load(self, name):
        return gguf_file.read_tensor(self._files[self.file[name]], name)


def _add(files, path, names):
    for name in names:
        if name in files:
            raise ValueError(f"{path}: {name}: is in {files[name]}, too; expected each tensor in one file")
        files[name] = path


def header(path):
    """({name: {"dtype", "shape", "data_offsets"}}, {key: text}) of a safetensors file; the library checks that it agrees with the file.

    Raises:
        ValueError: it is no safetensors file, or a broken one.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file")
    with located(path), safetensors_errors(), safe_open(path, "pt"):
        pass
    with open(path, "rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return entries, entries.pop("__metadata__", None) or {}


def open_checkpoint(path, layouts):
    """What layouts.open does, with a table of layouts."""
    path = os.fspath(path)
    if path.endswith(PICKLED):
        raise ValueError(f"{path}: is a pickled file, and nothing is unpickled; expected safetensors or GGUF")
    if os.path.isdir(path):
        folder, tensors = path, directory(path)
    elif not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: there is no such file or directory")
    elif path.endswith(".gguf"):
        folder, file = os.path.split(path)
        tensors = Blocks(_shards(folder or ".", [file]))
        return Checkpoint(tensors, layouts["gguf"], tensors.config(), path)
    elif path.endswith(".safetensors"):
        folder, tensors = os.path.dirname(path) or ".", Tensors([path])
    else:
        raise ValueError(f"{path}: expected a directory of safetensors files, a .safetensors file or a .gguf file")
    config, where, method = _config(folder)
    with located(where):
        module = _layout(config, method, layouts)
    return Checkpoint(tensors, module, config, where)


def _shards(folder, files):
    """Paths of the files, and of all others of the sets that they are shards of (model-00001-of-00003.gguf)."""
    found = set(files)
    for file in files:
        if match := re.fullmatch(r"(.*-)([0-9]{5})-of-([0-9]{5})(\.[a-z]+)", file):
            found |= {f"{match[1]}{i:05d}-of-{match[3]}{match[4]}" for i in range(1, int(match[3]) + 1)}
    missing = sorted(found - set(os.listdir(folder)))
    if missing:
        raise FileNotFoundError(f"{os.path.join(folder, missing[0])}: there is no such file, but there is {files[0]}")
    return [os.path.join(folder, file) for file in sorted(found, key=natural)]


def directory(folder):
    """The tensors of a directory: those of its index, or of model.safetensors, or of all .safetensors files."""
    there = sorted(entry for entry in os.listdir(folder) if entry.endswith(".safetensors"))
    index = os.path.join(folder, INDEX)
    if os.path.exists(index):
        return _indexed(folder, index, there)
    if not there:
        others = [entry for entry in sorted(os.listdir(folder)) if entry.endswith((*PICKLED, ".gguf"))]
        note = f" ({others[0]} is none; a .gguf file is opened by its own path, pickled ones are not)" if others else ""
        raise ValueError(f"{folder}: holds no .safetensors file{note}")
    if "model.safetensors" in there:
        there = ["model.safetensors"]
    return Tensors(_shards(folder, there))


def _indexed(folder, index, there):
    with located(index):
        document = read_json(index)
        named = document.get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
            raise ValueError("weight_map is missing, or no dict of tensor names to file names")
        there = set(there)
        for name, file in named.items():
            if file not in there:
                raise ValueError(f"{name}: is said to be in {file!r}, which is no .safetensors file of this directory")
        if "model.safetensors" in there and "model.safetensors" not in named.values():
            raise ValueError("the directory has a model.safetensors that the index does not name; expected one of the two")
    paths = {file: os.path.join(folder, file) for file in sorted(set(named.values()), key=natural)}
    tensors = Tensors(paths.values())
    with located(index):
        for name, file in named.items():
            if (path := tensors.file.get(name)) != paths[file]:
                raise ValueError(f"{name}: is said to be in {file}, but {f'is in {path}' if path else 'is not there'}")
        for name, path in tensors.file.items():
            if name not in named:
                raise ValueError(f"{name}: is in {path}, but the index does not name it")
    return tensors


def _config(folder):
    """(the quantization config, its file, the quant_method that the kind of file implies or None)."""
    path = os.path.join(folder, "config.json")
    if os.path.exists(path):
        with located(path):
            config = _quantization_config(read_json(path))
            if config is not None:
                return config, path, None
    for file, method in CONFIG_FILES.items():
        other = os.path.join(folder, file)
        if os.path.exists(other):
            with located(other):
                return read_json(other), other, method
    if not os.path.exists(path):
        raise FileNotFoundError(f"{path}: there is no such file, nor one of {', '.join(CONFIG_FILES)}; expected a quantization config")
    raise ValueError(f"{path}: has no quantization_config (nor is there one of {', '.join(CONFIG_FILES)}): nothing is quantized")


def _quantization_config(config):
    """The quantization config of config.json: its own, or else that of a part of a composite model (text_config, llm_config); or None."""
    found = {}
    parts = [("", config)]
    for prefix, part in parts:  # grows: the parts of the parts
        key = next((key for key in QUANTIZATION if part.get(key) is not None), None)
        if key is not None:
            if not isinstance(part[key], dict):
                raise ValueError(f"{prefix}{key} is {type(part[key]).__name__}, expected a dict")
            if part is config:
                return part[key]
            found[prefix + key] = part[key]
        inner = (k for k, v in part.items() if k.endswith("_config") and k not in QUANTIZATION and isinstance(v, dict))
        parts += [(f"{prefix}{k}.", part[k]) for k in inner]
    first = next(iter(found.values()), None)
    for name, other in found.items():
        if other != first:
            raise ValueError(f"{next(iter(found))} and {name} differ; expected one quantization config")
    return first


def _layout(config, method, layouts):
    """The module whose quant_method the config has, or implies."""
    name = config.get("quant_method", config.get("method", method))
    if name is None and ("load_in_4bit" in config or "load_in_8bit" in config):
        name = "bitsandbytes"  # old files do not say so
    if name is None and "quant_algo" in config:
        name = "modelopt"
    if name == "gptq" and (config.get("checkpoint_format") == "marlin" or config.get("is_marlin_format") is True):
        name = "marlin"
    if not isinstance(name, str):
        raise ValueError(f"quant_method is {name!r}, expected one of {', '.join(layouts)}")
    if name not in layouts:
        nearest = difflib.get_close_matches(name, layouts, n=1, cutoff=0.0)
        raise NotImplementedError(f"quant_method {name!r} has no layout; there is {', '.join(layouts)}; the nearest is {nearest[0]!r}")
    return layouts[name]


def read_json(path):
    """A JSON file that holds a dict.

    Raises:
        ValueError: it does not.
    """
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"holds a {type(found).__name__}, expected a dict")
    level = [found]
    for _ in range(DEEPEST):
        level = [
            node for parent in level for node in (parent.values() if isinstance(parent, dict) else parent) if isinstance(node, (dict, list))
        ]
    if level:
        raise ValueError(f"is nested more than {DEEPEST} deep")
    return found


def natural(name):
    """Sorts names with the numbers in them as numbers.

    >>> sorted(["h.10.w", "h.9.w"], key=natural)
    ['h.9.w', 'h.10.w']
    """
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else part for i, part in enumerate(re.split(r"([0-9]+)", name))]


@contextlib.contextmanager
def located(*where):
    """Put where something is wrong in front of what is."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        kind = ValueError if isinstance(error, ValueError) else NotImplementedError
        raise kind(": ".join((*where, str(error)))) from None


@contextlib.contextmanager
def safetensors_errors(what=""):
    """The library's errors as ValueError."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"safetensors: {what}{error}") from None
