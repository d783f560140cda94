"""The law of the layers: who imports what, the same signatures in ref and fast, and an import that loads nothing heavy."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import fast
import ref

ROOT = Path(__file__).parent.parent
# What fast may take from ref: types, names, the tables that say what a code is, and checks that read no data; nothing that computes values.
REF_TYPES = {
    "ref.element": {"Int", "Float", "Codebook", "NAMED", "parse_element", "value_list", "values", "max_value", "min_value"},
    "ref.format": {"Format", "FORMATS", "SCALE_DTYPES", "ZERO_DTYPES", "check_input_format", "parse_format"},
    "ref.qtensor": {"QTensor", "TENSORS", "check_parts", "equal", "part_kinds", "validate"},
    # They move bytes and compute nothing: QTensors made of others.
    "ref.combine": {"by_row", "fuse", "stack", "take_columns", "take_expert", "take_rows"},
    # What configurations say, as checkpoints have them; and the readers of checkpoints, which move bytes and compute nothing, too.
    "ref.layouts": {
        *("LAYOUTS", "Checkpoint", "open", "rules", "auto_round", "bitnet", "compressed_tensors", "compressed_tensors_config"),
        *("fp8", "humming", "modelopt", "mxfp4", "quark", "quark_codes", "quark_config", "torchao"),
    },
    "ref.layouts.check": {"check_keys", "integer", "one_of"},
    "ref.layouts.checkpoint": {
        *("CONFIG_FILES", "INDEX", "PICKLED", "QUANTIZATION"),
        *("directory", "header", "located", "natural", "read_json"),
    },
    "ref.layouts.gptq": {"pick"},
    "ref.moe.check": {
        "ACTIVATIONS",
        "DENOMINATORS",
        "SCORING",
        "Activation",
        "check_activation",
        "check_experts",
        "check_grouped",
        "check_mul_sum",
        "check_topk",
    },
}
# Modules that may import one more package than their layer: the one that opens files, a command line, the probe of Triton's interpreter; and
# what transformers' loaders call, which is loaded by them or by fast.load.
EXCEPTIONS = {
    "safetensors": ("ref/layouts/",),
    "tqdm": ("ref/__main__.py", "ref/layouts/"),
    "triton": ("conformance/interpreted.py",),
    "transformers": ("fast/hf/",),
}


def sources(package):
    """The package's modules, without its tests and the scripts that made golden vectors with other people's packages."""
    found = [p for p in sorted((ROOT / package).rglob("*.py")) if not p.name.startswith(("test_", "conftest"))]
    return [p for p in found if p.parent.name != "golden"]


def imports(path):
    """(module, names or None, whether at the top level) of every import statement, relative ones resolved."""
    tree = ast.parse(path.read_text())
    package = path.relative_to(ROOT).parent.parts
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) - node.level + 1], *filter(None, [node.module]))) if node.level else node.module
            yield base, {alias.name for alias in node.names}, id(node) in top


def where(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources("ref"), ids=where)
def test_ref_imports_torch_einops_and_the_standard_library(path):
    for module, _, _ in imports(path):
        package = module.split(".")[0]
        legal = package in {"torch", "einops", "ref"} or package in sys.stdlib_module_names
        assert legal or where(path).startswith(EXCEPTIONS.get(package, ())), f"{where(path)} imports {module}"


@pytest.mark.parametrize("path", sources("fast"), ids=where)
def test_fast_imports_types_from_ref_and_no_oracle(path):
    for module, names, at_top in imports(path):
        package = module.split(".")[0]
        legal = package in {"torch", "ref", "fast", "triton", "humming"} or package in sys.stdlib_module_names
        legal = legal or not at_top or where(path).startswith(EXCEPTIONS.get(package, ()))
        assert legal, f"{where(path)} imports {module}, which is no dependency"
        assert package not in {"conformance", "hypothesis", "pytest"}, f"{where(path)} imports {module}"
        if package == "ref":
            assert module in REF_TYPES, f"{where(path)} imports {module}"
            assert names is not None and names <= REF_TYPES[module], f"{where(path)} imports {names} from {module}"


def test_the_oracles_are_none_of_what_fast_may_import():
    oracles = {n for n in ref.__all__ if inspect.isfunction(getattr(ref, n))} - {"equal", "parse_element", "parse_format", "validate"}
    oracles -= REF_TYPES["ref.combine"]
    assert {"decode", "dequantize", "encode", "hadamard", "linear", "pack", "quantize", "quantize_input", "unpack"} <= oracles
    assert not oracles & set().union(*REF_TYPES.values())


@pytest.mark.parametrize("path", sorted((ROOT / "fast").glob("*.py")), ids=where)
def test_triton_and_humming_stay_in_their_packages(path):
    """fast's own files, which import fast loads, name neither; the registry in dispatch imports implementations by name."""
    for module, _, _ in imports(path):
        assert not module.startswith(("triton", "humming", "fast.triton", "fast.humming", "fast.cublas")) or path.name.startswith(
            "test_"
        ), module


@pytest.mark.parametrize("path", sources("conformance"), ids=where)
def test_conformance_knows_candidates_by_name_only(path):
    for module, _, _ in imports(path):
        package = module.split(".")[0]
        assert package not in {"fast", "triton", "humming"} or where(path) in EXCEPTIONS.get(package, ()), f"{where(path)} imports {module}"


def test_the_imports_are_read_as_python_reads_them():
    found = set()
    for path in sources("fast"):
        found |= {module for module, _, _ in imports(path)}
    assert {"ref.qtensor", "ref.format", "fast.dispatch", "torch"} <= found


PAIRS = sorted(name for name in set(ref.__all__) & set(fast.__all__) if inspect.isfunction(getattr(ref, name)))
ADDED = {"impl": None, "deterministic": True, "out": None, "gemm_type": "auto"}


def test_pairs_exist():
    assert {"linear", "dequantize", "hadamard", "quantize_input"} <= set(PAIRS)


@pytest.mark.parametrize("name", PAIRS)
def test_the_same_signature(name):
    """fast adds impl, deterministic and out, by keyword, with their defaults; nothing else differs."""
    theirs, ours = (inspect.signature(getattr(module, name)).parameters for module in (ref, fast))
    added = {p: ours[p] for p in ours if p not in theirs}
    assert [(p.name, p.kind, p.default) for p in ours.values() if p.name in theirs] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]
    assert added.keys() <= ADDED.keys()
    assert all(p.kind is p.KEYWORD_ONLY and p.default is ADDED[p.name] for p in added.values())


def test_public_names_exist_and_are_documented():
    for module in (ref, fast):
        for name in module.__all__:
            thing = getattr(module, name)
            assert not callable(thing) or thing.__doc__, f"{module.__name__}.{name}"


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


HEAVY = (
    "transformers",
    "vllm",
    "triton",
    "humming",
    "hypothesis",
    "pytest",
    "conformance",
    "safetensors",
    "tqdm",
    "torch._dynamo",
    "torch._inductor",
)
MEASURE = f"""
import sys, time, torch
before, start = set(sys.modules), time.process_time()
import ref
alone = "fast" not in sys.modules
import fast
print(time.process_time() - start, alone, [m for m in sorted(set(sys.modules) - before) if m.startswith({HEAVY!r})])
sys.modules.update(dict.fromkeys({[m for m in HEAVY if "." not in m]!r}))  # None: an import of it fails
q = ref.quantize(torch.ones(2, 32), "int4")
print(ref.linear(torch.ones(1, 32), q).tolist(), fast.linear(torch.ones(1, 32), q).tolist())
"""


def test_an_import_is_silent_and_quick_and_loads_nothing_heavy():
    """ref does not need fast, and neither needs more than torch and einops to import and to run.

    Both together take less than 0.3 s beyond torch: of the processor, and the least of several, as the machine does other things too.
    """
    times = []
    while len(times) < 5 and min(times, default=1) >= 0.3:
        done = python(MEASURE)
        seconds, rest = done.stdout.split(" ", 1)
        assert (done.returncode, done.stderr, rest) == (0, "", "True []\n[[32.0, 32.0]] [[32.0, 32.0]]\n")
        times.append(float(seconds))
    assert min(times) < 0.3, times
