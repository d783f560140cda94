"""Two runs: which cells changed status, which are new, which are gone."""

from dataclasses import dataclass

from ..status import FAILING

# What a reader calls a change, by how far up the status went.
WORSE, BETTER, OTHER = "worse", "better", "other"


@dataclass(frozen=True)
class Comparison:
    """What became of an old run's cells.

    changed: (WORSE, BETTER or OTHER, old cell, new cell), the worse ones first. new, gone: cells. same: how many kept their
    status. settings: (name, old, new) of what else was different: the run's settings, versions, device.
    """

    changed: tuple
    new: tuple
    gone: tuple
    same: int
    settings: tuple


def compare(old, new):
    """The Comparison of two documents."""
    before, now = _by_key(old), _by_key(new)
    both = [(before[key], now[key]) for key in now if key in before]
    changed = [(_change(a["status"], b["status"]), a, b) for a, b in both if a["status"] != b["status"]]
    order = (WORSE, OTHER, BETTER)
    return Comparison(
        tuple(sorted(changed, key=lambda item: order.index(item[0]))),
        tuple(cell for key, cell in now.items() if key not in before),
        tuple(cell for key, cell in before.items() if key not in now),
        len(both) - len(changed),
        tuple(_settings(old, new)),
    )


def differences(comparison):
    """The Comparison as text: a line of counts, a line of settings, a line for each cell."""
    count = {kind: sum(c[0] == kind for c in comparison.changed) for kind in (WORSE, BETTER, OTHER)}
    lines = [
        f"compared with the old run: {count[WORSE]} worse, {count[BETTER]} better, {count[OTHER]} changed otherwise,"
        f" {len(comparison.new)} new, {len(comparison.gone)} gone, {comparison.same} as before"
    ]
    if comparison.settings:
        lines.append("  not the same: " + ", ".join(f"{name} {old} -> {new}" for name, old, new in comparison.settings))
    lines += [f"  {kind:6}  {name(b)}: {a['status']} -> {b['status']}" for kind, a, b in comparison.changed]
    lines += [f"  new     {name(cell)}: {cell['status']}" for cell in comparison.new]
    lines += [f"  gone    {name(cell)}: {cell['status']}" for cell in comparison.gone]
    return "\n".join(lines)


def name(cell):
    """A cell's name: operation, format, implementation where there is one."""
    return " ".join(filter(None, (cell["op"], cell["label"], cell["impl"])))


def _by_key(document):
    return {(cell["op"], cell["label"], cell["impl"]): cell for cell in document["cells"]}


def _change(old, new):
    if old == "pass" or (new in FAILING and old not in FAILING):
        return WORSE
    return BETTER if new == "pass" else OTHER


def _settings(old, new):
    for part in ("run", "versions"):
        for key, value in new[part].items():
            if key not in ("seconds", "examples_per_second") and old[part].get(key) != value:
                yield key if part == "run" else f"version of {key}", old[part].get(key), value
    if old["device_name"] != new["device_name"]:
        yield "device's name", old["device_name"], new["device_name"]
