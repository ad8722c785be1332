"""Laws of the wire: canonical, typed, and nothing but the declared message decodes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedmat import wire
from fedmat.domain import AttestRequest, Dropout, GlobalModel, Request, Scaler, TrainRequest, Update
from fedmat.errors import StateError, WireError

WEIGHTS = st.dictionaries(
    st.text("abc.01", min_size=1, max_size=5),
    arrays(np.float32, array_shapes(max_dims=2, max_side=4), elements=st.floats(-1e6, 1e6, width=32)),
    max_size=4,
)


def update(**changes: object) -> Update:
    values = {"site": "ash", "round": 1, "plan_sha256": "p", "request_sha256": "r", "delta": {"w": np.ones(2, np.float32)}}
    return Update(**{**values, **changes})  # type: ignore[arg-type]


@given(WEIGHTS, WEIGHTS, st.floats(), st.integers(0, 2**40))
def test_what_is_encoded_decodes_to_the_same_bytes(delta, control, loss, number) -> None:  # type: ignore[no-untyped-def]
    data = wire.encode(update(delta=delta, control_delta=control, train_loss=loss, round=number))
    back = wire.decode(data, Update)
    assert wire.encode(back) == data
    assert back.train_loss == loss or math.isnan(loss)
    assert all(np.array_equal(back.delta[k], v) for k, v in delta.items())


def test_the_order_of_tensors_does_not_change_the_bytes() -> None:
    a, b = np.ones(2, np.float32), np.zeros(3, np.float32)
    assert wire.encode(update(delta={"a": a, "b": b})) == wire.encode(update(delta={"b": b, "a": a}))


@given(st.binary(max_size=300))
def test_random_bytes_are_a_wire_error(data: bytes) -> None:
    with pytest.raises(WireError):
        wire.decode(data, Update)


@given(st.data())
def test_one_changed_byte_never_raises_anything_but_a_wire_error(data: st.DataObject) -> None:
    good = bytearray(wire.encode(update()))
    at = data.draw(st.integers(0, len(good) - 1))
    good[at] ^= data.draw(st.integers(1, 255))
    try:
        wire.decode(bytes(good), Update)
    except WireError:
        pass


@pytest.mark.parametrize(
    "wrong",
    [
        {"round": "1"}, {"round": True}, {"round": 1.5}, {"site": 3}, {"train_loss": "nan"}, {"train_loss": 1},
        {"delta": {"w": np.ones(2)}}, {"delta": {"w": [1.0]}}, {"delta": np.ones(2, np.float32)}, {"validation": "x"},
    ],
)  # fmt: skip
def test_a_field_of_another_type_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(WireError):
        wire.decode(wire.encode(update(**wrong)), Update)


def test_another_message_is_refused() -> None:
    with pytest.raises(WireError, match="expected a Update"):
        wire.decode(wire.encode(Dropout("ash", "late")), Update)


def test_a_request_is_any_of_its_kinds() -> None:
    assert isinstance(wire.decode(wire.encode(AttestRequest("p")), Request), AttestRequest)
    with pytest.raises(WireError):
        wire.decode(wire.encode(update()), Request)


def test_a_literal_outside_its_values_is_refused() -> None:
    with pytest.raises(WireError):
        wire.decode(wire.encode(Dropout("ash", "bored")), Dropout)  # type: ignore[arg-type]


def test_a_damaged_model_file_is_a_state_error_naming_it(tmp_path) -> None:  # type: ignore[no-untyped-def]
    scaler = Scaler(np.zeros(2), np.ones(2), np.ones(2), np.zeros(1), np.ones(1))
    path = tmp_path / "model.safetensors"
    digest = wire.save_model(GlobalModel({"w": np.ones(2, np.float32)}, scaler, {"schema": "x", "n": (1, 2)}), path)
    assert wire.digest(wire.load_model(path)) == digest
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StateError, match=r"model\.safetensors"):
        wire.load_model(path)
    with pytest.raises(StateError, match="no such model"):
        wire.load_model(tmp_path / "none")


def test_the_bytes_hold_no_pickle() -> None:
    request = TrainRequest(
        "p", 0, 0.1, "digest", {"w": np.ones(3, np.float32)}, Scaler(np.zeros(1), np.ones(1), np.ones(1), 0.0, 1.0)
    )
    data = wire.encode(request)
    assert b"numpy" not in data
    assert data[8:9] == b"{"
