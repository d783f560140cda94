"""What a second call must return, given what the first one did: relations between calls that no reference is needed for.

In the exact regime every relation of relations.py and relations_moe.py holds in every element; in others those of INVARIANT do, bit for
bit, for a candidate that declares batch_invariant.
"""

from . import relations as dense
from . import relations_moe as moe

# Which relations a function has.
RELATIONS = {
    "linear": (dense.tokens_reordered, dense.batch_split, dense.scaled, dense.columns_appended),
    "grouped_linear": (moe.expert_rows_reordered, moe.expert_rows_split, moe.experts_relabelled, moe.grouped_scaled),
    "masked_linear": (moe.plane_rows_reordered, moe.planes_relabelled, moe.plane_scaled),
    "indexed_linear": (moe.blocks_relabelled, moe.grouped_scaled),
    "moe_fused_mul_sum": (moe.sums_reordered, moe.sums_split, moe.slots_reordered, moe.sums_scaled, moe.zero_for_empty),
    "fused_experts": (
        *(moe.layer_tokens_reordered, moe.layer_split, moe.layer_relabelled),
        *(moe.layer_weights_scaled, moe.layer_zero_for_empty, moe.layer_duplicates_merged),
    ),
    "pack": (dense.rows_split,),
    "unpack": (dense.rows_split,),
    "dequantize": (dense.weight_rows_split,),
    "quantize_input": (dense.inputs_split(0),),
    "moe_activation": (dense.inputs_split(0),),
    "fused_topk": (dense.inputs_split(0),),
    "moe_align_block_size": (dense.inputs_split(0),),
    "moe_permute": (dense.inputs_split(0, 1),),
}

# What batch invariance promises: a row of the result depends on its own row of x only, wherever that lies.
INVARIANT = (
    *(dense.tokens_reordered, dense.batch_split, moe.expert_rows_reordered, moe.expert_rows_split, moe.plane_rows_reordered),
    *(moe.sums_reordered, moe.sums_split, moe.layer_tokens_reordered, moe.layer_split),
)


def choose(function, args, kwargs, y, seed, exact, invariant):
    """One Related of a call, or None.

    Args:
        y: the call's result, a tensor on the CPU, or None where it is none.
        exact: whether every correct kernel returns y. invariant: whether batch invariance is promised.

    Returns:
        A Related whose expected is None where nothing is promised about it.
    """
    table = RELATIONS.get(function, ())
    if not exact and invariant:
        table = [relation for relation in table if relation in INVARIANT]
    for i in range(len(table)):
        relation = table[(seed // 8 + i) % len(table)]
        related = relation(args, kwargs, y, seed)
        if related is not None:
            if y is None or not (exact or (invariant and relation in INVARIANT)):
                related.expected = None
            return related
    return None
