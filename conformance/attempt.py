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
    if isinstance(problem.result, list):
        result = tuple(first)
    agreement = problem.check(first[0] if isinstance(problem.result, tuple) else result)
    settled = [t.clone() for t in problem.settled(first)]
    out = {}
    if isinstance(problem.result, tuple) and candidate.takes(function, "out"):
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
    for a, b in zip(settled, problem.settled([t.cpu() for t in _tensors(again)]), strict=True):
        _check_same(a, b, what)
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
    if isinstance(problem.result, list):
        if not isinstance(result, tuple) or len(result) != len(problem.result):
            got = f"{len(result)} of them" if isinstance(result, tuple) else f"a {type(result).__name__}"
            raise Disagreement("result: type", f"the result is {got}, expected a tuple of {len(problem.result)} tensors")
        for i, (tensor, expected) in enumerate(zip(result, problem.result, strict=True)):
            _check_tensor(tensor, *expected, problem.device, f"result[{i}]")
        return
    _check_tensor(result, *problem.result, problem.device, "result")


def _check_tensor(tensor, shape, dtype, device, name):
    if not isinstance(tensor, torch.Tensor):
        raise Disagreement("result: type", f"the {name} is a {type(tensor).__name__}, expected a tensor")
    got = tuple(tensor.shape), tensor.dtype, tensor.device
    if got != (tuple(shape), dtype, device):
        raise Disagreement("result: shape", f"the {name} is {got[0]} {got[1]} on {got[2]}, expected {tuple(shape)} {dtype} on {device}")


def _check_same(a, b, what):
    same = bits(a) == bits(b)
    if a.is_floating_point():
        same |= a.isnan() & b.isnan()
    if not bool(same.all()):
        at = (~same).nonzero()[0].tolist()
        text = f"result{at} = {number(a[tuple(at)])}, and {number(b[tuple(at)])} on the second run {what}, admissible: the same bits"
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
