"""Tile sizes and launch options of the attention kernels, by shape: BLOCK_M queries by BLOCK_N keys.

Chosen by `python -m mdm_kernels.aot`: the largest tiles with which no shape class spills on any target.
"""

FEW_QUERIES = 128 * 132  # fewer make less than one tile of 128 for each multiprocessor of a large GPU


def power_of_two(size: int) -> int:
    """The least power of two that is no less, and no less than a matrix product's 16."""
    return max(16, 1 << (size - 1).bit_length())


def split_width(head_width: int) -> tuple[int, int]:
    """(DA, DB), powers of two: 64 → (64, 0), 96 → (64, 32), 80 → (64, 16); one padded tile where that is no larger."""
    padded = power_of_two(head_width)
    half = padded // 2
    rest = power_of_two(head_width - half)
    return (half, rest) if half >= 16 and half + rest < padded else (padded, 0)


def count(size: int, block: int) -> int:
    """How many tiles of `block` rows cover `size` rows."""
    return -(-size // block)


def width_constants(head_width: int) -> dict[str, int]:
    """The constexprs that say how a head's channels are held."""
    first, second = split_width(head_width)
    return {"D": head_width, "DA": first, "DB": second}


def forward_tiles(itemsize: int, queries: int) -> dict[str, int]:
    """Of the forward kernels; `queries` counts those of all heads and samples."""
    if itemsize == 4:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    if queries < FEW_QUERIES:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


def context_tile(queries_tile: int) -> int:
    """Keys of the context in a tile of `self_cross_forward`, whose tile of queries is given. With 64 beside 128 queries
    it needs more than 128 registers on sm_90, and one program of 8 warps fills a multiprocessor that could have two."""
    return 64 if queries_tile == 64 else 32


def query_tiles(itemsize: int, queries: int) -> dict[str, int]:
    """Of the kernels for the gradient of q."""
    if itemsize == 4:
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 8, "num_stages": 2}
    if queries < FEW_QUERIES:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}


def key_tiles(head_width: int, itemsize: int) -> dict[str, int]:
    """Of the kernels for the gradients of k and v."""
    if itemsize == 4:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    if head_width > 64:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
