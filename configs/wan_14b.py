"""Wan2.1-T2V-14B: the transformer of distillation's teacher; all else as in configs/wan_1_3b.py.

python -m adastate_jax.sample --config=configs/wan_14b.py --checkpoint=weights_14b --prompt="a fox runs through snow"

samples a causal student of this size, such as a Self-Forcing generator distilled into 14B; the published teacher itself
is bidirectional and makes no stream. With --random-weights instead of --checkpoint it is a dry run.
"""

import pathlib
import runpy

SMALLER = pathlib.Path(__file__).with_name("wan_1_3b.py")


def get_config():
    config = runpy.run_path(str(SMALLER))["get_config"]()
    # Wan-Video/Wan2.1 wan/configs/wan_t2v_14B.py; what is not here is the same there
    config.model.dim = 5120
    config.model.ffn_dim = 13824
    config.model.num_heads = 40
    config.model.num_layers = 40
    return config
