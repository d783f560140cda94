"""Do several ranks agree with one? The exit status is 1 if not.

`python -m fast.parallel.check --backend nccl --world 2` starts them; under torchrun it is one of them, without --world.
"""

import argparse
import os
import sys
import time
import traceback

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException

from .cases import cases
from .launch import join, launch


def check(device):
    """Run all cases on this rank; rank 0 prints a line for each, and each rank what it found wrong.

    Raises:
        SystemExit: some case failed, on some rank.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    failed = 0
    for name, case in cases(device):
        start = time.monotonic()
        try:
            complaint = case(rank, size, device)
        except Exception:
            complaint = traceback.format_exc()
        if complaint:
            print(f"rank {rank}: {name}: {complaint}", file=sys.stderr, flush=True)
        bad = torch.tensor([bool(complaint)], dtype=torch.int32, device=device)
        dist.all_reduce(bad)
        failed += bool(bad)
        if rank == 0:
            print(f"{'FAIL' if bad else 'pass'}  {name}  ({time.monotonic() - start:.2f} s)", flush=True)
    if rank == 0:
        print(f"{size} ranks on {device.type}: {failed} cases failed", flush=True)
    if failed:
        raise SystemExit(1)


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m fast.parallel.check", description="Several ranks against one.")
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="nccl" if torch.cuda.is_available() else "gloo")
    parser.add_argument("--world", type=int, help="start so many ranks here; without it, be one of torchrun's")
    chosen = parser.parse_args(arguments)
    if chosen.world is None and "RANK" not in os.environ:
        parser.error("say --world 2, or start it with torchrun")
    if chosen.world is not None and not 1 <= chosen.world <= 4:
        parser.error(f"--world is {chosen.world}, expected 1 to 4")
    if chosen.world is None:
        return join(check, chosen.backend, int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    try:
        launch(check, chosen.world, chosen.backend)
    except (ProcessException, TimeoutError) as error:
        # The ranks have said the rest.
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
