"""The report as a value: what is written to JSON, and how it is read back."""

import importlib.metadata
import json
import math
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

SCHEMA = 2
HERE = Path(__file__).parent


class ReportError(ValueError):
    """A file that is not a report of this schema; the message is one sentence."""


def document(cells, run, fingerprint=None):
    """Everything that a run found out, of JSON's types only; schema.json says what is where.

    Args:
        cells: Cells.
        run: the settings of the run, a dict.
        fingerprint: what the probe found, {impl or "-": dict}, or None.
    """
    return _plain(
        {
            "schema": SCHEMA,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": run,
            "versions": _versions(run["candidate"]),
            "device_name": _device_name(torch.device(run["device"])),
            "fingerprint": fingerprint,
            "power": measured_power(),
            "cells": [cell.as_dict() for cell in cells],
        }
    )


def measured_power():
    """What `python -m conformance.power --write` measured last, or None where a part of that is missing."""
    path = HERE.parent / "power.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return found if {"mutants", "killed", "variations", "false_alarms", "examples", "date"} <= set(found) else None


def write_json(path, cells, run, fingerprint=None):
    """The document as a file; arguments as of document()."""
    with open(path, "w") as file:
        json.dump(document(cells, run, fingerprint), file, indent=1, allow_nan=False)
        file.write("\n")


def read(path):
    """A document that write_json wrote.

    Raises:
        ReportError: there is no such file, or it is something else, or of another schema.
    """
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ReportError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except ValueError as error:
        raise ReportError(f"{str(path)!r} is not JSON: {error}") from None
    if not isinstance(found, dict) or "schema" not in found or "cells" not in found:
        raise ReportError(f"{str(path)!r} is not a report: expected an object with schema and cells, as --json writes it")
    if found["schema"] != SCHEMA:
        raise ReportError(f"{str(path)!r} has schema {found['schema']!r}, expected {SCHEMA}: write it again with this version's --json")
    check(found, json.loads((HERE / "schema.json").read_text()), str(path))
    return found


TYPES = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "null": type(None)}


def check(value, schema, at):
    """The part of JSON Schema that schema.json uses.

    Args:
        at: the name of the value, for messages.

    Raises:
        ReportError: with the first place that differs.
    """
    names = schema.get("type", [])
    names = [names] if isinstance(names, str) else names
    if names and (isinstance(value, bool) or not isinstance(value, tuple(t for n in names for t in _tuple(TYPES[n])))):
        raise ReportError(f"{at} is {_shown(value)}, expected {' or '.join(names)}")
    if "const" in schema and value != schema["const"]:
        raise ReportError(f"{at} is {_shown(value)}, expected {schema['const']!r}")
    if "enum" in schema and value not in schema["enum"]:
        raise ReportError(f"{at} is {_shown(value)}, expected one of {', '.join(map(repr, schema['enum']))}")
    if "minimum" in schema and value is not None and value < schema["minimum"]:
        raise ReportError(f"{at} is {value}, expected {schema['minimum']} or more")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
            raise ReportError(f"{at} has {len(value)} items, expected {schema['minItems']}")
        for i, item in enumerate(value):
            check(item, schema.get("items", {}), f"{at}[{i}]")
    if isinstance(value, dict):
        for name in schema.get("required", []):
            if name not in value:
                raise ReportError(f"{at} has no {name!r}")
        for name, item in value.items():
            check(item, schema.get("properties", {}).get(name, schema.get("additionalProperties", {})), f"{at}.{name}")


def _tuple(types):
    return types if isinstance(types, tuple) else (types,)


def _shown(value):
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _plain(value):
    """The value as JSON gives it back; infinities and NaN, which JSON does not have, as null."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _device_name(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def _versions(candidate):
    found = {name: _version(name) for name in ("quantref", "torch", "triton", "hypothesis")}
    found["quantref"] = " at ".join(filter(None, (found["quantref"], _commit()))) or None
    package = candidate.partition(":")[0].partition(".")[0]
    owners = importlib.metadata.packages_distributions().get(package, [])
    return {**found, "python": platform.python_version(), "candidate": _version(owners[0]) if owners else None}


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit():
    """The commit of a checkout; None for an installed package."""
    root = HERE.parent.parent
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", root, "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except OSError:  # no git here
        return None
    return done.stdout.strip() or None
