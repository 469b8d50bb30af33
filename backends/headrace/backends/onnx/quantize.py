"""Weights as integers: int8 in blocks, as ``com.microsoft.MatMulNBits`` and ``GatherBlockQuantized`` read it; int4 in
blocks with minima; int8 by output channel, as ``com.microsoft.MatMulIntegerToFloat`` reads it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ZERO_POINT = 128
"""Of uint8. The block-wise operators take it for zero when they are given no zero points."""

CHANNEL_LARGEST = 112
"""The largest magnitude of an int8 weight by channel. Without VNNI, ONNX Runtime adds two products of uint8 and int8 in
16 bits, saturating; two of 127 and activations a little above their zero point would be clipped."""

_ROWS_AT_ONCE = 4096  # bounds the temporary arrays


def quantize_blocks(weight: NDArray[np.float32], block_size: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Quantises ``weight`` [N, K] in blocks of ``block_size`` along K, the last one padded with zeros.

    Returns the values [N, ceil(K / block_size), block_size] and the scales [N, ceil(K / block_size)]: a weight is
    (value - ZERO_POINT) x scale, and off by at most half a scale. Scales are what float16 holds exactly, so that the
    compiled operators may keep them so.
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
        rounded = (largest / np.float32(127)).astype(np.float16).astype(np.float32)
        # Tiny halves are far apart: the next one, where nearly a step of the largest weight would be cut off.
        above = np.nextafter(rounded.astype(np.float16), np.float16(np.inf)).astype(np.float32)
        rounded = np.where(largest > np.float32(127.5) * rounded, above, rounded)
        # A block of zeros needs a scale that is not zero; any will do.
        scales[rows] = np.where(rounded > 0, rounded, np.float32(1))
        quotient = np.clip(blocks / scales[rows, :, None], -127, 127)
        values[rows] = np.rint(quotient).astype(np.int16) + ZERO_POINT
    return values, scales


def quantize_minima(
    weight: NDArray[np.float32], block_size: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """Quantises ``weight`` [N, K] to 4 bits in blocks of ``block_size`` along K, the last one padded with zeros.

    Returns values [N, blocks, block_size / 2], two to a byte, the first in its lower half; scales and minima
    [N, blocks], which float16 holds exactly. A weight is value x scale + minimum.

    A block that already is up to 16 evenly spaced numbers, as weights read from a file of 4 bits are, stays exactly
    that where float16 holds its spacing and its least number.
    """
    num_rows, width = weight.shape
    num_blocks = -(-width // block_size)
    values = np.empty((num_rows, num_blocks, block_size // 2), np.uint8)
    scales = np.empty((num_rows, num_blocks), np.float32)
    minima = np.empty((num_rows, num_blocks), np.float32)
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        padded = np.pad(weight[rows], ((0, 0), (0, num_blocks * block_size - width)))
        integers, scales[rows], minima[rows] = _fit_evenly(padded.reshape(-1, num_blocks, block_size))
        values[rows] = integers[..., ::2] | integers[..., 1::2] << 4
    return values, scales, minima


def _fit_evenly(
    blocks: NDArray[np.float32],
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """For each block [..., K] integers of 0 to 15, a scale and a minimum [...]: of the spacings that divide its range
    into 15 to 8 steps, the one that loses least.
    """
    flat = blocks.reshape(-1, blocks.shape[-1])
    least = flat.min(axis=1).astype(np.float16).astype(np.float32)
    span = flat.max(axis=1) - least
    integers, scales = np.empty(flat.shape, np.uint8), np.empty(len(flat), np.float32)
    losses = np.full(len(flat), np.inf, np.float32)
    exact = np.float32(1e-12) * np.square(span) * flat.shape[1]
    for num_steps in range(15, 7, -1):
        (open_blocks,) = np.nonzero(losses > exact)
        if not len(open_blocks):
            break
        block, minimum = flat[open_blocks], least[open_blocks, None]
        spacing = (span[open_blocks] / np.float32(num_steps)).astype(np.float16).astype(np.float32)
        spacing = np.where(spacing > 0, spacing, np.float32(1))  # of a block of one number, any will do
        found = np.clip(np.rint((block - minimum) / spacing[:, None]), 0, 15)
        loss = np.square(found * spacing[:, None] + minimum - block).sum(axis=1)
        better = loss < losses[open_blocks]
        chosen = open_blocks[better]
        integers[chosen], scales[chosen], losses[chosen] = found[better], spacing[better], loss[better]
    shape = blocks.shape[:-1]
    return integers.reshape(blocks.shape), scales.reshape(shape), least.reshape(shape)


def quantize_channels(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantises ``weight`` [N, K] with one scale for each of N.

    Returns the values [K, N] and the scales [N]: a weight is value x scale, and off by at most half a scale.
    """
    largest = np.abs(weight).max(axis=-1)
    scales = np.where(largest > 0, largest / np.float32(CHANNEL_LARGEST), np.float32(1))
    values = np.empty((weight.shape[1], weight.shape[0]), np.int8)
    for start in range(0, weight.shape[0], _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        values[:, rows] = np.rint(weight[rows] / scales[rows, None]).T
    return values, scales
