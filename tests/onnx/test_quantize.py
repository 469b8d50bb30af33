from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from headrace.backends.onnx.quantize import CHANNEL_LARGEST, ZERO_POINT, quantize_blocks, quantize_channels

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
