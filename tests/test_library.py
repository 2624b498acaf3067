"""The examples of docs/library.md run as they stand, one after the other, and do what it says."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


@pytest.fixture(scope="module")
def example():
    """The names that the page's blocks leave behind."""
    names = {"__name__": "example"}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    # a user's process has neither strict mode
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks:
            exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102 - our own page
    return names


def test_the_model_is_short_and_learns(example):
    (text,) = re.findall(r"^class Classifier.*?^$\n^model", PAGE.read_text(), re.DOTALL | re.M)[:1]
    assert len(text.splitlines()) <= 20
    first, last = example["losses"][0], example["losses"][-1]
    assert last[0] < 0.9 * first[0]
    tokens = int((example["token_bt"] > 0).sum())
    assert int(last[1].count_e.sum()) == 2 * tokens


def test_experts_of_ones_own_are_all_different_and_used(example):
    kernel = np.asarray(example["own"].expert.up.kernel[...])
    assert kernel.shape == (8, 64, 32)
    assert np.abs(kernel[0] - kernel[1]).max() > 0.01


def test_the_bias_moved_and_replay_is_the_same(example):
    bias = np.asarray(example["state"]["bias"])
    assert np.abs(bias).max() > 0
    np.testing.assert_allclose(example["again"], example["y_btd"], rtol=1e-5, atol=1e-6)
