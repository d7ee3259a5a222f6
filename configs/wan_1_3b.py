"""Wan2.1-T2V-1.3B made causal (Self-Forcing's student), streamed with AdaState's window and anchor at 480×832.

python -m adastate_jax.sample --config=configs/wan_1_3b.py --checkpoint=weights --prompt="a fox runs through snow"
python -m adastate_jax.sample --config=configs/wan_1_3b.py --random-weights --prompt="a dry run without any files"

`weights` is a folder of networks that `python -m adastate_jax.convert` made: transformer, text_encoder, vae or
tiny_vae, and the tokenizer.json of google/umt5-xxl. Sources: [wan] Wan-Video/Wan2.1, [sf] guandeh17/Self-Forcing,
[taehv] madebyollin/taehv, [paper] arXiv 2605.30349.
"""

from adastate_jax.config import WAN_NEGATIVE_PROMPT, default_config


def get_config():
    config = default_config()
    config.stages = ()  # the networks come trained
    config.negative_prompt = WAN_NEGATIVE_PROMPT  # [wan] wan/configs/shared_config.py sample_neg_prompt

    # [sf] configs/self_forcing_dmd.yaml image_or_video_shape [1, 21, 16, 60, 104]: 21 latent frames of 60×104, which
    # are 81 frames of 480×832; at 16 per second, [wan] wan/configs/shared_config.py sample_fps
    config.data.kind = "none"
    config.data.clips.height, config.data.clips.width = 480, 832
    config.data.clips.num_frames, config.data.clips.fps = 81, 16

    # [wan] wan/configs/wan_t2v_1_3B.py; text_dim and channels from wan/modules/model.py WanModel
    config.model.dim = 1536
    config.model.ffn_dim = 8960
    config.model.freq_dim = 256
    config.model.num_heads = 12
    config.model.num_layers = 30
    config.model.patch_size = (1, 2, 2)
    config.model.qk_norm = config.model.cross_attn_norm = True
    config.model.eps = 1e-6
    config.model.in_channels = config.model.out_channels = 16
    config.model.text_dim = 4096
    config.model.text_length = 512
    config.model.prediction = "flow"

    # [wan] wan/modules/t5.py umt5_xxl; text_len of wan/configs/shared_config.py
    config.text.vocab_size = 256384
    config.text.dim = config.text.dim_attention = 4096
    config.text.ffn_dim = 10240
    config.text.num_heads = 64
    config.text.num_layers = 24
    config.text.num_buckets = 32
    config.text.max_distance = 128  # [wan] wan/modules/t5.py T5RelativeEmbedding max_dist
    config.text.eps = 1e-6
    config.text.text_length = 512

    # [wan] wan/modules/vae.py _video_vae; mean and deviation of the latents are VAEConfig's defaults, from there too
    config.decoder = "wan"
    config.vae.dim = 96
    config.vae.latent_channels = 16
    config.vae.dim_multipliers = (1, 2, 4, 4)
    config.vae.num_res_blocks = 2
    config.vae.temporal_downsample = (False, True, True)

    # [taehv] taehv.py TAEHV, whose temporal flags for Wan2.1 these are; used with --decoder=tiny
    config.tiny_vae.latent_channels = 16
    config.tiny_vae.widths = (256, 128, 64)
    config.tiny_vae.temporal_upsample = (False, True, True)
    config.tiny_vae.temporal_downsample = (True, True, False)

    # [sf] inference.py casts the whole pipeline to bfloat16
    for network in (config.model, config.text, config.vae, config.tiny_vae):
        network.param_dtype = network.dtype = "bfloat16"

    # [paper] chunks of 3 latent frames, a window of 6 with the chunk, one adaptive state frame
    config.stream.chunk_frames = 3  # also [sf] num_frame_per_block
    config.stream.past_frames = 3
    config.stream.anchor.name = "adaptive"
    config.stream.anchor.frames = 1
    # [sf] configs/self_forcing_dmd.yaml denoising_step_list, warped by timestep_shift
    config.stream.denoising_steps = (1000.0, 750.0, 500.0, 250.0)
    config.stream.shift = 5.0

    # [paper] teacher guidance, and the training rollout of seven chunks; [sf] guidance_scale is the same
    config.distill.guidance_scale = 3.0
    config.distill.rollout_frames = 21
    return config
