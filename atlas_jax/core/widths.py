"""Sizes that arrays are padded to, so that few programs are compiled for them."""


def power_of_two(number: int) -> int:
    """The least power of two that is not below ``number``; 1 for what is below 1."""
    return 1 << max(0, number - 1).bit_length()
