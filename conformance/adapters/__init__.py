"""Other people's kernels as candidates, one file a package: python -m conformance --candidate conformance.adapters.gguf --formats mxfp4

An adapter converts a QTensor to the package's own layout (by ref.layouts where that is a checkpoint's) and calls what users of the package
call. It imports without its package; its functions then raise NotImplementedError, which says how to install it. What a package does not
take is refused by a sentence, too; what it takes and gets wrong is not hidden. FORMATS: what is worth asking of it, for --formats.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util

import torch

from ref.pack import unpack
from ref.qtensor import TENSORS, QTensor

REDUCTIONS = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")


def package(module, distribution=None):
    """A module of an optional package, imported when it is first asked for.

    Raises:
        NotImplementedError: the package is not installed, or does not import here.
    """
    found, reason = _imported(module, distribution or module.partition(".")[0])
    if found is None:
        raise NotImplementedError(reason)
    return found


@functools.cache
def _imported(module, distribution):
    """(module, None), or (None, why not)."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return None, f"{distribution} is not installed: pip install {distribution}"
    try:
        return importlib.import_module(module), None
    except Exception as error:
        return None, f"{distribution} {version_of(distribution)} does not import here: {type(error).__name__}: {error}"


def version_of(distribution):
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def written(layout, q, **options):
    """layout.write(q, **options) on q's device: {part: tensor}.

    Raises:
        NotImplementedError: the layout cannot hold q.
    """
    tensors = {name: getattr(q, name).cpu() for name in TENSORS if getattr(q, name) is not None}
    try:
        parts = layout.write(QTensor(q.format, tuple(q.shape), **tensors), **options)
    except ValueError as error:
        raise NotImplementedError(str(error)) from None
    return {name: tensor.to(q.packed.device) for name, tensor in parts.items()}


def exactly(tensor, dtype, what):
    """The same numbers in another dtype.

    Raises:
        NotImplementedError: they are not representable there.
    """
    kept = tensor.to(dtype)
    if not torch.equal(kept.to(tensor.dtype), tensor):
        raise NotImplementedError(f"{what} are kept in {dtype}, and some are not representable there")
    return kept


def codes_of(q):
    """The codes of a weight, uint8 (..., n, k)."""
    return unpack(q.packed, q.format.element.bits, q.shape[-1])


def need(condition, reason):
    """NotImplementedError(reason) unless the condition holds."""
    if not condition:
        raise NotImplementedError(reason)


def aligned(t, size=16):
    """The same tensor, a copy where it does not begin at a multiple of so many bytes: kernels with vector loads that do not check end the process."""
    return t.clone() if t.data_ptr() % size else t


@contextlib.contextmanager
def whole_sums(x):
    """Products of torch on x's device without reduced precision: by default cuBLAS may round the partial sums of a split k to x's dtype.

    That default is torch's and documented (allow_bf16_reduced_precision_reduction); without it what is left is the package's own.
    """
    if not x.is_cuda:
        yield
        return
    settings, kept = torch.backends.cuda.matmul, {}
    for name in REDUCTIONS:
        whole, split = getattr(settings, name), getattr(settings, f"{name}_split_k", True)
        kept[name] = whole if split else (whole, split)
        setattr(settings, name, False)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(settings, name, value)


def plain(q, what):
    """Refuse a reordered or rotated weight, which no package here takes."""
    need(q.group_index is None, f"{what} takes groups in order, without a group_index")
    need(not q.format.hadamard, f"{what} does not rotate")


def padded(t, rows=1, columns=1):
    """A tensor (..., n, k) with zeros behind, so that n and k are multiples of rows and columns."""
    more = (0, -t.shape[-1] % columns, 0, -t.shape[-2] % rows)
    return torch.nn.functional.pad(t, more) if any(more) else t
