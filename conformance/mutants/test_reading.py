"""The judge of readers: right readers agree with all golden vectors, and a wrong one does not."""

import pytest

import ref
from conformance.mutants import reading
from ref.layouts import awq, hqq
from ref.rounding import round_to

LAYOUTS = sorted(path.stem for path in reading.FOLDER.glob("*.safetensors") if not path.stem.endswith("_cuda"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_vector_agrees(layout):
    found = reading.read_all(layout)
    assert found.error is None
    assert found.cases == len(reading.vectors(layout)[0]) - sum(name == layout for name, _ in reading.SKIPPED)


def test_the_first_disagreement_is_named(monkeypatch):
    monkeypatch.setattr(awq, "FAST_ORDER", awq.FAST_ORDER.flip(0))
    found = reading.read_all("awq")
    assert found.case and "fast" in found.case and found.error.startswith("w[")


def test_a_reader_that_raises_disagrees(monkeypatch):
    monkeypatch.setattr(awq, "ORDER", (0, 1, 2))
    assert reading.read_all("awq").error.startswith("raised ")


def test_two_roundings_are_no_more_than_that():
    """What HQQ computes lies within two roundings; what is off by six does not."""
    parts, expected = reading.parts_of(reading.vectors("hqq")[1], "b4_axis1")
    q = hqq.read(parts, {})
    assert reading.disagreement(q, expected, "hqq", "b4_axis1") is None
    off = round_to(ref.dequantize(q) * (1 + 3 * 2.0**-10), expected.dtype)
    assert reading.disagreement(q, off, "hqq", "b4_axis1") is not None
