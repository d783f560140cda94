"""Which tile multiplies how many rows of how many experts, without stream-K, on compute capability 9.0.

As in tiles.py, the tile is the one that needs the least time for all its waves. Here a tile's rows are one expert's, so that small tiles win
where experts have few rows; and k may be so short that beginning and ending a tile counts.
"""

import math
from dataclasses import dataclass

SHARED_MEMORY = 227 * 1024
# The result has shared memory of its own, so that a tile's end overlaps the next one's beginning.
OVERLAP = (("smem_reuse_mode", "none"), ("producer_stage_unroll", 1), ("wgmma_split_issue_wait", True))
OVERLAP_8 = (("smem_reuse_mode", "none"), ("producer_stage_unroll", 2))


@dataclass(frozen=True)
class Tile:
    """m x n outputs, k columns at a time, by warps of `warp`; `blocks` of them at once on a multiprocessor.

    begin, cost: microseconds of a wave of blocks * multiprocessors tiles: begin + cost * k / 4096.
    alone: thread blocks that load for themselves, in place of those with warps that only load. more: further options of Humming's.
    """

    m: int
    n: int
    k: int
    warp: tuple
    stages: int
    begin: float
    cost: float
    blocks: int = 1
    wgmma: bool = True
    alone: bool = False
    more: tuple = ()


# Costs were fitted to a sweep on an H200: int4_g128_bf16, mxfp4 and e4m3 at the shapes of Qwen3-30B-A3B, GPT-OSS-120B and DeepSeek-V3, up to 4096 tokens.
# EIGHT's are estimates.
# 16-bit activations. Few rows of an expert want narrow tiles, many of them at once: they leave no multiprocessor idle, whatever k is.
HALF = (
    Tile(8, 64, 128, (8, 32, 64), 4, 1.4, 23, blocks=6, wgmma=False, alone=True),
    Tile(8, 64, 512, (8, 32, 64), 3, 2.0, 4.8, wgmma=False, alone=True),
    Tile(8, 128, 64, (8, 32, 64), 6, 0.9, 46, blocks=5, alone=True),
    Tile(16, 64, 256, (16, 32, 64), 3, 1.4, 10.6, blocks=2, wgmma=False, alone=True),
    Tile(16, 128, 64, (16, 32, 64), 6, 0.9, 42, blocks=4, alone=True),
    Tile(32, 128, 64, (32, 32, 64), 6, 1.1, 29, blocks=2, alone=True, more=OVERLAP),
    Tile(32, 256, 64, (32, 32, 64), 6, 1.6, 43, blocks=2, alone=True, more=OVERLAP),
    Tile(48, 128, 64, (48, 32, 64), 6, 1.2, 33, blocks=2, alone=True, more=OVERLAP),
    Tile(48, 256, 64, (48, 32, 64), 4, 1.4, 29, more=OVERLAP),
    Tile(64, 128, 64, (64, 32, 64), 6, 1.6, 36, blocks=2, alone=True, more=OVERLAP),
    Tile(64, 256, 64, (64, 32, 64), 4, 2.0, 30, more=OVERLAP),
    Tile(80, 256, 64, (80, 32, 64), 4, 2.4, 33, more=OVERLAP),
    Tile(96, 128, 64, (96, 32, 64), 4, 0.8, 30, more=OVERLAP),
    Tile(96, 256, 64, (96, 32, 64), 4, 2.5, 37, more=OVERLAP),
    Tile(128, 128, 64, (128, 32, 64), 4, 0.7, 40, more=OVERLAP),
    Tile(128, 256, 64, (128, 32, 64), 4, 3.2, 47, more=OVERLAP),
    Tile(144, 256, 64, (144, 32, 64), 4, 4.1, 51, more=OVERLAP),
)
# e4m3 by e4m3, scales by block of 128 x 128.
FP8_BLOCKS = (
    Tile(8, 128, 128, (8, 16, 128), 4, 0.9, 10, more=OVERLAP_8),
    Tile(8, 256, 128, (8, 32, 128), 4, 1.3, 14, more=OVERLAP_8),
    Tile(16, 128, 128, (16, 32, 128), 4, 1.3, 16, blocks=2, alone=True),
    Tile(16, 256, 128, (16, 32, 128), 4, 1.5, 14, more=OVERLAP_8),
    Tile(32, 128, 128, (32, 32, 128), 6, 1.4, 11),
    Tile(32, 256, 128, (32, 32, 128), 4, 1.7, 17, more=OVERLAP_8),
    Tile(48, 256, 128, (48, 32, 128), 4, 1.6, 21, more=OVERLAP_8),
    Tile(64, 128, 128, (64, 32, 128), 6, 1.8, 14),
    Tile(80, 256, 128, (80, 32, 128), 4, 2.1, 26, more=OVERLAP_8),
    Tile(128, 128, 128, (128, 16, 128), 5, 2.1, 25),
)
# Other weights by 8-bit activations.
EIGHT = (
    Tile(16, 128, 128, (16, 32, 128), 6, 1.3, 16),
    Tile(32, 128, 128, (32, 32, 128), 6, 1.4, 11),
    Tile(64, 128, 128, (64, 32, 128), 5, 1.8, 14),
    Tile(128, 128, 128, (64, 32, 128), 4, 3.0, 30),
)
# Upper ends of the ranges of rows, of all experts together, that get a tile each.
ENDS = tuple(2**i for i in range(3, 19))


def expected_blocks(rows, experts, m):
    """How many blocks of m rows are expected where each of `rows` chooses one of the experts, all alike."""
    mean = rows / experts
    if experts == 1:
        return -(-rows // m)
    if mean > 4 * m:
        return experts * (mean / m + 0.5)
    # An expert's number of rows is almost Poisson distributed: the sum over j of the probability that it exceeds j * m.
    term = below = math.exp(-mean)
    count, total = 0, 0.0
    while 1 - below > 1e-9 and count <= rows:
        if count % m == 0:
            total += 1 - below
        count += 1
        term *= mean / count
        below += term
    return experts * total


def waves(tiles, blocks, sms):
    """(number of waves, and what they cost in full ones) of so many tiles, `blocks` at once on a multiprocessor.

    A last wave that leaves each multiprocessor fewer is faster: by half at the most, as a thread block on its own waits for memory.
    """
    full, rest = divmod(math.ceil(tiles), sms * blocks)
    part = (1 + math.ceil(rest / sms) / blocks) / 2 if rest else 0
    return full + (rest > 0), full + part


def time(tile, rows, shape, experts, sms):
    """Estimated microseconds for (rows, k) by experts' padded weights (n, k)."""
    n, k = shape
    number, full = waves(expected_blocks(rows, experts, tile.m) * (n // tile.n), tile.blocks, sms)
    return number * tile.begin + full * tile.cost * k / 4096


def choose(tiles, rows, shape, experts, sms, m=None):
    """The tile with the least time, of those with m rows where m is given; None if none fits."""
    fitting = [tile for tile in tiles if shape[0] % tile.n == 0 and shape[1] % tile.k == 0 and m in (None, tile.m)]
    return min(fitting, key=lambda tile: time(tile, rows, shape, experts, sms), default=None)


def sizes(tiles, shape):
    """The numbers of rows of the tiles that a padded weight (n, k) consists of."""
    return tuple(sorted({tile.m for tile in tiles if shape[0] % tile.n == 0 and shape[1] % tile.k == 0}))


def choose_block(tiles, rows, shapes, experts, sms):
    """Rows of a block that serve several weights (n, k) best, one after the other: those of a layer's two products."""

    def total(m):
        return sum(time(choose(tiles, rows, shape, experts, sms, m), rows, shape, experts, sms) for shape in shapes)

    return min(sorted(set.intersection(*(set(sizes(tiles, shape)) for shape in shapes))), key=total)


def intervals(tiles, shape, experts, sms, layout, bits, m=None):
    """Humming's list of [lowest number of rows (excluded), highest, tuning configuration] for a padded weight (n, k).

    Args:
        bits: of a number of x, and of a weight with its share of scales. m: the rows of a tile, or None for any.
    """
    table, low = [], 0
    for end in ENDS:
        config = tuning(choose(tiles, end, shape, experts, sms, m), sms, layout, bits)
        if table and table[-1][2] == config:
            table[-1][1] = end
        else:
            table.append([low, end, config])
        low = end
    table[-1][1] = 1 << 30
    return table


def residency(tile, bits):
    """(stages, thread blocks on a multiprocessor) that fit its shared memory."""
    # Each operand of a stage begins at a multiple of 1024 bytes.
    stage = 1024 * sum(math.ceil(tile.k * size / 8192) for size in (tile.m * bits[0], tile.n * bits[1]))
    result = tile.m * tile.n * 2 if dict(tile.more).get("smem_reuse_mode") == "none" else 0
    for blocks in range(tile.blocks, 0, -1):
        stages = int((SHARED_MEMORY / blocks - result - 3072) // stage)
        if stages >= min(tile.stages, 3):
            break
    return min(tile.stages, stages), blocks


def tuning(tile, sms, layout, bits):
    """Humming's tuning configuration for one tile. Rows that are picked by index cannot be loaded and stored as boxes (TMA)."""
    stages, blocks = residency(tile, bits)
    config = {
        "mma_type": "wgmma" if tile.wgmma else "mma",
        "block_shape": [tile.m, tile.n, tile.k],
        "warp_shape": list(tile.warp),
        "num_stages": stages,
        "num_ctas_per_sm": blocks,
        "use_stream_k": False,
        "use_warp_spec": not tile.alone,
        "use_tma": not tile.alone,
        "raster_group_m": 1,
        "num_sms": sms,
    }
    if not tile.alone:
        config |= {"use_tma_a": layout != "indexed", "use_tma_c": False}
    return config | dict(tile.more)
