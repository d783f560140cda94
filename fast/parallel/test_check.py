"""Several ranks against one, with gloo on the CPU; and what happens where a rank fails."""

import time

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from fast.parallel import cases, check
from fast.parallel.launch import PATIENCE, launch


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_agree_with_one(world, capfd):
    launch(check.check, world)
    lines = capfd.readouterr().out.splitlines()
    expected = [name for name, _ in cases.cases(torch.device("cpu"))]
    assert [line.split("  ")[:2] for line in lines] == [*(["pass", name] for name in expected), [f"{world} ranks on cpu: 0 cases failed"]]


def raise_on_one(device):
    if dist.get_rank() == 1:
        raise ValueError("this rank has no weights")
    dist.all_reduce(torch.ones(1))


def wait(device):
    time.sleep(100)


def test_the_error_of_one_rank_is_raised_and_the_others_are_stopped():
    start = time.monotonic()
    with pytest.raises(ProcessRaisedException, match="this rank has no weights"):
        launch(raise_on_one, 2)
    assert time.monotonic() - start < PATIENCE


def test_an_end_to_waiting():
    with pytest.raises(TimeoutError, match="launch: 1 ranks of gloo had 1 s, and did not finish"):
        launch(wait, 1, deadline=1.0)


def test_a_wrong_result_is_found(alone, monkeypatch, capsys):
    """A bias that is added twice, and an expert that fails, in two cases of three."""
    wanted = ("row int4_g128 256x384 exact", "experts, even, exact", "column nvfp4 131x390 random")
    chosen = [(name, case) for name, case in cases.cases(torch.device("cpu")) if name in wanted]
    monkeypatch.setattr(check, "cases", lambda device: chosen)
    right = cases.RowParallelLinear.forward
    monkeypatch.setattr(cases.RowParallelLinear, "forward", lambda self, x: right(self, x) + self.bias.to(x.dtype))
    monkeypatch.setattr(cases, "take_experts", lambda w, here: w[99])
    with pytest.raises(SystemExit):
        check.check(torch.device("cpu"))
    out, err = capsys.readouterr()
    assert [line[:4] for line in out.splitlines()] == ["pass", "FAIL", "FAIL", "1 ra"] and "1 ranks on cpu: 2 cases failed" in out
    assert "differ by more than they may, the worst by 3" in err and "Traceback" in err


@pytest.mark.parametrize("got", [torch.tensor([1.0, torch.nan]), torch.zeros(2), torch.ones(3), torch.ones(2).double()])
def test_what_differs(got):
    assert (
        cases._compare(got, torch.ones(2), torch.full((2,), 0.5)) and cases._compare(torch.ones(2), torch.ones(2), torch.zeros(2)) is None
    )


def test_the_command_line(monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    for arguments, message in ((["--backend", "gloo"], "say --world 2, or start it with torchrun"), (["--world", "5"], "expected 1 to 4")):
        with pytest.raises(SystemExit) as error:
            check.main(arguments)
        assert error.value.code == 2 and message in capsys.readouterr().err
    called = []
    monkeypatch.setattr(check, "launch", lambda *args: called.append(args))
    check.main(["--backend", "nccl", "--world", "2"])
    assert called == [(check.check, 2, "nccl")]

    def failing(*args):
        raise ProcessExitedException("rank 1 failed", 1, 1, 1)

    monkeypatch.setattr(check, "launch", failing)
    with pytest.raises(SystemExit, match="rank 1 failed"):
        check.main(["--backend", "gloo", "--world", "2"])


def test_under_torchrun(monkeypatch):
    """As torchrun starts a rank: by the environment alone."""
    given = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr(check, "check", lambda device: seen.append((device, dist.get_rank(), dist.get_world_size())))
    check.main(["--backend", "gloo"])
    assert seen == [(torch.device("cpu"), 0, 1)] and not dist.is_initialized()
