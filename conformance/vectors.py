"""The golden vectors: small checkpoints of the ecosystem's own packers, with what its own code reads from them."""

import json
import pathlib

from safetensors import safe_open

FOLDER = pathlib.Path(__file__).parent / "golden"


def stored(layout):
    """(cases, tensors) of golden/<layout>.safetensors: {case: how it was made}, {"case/part": tensor}; the part "expected" is what it means."""
    with safe_open(FOLDER / f"{layout}.safetensors", "pt") as file:
        return json.loads(file.metadata()["cases"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def parts_of(tensors, case):
    """({part: tensor} of a case, what it means)."""
    parts = {name.rpartition("/")[2]: tensor for name, tensor in tensors.items() if name.rpartition("/")[0] == case}
    return parts, parts.pop("expected")
