from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from headrace.backends.onnx.quantize import (
    CHANNEL_LARGEST,
    ZERO_POINT,
    quantize_blocks,
    quantize_channels,
    quantize_minima,
)

BLOCK = 16
weights = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.integers(1, 50)),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


@given(weights)
def test_a_weight_is_off_by_at_most_half_a_scale(weight):
    values, scales = quantize_blocks(weight, BLOCK)
    restored = (values.astype(np.float32) - ZERO_POINT) * scales[..., None]
    width = weight.shape[1]
    error = np.abs(restored.reshape(len(weight), -1)[:, :width] - weight)
    allowed = np.repeat(scales, BLOCK, axis=1)[:, :width] * 0.5001
    assert (error <= allowed).all()


@given(weights)
def test_what_pads_the_last_block_counts_as_zero(weight):
    values, _ = quantize_blocks(weight, BLOCK)
    assert (values.reshape(len(weight), -1)[:, weight.shape[1] :] == ZERO_POINT).all()


def test_a_block_of_zeros_stays_zero_with_a_usable_scale():
    values, scales = quantize_blocks(np.zeros((2, 32), np.float32), BLOCK)
    assert (values == ZERO_POINT).all()
    assert (scales > 0).all()


@pytest.mark.parametrize("num_rows", [4095, 4096, 4097, 9000])
def test_rows_do_not_depend_on_how_many_there_are(num_rows):
    weight = np.random.default_rng(0).normal(size=(num_rows, 20)).astype(np.float32)
    values, scales = quantize_blocks(weight, BLOCK)
    last_values, last_scales = quantize_blocks(weight[-1:], BLOCK)
    assert (values[-1:] == last_values).all()
    assert (scales[-1:] == last_scales).all()


@given(weights)
def test_a_weight_by_channel_is_off_by_at_most_half_a_scale(weight):
    values, scales = quantize_channels(weight)
    assert (np.abs(values.T * scales[:, None] - weight) <= 0.5001 * scales[:, None]).all()
    assert (np.abs(values.astype(int)) <= CHANNEL_LARGEST).all()


def test_a_channel_of_zeros_stays_zero_with_a_usable_scale():
    values, scales = quantize_channels(np.zeros((2, 32), np.float32))
    assert (values == 0).all()
    assert (scales > 0).all()


# --- four bits, with minima


def four_bits(weight, block):
    """What ``quantize_minima`` makes of a weight whose width is whole blocks."""
    values, scales, minima = quantize_minima(weight, block)
    integers = np.stack([values & 15, values >> 4], axis=-1).reshape(*values.shape[:-1], block)
    return (integers * scales[..., None] + minima[..., None]).reshape(weight.shape)


def test_weights_of_a_file_of_four_bits_stay_what_they_are():
    dice = np.random.default_rng(0)
    integers = dice.integers(0, 16, (64, 8, 32))
    integers[..., 0], integers[..., 1] = 0, 15  # as whoever made the file chose its scale and minimum
    integers[0, 0, 1:] = 9  # or, as in some blocks, did not
    scales = dice.uniform(1e-3, 0.1, (64, 8, 1)).astype(np.float16).astype(np.float32)
    minima = dice.uniform(-1, 0, (64, 8, 1)).astype(np.float16).astype(np.float32)
    weight = (integers * scales + minima).astype(np.float32).reshape(64, 256)
    assert np.abs(four_bits(weight, 32) - weight).max() < 1e-6


@pytest.mark.parametrize("num_steps", [8, 9, 11, 14])
def test_blocks_of_fewer_even_steps_stay_what_they_are(num_steps):
    integers = np.random.default_rng(num_steps).integers(0, num_steps + 1, (16, 4, 32))
    integers[..., 0], integers[..., 1] = 0, num_steps
    weight = (integers * np.float32(0.125) - np.float32(0.5)).astype(np.float32).reshape(16, 128)
    assert (four_bits(weight, 32) == weight).all()


def test_other_weights_are_off_by_little_more_than_half_a_step():
    weight = np.random.default_rng(1).normal(size=(200, 64)).astype(np.float32)
    steps = np.repeat(np.ptp(weight.reshape(200, 2, 32), axis=-1) / 15, 32, axis=1)
    error = np.abs(four_bits(weight, 32) - weight)
    assert np.sqrt((error**2).mean()) < np.sqrt((steps**2 / 12).mean())
    assert (error < 0.8 * steps).all()


def test_blocks_of_one_number_and_what_pads_the_last_block_are_no_trouble():
    weight = np.full((3, 40), -0.25, np.float32)
    values, scales, minima = quantize_minima(weight, 32)
    assert values.shape == (3, 2, 16)
    assert (scales > 0).all()
    restored = np.stack([values & 15, values >> 4], axis=-1).reshape(3, 2, 32) * scales[..., None] + minima[..., None]
    assert np.abs(restored.reshape(3, 64)[:, :40] - weight).max() < 1e-3
