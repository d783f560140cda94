"""Failures that are known and put up with: a TOML file that says which, why and until when.

    [[waiver]]
    link = "https://github.com/me/kernels/issues/7"     # why
    op = "linear*"                                      # patterns; left out: any. A function without impl= has the impl "-"
    format = "int4_*"
    impl = "triton"
    where = "k % 128 != 0 and dtype == 'fp16'"          # of the case's fields; left out: every case
    statuses = ["fail"]                                 # left out: fail, undeclared reject, crash and timeout
    until = 2030-01-31                                  # after that day it holds no more

A waiver has to be needed: one that covers nothing that ran, none of whose cases fail in a cell, or that has expired, fails the run.
"""

import ast
import datetime
import functools
import operator
import re
import tomllib
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatchcase

from .candidate import nearest
from .case import Case
from .ops import operations
from .status import STATUSES, WAIVABLE

PATTERNS = ("op", "format", "impl")
KEYS = ("link", *PATTERNS, "where", "statuses", "until")


@dataclass(frozen=True)
class Waiver:
    """One of them. name: where it stands. becomes: the status of a cell with nothing but such failures; reason: what is said of it.

    expected: it has to be needed.
    """

    name: str
    link: str
    until: datetime.date | None = None
    op: str = "*"
    format: str = "*"
    impl: str = "*"
    where: str = ""
    statuses: tuple = WAIVABLE
    becomes: str = "xfail"
    reason: str = ""
    expected: bool = True

    def names(self, op, label, impl):
        """Whether it is about a cell."""
        return fnmatchcase(op, self.op) and fnmatchcase(label, self.format) and fnmatchcase(impl or "-", self.impl)

    def covers(self, case):
        return not self.where or bool(_value(_parse(self.where), case))


def read(path):
    """The Waivers of a file.

    Raises:
        ValueError: there is none, it is no TOML, or says what makes no sense, with the line.
    """
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read()
        found = tomllib.loads(lines)
    except OSError as error:
        raise ValueError(f"--waivers: cannot read {path!r}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    for name in found:
        if name != "waiver":
            raise ValueError(f"{path}:{_line(lines, -1, name)}: unknown table {name!r}, expected [[waiver]]")
    said = found.get("waiver", [])
    if not isinstance(said, list):
        raise ValueError(f"{path}:{_line(lines, -1, 'waiver')}: write [[waiver]], in double brackets")
    return tuple(_waiver(path, lines, i, keys) for i, keys in enumerate(said))


def complaints(waivers, cells, narrowed, today=None):
    """What is wrong with waivers, in sentences, after a run.

    Args:
        narrowed: the run leaves cells out on purpose, so that a waiver may be about none of those that ran.
    """
    today = today or datetime.date.today()
    for waiver in waivers:
        if waiver.until < today:
            yield f"{waiver.name}: expired on {waiver.until} ({waiver.link})"
            continue
        named = [c for c in cells if waiver.names(c.op, c.label, c.impl) and c.status not in ("not run", "not provided")]
        ran, failed = (sum(cell.waived.get(waiver.name, (0, 0))[i] for cell in named) for i in (0, 1))
        if not ran and (named or not narrowed):
            yield f"{waiver.name}: covers nothing that ran ({waiver.link})"
        elif ran and not failed:
            yield f"{waiver.name}: none of the {ran} examples that it covers failed ({waiver.link})"


def active(waivers, today=None):
    """Those that have not expired."""
    today = today or datetime.date.today()
    return tuple(waiver for waiver in waivers if waiver.until >= today)


def _waiver(path, lines, number, said):
    def wrong(key, message):
        return ValueError(f"{path}:{_line(lines, number, key)}: {message}")

    for key in said:
        if key not in KEYS:
            raise wrong(key, f"unknown key {key!r}, expected one of {', '.join(KEYS)}{nearest(key, KEYS)}")
    for key in ("link", "until"):
        if key not in said:
            raise wrong(None, f"this waiver has no {key!r}")
    for key in ("link", *PATTERNS, "where"):
        if not isinstance(said.get(key, ""), str):
            raise wrong(key, f"{key} is {said[key]!r}, expected text")
    if not said["link"]:
        raise wrong("link", "link is empty, expected where the failure is written down")
    until = said["until"]
    try:
        until = datetime.date.fromisoformat(until) if isinstance(until, str) else until
    except ValueError:
        until = None
    if type(until) is not datetime.date:
        raise wrong("until", f"until is {said['until']!r}, expected a day, as 2030-01-31")
    statuses = said.get("statuses", list(WAIVABLE))
    if not isinstance(statuses, list) or not statuses or any(status not in WAIVABLE for status in statuses):
        raise wrong("statuses", f"statuses is {statuses!r}, expected some of {', '.join(WAIVABLE)}")
    ops = [op for op in operations() if fnmatchcase(op, said.get("op", "*"))]
    if not ops:
        raise wrong("op", f"no operation is called {said['op']!r}{nearest(said['op'], operations())}")
    where = said.get("where", "")
    if where:
        try:
            _check(_parse(where), [_class(op) for op in ops])
        except ValueError as error:
            raise wrong("where", f"where: {error}") from None
    patterns = {key: said[key] for key in PATTERNS if key in said}
    name = f"{path}:{_line(lines, number, None)}"
    return Waiver(name, said["link"], until, **patterns, where=where, statuses=tuple(statuses))


def _line(lines, number, key):
    """In which line a key of the waiver of this number stands, or the waiver itself; -1: a key outside of waivers."""
    rows = lines.splitlines()
    starts = [i for i, row in enumerate(rows, 1) if re.match(r"\s*\[\[\s*waiver\s*\]\]", row)]
    start = 1 if number < 0 or number >= len(starts) else starts[number]
    for i, row in enumerate(rows[start - 1 :], start):
        if key is not None and re.match(rf"\s*\[*\s*[\"']?{re.escape(key)}\b", row):
            return i
    return start


def _class(op):
    """The class of an operation's cases."""
    name = "linear" if op == "linear_x" else op
    return next(cls for cls in Case.classes.values() if getattr(cls, "op", None) == name)


COMPARE = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}


@functools.cache
def _parse(where):
    """The expression as a tree.

    Raises:
        ValueError: it is none.
    """
    try:
        return ast.parse(where, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"cannot read {where!r}: {error.args[0]}") from None


def _check(node, classes):
    """Raise ValueError where a tree has something but comparisons, and, or, not, remainders of fields and literals."""
    if isinstance(node, (ast.Name, ast.Attribute)):
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        names = sorted(set().union(*(_names(cls) for cls in classes)))
        if not isinstance(root, ast.Name) or root.id not in names:
            shown = ast.unparse(root)
            raise ValueError(
                f"no case of these operations has a field {shown!r}, expected one of {', '.join(names)}{nearest(shown, names)}"
            )
        return
    operators = [*getattr(node, "ops", [])] + ([node.op] if isinstance(node, (ast.UnaryOp, ast.BinOp)) else [])
    for op in operators:
        if type(op) not in (*COMPARE, ast.Mod, ast.Not, ast.USub):
            raise ValueError(f"{ast.unparse(node)!r}: {type(op).__name__} is not for this, expected comparisons, and, or, not, %")
    if not isinstance(node, (ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.Compare, ast.Constant, ast.Tuple, ast.List)):
        raise ValueError(f"{ast.unparse(node)!r} is not for this, expected comparisons of fields and literals, and, or, not")
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.expr):
            _check(child, classes)


def _names(cls):
    """What of an object may be named: its fields and properties."""
    return {f.name for f in fields(cls)} | {name for name in dir(cls) if isinstance(getattr(cls, name), property)}


class _Missing(Exception):
    """This case has no such field, or one of another type."""


def _value(node, case):
    """The value of a tree for a case; False where the case has no such fields."""
    try:
        return _evaluate(node, case)
    except (_Missing, TypeError, ZeroDivisionError):
        return False


def _evaluate(node, case):
    if isinstance(node, ast.BoolOp):
        values = (_value(child, case) for child in node.values)
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.UnaryOp):
        value = _evaluate(node.operand, case)
        return not value if isinstance(node.op, ast.Not) else -value
    if isinstance(node, ast.BinOp):
        return _evaluate(node.left, case) % _evaluate(node.right, case)
    if isinstance(node, ast.Compare):
        sides = [_evaluate(side, case) for side in (node.left, *node.comparators)]
        return all(COMPARE[type(op)](a, b) for op, a, b in zip(node.ops, sides, sides[1:], strict=False))
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_evaluate(part, case) for part in node.elts)
    if isinstance(node, ast.Constant):
        return node.value
    return _field(node, case)


def _field(node, case):
    """A field by name, or a field of a field: a format as its name."""
    owner, name = (_field(node.value, case), node.attr) if isinstance(node, ast.Attribute) else (case, node.id)
    if not is_dataclass(owner) or name not in _names(type(owner)):
        raise _Missing
    value = getattr(owner, name)
    return str(value) if name in ("format", "x_format") and value is not None else value


assert set(WAIVABLE) <= set(STATUSES)
