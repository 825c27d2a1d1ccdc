"""Arrays in .npy files, mapped into memory."""

from pathlib import Path
from typing import Literal

import numpy as np

from atlas_jax.core.errors import UserError, one_line
from atlas_jax.core.paths import input_file


def open_npy(
    path: Path, shape: tuple[int, ...], *dtypes: type, mode: Literal["r", "r+"] = "r"
) -> np.memmap:
    """Map a .npy file that must have this shape and one of these types.

    Raises:
      UserError: the file is absent, damaged, or of another shape, type or byte order; says which.
    """
    input_file(path)
    try:
        array = np.lib.format.open_memmap(path, mode=mode)
    except Exception as error:  # NumPy evaluates the header and maps as much as it says
        raise UserError(f"{path}: not a whole .npy file: {one_line(error)}") from error
    kinds = [np.dtype(one) for one in dtypes]
    if array.shape != shape or array.dtype not in kinds or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else " column by column"
        wanted = " or ".join(kind.str for kind in kinds)
        raise UserError(
            f"{path}: holds {array.dtype.str} {list(array.shape)}{order} instead of {wanted} "
            f"{list(shape)}"
        )
    return array
