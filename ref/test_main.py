"""python -m ref inspect: the table, the totals, one line for an error."""

import os
import subprocess
import sys

import pytest
import torch

from . import __main__ as cli
from .layouts import LAYOUTS
from .layouts.test_checkpoint import EIGHTS, configure, layer, write


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setitem(LAYOUTS, "eights", EIGHTS)
    write(tmp_path, {**layer("h.9.up", n=3, k=8), **layer("h.10.up_and_more", n=1024, k=1024), "norm": torch.ones(2**18)})
    configure(tmp_path)
    return tmp_path


def test_table(checkpoint, capsys):
    assert cli.main(["inspect", str(checkpoint)]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "layer             layout  format  shape      bits/weight   MiB",
        "h.9.up            eights  int8    3x8             12.000  0.00",
        "h.10.up_and_more  eights  int8    1024x1024        8.031  1.00",
        "",
        "total          number  weights  bits/weight   MiB",
        "int8                2  1048600        8.031  1.00",
        "all quantized       2  1048600        8.031  1.00",
        "plain tensors       1                        1.00",
    ]
    assert err == ""


def test_an_error_is_one_line_and_exit_2(checkpoint, capsys):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert cli.main(["inspect", str(checkpoint)]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith(f"python -m ref inspect: {path}: safetensors: ") and err.count("\n") == 1
    assert cli.main(["inspect", str(checkpoint / "nowhere")]) == 2
    assert "nowhere: there is no such file or directory" in capsys.readouterr().err


def test_as_a_command(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-m", "ref", "inspect", str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 2 and "holds no .safetensors file" in done.stderr and not done.stdout


def test_usage(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([])
    assert error.value.code == 2 and "usage: python -m ref" in capsys.readouterr().err
