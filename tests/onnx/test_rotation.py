from __future__ import annotations

import numpy as np
import pytest

from headrace.backends.onnx.rotation import randomized_hartley


@pytest.mark.parametrize("size", [1, 2, 7, 64, 576, 960, 2048])
def test_the_matrix_is_orthogonal_and_no_entry_stands_out(size):
    matrix = randomized_hartley(size).astype(np.float64)
    assert np.abs(matrix @ matrix.T - np.eye(size)).max() < 1e-5
    assert np.abs(matrix).max() <= np.sqrt(2 / size) * (1 + 1e-6)


def test_an_outlier_is_spread_over_all_channels():
    row = np.zeros(576)
    row[5] = 24
    assert np.abs(row @ randomized_hartley(576)).max() < 1.5
