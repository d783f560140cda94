"""Which tile multiplies how many rows, without stream-K, on compute capability 9.0.

Humming's own table splits k between thread blocks, and adds the parts in the output's dtype in any order; its batch-invariant
table keeps the same large tiles and leaves most of the GPU idle. Here the tile is the one that needs the least time for all its
waves, a wave being as many tiles as there are multiprocessors; k is split only inside a thread block, which adds in order.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """m x n outputs, k columns at a time, by warps of `warp`. cost: microseconds of a wave at k = 4096, measured on an H200."""

    m: int
    n: int
    k: int
    warp: tuple
    stages: int
    cost: float
    wgmma: bool = True


# 16-bit activations (measured with int4, group 128).
HALF = (
    Tile(32, 64, 128, (32, 64, 32), 4, 11.5, wgmma=False),
    Tile(16, 128, 128, (16, 32, 64), 6, 14.5),
    Tile(32, 128, 128, (32, 32, 64), 6, 15),
    Tile(64, 128, 128, (64, 32, 64), 5, 19),
    Tile(128, 128, 128, (128, 32, 64), 4, 26),
    Tile(128, 256, 64, (128, 32, 64), 5, 48),
)
# e4m3 by e4m3, scales by block of 128 x 128.
FP8_BLOCKS = (
    Tile(16, 64, 256, (16, 16, 128), 8, 10),
    Tile(16, 128, 256, (16, 32, 128), 5, 14),
    Tile(64, 64, 256, (64, 16, 128), 6, 11),
    Tile(64, 128, 128, (64, 32, 128), 6, 14),
    Tile(128, 64, 128, (128, 16, 128), 6, 12),
    Tile(128, 128, 128, (128, 16, 128), 5, 17),
)
# Upper ends of the ranges of m that get a tile each.
ENDS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384)


def intervals(tiles, shape, sms):
    """Humming's list of [lowest m (excluded), highest m, tuning configuration] for a padded weight (n, k)."""
    table, low = [], 0
    for end in ENDS:
        config = tuning(choose(tiles, end, shape, sms), sms)
        if table and table[-1][2] == config:
            table[-1][1] = end
        else:
            table.append([low, end, config])
        low = end
    table[-1][1] = 1 << 30
    return table


def choose(tiles, m, shape, sms):
    """The tile with the least time for m rows, the smaller where two are equal."""
    n, k = shape
    fitting = [tile for tile in tiles if n % tile.n == 0 and k % tile.k == 0]
    return min(fitting, key=lambda tile: -(-(-(-m // tile.m) * (n // tile.n)) // sms) * tile.cost)


def tuning(tile, sms):
    """Humming's tuning configuration for one tile."""
    return {
        "mma_type": "wgmma" if tile.wgmma else "mma",
        "block_shape": [tile.m, tile.n, tile.k],
        "warp_shape": list(tile.warp),
        "num_stages": tile.stages,
        "num_ctas_per_sm": 1,
        "use_stream_k": False,
        "use_warp_spec": tile.wgmma,
        "use_tma": tile.wgmma,
        "raster_group_m": 1,
        "num_sms": sms,
    }
