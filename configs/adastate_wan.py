"""AdaState at the paper's size: a 14B teacher, a 1.3B critic, and Self-Forcing's 1.3B student, distilled with a state.

python -m adastate_jax.train --config=configs/adastate_wan.py --workdir=runs/adastate --config.mesh.fsdp=4
python -m adastate_jax.train --config=configs/adastate_wan.py:long --workdir=runs/adastate_long --config.mesh.fsdp=4

The second is the setting for 30-second videos. Before either, once, with Wan-AI/Wan2.1-T2V-14B and -1.3B,
self_forcing_dmd.pt of gdhe17/Self-Forcing, and a file of prompts, one a line (the paper's are Self-Forcing's,
vidprom_filtered_extended.txt):

python -m adastate_jax.convert --source=Wan2.1-T2V-14B --output=weights/teacher --dtype=bfloat16
python -m adastate_jax.convert --source=Wan2.1-T2V-1.3B/diffusion_pytorch_model.safetensors --output=weights/critic
python -m adastate_jax.convert --source=self_forcing_dmd.pt --output=weights/student
python -m adastate_jax.convert --source=Wan2.1-T2V-1.3B/models_t5_umt5-xxl-enc-bf16.pth --output=weights/text_encoder
python -m adastate_jax.convert --source=Wan2.1-T2V-1.3B/Wan2.1_VAE.pth --output=weights/vae --dtype=bfloat16
cp Wan2.1-T2V-1.3B/google/umt5-xxl/tokenizer.json weights/
python -m adastate_jax.embed --checkpoint=weights --prompts=prompts.txt --output=data/prompts

Sources: [paper] arXiv 2605.30349; [sf] guandeh17/Self-Forcing, configs/self_forcing_dmd.yaml where no file is named,
for what the paper does not state (configs/self_forcing_dmd_5step.yaml there has the same numbers, but for a fifth
step); [wan] Wan-Video/Wan2.1.
"""

import pathlib
import runpy

WAN = pathlib.Path(__file__).with_name("wan_1_3b.py")


def get_config(setting: str = ""):
    if setting not in ("", "long"):
        raise ValueError(f"unknown setting {setting!r}; the only one is long")
    config = runpy.run_path(str(WAN))["get_config"]()  # networks of 1.3B, the encoders, chunks, window and state
    config.stages = ("distill", "sample")

    # No clips: all that is read is prompts, encoded beforehand. 81 frames of 480×832, 21 latent ones.
    config.data.kind = "none"
    config.data.embeddings = "data/prompts"
    config.data.encoders = "weights"

    # [paper] the teacher is Wan2.1-T2V-14B; [sf] real_name is the same.
    # [wan] wan/configs/wan_t2v_14B.py
    config.teacher.weights = "weights/teacher"
    config.teacher.dim = 5120
    config.teacher.ffn_dim = 13824
    config.teacher.num_heads = 40
    config.teacher.num_layers = 40
    config.teacher.param_dtype = "bfloat16"  # frozen
    config.critic.weights = "weights/critic"  # [sf] the fake score is Wan2.1-T2V-1.3B, trained fully
    config.student.weights = "weights/student"  # [paper] from the Self-Forcing checkpoint
    config.model.param_dtype = "float32"  # of what is trained; it computes in bfloat16, [sf] mixed_precision
    config.model.remat = "block"  # [sf] gradient_checkpointing

    config.distill.steps = 1000  # [paper] iterations; each updates the critic, every fifth the student
    config.distill.batch_size = 4  # [paper] effective batch
    config.distill.rollout_frames = 21  # [paper] seven chunks of three
    config.distill.horizon_alpha = 4.0 if setting == "long" else 2.0  # [paper] best at 30 s, and at 5 s
    config.distill.cache_gradient = "stop"  # [paper] the gradient is cut at chunk boundaries
    config.distill.guidance_scale = 3.0  # [sf] guidance_scale: cond + 3 (cond - uncond)
    config.distill.critic_ratio = 5  # [sf] dfake_gen_update_ratio
    config.distill.student.learning_rate = 2e-6  # [sf] lr
    config.distill.critic.learning_rate = 4e-7  # [sf] lr_critic
    for optimizer in (config.distill.student, config.distill.critic):
        optimizer.betas = (0.0, 0.999)  # [sf] beta1, beta2, and the critic's
        optimizer.weight_decay = 0.01  # [sf] configs/default_config.yaml; trainer/distillation.py has it for both
        optimizer.max_gradient_norm = 10.0  # [sf] trainer/distillation.py, where no file sets it: of both
    config.distill.ema_decay = 0.99  # [sf] ema_weight
    config.distill.ema_start = 200  # [sf] ema_start_step
    config.distill.shift = 5.0  # [sf] timestep_shift
    config.distill.min_timestep, config.distill.max_timestep = 20.0, 980.0  # [sf] model/dmd.py: 2 and 98 % of 1000

    # [paper] 21 latent frames are 5 seconds, 120 are 30
    config.sample.anchors = ("adaptive",)
    config.sample.frames = 120 if setting == "long" else 21
    config.sample.count = 4
    config.sample.scale = 1
    config.logging.save_every = 100
    return config
