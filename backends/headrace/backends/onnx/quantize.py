"""Block-wise symmetric int8, as ``com.microsoft.MatMulNBits`` and ``GatherBlockQuantized`` read it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ZERO_POINT = 128
"""What both operators take for zero when they are given no zero points."""

_ROWS_AT_ONCE = 4096  # bounds the temporary arrays


def quantize_blocks(weight: NDArray[np.float32], block_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantises ``weight`` [N, K] in blocks of ``block_size`` along K, the last one padded with zeros.

    Returns the values [N, ceil(K / block_size), block_size] and the scales [N, ceil(K / block_size)]: a weight is
    (value - ZERO_POINT) x scale, and off by at most half a scale.
    """
    num_rows, width = weight.shape
    num_blocks = -(-width // block_size)
    values = np.empty((num_rows, num_blocks, block_size), np.uint8)
    scales = np.empty((num_rows, num_blocks), np.float32)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        padded = np.pad(weight[rows], ((0, 0), (0, num_blocks * block_size - width)))
        blocks = padded.reshape(-1, num_blocks, block_size)
        largest = np.abs(blocks).max(axis=-1)
        # A block of zeros needs a scale that is not zero; any will do.
        scales[rows] = np.where(largest > 0, largest / np.float32(127), np.float32(1))
        quotient = blocks / scales[rows, :, None]
        values[rows] = np.rint(quotient).astype(np.int16) + ZERO_POINT
    return values, scales
