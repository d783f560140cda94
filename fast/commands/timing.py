"""How long calls take: on a GPU from its own clock, in CUDA graphs; on a CPU from the host's. Weights are cold: calls go around many copies."""

import itertools
import statistics
import time

import torch

# Copies of a weight together exceed several times any GPU's L2 cache, but of a small one there are no more than so many; a graph has so many
# launches, or more, that its start does not count.
ROTATED, MOST, LAUNCHES, REPLAYS = 240e6, 1000, 24, 20
# On a CPU: calls, and seconds after which a few are enough.
CALLS, FEW, SECONDS = 20, 3, 2.0
HOST_CALLS = 200


def copies(size):
    """How many copies of so many bytes exceed ROTATED together, or MOST."""
    return min(int(ROTATED // max(size, 1)) + 1, MOST)


def device_us(calls, device):
    """Microseconds a call: (median, least, most). calls: functions of nothing, one a copy of the weight."""
    calls[0]()
    return _in_graphs(calls) if device.type == "cuda" else _one_by_one(calls)


def host_us(call, device):
    """Microseconds of the host a call, without waiting for the device: (median, least, most)."""
    if device.type != "cuda":
        return _one_by_one([call])
    times = []
    for _ in range(REPLAYS + 1):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(HOST_CALLS):
            call()
        times.append((time.perf_counter() - start) / HOST_CALLS * 1e6)
    torch.cuda.synchronize(device)
    return _summary(times[1:])


def bandwidth(device):
    """Bytes in a second, read and written, of a kernel that copies."""
    here, there = torch.zeros(2, 2**27, device=device)
    return 2 * there.nbytes / device_us([lambda: torch.neg(there, out=here)], device)[0] * 1e6


def _one_by_one(calls):
    times, start = [], time.perf_counter()
    for call in itertools.cycle(calls):
        if len(times) >= CALLS or (len(times) >= FEW and time.perf_counter() - start > SECONDS):
            return _summary(times)
        before = time.perf_counter()
        call()
        times.append((time.perf_counter() - before) * 1e6)


def _in_graphs(calls):
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph, calls, times = torch.cuda.CUDAGraph(), calls * -(-LAUNCHES // len(calls)), []
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(REPLAYS + 1):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    # Without the first, which moves the graph to the GPU.
    return _summary([a.elapsed_time(b) * 1e3 / len(calls) for a, b in times[1:]])


def _summary(times):
    return statistics.median(times), min(times), max(times)
