"""Files of weights: what they hold is known without being read."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from adastate_jax.weights.safetensors_file import SafeTensors


def test_a_name_is_looked_up_without_reading_its_tensor(tmp_path, monkeypatch):
    save_file({"a": np.arange(3.0), "b": np.ones((2, 3), np.float32)}, tmp_path / "x.safetensors")
    tensors = SafeTensors(tmp_path / "x.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(SafeTensors, "__getitem__", lambda tensors, name: pytest.fail(f"{name} was read"))
        assert "a" in tensors
        assert "c" not in tensors
        assert {name: tensor.shape for name, tensor in tensors.stored().items()} == {"a": (3,), "b": (2, 3)}
    np.testing.assert_array_equal(tensors["a"], [0, 1, 2])
    with pytest.raises(KeyError, match="c"):
        tensors["c"]
