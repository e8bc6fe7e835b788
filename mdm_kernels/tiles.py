"""The arithmetic of tiles, on integers: sizes of blocks, and how many cover a size. Triton's own costs microseconds."""


def next_power_of_2(size: int) -> int:
    """The least power of two that is no less than `size`; 1 for a size of 0."""
    return 1 << max(size - 1, 0).bit_length()


def count(size: int, block: int) -> int:
    """How many blocks of `block` cover `size`."""
    return -(-size // block)
