"""Which layers a pattern means."""

import re

import pytest

from . import rules


def test_by_substring():
    assert rules.by_substring("model.layers.3.mlp.gate", ["lm_head", "mlp.gate"]) == "mlp.gate"
    assert rules.by_substring("model.layers.3.mlp.up_proj", ["lm_head", "mlp.gate"]) is None
    assert rules.by_substring("model.layers.3", []) is None


@pytest.mark.parametrize(
    ("name", "patterns", "match", "expected"),
    [
        ("lm_head", ["lm_head"], re.match, "lm_head"),
        ("model.lm_head", ["lm_head"], re.match, None),  # a name is the whole name
        ("model.lm_head", ["re:.*lm_head"], re.match, "re:.*lm_head"),
        ("model.lm_head.x", ["re:.*lm_head"], re.match, "re:.*lm_head"),  # match: from the start, not to the end
        ("model.lm_head.x", ["re:.*lm_head"], re.fullmatch, None),
        ("model.lm_head", ["re:lm_head"], re.search, "re:lm_head"),
        ("model.lm_head", ["re:lm_head"], re.match, None),
        ("h.1", ["re:h\\.2", "h.1"], re.match, "h.1"),  # the first that matches
        ("h.1", ["re:h", "h.1"], re.match, "re:h"),
        (".*", [".*"], re.match, ".*"),  # a name without re: is no regular expression
        ("abc", [".*"], re.match, None),
    ],
)
def test_by_name_or_re(name, patterns, match, expected):
    assert rules.by_name_or_re(name, patterns, match) == expected


@pytest.mark.parametrize(
    ("name", "pattern", "matches"),
    [
        ("lm_head", "lm_head", True),
        ("model.layers.0.mlp.gate", "*.gate", True),  # a star crosses dots
        ("model.layers.0.mlp.gate_proj", "*.gate", False),
        ("model.layers.10.mlp", "model.layers.?.mlp", False),
        ("model.layers.1.mlp", "model.layers.[12].mlp", True),
        ("Model", "model", False),
    ],
)
def test_by_glob(name, pattern, matches):
    assert rules.by_glob(name, [pattern]) == (pattern if matches else None)


def test_dynamic():
    overrides = {"-:.*lm_head": {}, "+:.*\\.up": {"bits": 8}, ".*\\.down": {"bits": 3}, ".*": {"bits": 2}}
    assert rules.dynamic("model.lm_head", overrides) is None
    assert rules.dynamic("h.0.up", overrides) == {"bits": 8}
    assert rules.dynamic("h.0.down", overrides) == {"bits": 3}
    assert rules.dynamic("h.0.gate", overrides) == {"bits": 2}
    assert rules.dynamic("h.0.gate", {"up": {"bits": 8}}) == {}  # from the name's start
    assert rules.dynamic("h.0.gate", {}) == {}


def test_no_regular_expression():
    with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
        rules.by_name_or_re("a", ["re:("])
    with pytest.raises(ValueError, match=r"'\*' is no regular expression"):
        rules.dynamic("a", {"+:*": {}})


def test_strings():
    assert rules.strings(None, "ignore") == []
    assert rules.strings(["a"], "ignore") == ["a"]
    for value in ("a", [1], {"a": 1}, 3, [["a"]]):
        with pytest.raises(ValueError, match="ignore is "):
            rules.strings(value, "ignore")


def test_layers():
    names = ["a.0.qweight", "a.0.scales", "a.0.bias", "a.0.g_idx.x", "a.1.weight", "qweight", "b.scales"]
    assert rules.layers(names, ("qweight",), ("scales", "g_idx")) == {"a.0": {"qweight": "a.0.qweight", "scales": "a.0.scales"}}
    both = rules.layers(["a.weight", "a.weight_scale", "a.weight_packed"], ("weight_packed", "weight_scale"), ("weight",))
    assert both == {"a": {"weight_packed": "a.weight_packed", "weight_scale": "a.weight_scale", "weight": "a.weight"}}
