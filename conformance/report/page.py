"""The report as a page: one HTML file that needs nothing else.

What a candidate or a format says goes through escape.text(): it stays text. A Content-Security-Policy allows the page's own script only.
Without a script all is there, too: a cell of the matrix is a link to its details, which show when they are the link's target.
"""

import base64
import hashlib
import re

from ..status import FAILING, STATUSES
from .compare import compare, name
from .document import HERE, document
from .escape import text
from .plots import errors, shares, widths

# What stands in a cell of the matrix for a status, and the kind that chooses its colour (page.css).
MARKS = {
    "pass": ("P", "good"),
    "fail": ("F", "bad"),
    "mistrusted": ("M", "doubt"),
    "unsupported": ("U", "none"),
    "undeclared reject": ("R", "bad"),
    "crash": ("C", "broken"),
    "timeout": ("T", "broken"),
    "error": ("E", "broken"),
    "xfail": ("xf", "doubt"),
    "xpass": ("xp", "bad"),
    "precondition failed": ("pf", "halted"),
    "blocked": ("B", "halted"),
    "not run": ("nr", "none"),
    "not provided": ("np", "none"),
}

# How much of a candidate's message is shown.
LONGEST = 4000


def write_html(path, cells, run, old=None, fingerprint=None):
    """The page as a file.

    Args:
        cells, run, fingerprint: as of document().
        old: the document of another run to compare with, as read() gives it, or None.
    """
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(page(document(cells, run, fingerprint), old))


def page(new, old=None):
    """The page of a document, compared with an old one where there is one."""
    comparison = None if old is None else compare(old, new)
    before = {} if comparison is None else {_key(b): a for _, a, b in comparison.changed}
    ids = _ids(new["cells"])
    failing = [cell for cell in new["cells"] if cell["status"] in FAILING]
    style, script = ((HERE / f"page.{kind}").read_text() for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    candidate = text(new["run"]["candidate"])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{candidate}: {_verdict(new)}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#matrix">Skip to the matrix</a>
<header>
<p class="kind">Conformance report</p>
<h1>{candidate}</h1>
<p class="verdict">{_verdict(new)}</p>
{_legend(new["cells"])}
{_facts(new)}
{_power(new["power"])}
</header>
<main>
{_complaints(new["run"].get("complaints", []))}
{_comparison(comparison, ids)}
{_matrix(new["cells"], ids, before)}
{_failures(failing, ids)}
{_fingerprint(new["fingerprint"])}
{_settings(new)}
<section class="details" aria-labelledby="details-title">
<h2 id="details-title">Details</h2>
<p id="says" class="hidden" role="status" aria-live="polite"></p>
{"".join(_details(cell, ids[_key(cell)], before.get(_key(cell))) for cell in new["cells"])}
</section>
</main>
<script>{script}</script>
</body>
</html>
"""


def _key(cell):
    return cell["op"], cell["label"], cell["impl"]


def _ids(cells):
    """Names for links, the same in every report: of the cell's own name where that is not taken."""
    found = {}
    for cell in cells:
        slug = "c-" + re.sub(r"[^\w.]+", "-", ".".join(filter(None, _key(cell))), flags=re.ASCII)
        while slug in found.values():
            slug += "-"
        found[_key(cell)] = slug
    return found


def _verdict(new):
    cells = [cell for cell in new["cells"] if cell["status"] != "not provided"]
    failing = sum(cell["status"] in FAILING for cell in cells)
    passing = sum(cell["status"] == "pass" for cell in cells)
    said = "nothing was tried"
    if failing:
        said = f"{failing} of {len(cells)} cells {'fails' if failing == 1 else 'fail'}"
    elif cells:
        said = f"nothing fails, {passing} of {len(cells)} cells pass"
    return said + ("; waivers fail the run" if new["run"].get("complaints") else "")


def _mark(status, tag="span", attributes=""):
    letters, kind = MARKS[status]
    return f'<{tag} class="mark {kind}"{attributes}>{letters}</{tag}>'


def _legend(cells):
    counts = {status: sum(cell["status"] == status for cell in cells) for status in STATUSES}
    items = "".join(
        f'<li title="{STATUSES[status]}">{_mark(status)} {status} <b>{count}</b></li>' for status, count in counts.items() if count
    )
    return f'<ul class="legend" aria-label="Cells by status">{items}</ul>'


def _facts(new):
    run = new["run"]
    examples = sum(cell["examples"] for cell in new["cells"])
    shard = f", part {run['shard']} of the cells" if run.get("shard") else ""
    return _list(
        {
            "device": f"{run['device']}, {new['device_name']}",
            "profile": f"{run['profile']}, {run['examples']:,} examples a cell, seed {run['seed']}{shard}",
            "ran": f"{examples:,} examples in {run['seconds']:.0f} s, {run['examples_per_second']:.1f} a second",
            "date": new["date"].replace("T", " ").replace("+00:00", " UTC"),
        },
        "facts",
    )


def _power(power):
    if power is None:
        return '<p class="power">What a pass is worth was not measured for this version of the suite: it has no power.json.</p>'
    lanes = {"cpu": "on a CPU alone", "gpu": "on a GPU alone"}
    alone = ", ".join(f"{power['killed'][lane]} {words}" for lane, words in lanes.items() if power["killed"].get(lane) is not None)
    both = power["killed"].get("both")
    found = alone if both is None else f"{both} ({alone})" if alone else str(both)
    return (
        f'<p class="power"><b>What a pass is worth.</b> Of {power["mutants"]} kernels known to be wrong the suite finds {found}.'
        f" Of {power['variations']} correct variations it blames {power['false_alarms']}, in {power['examples']:,} examples."
        f" Measured {text(power['date'])} at {text(power['commit'])}.</p>"
    )


def _list(pairs, kind):
    items = "".join(f"<div><dt>{text(key)}</dt><dd>{text(value)}</dd></div>" for key, value in pairs.items())
    return f'<dl class="{kind}">{items}</dl>'


def _link(cell, ids):
    return f'<a href="#{ids[_key(cell)]}">{text(name(cell))}</a>'


def _complaints(lines):
    if not lines:
        return ""
    items = "".join(f"<li>{text(line)}</li>" for line in lines)
    return (
        f'<section aria-labelledby="complaints"><h2 id="complaints">Waivers that fail the run</h2><ul class="rows">{items}</ul></section>'
    )


def _comparison(comparison, ids):
    if comparison is None:
        return ""
    changed = "".join(
        f'<li class="{kind}"><b>{kind}</b> {_link(b, ids)} {_mark(a["status"])} {a["status"]} → {_mark(b["status"])} {b["status"]}</li>'
        for kind, a, b in comparison.changed
    )
    changed += "".join(f"<li><b>new</b> {_link(c, ids)} {_mark(c['status'])} {c['status']}</li>" for c in comparison.new)
    changed += "".join(f"<li><b>gone</b> {text(name(c))} {_mark(c['status'])} {c['status']}</li>" for c in comparison.gone)
    settings = "".join(f"<li><b>{text(what)}</b> {text(a)} → {text(b)}</li>" for what, a, b in comparison.settings)
    same = f"{comparison.same} cells have the status that they had."
    return (
        f'<section aria-labelledby="changes"><h2 id="changes">Since the old run</h2><p>{same if comparison.same else ""}'
        f"{'' if changed else ' Nothing changed.'}</p>"
        + (f'<ul class="rows">{changed}</ul>' if changed else "")
        + (f'<h3>Not the same in both runs</h3><ul class="rows">{settings}</ul>' if settings else "")
        + "</section>"
    )


def _failures(cells, ids):
    if not cells:
        return ""
    items = "".join(f"<li>{_mark(c['status'])} {_link(c, ids)} <span class='why'>{text(_first_line(c))}</span></li>" for c in cells)
    return f'<section aria-labelledby="failures"><h2 id="failures">What fails</h2><ul class="rows">{items}</ul></section>'


def _first_line(cell):
    lines = (cell["error"] or cell["reason"]).strip().splitlines()
    return lines[0][:300] if lines else STATUSES[cell["status"]]


def _matrix(cells, ids, before):
    missing = list(dict.fromkeys(cell["op"] for cell in cells if cell["status"] == "not provided"))
    tables = "".join(_table(ops, cells, ids, before) for ops in _groups([c for c in cells if c["op"] not in missing]))
    lacking = f"<p>{_mark('not provided')} Not provided: {text(', '.join(missing))}.</p>" if missing else ""
    return f"""<section aria-labelledby="matrix"><h2 id="matrix" tabindex="-1">Formats and operations</h2>
<p class="hint">A cell opens its details. Arrow keys move, Enter opens, Tab goes on into the details, Escape closes them.
The bar under a letter is the largest error as a share of what is admissible{"; a dot: it changed since the old run" if before else ""}.</p>
<div class="tables">{tables}</div>{lacking}</section>"""


def _groups(cells):
    """Operations that share rows, each group a table. Rows that all may have, as `generated`, do not count unless there are no others."""
    labels = {}
    for cell in cells:
        labels.setdefault(cell["op"], {})[cell["label"]] = None
    groups = []
    for op, found in labels.items():
        own = set(found) - {"generated"} or set(found)
        joined = [group for group in groups if group[1] & own]
        first = groups.index(joined[0]) if joined else len(groups)
        groups = [group for group in groups if group not in joined]
        groups.insert(first, ([o for group in joined for o in group[0]] + [op], own.union(*(group[1] for group in joined))))
    return [ops for ops, _ in groups]


def _table(ops, cells, ids, before):
    """Rows: formats, columns: operations and their implementations; or rows: operations, where they have one format alone."""
    by = {_key(cell): cell for cell in cells}
    labels = list(dict.fromkeys(c["label"] for c in cells if c["op"] in ops))
    impls = {op: list(dict.fromkeys(c["impl"] for c in cells if c["op"] == op)) for op in ops}

    def box(op, label, impl):
        cell = by.get((op, label, impl))
        inside = _box(cell, ids[_key(cell)], _key(cell) in before) if cell else ""
        return f"<td class='first'>{inside}</td>" if impl == impls[op][0] else f"<td>{inside}</td>"

    if len(labels) == 1 and len(ops) > 1:
        columns = list(dict.fromkeys(impl for op in ops for impl in impls[op]))
        corner = f"<thead><tr><th scope='col'>operation</th>{''.join(_column(impl or 'status') for impl in columns)}</tr></thead>"
        rows = {op: "".join(box(op, labels[0], impl) for impl in columns) for op in ops}
    else:
        split = any(impl is not None for op in ops for impl in impls[op])
        tops = "".join(
            f"<th scope='colgroup' colspan='{len(impls[op])}'>{_breakable(op)}</th>"
            if impls[op] != [None]
            else f"<th scope='col' rowspan='{2 if split else 1}'>{_breakable(op)}</th>"
            for op in ops
        )
        under = "".join(_column(impl, impl == impls[op][0]) for op in ops for impl in impls[op] if impls[op] != [None])
        corner = (
            f"<thead><tr><th scope='col' rowspan='{2 if split else 1}'>format</th>{tops}</tr>{f'<tr>{under}</tr>' if split else ''}</thead>"
        )
        rows = {label: "".join(box(op, label, impl) for op in ops for impl in impls[op]) for label in labels}
    body = "".join(f"<tr><th scope='row'>{_breakable(row)}</th>{boxes}</tr>" for row, boxes in rows.items())
    caption = f"Status of {text(', '.join(ops))} by format and implementation"
    return (
        f"<div class='scroll'><table class='matrix'><caption class='hidden'>{caption}</caption>{corner}<tbody>{body}</tbody></table></div>"
    )


def _column(impl, first=False):
    return f"<th scope='col' class='impl{' first' if first else ''}'><span>{text(impl or 'any')}</span></th>"


def _breakable(value):
    return text(value).replace("_", "_<wbr>")


def _box(cell, target, changed):
    told = f"{cell['status']}: {name(cell)}" + (f", largest error / bound {_worst(cell)}" if cell["elements"] else "")
    told += ", changed since the old run" if changed else ""
    bar = f" style='--worst:{min(1 if cell['worst'] is None else cell['worst'], 1):.3f}'" if cell["elements"] else ""
    dot = " data-changed" if changed else ""
    return _mark(cell["status"], "a", f" href='#{target}' aria-label='{text(told)}' title='{text(told)}'{bar}{dot}")


def _worst(cell):
    return "infinite" if cell["worst"] is None else f"{cell['worst']:.3f}"


def _details(cell, target, before):
    parts = [
        f"<article id='{target}' class='{'failing' if cell['status'] in FAILING else 'other'}' aria-labelledby='{target}-title'>",
        f"<a class='close' href='#-' aria-label='Close'>×</a><h3 id='{target}-title'>{_breakable(name(cell))}</h3>",
        f"<p>{_mark(cell['status'])} <b>{cell['status']}</b>: {STATUSES[cell['status']]}"
        + (f"; in the old run: {before['status']}" if before else "")
        + ".</p>",
    ]
    if cell["blocked_by"]:
        parts.append(f"<p>Blocked by {text(cell['blocked_by'])}.</p>")
    if cell["waiver"]:
        parts.append(f"<p>Waived: {text(cell['waiver'])}</p>")
    for waiver, (covered, failed) in cell["waived"].items():
        parts.append(f"<p>{text(waiver)} covers {covered} examples of this cell, of which {failed} failed.</p>")
    if cell["error"]:
        parts.append(f"<h4>What came</h4><pre class='error'>{_cut(cell['error'])}</pre>")
    if cell["reason"]:
        parts.append(f"<h4>Why</h4><pre>{_cut(cell['reason'])}</pre>")
    if cell["case"]:
        parts.append(_code("The smallest case", cell["case"]))
    if cell["reproduce"]:
        parts.append(_code("To see it again", cell["reproduce"]))
    if cell["examples"] or cell["unsupported"]:
        parts.append(_list(_numbers(cell), "numbers"))
    if cell["elements"]:
        parts += [errors(cell["errors"]), widths(cell["widths"])]
    elif cell["examples"]:
        parts.append("<p>No bound was needed: all that was compared had to be equal bit for bit.</p>")
    for title, counts in (("Examples by the variant that agreed first", cell["variants"]), ("Examples by kind of data", cell["regimes"])):
        if counts:
            parts.append(f"<h4>{title}</h4>{shares(counts)}")
    return "".join(parts) + "</article>"


def _numbers(cell):
    found = {"examples": f"{cell['examples']:,}"}
    if cell["left_out"]:
        found["left out for lack of time"] = f"{cell['left_out']:,}"
    if cell["unsupported"]:
        found["declined"] = f"{cell['unsupported']:,}"
    if cell["elements"]:
        found |= {
            "elements under a bound": f"{cell['elements']:,}",
            "largest error / bound": _worst(cell),
            "equal to the rounded exact result": f"{cell['matches'] / cell['elements']:.1%}",
            "bounds too wide to tell much": f"{cell['wide'] / cell['elements']:.1%}",
        }
    if cell["bias_z"] is not None:
        found["rounding bias, sigmas"] = f"{cell['bias_z']:+.1f}"
    return found | {"in its calls": f"{cell['seconds']:.1f} s"}


def _code(title, code):
    return f"<h4>{title}</h4><div class='code'><pre><code>{_cut(code)}</code></pre><button type='button' hidden>Copy</button></div>"


def _cut(value):
    more = len(value) - LONGEST
    return text(value[:LONGEST]) + (f"\n... {more:,} more characters" if more > 0 else "")


def _fingerprint(found):
    if found is None:
        return ""
    # The columns' heads say impl; notes are longest, and come last.
    names = sorted({key: None for one in found.values() for key in one if key != "impl"}, key=lambda key: key == "notes")
    head = "".join(f"<th scope='col'>{text('any' if impl == '-' else impl)}</th>" for impl in found)
    rows = "".join(
        f"<tr><th scope='row'>{text(key.replace('_', ' '))}</th>"
        + "".join(f"<td>{_value(one.get(key))}</td>" for one in found.values())
        + "</tr>"
        for key in names
    )
    return f"""<section aria-labelledby="fingerprint"><h2 id="fingerprint">Fingerprint</h2>
<p>How the products add up, as probes with chosen inputs see it from outside.</p><div class="scroll"><table class="plain">
<caption class="hidden">Fingerprint by implementation</caption>
<thead><tr><th scope="col">property</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></section>"""


def _value(value):
    if isinstance(value, list):
        return "<br>".join(_value(item) for item in value)
    if isinstance(value, dict):
        return "<br>".join(f"{text(key)}: {_value(item)}" for key, item in value.items())
    return {None: "-", True: "yes", False: "no"}[value] if value is None or isinstance(value, bool) else text(value)


def _settings(new):
    versions = {key: value or "not known" for key, value in new["versions"].items()}
    impls = ", ".join(impl or "any" for impl in new["run"]["impls"])
    return f"""<section aria-labelledby="versions"><h2 id="versions">Versions</h2>
{_list({**versions, "implementations": impls, "report schema": new["schema"]}, "facts")}</section>"""
