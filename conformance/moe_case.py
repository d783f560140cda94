"""Cases of the MoE operations; Route, which slots go to which expert, is shared by all of them."""

from dataclasses import dataclass

import torch

from ref.moe import expert_map
from ref.moe.expert_map import local_ids

from .case import Case
from .regimes import hashed


@dataclass(frozen=True, repr=False)
class Route(Case):
    """Which expert each slot of each token goes to.

    m, t, e: tokens, slots of a token, experts of all ranks together.
    cuts: ascending; slots, in some order, from cuts[i] on belong to expert i + 1 or a later one: equal cuts make empty experts.
    mixed: that order is a shuffled one, else that of the slots. distinct: only the tokens' first slots go by cuts, slot j goes to the
    expert j further on.
    neg: slot i is empty where bit i % 32 is set; empty: the id it has then.
    ranks: 0 for no expert map, else the number of ranks; rank: this one. placement: "linear", "round_robin", or "shuffled": linear with
    local indices in another order. int64, map_int64: dtypes of ids and map, else int32.
    """

    m: int = 1
    t: int = 1
    e: int = 1
    cuts: tuple = ()
    mixed: bool = False
    distinct: bool = False
    neg: int = 0
    empty: int = -1
    ranks: int = 0
    rank: int = 0
    placement: str = "linear"
    int64: bool = False
    map_int64: bool = False

    @property
    def n(self):
        """Slots."""
        return self.m * self.t

    @property
    def dtype(self):
        return torch.int64 if self.int64 else torch.int32

    def ids(self, seed=0):
        """(m, t) of dtype."""
        drawn = self.m if self.distinct else self.n
        at = hashed(seed, "slots", drawn).argsort().argsort() if self.mixed else torch.arange(drawn)
        expert = torch.bucketize(at, torch.tensor(self.cuts, dtype=torch.int64), right=True).clamp(max=self.e - 1)
        if self.distinct:
            expert = (expert[:, None] + torch.arange(self.t)) % self.e
        left = (torch.tensor(self.neg) >> (torch.arange(self.n) % 32)) & 1
        return torch.where(left == 1, self.empty, expert.flatten()).view(self.m, self.t).to(self.dtype)

    def expert_map(self, seed=0):
        """(e,), or None."""
        if not self.ranks:
            return None
        shuffled = self.placement == "shuffled"
        found = expert_map(self.e, self.ranks, self.rank, "linear" if shuffled else self.placement)
        if shuffled:
            local = found[found >= 0]
            found[found >= 0] = local[hashed(seed, "map", local.numel()).argsort()]
        return found.to(torch.int64 if self.map_int64 else torch.int32)

    def local(self, seed=0):
        """Each slot's index on this rank, -1 for none: int64 (m, t)."""
        return local_ids(self.ids(seed), self.e, self.expert_map(seed))

    @property
    def local_experts(self):
        found = self.expert_map()
        return self.e if found is None else int((found >= 0).sum())

    def counts(self, seed=0):
        """Slots of each local expert: int64 (local experts,)."""
        local = self.local(seed)
        return torch.bincount(local[local >= 0], minlength=self.local_experts)


@dataclass(frozen=True, repr=False)
class TopkCase(Case):
    """One call of fused_topk on logits (m, e); names as its arguments.

    bias: dtype of the correction bias, or None. num_valid: None for all. pad, offset: logits are a view, rows `pad` elements further
    apart, from the element `offset` on. transposed: of a transposed buffer. data: a regime of ops.fused_topk.
    """

    op = "fused_topk"
    m: int = 1
    e: int = 1
    top_k: int = 1
    renormalize: bool | str = True
    scoring_func: str = "softmax"
    bias: str | None = None
    groups: int = 0
    topk_group: int = 0
    factor: float = 1.0
    shared: int = 0
    shared_weight: float = 1.0
    num_valid: int | None = None
    dtype: str = "fp32"
    pad: int = 0
    offset: int = 0
    transposed: bool = False
    data: str = "integers"
    seed: int = 0


@dataclass(frozen=True, repr=False)
class HashTopkCase(Case):
    """One call of hash_topk on logits (m, e), table (vocabulary, top_k); the rest as TopkCase."""

    op = "hash_topk"
    m: int = 1
    e: int = 1
    top_k: int = 1
    vocabulary: int = 1
    renormalize: bool | str = True
    scoring_func: str = "sqrtsoftplus"
    factor: float = 1.0
    shared: int = 0
    shared_weight: float = 1.0
    num_valid: int | None = None
    int64: bool = False
    dtype: str = "fp32"
    pad: int = 0
    data: str = "integers"
    seed: int = 0


@dataclass(frozen=True, repr=False)
class AlignCase(Case):
    """One call of moe_align_block_size; pad: padded to whole blocks, ignore: ignore_invalid_experts."""

    op = "moe_align_block_size"
    route: Route = Route()
    block_size: int = 1
    pad: bool = False
    ignore: bool = False
    seed: int = 0


@dataclass(frozen=True, repr=False)
class BatchedAlignCase(Case):
    """One call of batched_moe_align_block_size."""

    op = "batched_moe_align_block_size"
    max_tokens: int = 1
    block_size: int = 1
    counts: tuple = ()
    int64: bool = False
    seed: int = 0


@dataclass(frozen=True, repr=False)
class PermuteCase(Case):
    """One call of moe_permute on x (m, k). told: num_local_experts is given. pad, offset: x is a view into a larger buffer."""

    op = "moe_permute"
    route: Route = Route()
    k: int = 1
    dtype: str = "bf16"
    align: int = 1
    offset_int64: bool = False
    told: bool = False
    pad: int = 0
    offset: int = 0
    seed: int = 0


@dataclass(frozen=True, repr=False)
class ScatterCase(Case):
    """One call of moe_scatter_masked on x (m, k). more: what planes hold beyond the rows of the fullest expert."""

    op = "moe_scatter_masked"
    route: Route = Route()
    k: int = 1
    dtype: str = "bf16"
    more: int = 0
    told: bool = False
    pad: int = 0
    offset: int = 0
    seed: int = 0


@dataclass(frozen=True, repr=False)
class UnpermuteCase(Case):
    """One call of moe_unpermute on what moe_permute made of (m, k). weights: their dtype. data: a regime of ops.moe_sum_data."""

    op = "moe_unpermute"
    route: Route = Route()
    k: int = 1
    dtype: str = "bf16"
    weights: str = "fp32"
    align: int = 1
    pad: int = 0
    offset: int = 0
    data: str = "exact"
    seed: int = 0


@dataclass(frozen=True, repr=False)
class MulSumCase(Case):
    """One call of moe_fused_mul_sum on (m, t, k).

    ids: topk_ids are given (with a map always). weights: their dtype. pad, offset: inputs are a view, rows `pad` elements further apart,
    from the element `offset` on. layout: "rows" (m, t, k), "slots": a transposed view of (t, m, k), "columns": of (k, m, t), "far": tokens
    lie so far apart that offsets need more than 32 bits, "far slots": slots do.
    data: a regime of ops.moe_sum_data.
    """

    op = "moe_fused_mul_sum"
    route: Route = Route()
    k: int = 1
    dtype: str = "bf16"
    weights: str = "fp32"
    ids: bool = True
    layout: str = "rows"
    pad: int = 0
    offset: int = 0
    data: str = "exact"
    seed: int = 0


@dataclass(frozen=True, repr=False)
class ActivationCase(Case):
    """One call of moe_activation on (*lead, columns), n of them in the result; parameters as its arguments.

    format: that the result is quantized to, or None. pad, offset, transposed: x is a view. data: a regime of ops.moe_activation.
    """

    op = "moe_activation"
    n: int = 1
    lead: tuple = (1,)
    activation: str = "silu"
    limit: float | None = None
    alpha: float | None = None
    beta: float | None = None
    up_beta: float | None = None
    format: str | None = None
    dtype: str = "bf16"
    pad: int = 0
    offset: int = 0
    transposed: bool = False
    data: str = "normal"
    seed: int = 0

    @property
    def m(self):
        return torch.Size(self.lead).numel()


@dataclass(frozen=True, repr=False)
class ExpertMapCase(Case):
    """One call of expert_map."""

    op = "expert_map"
    e: int = 1
    ranks: int = 1
    rank: int = 0
    placement: str = "linear"
    seed: int = 0
