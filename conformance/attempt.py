"""One call of a candidate, watched: what it returns, what it leaves behind, and whether it does so twice."""

import torch

from ref.qtensor import QTensor

from .ops import parts_of
from .oracle import Disagreement, bits, number

POISON = (float("nan"), 1e30, -7.0)


def attempt(candidate, function, problem, impl=None, seed=0):
    """Call the candidate twice and judge.

    Memory of the result's size is filled with poison and given back to the allocator first, so that an output that is not
    written shows. The second call has to return the same bits; into a poisoned out=, where the function takes it.

    Returns:
        Agreement.

    Raises:
        NotImplementedError: the candidate does not support the call.
        Disagreement: it is wrong, raised something else, changed an input, or gave other bits the second time.
    """
    poison = POISON[seed % 3]
    _poison(problem, poison)
    result = _call(candidate, function, problem, {}, impl)
    _check_inputs(problem)
    _check_result(problem, result)
    first = [t.to("cpu", copy=True) for t in _tensors(result)]
    agreement = problem.check(first[0] if problem.result is not None else result)
    out = {}
    if problem.result is not None and candidate.takes(function, "out"):
        shape, dtype = problem.result
        out["out"] = torch.full(shape, poison, device=problem.device).to(dtype)
    else:
        _poison(problem, POISON[(seed + 1) % 3])
    again = _call(candidate, function, problem, out, impl)
    _check_inputs(problem)
    _check_result(problem, again)
    if out and again.data_ptr() != out["out"].data_ptr():
        raise Disagreement("out: ignored", "the result is not the tensor that was given as out=")
    what = "with a poisoned out=" if out else "of the same call"
    for a, b in zip(first, _tensors(again), strict=True):
        _check_same(a, b.cpu(), what)
    return agreement


def _call(candidate, function, problem, kwargs, impl):
    try:
        result = candidate.call(function, problem.args, {**problem.kwargs, **kwargs}, impl)
        if problem.device.type == "cuda":
            # What a kernel does wrong to memory shows here, and not in the suite's own next step.
            torch.cuda.synchronize(problem.device)
        return result
    except NotImplementedError:
        raise
    except ExceptionGroup as group:
        if group.split(NotImplementedError)[1] is None:
            raise NotImplementedError(str(group)) from None
        raise Disagreement(f"raised: {type(group).__name__}", f"raised {group!r}") from None
    except Exception as error:
        raise Disagreement(f"raised: {type(error).__name__}", f"raised {type(error).__name__}: {error}") from None


def _check_inputs(problem):
    for name, tensor in problem.owned.items():
        if not torch.equal(bits(tensor), bits(problem.pristine[name])):
            at = (bits(tensor) != bits(problem.pristine[name])).nonzero()[0].tolist()
            now = number(tensor[tuple(at)])
            tensor.copy_(problem.pristine[name])
            raise Disagreement(f"input: {name}", f"the call changed its input: {name}{at} is {now} now")


def _check_result(problem, result):
    if problem.result is None:
        tensors = _tensors(result) if isinstance(result, QTensor) else []
        devices = {t.device for t in tensors}
        if tensors and devices != {problem.device}:
            raise Disagreement("result: device", f"the result is on {', '.join(map(str, devices))}, expected {problem.device}")
        return
    shape, dtype = problem.result
    if not isinstance(result, torch.Tensor):
        raise Disagreement("result: type", f"the result is a {type(result).__name__}, expected a tensor")
    got = tuple(result.shape), result.dtype, result.device
    if got != (tuple(shape), dtype, problem.device):
        raise Disagreement(
            "result: shape", f"the result is {got[0]} {got[1]} on {got[2]}, expected {tuple(shape)} {dtype} on {problem.device}"
        )


def _check_same(a, b, what):
    same = bits(a) == bits(b)
    if a.is_floating_point():
        same |= a.isnan() & b.isnan()
    if not bool(same.all()):
        at = (~same).nonzero()[0].tolist()
        text = f"result{at} = {number(a[tuple(at)])}, and {number(b[tuple(at)])} on the second run {what}, admissible: the same bits"
        raise Disagreement("rerun", text)


def _tensors(result):
    return list(parts_of(result, "q").values()) if isinstance(result, QTensor) else [result]


def _poison(problem, value):
    """Fill memory as large as the result with a value, and free it: where the allocator will take the result from."""
    if problem.result is None:
        return
    shape, dtype = problem.result
    if dtype.is_floating_point:
        torch.full(tuple(shape), value, device=problem.device).to(dtype)
    else:
        torch.full(tuple(shape), 77, dtype=dtype, device=problem.device)
