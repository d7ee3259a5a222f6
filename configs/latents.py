"""All stages on videos and prompts of your own, encoded beforehand with Wan2.1's text encoder and autoencoder.

With `weights` as the README makes it, a folder `videos` with captions, and `prompts.txt`:

python -m adastate_jax.encode --checkpoint=weights --videos=videos --output=data/clips
python -m adastate_jax.embed --checkpoint=weights --prompts=data/clips/captions.jsonl --output=data/captions
python -m adastate_jax.embed --checkpoint=weights --prompts=prompts.txt --output=data/prompts
python -m adastate_jax.train --config=configs/latents.py --workdir=runs/latents
"""

from adastate_jax.config import WAN_NEGATIVE_PROMPT, default_config


def get_config():
    config = default_config()
    config.negative_prompt = WAN_NEGATIVE_PROMPT

    config.data.kind = "latents"
    config.data.latents = "data/clips"
    config.data.captions = "data/captions"
    config.data.embeddings = "data/prompts"
    config.data.encoders = "weights"
    config.data.clips.height, config.data.clips.width, config.data.clips.num_frames = 480, 832, 81

    # The encoders as they were converted; the text encoder is UMT5-XXL, which the defaults are. They compute in what
    # is set here when the sample videos are made, not in training.
    config.decoder = "wan"
    config.text.param_dtype = config.text.dtype = "bfloat16"
    config.vae.param_dtype = config.vae.dtype = "bfloat16"

    # A small network; `configs/wan_1_3b.py` has Wan2.1's sizes.
    config.model.dim = 512
    config.model.ffn_dim = 2048
    config.model.num_heads = 8
    config.model.num_layers = 12
    config.model.dtype = "bfloat16"

    config.distill.rollout_frames = 21
    config.sample.anchors = ("adaptive",)
    config.sample.horizon = 1
    config.sample.scale = 1
    return config
