"""One process a rank, started here, with an end to waiting: whichever rank fails, its error is raised and the others are stopped."""

import datetime
import os
import tempfile
import time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# How long a rank waits for the others, in seconds.
PATIENCE = 60


def launch(body, world, backend="gloo", deadline=300.0):
    """body(device) on `world` ranks, each in a process of its own, with a group over all of them.

    Args:
        body: a function that another process can import. device: of the rank: the CPU for gloo, a GPU for nccl.
        deadline: seconds for all of it.

    Raises:
        torch.multiprocessing.ProcessException: of the first rank that failed, with its traceback; the others are stopped.
        TimeoutError: the deadline passed; all ranks are stopped.
    """
    end = time.monotonic() + deadline
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{os.path.join(folder, 'ranks')}"
        context = mp.spawn(_rank, (body, world, backend, meeting), nprocs=world, join=False)
        while not context.join(timeout=max(min(1.0, end - time.monotonic()), 0)):
            if time.monotonic() >= end:
                for process in context.processes:
                    process.kill()
                    process.join()
                raise TimeoutError(f"launch: {world} ranks of {backend} had {deadline:g} s, and did not finish")


def _rank(rank, body, world, backend, meeting):
    join(body, backend, rank, rank, init_method=meeting, world_size=world)


def join(body, backend, rank, local_rank, **meeting):
    """body(device) as one rank of a group. local_rank: which GPU of this host is its own. meeting: as init_process_group's."""
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    own = {"device_id": device} if backend == "nccl" else {}
    dist.init_process_group(backend, rank=rank, timeout=datetime.timedelta(seconds=PATIENCE), **meeting, **own)
    body(device)
    dist.destroy_process_group()
