"""Networks of a converted folder, loaded with settings of one's own."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save_file

from adastate_jax import convert
from adastate_jax.errors import UserError
from adastate_jax.models.vae import VAEConfig
from adastate_jax.weights.kinds import KINDS
from adastate_jax.weights.parts import load_part

CONFIG = VAEConfig(dim=2, dim_multipliers=(1, 2), num_res_blocks=1, temporal_downsample=(True,))


def test_stored_networks_decode_in_other_tiles_but_keep_their_sizes(tmp_path):
    slots = KINDS["vae"].slots(CONFIG)
    save_file({name: np.zeros(slot.shape, np.float32) for name, slot in slots.items()}, tmp_path / "x.safetensors")
    convert.main([f"--source={tmp_path / 'x.safetensors'}", f"--output={tmp_path / 'vae'}"])
    for tile in (0, 4):
        config = dataclasses.replace(CONFIG, tile=tile)
        assert load_part(tmp_path, "vae", config, None).config == config
    with pytest.raises(UserError, match=r"its dim is 2, config\.vae\.dim is 4"):
        load_part(tmp_path, "vae", dataclasses.replace(CONFIG, dim=4), None)
