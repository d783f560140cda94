"""One call of a candidate, watched: what it returns, what it leaves behind, and whether it does so again."""

import torch

from ref.qtensor import QTensor

from . import hygiene, metamorphic
from .ops import parts_of
from .oracle import Disagreement, bits, number

POISON = (float("nan"), 1e30, -7.0)
# Of the examples, one in so many has another call between the two; one is called on two streams and as a CUDA graph; one with its first argument
# elsewhere in memory; and one for the second time while other kernels keep the GPU busy.
BETWEEN, CONCURRENT, MOVED, CROWDED = 2, 8, 4, 2


def attempt(candidate, function, problem, impl=None, seed=0, declared=None):
    """Call the candidate twice and judge; in every second example make another call in between.

    All arguments lie between guard bands. Memory of the result's size is filled with poison and given back to the allocator first, so that
    an output that is not written shows. The call in between has other arguments, often of another shape, or the first ones overwritten, and
    its result follows from that of the first where a relation of metamorphic says so. The second call has to return the same bits; into a
    poisoned out=, where the function takes it. Some examples are called once more with the first argument elsewhere in memory. On a GPU some
    examples are called on two streams at once, and those of functions that the candidate names in GRAPHS captured in a CUDA graph and
    replayed; and every second one is repeated while other kernels keep the GPU busy.

    Args:
        declared: the Declaration that the candidate is held to, or None. Not deterministic: what is returned the second time only has to
            be admissible.

    Returns:
        Agreement.

    Raises:
        NotImplementedError: the candidate does not support the call.
        Disagreement: it is wrong, raised something else, changed an input, memory around it or the process's state, or gave other bits
            the second time.
    """
    hygiene.lay(problem, seed)
    watched = _Watched(candidate, function, problem, impl, declared)
    try:
        return _attempt(watched, seed)
    except NotImplementedError as error:
        if watched.settled is None:
            raise
        raise Disagreement("refused again", f"declined a call that it had answered before: {error}") from None
    except Disagreement as error:
        # What decides that is the seed, which a case does not explain.
        note = f" (here {', '.join(problem.apart)} are views with gaps)" if problem.apart else ""
        raise Disagreement(error.kind, error.args[0] + note, error.hint) from None


def _attempt(watched, seed):
    problem = watched.problem
    poison = POISON[seed % 3]
    _poison(problem, poison)
    result = watched.call(problem.args, problem.kwargs)
    _check_result(problem, result)
    first = [t.to("cpu", copy=True) for t in _tensors(result)]
    agreement = watched.judge(result, first)
    watched.settled = [t.clone() for t in problem.settled(first)]
    if seed % BETWEEN == 0:
        _between(watched, agreement, first, seed)
        for a, b in zip(first, _tensors(result), strict=True):
            _check_same(a, b.cpu(), "after another call, which wrote over it")
    if problem.device.type == "cuda" and seed % CONCURRENT == 0:
        _concurrent(watched, poison)
    if seed % MOVED == 1:
        _moved(watched)
    out, guard = {}, None
    if isinstance(problem.result, tuple) and watched.candidate.takes(watched.function, "out"):
        out["out"], guard = hygiene.guarded(*problem.result, problem.device, poison)
    else:
        _poison(problem, POISON[(seed + 1) % 3])
    if problem.device.type == "cuda" and seed % CROWDED == 1:
        hygiene.crowd(problem.device)
    again = watched.call(problem.args, {**problem.kwargs, **out})
    _check_result(problem, again)
    if guard is not None:
        guard.check()
        if again.data_ptr() != out["out"].data_ptr():
            raise Disagreement("out: ignored", "the result is not the tensor that was given as out=")
    watched.repeated(again, "on the second run with a poisoned out=" if out else "on the second run of the same call")
    return agreement


class _Watched:
    """A candidate's function, whose calls must leave alone what is not theirs."""

    def __init__(self, candidate, function, problem, impl, declared):
        self.candidate, self.function, self.problem, self.impl = candidate, function, problem, impl
        self.deterministic = declared is None or declared.deterministic
        self.invariant = declared is not None and declared.batch_invariant
        self.state, self.settled = hygiene.state(), None

    def call(self, args, kwargs, again=lambda: None):
        """The result; again: what to do before inputs are looked at."""
        try:
            result = self.bare(args, kwargs)
        finally:
            again()
        hygiene.check_inputs(self.problem)
        hygiene.check_state(self.state)
        return result

    def bare(self, args, kwargs, wait=True):
        """The result, or NotImplementedError, or Disagreement for anything else that is raised."""
        try:
            result = self.candidate.call(self.function, args, kwargs, self.impl)
            if wait and self.problem.device.type == "cuda":
                # What a kernel does wrong to memory shows here, and a launch that was refused, and not in the suite's own next step.
                torch.cuda.synchronize(self.problem.device)
                torch.zeros(1, device=self.problem.device)
            return result
        except NotImplementedError:
            raise
        except ExceptionGroup as group:
            if group.split(NotImplementedError)[1] is None:
                raise NotImplementedError(str(group)) from None
            raise Disagreement(f"raised: {type(group).__name__}", f"raised {group!r}") from None
        except Exception as error:
            raise Disagreement(f"raised: {type(error).__name__}", f"raised {type(error).__name__}: {error}") from None

    def judge(self, result, tensors):
        """The Agreement of a result whose tensors are on the CPU."""
        if isinstance(self.problem.result, list):
            result = tuple(tensors)
        return self.problem.check(tensors[0] if isinstance(self.problem.result, tuple) else result)

    def repeated(self, result, when):
        """Hold another result of the first call against the first one."""
        tensors = [t.cpu() for t in _tensors(result)]
        if not self.deterministic:
            self.judge(result, tensors)
            return
        for a, b in zip(self.settled, self.problem.settled(tensors), strict=True):
            _check_same(a, b, when)


def _between(watched, agreement, first, seed):
    """Another call, with a result that follows from the first where a relation says so."""
    problem = watched.problem
    y = first[0] if isinstance(problem.result, tuple) else None
    # Where no element was compared under a bound, every correct kernel returns these numbers.
    exact = y is not None and agreement.elements == 0 and bool(y.isfinite().all())
    related = metamorphic.choose(watched.function, problem.args, problem.kwargs, y, seed, exact, watched.invariant)
    if related is None:
        return
    args, kwargs, restore = related.args, related.kwargs, lambda: None
    if seed & 32:
        args, kwargs, restore = _overwritten(problem, args, kwargs)
    try:
        got = watched.call(args, kwargs, restore)
    except NotImplementedError:
        return
    if related.expected is None:
        return
    name = f"relation: {related.name}"
    _check_tensor(got, related.expected.shape, related.expected.dtype, problem.device, f"result ({name})", name)
    got, want = got.cpu(), related.expected
    same = (got == want) if exact else (bits(got) == bits(want))
    same |= got.isnan() & want.isnan()
    if related.judged is not None:
        same |= ~related.judged.view(*related.judged.shape, *[1] * (same.dim() - related.judged.dim()))
    if not bool(same.all()):
        at = tuple((~same).nonzero()[0].tolist())
        why = "as the first call's result has it" if exact else "as batch invariance promises"
        raise Disagreement(
            name, f"y{list(at)} = {number(got[at])} with {related.name}, admissible {number(want[at])} only, {why}"
            f" ({int((~same).sum())} of {same.numel()} elements are wrong)",
        )  # fmt: skip


def _overwritten(problem, args, kwargs):
    """(args, kwargs, how to restore): tensors of the first call's shapes written over its own, where results kept by address would show."""
    kept = []

    def write(old, new):
        if not isinstance(old, torch.Tensor) or old is new or old.shape != new.shape or old.dtype != new.dtype or not old.numel():
            return new
        kept.append((old, old.clone()))
        return old.copy_(new)

    args = tuple(write(old, new) for old, new in zip(problem.args, args, strict=True))
    kwargs = {name: write(problem.kwargs.get(name), new) for name, new in kwargs.items()}

    def restore():
        for tensor, was in kept:
            tensor.copy_(was)

    return args, kwargs, restore


def _moved(watched):
    """The first call with its first argument one element further in memory: what was compiled for aligned memory meets some that is not."""
    x, problem = watched.problem.args[0], watched.problem
    if not isinstance(x, torch.Tensor) or not x.numel() or x.untyped_storage().nbytes() > hygiene.LARGEST:
        return
    try:
        result = watched.call((hygiene.moved(x), *problem.args[1:]), problem.kwargs)
    except NotImplementedError:
        return
    _check_result(problem, result)
    try:
        watched.judge(result, [t.cpu() for t in _tensors(result)])
    except Disagreement as error:
        raise Disagreement(error.kind, f"{error.args[0]} (its first argument one element further in memory)", error.hint) from None


def _concurrent(watched, poison):
    """Two streams at once, and a CUDA graph."""
    problem = watched.problem

    def call():
        return watched.bare(problem.args, problem.kwargs, wait=False)

    for result in hygiene.on_two_streams(call, problem.device):
        watched.repeated(result, "of the same call on two streams at once")
    if watched.function not in getattr(watched.candidate.target, "GRAPHS", ()):
        return

    inputs = {guard.memory.untyped_storage().data_ptr() for guard in problem.guards}

    def overwrite(result):
        for tensor in _tensors(result):
            # A part of a result may be an input, handed on.
            if tensor.untyped_storage().data_ptr() not in inputs:
                tensor.copy_(torch.tensor(poison if tensor.is_floating_point() else 77).to(tensor.dtype))

    try:
        result = hygiene.replayed(call, problem.device, overwrite)
    except NotImplementedError:
        return
    except RuntimeError as error:
        raise Disagreement("graph: capture", f"raised {type(error).__name__} while a CUDA graph was captured: {error}") from None
    watched.repeated(result, "of the same call as a CUDA graph")
    hygiene.check_inputs(problem)


def _check_result(problem, result):
    if problem.result is None:
        tensors = _tensors(result) if isinstance(result, QTensor) else []
        devices = {t.device for t in tensors}
        if tensors and devices != {problem.device}:
            raise Disagreement("result: device", f"the result is on {', '.join(map(str, devices))}, expected {problem.device}")
        return
    if isinstance(problem.result, list):
        if not isinstance(result, tuple) or len(result) != len(problem.result):
            got = f"{len(result)} of them" if isinstance(result, tuple) else f"a {type(result).__name__}"
            raise Disagreement("result: type", f"the result is {got}, expected a tuple of {len(problem.result)} tensors")
        for i, (tensor, expected) in enumerate(zip(result, problem.result, strict=True)):
            _check_tensor(tensor, *expected, problem.device, f"result[{i}]")
        return
    _check_tensor(result, *problem.result, problem.device, "result")


def _check_tensor(tensor, shape, dtype, device, name, kind="result"):
    if not isinstance(tensor, torch.Tensor):
        raise Disagreement(f"{kind}: type", f"the {name} is a {type(tensor).__name__}, expected a tensor")
    if tensor.layout != torch.strided:
        raise Disagreement(f"{kind}: type", f"the {name} is {tensor.layout}, expected a dense tensor")
    got = tuple(tensor.shape), tensor.dtype, tensor.device
    if got != (tuple(shape), dtype, device):
        raise Disagreement(f"{kind}: shape", f"the {name} is {got[0]} {got[1]} on {got[2]}, expected {tuple(shape)} {dtype} on {device}")


def _check_same(a, b, what):
    same = bits(a) == bits(b)
    if a.is_floating_point():
        same |= a.isnan() & b.isnan()
    if not bool(same.all()):
        at = (~same).nonzero()[0].tolist()
        text = f"result{at} = {number(a[tuple(at)])}, and {number(b[tuple(at)])} {what}, admissible: the same bits"
        raise Disagreement("rerun", text)


def _tensors(result):
    if isinstance(result, QTensor):
        return list(parts_of(result, "q").values())
    return list(result) if isinstance(result, tuple) else [result]


def _poison(problem, value):
    """Fill memory as large as the result with a value, and free it: where the allocator will take the result from."""
    if problem.result is None:
        return
    # All at once, so that each result finds some of its size.
    held = []
    for shape, dtype in problem.result if isinstance(problem.result, list) else [problem.result]:
        full = value if dtype.is_floating_point else 77
        held.append(torch.full(tuple(shape), full, device=problem.device).to(dtype))
