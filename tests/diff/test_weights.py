"""Weights side by side."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from rayexp.diff.weights import diff_weights
from rayexp.errors import UserError


def pair(makes, arrays, first, second):
    predictions = arrays.images([0, 1], [1, 0], classes=2)
    run = makes.images([predictions] * 2, 2, weights=[first, second])
    return (run, 1), (run, 2)


def test_by_hand(makes, arrays):
    a = {
        "conv.weight": np.array([[3.0, 4.0]], np.float32),
        "fc.bias": np.zeros(2, np.float32),
        "bn.num_batches_tracked": np.array(3, np.int64),
        "still": np.ones((2, 2), np.float32),
        "layer.10.w": np.ones(1, np.float32),
        "layer.9.w": np.ones(1, np.float32),
        "layer.9.0": np.zeros(1, np.float32),
    }
    b = {**a, "conv.weight": np.array([[3.0, 5.0]], np.float32), "fc.bias": np.array([0.0, 2.0], np.float32)}
    b["bn.num_batches_tracked"] = np.array(6, np.int64)
    r = diff_weights(*pair(makes, arrays, a, b))
    found = {t.name: t for t in r.tensors}
    assert found["conv.weight"].relative == pytest.approx(0.2)
    assert found["conv.weight"].shape == (1, 2)
    assert math.isinf(found["fc.bias"].relative)
    assert found["still"].relative == 0
    assert [x.name for x in r.layers] == ["fc", "conv", "layer.9", "layer.10", "still"]
    assert r.layers[1].weights == 2
    names = [t.name for t in r.tensors]
    assert names.index("layer.9.w") < names.index("layer.9.0") < names.index("layer.10.w")
    # |A|^2 = 25 + 4 + 2, |B - A|^2 = 1 + 4; the counter is no weight
    assert r.relative == pytest.approx(math.sqrt(5 / 31))
    assert not r.equal
    assert json.loads(json.dumps(r.to_json(), allow_nan=False))["relative"] == r.relative


def test_what_is_not_finite_moved_most(makes, arrays):
    a = {"one.w": np.ones(1, np.float32), "two.w": np.ones(1, np.float32)}
    b = {"one.w": np.full(1, 9, np.float32), "two.w": np.full(1, np.nan, np.float32)}
    assert [x.name for x in diff_weights(*pair(makes, arrays, a, b)).layers] == ["two", "one"]


def test_zeros_that_stay_zeros_have_not_moved(makes, arrays):
    same = {"fc.bias": np.zeros(2, np.float32)}
    r = diff_weights(*pair(makes, arrays, same, {"fc.bias": np.zeros(2, np.float32)}))
    assert [t.relative for t in r.tensors] == [0]
    assert r.relative == 0


def test_layers_by_hand(makes, arrays):
    a = {
        "l.weight": np.array([3.0], np.float32),
        "l.bias": np.array([4.0], np.float32),
        "m.weight": np.ones(4, np.float32),
    }
    b = {
        "l.weight": np.array([3.0], np.float32),
        "l.bias": np.array([5.0], np.float32),
        "m.weight": np.ones(4, np.float32),
    }
    for side, value in ((a, 1.0), (b, 9.0)):
        side["l.running_mean"] = np.array([value], np.float32)
    r = diff_weights(*pair(makes, arrays, a, b))
    assert [(x.name, x.weights, x.norm, x.moved, x.relative) for x in r.layers] == [
        ("l", 2, 5, 1, 0.2),
        ("m", 4, 2, 0, 0),
    ]
    assert r.relative == pytest.approx(1 / np.sqrt(29))
    assert len(r.tensors) == 4


def test_equal(makes, arrays):
    a = {"w": np.ones(4, np.float32)}
    assert diff_weights(*pair(makes, arrays, a, dict(a))).equal


def test_other_architecture(makes, arrays):
    a = {"w": np.ones(4, np.float32), "old": np.ones(1, np.float32), "x": np.ones(2, np.float32)}
    b = {"w": np.ones(4, np.float32), "new": np.ones(1, np.float32), "x": np.ones(3, np.float32)}
    r = diff_weights(*pair(makes, arrays, a, b))
    assert (r.only_a, r.only_b) == (("old", "x"), ("new", "x"))
    assert not r.equal
    with pytest.raises(UserError, match="in common"):
        diff_weights(*pair(makes, arrays, {"u": np.ones(1)}, {"v": np.ones(1)}))


def test_missing_or_damaged(makes, arrays):
    a, b = pair(makes, arrays, {"w": np.ones(4, np.float32)}, {"w": np.ones(4, np.float32)})
    path = b[0].checkpoint(2) / "state.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=r"epoch_002/state\.safetensors: cannot be read"):
        diff_weights(a, b)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        diff_weights(a, b)
