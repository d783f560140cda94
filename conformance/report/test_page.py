"""The page: its structure, that nothing gets out of its quotes, its colours, and what a browser makes of it."""

import base64
import hashlib
import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from .. import report
from ..cell import Cell
from ..status import FAILING, STATUSES
from .document import HERE
from .page import LONGEST, MARKS, page
from .plots import errors, shares, widths
from .test_report import RUN

HOSTILE = (
    "</pre><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> '\" onclick='x' &amp; \x00\u202e\udc80"
)
VOID = {"meta", "br", "wbr", "rect", "path", "img", "link", "input", "hr"}


def invented():
    """A document with every status, and operations that share formats and that do not."""
    cells = []
    for op, labels, impls in (
        ("linear", ("int8", "int4_g128", "nvfp4", "generated"), ("torch", "triton", "humming")),
        ("quantize", ("int8", "int4_g128", "nvfp4"), (None,)),
        *((op, ("int4_g128", "nvfp4"), ("torch", "triton", "humming")) for op in ("dequantize", "masked_linear")),
        ("pack", ("2 bits", "4 bits"), ("torch",)),
        ("moe_permute", ("all",), ("torch", "triton")),
        ("expert_map", ("all",), ("torch",)),
    ):
        cells += [Cell(op, label, impl, "pass", examples=3, regimes={"exact": 2, "normal": 1}) for label in labels for impl in impls]
    for cell, status in zip(cells, [s for s in STATUSES if s != "not provided"], strict=False):
        cell.status = status
        cell.elements, cell.worst, cell.variants, cell.matches = 100, 0.5, {"exact": 3}, 90
        cell.widths, cell.errors = [60, 30, 0, 0, 9, *[0] * 10, 1], [90, 0, 0, 0, 10, *[0] * 5]
        if status in FAILING:
            cell.case, cell.error = f"LinearCase(n=3, format='{cell.label}')", "y[0] = 2, admissible 1 only"
            cell.reproduce = f"python -m conformance --candidate mine --case '{cell.case}'"
    cells.append(Cell("unpack", "2 bits", None, "not provided"))
    return report.document(cells, RUN, {"torch": {"accumulator_bits": 24, "matches_declaration": None, "notes": ["a", "b"]}})


@pytest.fixture(scope="module")
def document():
    return invented()


class Parsed(HTMLParser):
    """The page as a tree of [tag, attributes, children]; raises where tags do not match."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.root = ["root", {}, []]
        self.open = [self.root]
        self.feed(source)
        self.close()
        assert self.open == [self.root], f"not closed: {[node[0] for node in self.open[1:]]}"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {tag} {attrs}"
        node = [tag, dict(attrs), []]
        self.open[-1][2].append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.open[-1][2].append([tag, dict(attrs), []])

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1][0]}>"
            self.open.pop()

    def handle_data(self, data):
        self.open[-1][2].append(data)

    def all(self, *tags, under=None):
        for node in (under or self.root)[2]:
            if isinstance(node, list):
                if not tags or node[0] in tags:
                    yield node
                yield from self.all(*tags, under=node)

    def one(self, tag, **attributes):
        (found,) = [n for n in self.all(tag) if all(n[1].get(k) == v for k, v in attributes.items())]
        return found


def text_of(node):
    return node if isinstance(node, str) else "".join(map(text_of, node[2]))


def test_every_status_has_a_mark_of_its_own():
    assert list(MARKS) == list(STATUSES)
    assert len({letters for letters, _ in MARKS.values()}) == len(MARKS)
    style = (HERE / "page.css").read_text()
    assert all(f".{kind} {{" in style for _, kind in MARKS.values())


def test_structure(document):
    parsed = Parsed(page(document))
    assert parsed.one("html")[1]["lang"] == "en"
    for tag in ("h1", "header", "main"):
        parsed.one(tag)
    ids = [node[1]["id"] for node in parsed.all() if "id" in node[1]]
    assert len(set(ids)) == len(ids)
    for node in parsed.all("a"):
        assert node[1]["href"] == "#-" or node[1]["href"][1:] in ids
    for node in parsed.all():
        for name in ("aria-labelledby", "aria-describedby"):
            assert node[1].get(name, ids[0]) in ids
    for node in parsed.all("th"):
        assert node[1]["scope"] in ("col", "row", "colgroup")
    for node in parsed.all("table"):
        assert node[1]["class"] == "shares" or any(True for _ in parsed.all("caption", under=node))
    levels = [int(node[0][1]) for node in parsed.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert parsed.one("p", id="says")[1]["aria-live"] == "polite"


def test_nothing_comes_from_elsewhere(document):
    parsed = Parsed(page(document))
    for node in parsed.all():
        assert node[0] not in ("img", "iframe", "object", "embed", "form", "base", "audio", "video") and "src" not in node[1]
        assert node[0] != "link"
    style = text_of(parsed.one("style"))
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    policy = next(n[1]["content"] for n in parsed.all("meta") if n[1].get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(text_of(parsed.one("script")).encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_each_cell_is_in_the_matrix_and_has_its_details(document):
    parsed = Parsed(page(document))
    boxes = [a for td in parsed.all("td") for a in parsed.all("a", under=td)]
    shown = [cell for cell in document["cells"] if cell["op"] != "unpack"]
    assert len(boxes) == len(shown) > 12
    by_name = {a[1]["aria-label"]: a for a in boxes}
    for cell in shown:
        name = " ".join(filter(None, (cell["op"], cell["label"], cell["impl"])))
        (box,) = [a for label, a in by_name.items() if label.split(",")[0] == f"{cell['status']}: {name}"]
        assert text_of(box) == MARKS[cell["status"]][0]
        article = parsed.one("article", id=box[1]["href"][1:])
        said = text_of(article)
        assert name in said and STATUSES[cell["status"]] in said
        for key in ("case", "error", "reproduce"):
            assert cell[key] in said
        assert len(list(parsed.all("svg", under=article))) == (2 if cell["elements"] else 0)
        assert len(list(parsed.all("button", under=article))) == bool(cell["case"]) + bool(cell["reproduce"])
    (failures,) = [n for n in parsed.all("section") if n[1].get("aria-labelledby") == "failures"]
    assert len(list(parsed.all("a", under=failures))) == sum(cell["status"] in FAILING for cell in document["cells"])


def test_operations_that_share_formats_share_a_table(document):
    parsed = Parsed(page(document))
    tables = [n for n in parsed.all("table") if n[1]["class"] == "matrix"]
    assert [[text_of(th) for th in parsed.all("th", under=t) if th[1]["scope"] == "row"] for t in tables] == [
        ["int8", "int4_g128", "nvfp4", "generated"],
        ["2 bits", "4 bits"],
        ["moe_permute", "expert_map"],
    ]
    for table in tables:
        widths = {sum(1 for _ in parsed.all("td", under=row)) for row in parsed.all("tr", under=next(parsed.all("tbody", under=table)))}
        columns = sum(th[1]["scope"] == "col" for th in parsed.all("th", under=next(parsed.all("thead", under=table)))) - 1
        assert widths == {columns}


def test_what_a_candidate_says_stays_text(document):
    hostile = json.loads(json.dumps(document))

    def poison(value):
        if isinstance(value, str):
            return HOSTILE
        if isinstance(value, list):
            return [poison(item) for item in value]
        return {HOSTILE + key: poison(item) for key, item in value.items()} if isinstance(value, dict) else value

    for part in ("fingerprint", "versions"):
        hostile[part] = poison(hostile[part])
    hostile["device_name"], hostile["date"] = HOSTILE, HOSTILE
    hostile["run"] |= {"candidate": HOSTILE, "device": HOSTILE, "profile": HOSTILE, "impls": [HOSTILE], "complaints": [HOSTILE]}
    for cell in hostile["cells"]:
        cell |= {key: HOSTILE for key in ("error", "reason", "case", "reproduce", "blocked_by", "waiver")}
        cell |= {key: cell[key] + HOSTILE for key in ("op", "label")} | {"impl": HOSTILE}
        cell |= {"variants": {HOSTILE: 2}, "regimes": {HOSTILE: 1}, "waived": {HOSTILE: [1, 1]}}
    old = json.loads(json.dumps(hostile))
    old["cells"][0]["status"] = "xfail"
    old["cells"][1]["op"] += "gone"
    plain, harmed = Parsed(page(document, document)), Parsed(page(hostile, old))
    for parsed in (plain, harmed):
        assert len(list(parsed.all("script"))) == 1 and not list(parsed.all("img"))
        assert not [name for node in parsed.all() for name in node[1] if name.startswith("on") or name == "src"]
    assert "\x00" not in page(hostile) and "\u202e" not in page(hostile)
    shown = text_of(next(harmed.all("article")))
    assert "</pre><script>document.title='owned'</script><img src=x" in shown and "&amp; \\x00\\x202e" in shown


def test_a_page_with_half_a_surrogate_can_be_written(tmp_path):
    path = tmp_path / "report.html"
    report.write_html(path, [Cell("linear", "int8", None, "fail", error=HOSTILE)], RUN)
    assert "\\udc80" in path.read_text(encoding="utf-8")


def test_a_long_message_is_cut(document):
    long = json.loads(json.dumps(document))
    long["cells"][1]["error"] = "x" * (LONGEST + 12345)
    source = page(long)
    assert "12,345 more characters" in source and "x" * (LONGEST + 1) not in source


def test_an_infinite_error_says_so(document):
    harmed = json.loads(json.dumps(document))
    harmed["cells"][1]["worst"] = None
    (box,) = [a for a in Parsed(page(harmed)).all("a") if "infinite" in a[1].get("aria-label", "")]
    assert box[1]["style"] == "--worst:1.000"


def test_the_fingerprint_is_a_table(document):
    parsed = Parsed(page(document))
    (section,) = [n for n in parsed.all("section") if n[1].get("aria-labelledby") == "fingerprint"]
    rows = [[text_of(cell) for cell in row[2] if isinstance(cell, list)] for row in parsed.all("tr", under=section)]
    assert rows == [["property", "torch"], ["accumulator bits", "24"], ["matches declaration", "-"], ["notes", "ab"]]


def test_waivers_that_fail_the_run_are_in_the_verdict(document):
    source = page({**document, "run": {**document["run"], "complaints": ["w.toml:3 covers nothing that ran"]}})
    assert "w.toml:3 covers nothing that ran" in source and "; waivers fail the run</title>" in source


def test_power_is_in_the_header(document):
    power = {"mutants": 142, "killed": {"cpu": 131, "gpu": None, "both": 140}, "variations": 22, "false_alarms": 0, "examples": 10000}
    said = text_of(Parsed(page({**document, "power": {**power, "date": "2030-01-02", "commit": "abc"}})).one("header"))
    assert "Of 142 kernels known to be wrong the suite finds 140 (131 on a CPU alone)." in said
    assert "Of 22 correct variations it blames 0, in 10,000 examples." in said and "2030-01-02 at abc" in said
    assert "was not measured" in text_of(Parsed(page({**document, "power": None})).one("header"))


def test_comparison_is_in_the_page(document):
    old = json.loads(json.dumps(document))
    old["cells"][0]["status"] = "fail"
    old["cells"][-2]["label"] = "elsewhere"
    parsed = Parsed(page(document, old))
    (section,) = [n for n in parsed.all("section") if n[1].get("aria-labelledby") == "changes"]
    said = [re.sub(r"\s+", " ", text_of(li)) for li in parsed.all("li", under=section)]
    assert said == ["better linear int8 torch F fail → P pass", "new expert_map all torch P pass", "gone expert_map elsewhere torch P pass"]
    assert "in the old run: fail" in text_of(parsed.one("article", id="c-linear.int8.torch"))
    assert len([a for a in parsed.all("a") if "data-changed" in a[1]]) == 1
    assert "Nothing changed" in page(document, document) and "Since the old run" not in page(document)


def test_plots():
    drawn = Parsed(errors([1000, 10, 0, 0, 0, 0, 0, 0, 0, 1]))
    heights = [float(rect[1]["height"]) for rect in drawn.all("rect")]
    assert len(heights) == 3 and heights[0] > heights[1] > heights[2] > 0
    assert "0.0 to 0.1: 98.9%" in drawn.one("svg")[1]["aria-label"]
    drawn = Parsed(widths([5, 0, 0, 1, 1, *[0] * 10, 1]))
    assert [rect[1]["class"] for rect in drawn.all("rect")] == ["bar", "bar", "wide", "wide"]
    assert "15 to 31 ulps" in drawn.one("svg")[1]["aria-label"] and "32,767 ulps and more" in drawn.one("svg")[1]["aria-label"]
    assert errors([0] * 10) == ""
    assert [text_of(row) for row in Parsed(shares({"a": 1, "<b>": 3})).all("tr")] == ["<b>3", "a1"]


def colours():
    style = (HERE / "page.css").read_text()
    light = dict(re.findall(r"--([\w-]+): (#\w{6})", style[: style.index("@media")]))
    dark = light | dict(re.findall(r"--([\w-]+): (#\w{6})", style[style.index("@media") : style.index("box-sizing")]))
    assert len(light) > 20 and light != dark
    return {"light": light, "dark": dark}


def contrast(a, b):
    """WCAG 2's ratio of two colours."""

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme):
    of = colours()[scheme]
    pairs = [(name, f"{name[:-3]}-bg") for name in of if name.endswith("-fg")]
    pairs += [("soft-fg", "page-bg"), ("page-fg", "soft-bg"), ("link-fg", "page-bg")]
    assert len(pairs) == 12
    for front, back in pairs:
        assert contrast(of[front], of[back]) >= 4.5, (front, back)
    for name in ("bar", "wide", "edge"):
        assert contrast(of[name], of["page-bg"]) >= 3, name


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on this machine")


def browse(tmp_path, source, target="", window="1280,900"):
    """The page's document after its script ran."""
    path = tmp_path / "page.html"
    path.write_text(source, encoding="utf-8", errors="backslashreplace")
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={window}")
    command = [BROWSER, *options, "--virtual-time-budget=3000", "--dump-dom", f"{path.as_uri()}{target}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout


def tried(tmp_path, source, script):
    """What a script finds that runs behind the page's own."""
    source = re.sub(r"<meta http-equiv[^>]*>", "", source)
    ran = f"<script>addEventListener('load', async () => {{ document.body.dataset.found = JSON.stringify(await (async () => {{{script}}})()); }});</script>"
    found = Parsed(browse(tmp_path, source.replace("</body>", f"{ran}</body>")))
    return json.loads(found.one("body")[1]["data-found"])


@browser
def test_browser_runs_the_page_and_nothing_else(document, tmp_path):
    hostile = json.loads(json.dumps(document))
    for cell in hostile["cells"]:
        cell["error"] = cell["reason"] = cell["reproduce"] = HOSTILE
    parsed = Parsed(browse(tmp_path, page(hostile), "#c-linear.int4_g128.torch"))
    assert "owned" not in text_of(next(parsed.all("title")))
    tables = [n for n in parsed.all("table") if n[1]["class"] == "matrix"]
    stops = [[a for a in parsed.all("a", under=t) if a[1].get("tabindex") == "0"] for t in tables]
    assert [len(s) for s in stops] == [1] * len(tables)
    assert not [b for b in parsed.all("button") if "hidden" in b[1]]
    (current,) = [a for a in parsed.all("a") if "aria-current" in a[1]]
    assert current[1]["href"] == "#c-linear.int4_g128.torch"
    assert text_of(parsed.one("p", id="says")).startswith("linear int4_g128 torch: unsupported")


@browser
def test_browser_keyboard(document, tmp_path):
    found = tried(
        tmp_path,
        page(document),
        """
        const at = () => document.activeElement.getAttribute("href");
        const press = (key, more) => {
          document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true, ...more }));
          return at();
        };
        document.querySelector(".matrix td a").focus();
        const moves = ["ArrowRight", "ArrowDown", "End", "Home", "ArrowLeft", "ArrowUp", "ArrowUp"].map((key) => press(key));
        moves.push(press("End", { ctrlKey: true }), press("Home", { ctrlKey: true }));
        const visible = () => [...document.querySelectorAll("article")].filter((a) => a.checkVisibility()).map((a) => a.id);
        const before = visible();
        press("ArrowRight");
        document.activeElement.click();
        await new Promise((resolve) => { setTimeout(resolve, 50); });
        const open = visible();
        const inside = press("Tab");
        const back = press("Tab", { shiftKey: true });
        press("Escape");
        return { moves, before, open, inside, back, closed: visible(), returned: at() };
        """,
    )
    first = "#c-linear.int8.torch"
    assert found["moves"] == [
        "#c-linear.int8.triton",
        "#c-linear.int4_g128.triton",
        "#c-masked_linear.int4_g128.humming",
        "#c-linear.int4_g128.torch",
        "#c-linear.int4_g128.torch",
        first,
        first,
        "#c-linear.generated.humming",
        first,
    ]
    assert found["before"] == [] and found["open"] == ["c-linear.int8.triton"] and found["closed"] == []
    assert found["inside"] == "#-" and found["back"] == found["returned"] == "#c-linear.int8.triton"


@browser
@pytest.mark.parametrize("opened", ["", "#c-linear.int8.triton"])
def test_browser_at_320_pixels(document, tmp_path, opened):
    inner = html.escape(page(document))
    source = f"<!doctype html><title>frame</title><body><iframe srcdoc='{inner}' style='width:320px;height:640px;border:0'></iframe></body>"
    found = tried(
        tmp_path,
        source,
        f"""
        const inner = document.querySelector("iframe").contentDocument;
        inner.location.hash = "{opened}";
        const wide = [...inner.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.closest(".scroll, .hidden, .skip"));
        return {{
          width: [inner.documentElement.clientWidth, inner.documentElement.scrollWidth],
          outside: wide.filter((e) => e.getBoundingClientRect().right > 320.5).map((e) => e.outerHTML.slice(0, 80)),
          open: inner.querySelectorAll("article:target").length,
        }};
        """,
    )
    assert found["open"] == bool(opened)
    assert found["width"][1] <= found["width"][0] <= 320 and found["outside"] == []
