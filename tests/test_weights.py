"""Algebra of named tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmat import weights as wts
from fedmat.seeds import derive, stream


def some(seed: int) -> wts.Weights:
    rng = np.random.default_rng(seed)
    return {"b": rng.normal(size=3).astype(np.float32), "a": rng.normal(size=(2, 2)).astype(np.float32)}


@given(st.integers(0, 2**32 - 1))
def test_flatten_and_unflatten_are_inverse(seed: int) -> None:
    a = some(seed)
    back = wts.unflatten(wts.flatten(a), a)
    assert all(np.array_equal(a[k], back[k]) for k in a)


def test_a_vector_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="8 numbers"):
        wts.unflatten(np.zeros(8), some(0))


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_subtracting_what_was_added_returns_to_the_start(s: int, t: int) -> None:
    a, b = some(s), some(t)
    back = wts.subtract(wts.add(a, b), b)
    assert all(np.allclose(a[k], back[k], atol=1e-6) for k in a)


def test_norm_is_the_euclidean_norm() -> None:
    assert wts.norm({"x": np.array([3.0], np.float32), "y": np.array([[4.0]], np.float32)}) == pytest.approx(5.0)


def test_streams_of_different_names_differ_and_equal_names_agree() -> None:
    assert stream(1, "a").random() == stream(1, "a").random()
    assert len({derive(1, "a"), derive(1, "b"), derive(2, "a"), derive(1, "a", 0), derive(1, "a", "0", 0)}) == 5
    assert derive(1, "a", "b") != derive(1, "ab")
