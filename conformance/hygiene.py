"""What a call must leave alone: its inputs, the memory around them, and the process's state."""

import functools
import gc
import os

import torch
from torch.utils import _pytree as pytree

from .oracle import Disagreement, bits, number

# Bytes before and after every buffer: more than a vector store is long, and no less aligned than any allocator's memory.
BAND = 512
# NaN or huge in every float dtype, so that what is read there shows; never all ones in 32 bits, so that NaN or -1 that is written does.
PATTERN = torch.tensor([0xFF, 0xFF, 0x7F, 0x7F], dtype=torch.uint8)
# Larger buffers (far apart rows on pages that are not there) stay where they are.
LARGEST = 2**26
# Sides of the products that keep a GPU busy: about half a millisecond of many blocks, of several lengths.
CROWD = (3000, 2048, 3000, 1024, 3000, 2048, 3000)
# Every eighth example has its small operands as views, with gaps between their elements or rows.
APART, APART_SEED = 8, 1


class Guard:
    """A copy of a storage between two bands."""

    def __init__(self, storage, device):
        size = storage.nbytes()
        self.memory = torch.empty(size + 2 * BAND, dtype=torch.uint8, device=device)
        self.end = BAND + size
        self.memory[:BAND] = self.memory[self.end :] = _pattern(BAND, device)
        self.memory[BAND : self.end] = torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (size,), (1,))
        self.name = "an argument"

    def keep(self):
        self.pristine = self.memory.clone()

    def view(self, tensor):
        """The same view as a tensor is, of the copy."""
        start = BAND // tensor.element_size() + tensor.storage_offset()
        return _view(self.memory, tensor.dtype, start, tensor.shape, tensor.stride())

    def check(self):
        """Raise Disagreement where a band has changed, after putting it right."""
        changed = self.memory != self.pristine
        changed[BAND : self.end] = False
        if not bool(changed.any()):
            return
        at = int(changed.nonzero()[0])
        where = f"{BAND - at} bytes before its start" if at < BAND else f"{at - self.end} bytes behind its end"
        self.memory.copy_(self.pristine)
        raise Disagreement(f"guard: {self.name}", f"the call wrote outside of {self.name}: {int(changed.sum())} bytes, the first {where}")


def lay(problem, seed=0):
    """Move a Problem's buffers between guard bands, once: its args, kwargs and owned become the same views of the copies.

    problem.guards: the copies. problem.apart: names of what lies with gaps there. problem.pristine: copies of what is too large to be moved.
    """
    if hasattr(problem, "guards"):
        return
    names = {t.untyped_storage().data_ptr(): name for name, t in problem.owned.items()}
    guards, moved = {}, {}

    def move(tensor):
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if not key or storage.nbytes() > LARGEST:
            return tensor
        name = names.get(key, "an argument")
        if seed % APART == APART_SEED and _whole(tensor) and "." not in name and name != "x":
            if key not in moved:
                tensor = _apart(tensor)
                moved[key] = tensor, Guard(tensor.untyped_storage(), problem.device)
            tensor, guards[key] = moved[key]
        elif key not in guards:
            guards[key] = Guard(storage, problem.device)
        guards[key].name = name
        return guards[key].view(tensor)

    given = problem.args, problem.kwargs, problem.owned
    problem.args, problem.kwargs, problem.owned = pytree.tree_map_only(torch.Tensor, move, given)
    problem.guards, problem.apart = list(guards.values()), sorted({guards[key].name for key in moved})
    for guard in problem.guards:
        guard.keep()
    problem.pristine = {name: t.clone() for name, t in problem.owned.items() if t.untyped_storage().nbytes() > LARGEST}


def check_inputs(problem):
    """Raise Disagreement where the call has changed an input, or memory around one, after putting it right."""
    for guard in problem.guards:
        if torch.equal(guard.memory, guard.pristine):
            continue
        guard.check()
        now = guard.memory.clone()
        guard.memory.copy_(guard.pristine)
        for name, tensor in problem.owned.items():
            if tensor.untyped_storage().data_ptr() == guard.memory.data_ptr():
                got = _view(now, tensor.dtype, tensor.storage_offset(), tensor.shape, tensor.stride())
                _raise_changed(name, got, tensor)
        raise Disagreement(f"input: {guard.name}", f"the call changed its input: bytes between the elements of {guard.name}")
    for name, pristine in problem.pristine.items():
        tensor = problem.owned[name]
        if not torch.equal(bits(tensor), bits(pristine)):
            got = tensor.clone()
            tensor.copy_(pristine)
            _raise_changed(name, got, tensor)


def _raise_changed(name, got, pristine):
    differs = bits(got) != bits(pristine)
    if bool(differs.any()):
        at = differs.nonzero()[0].tolist()
        raise Disagreement(f"input: {name}", f"the call changed its input: {name}{at} is {number(got[tuple(at)])} now")


def guarded(shape, dtype, device, value):
    """(tensor full of a value, its Guard), for out=."""
    tensor = torch.full(tuple(shape), value if dtype.is_floating_point else 77, device=device).to(dtype)
    guard = Guard(tensor.untyped_storage(), device)
    guard.name = "out"
    guard.keep()
    return guard.view(tensor), guard


@functools.cache
def _crowd(size, device):
    return torch.ones(size, size, dtype=torch.float16, device=device)


@functools.lru_cache(maxsize=8)
def _pattern(size, device):
    return PATTERN.to(device).repeat(-(-size // len(PATTERN)))[:size]


def _view(memory, dtype, start, shape, stride):
    return torch.empty(0, dtype=dtype, device=memory.device).set_(memory.untyped_storage(), start, shape, stride)


def _whole(tensor):
    """Whether a tensor is all of its storage, one element behind the other."""
    return tensor.dim() > 0 and tensor.is_contiguous() and tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _apart(tensor):
    """The same numbers with the pattern between the elements of a vector, or between rows."""
    *lead, last = tensor.shape
    wide = (*lead, last + 3) if lead else (last, 2)
    space = _pattern(torch.Size(wide).numel() * tensor.element_size(), tensor.device).clone().view(tensor.dtype).view(wide)
    view = space[..., :last] if lead else space[:, 0]
    return view.copy_(tensor)


# What of the process a call must leave as it was: how to read it, how to put it back.
STATE = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default device": (torch.get_default_device, lambda was: torch.set_default_device(None if was.type == "cpu" else was)),
    "grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "number of threads": (torch.get_num_threads, torch.set_num_threads),
    "deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda was: torch.use_deterministic_algorithms(was[0], warn_only=was[1]),
    ),
    "float32 matmul precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "flushing of subnormals": (lambda: _flushes(), torch.set_flush_denormal),
    "working directory": (os.getcwd, os.chdir),
    "random state": (torch.get_rng_state, torch.set_rng_state),
}


def _flushes():
    """Whether this thread's arithmetic takes subnormal numbers as zero; seen in bits, as comparing would take them so, too."""
    return int((torch.tensor(2.0**-140) * 1).view(torch.int32)) == 0


def state():
    """The process's state, by name."""
    return {name: read() for name, (read, _) in STATE.items()}


def check_state(before):
    """Raise Disagreement where the state is not what it was, after putting it back."""
    for name, was in before.items():
        read, write = STATE[name]
        now = read()
        if torch.equal(now, was) if isinstance(was, torch.Tensor) else now == was:
            continue
        write(was)
        if name == "random state":
            raise Disagreement(f"state: {name}", "the call drew from torch's global random numbers, or seeded them anew")
        raise Disagreement(f"state: {name}", f"the call left the {name} at {now}, it was {was}")


def crowd(device):
    """Products on a stream of their own, which leave few multiprocessors to what is launched next; CUDA only.

    Blocks of a kernel then begin and end far apart: what waits for the wrong block reads what is not there yet.
    """
    with torch.cuda.stream(torch.cuda.Stream(device)):
        for size in CROWD:
            a = _crowd(size, device)
            torch.mm(a, a)


def moved(tensor):
    """The same numbers in the same strides, in memory that begins one element later than an aligned one."""
    storage = tensor.untyped_storage()
    size, start = storage.nbytes() // tensor.element_size(), tensor.storage_offset()
    space = torch.empty(size + 1, dtype=tensor.dtype, device=tensor.device)
    space[1:].copy_(torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(storage, 0, (size,), (1,)))
    return space.as_strided(tensor.shape, tensor.stride(), start + 1)


def on_two_streams(call, device):
    """The results of two calls that run at once, on a stream each; CUDA only."""
    current, results = torch.cuda.current_stream(device), []
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    for stream in streams:
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            results.append(call())
    torch.cuda.synchronize(device)
    return results


def replayed(call, device, poison):
    """The result of a call as a CUDA graph computes it: captured, overwritten with poison, replayed; CUDA only.

    poison: a function that overwrites a result.
    """
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        call()  # what is made on first use on a stream is made now
    torch.cuda.synchronize(device)
    # What Python lets go of meanwhile would break the capture off.
    gc.disable()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = call()
    finally:
        gc.enable()
    poison(result)
    graph.replay()
    torch.cuda.synchronize(device)
    return result
