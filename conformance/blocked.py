"""Failures that follow from others: of an operation that is made of one that fails, too."""

from ref.format import parse_format

# What each operation is made of; those that it is made of come first.
MADE_OF = {
    "unpack": ("pack",),
    "dequantize": ("unpack",),
    "linear": ("dequantize",),
    "linear_x": ("linear", "quantize_input"),
    "grouped_linear": ("linear", "linear_x"),
    "masked_linear": ("linear", "linear_x"),
    "indexed_linear": ("linear", "linear_x"),
    "fused_experts": (
        *("linear", "grouped_linear", "indexed_linear", "masked_linear"),
        *("moe_align_block_size", "moe_permute", "moe_activation", "moe_fused_mul_sum"),
    ),
}
BAD = ("fail", "undeclared reject", "crash", "timeout", "blocked")


def mark(cells):
    """Give every failure whose operation is made of one that fails with the same format and implementation the status "blocked"."""
    by_op = {}
    for cell in cells:
        by_op.setdefault(cell.op, []).append(cell)
    for op, parts in MADE_OF.items():
        for cell in by_op.get(op, ()):
            causes = (part for part in parts for other in by_op.get(part, ()) if other.status in BAD and _same(cell, other))
            cause = next(causes, None) if cell.status in ("fail", "crash", "timeout") else None
            if cause:
                cell.status, cell.blocked_by = "blocked", cause


def _same(cell, part):
    if None not in (cell.impl, part.impl) and cell.impl != part.impl:
        return False
    return part.label in (cell.label, "all", f"{_bits(cell.label)} bits")


def _bits(label):
    try:
        return parse_format(label).element.bits
    except ValueError:
        return None
