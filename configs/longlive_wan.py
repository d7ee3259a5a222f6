"""LongLive's streaming long tuning at its size: a 14B teacher, and adapters of a 1.3B critic and student.

python -m adastate_jax.train --config=configs/longlive_wan.py --workdir=runs/longlive --config.mesh.fsdp=64

The files are those of configs/adastate_wan.py, but for the student: LongLive starts from one that was distilled before
with its anchor and window (longlive_init.pt of Efficient-Large-Model/LongLive-1.3B):

python -m adastate_jax.convert --source=longlive_init.pt --output=weights/longlive_init

Sources: [paper] arXiv 2509.22622; [ll] NVlabs/LongLive v1, configs/longlive_train_long.yaml where no file is named.
Not as there: the first frame of a clip is not encoded again for critic and teacher, see docs/training.md; the prompts
of a rollout are two of one file, where LongLive has a file of pairs.
"""

import pathlib
import runpy

ADASTATE = pathlib.Path(__file__).with_name("adastate_wan.py")


def get_config():
    config = runpy.run_path(str(ADASTATE))["get_config"]()  # what is not here is Self-Forcing's there, too

    # [ll] local_attn_size 12, sink_size 3: the first chunk, at its absolute positions, six frames, and the chunk
    config.stream.anchor = {"name": "absolute", "frames": 3}
    config.stream.past_frames = 6

    config.student.weights = "weights/longlive_init"  # [ll] generator_ckpt
    for network in (config.student, config.critic):
        network.lora.rank = 256  # [ll] adapter: rank, alpha; on all linear layers of the blocks
        network.lora.alpha = 256.0

    config.distill.steps = 3000  # [ll] max_iters
    config.distill.batch_size = 64  # [paper]
    config.distill.continue_rollout = True  # [ll] streaming_training
    config.distill.scored_frames = 21  # [ll] streaming_chunk_size
    config.distill.overlap_frames = 3  # [ll] streaming_min_new_frame 18
    config.distill.rollout_frames = 237  # [ll] streaming_max_length 240: the last that 21 + 18 n frames reach
    # [ll] one switch a rollout, global_sink false in training; switch_choices are segments from 21 to 201, here to 219
    config.distill.prompt_change = "renew"
    config.distill.horizon_alpha = 0.0  # every frame counts alike
    config.distill.ema_decay = 0.0  # [ll] trainer/distillation.py: adapters have no average
    config.distill.student.learning_rate = 1e-5  # [ll] lr
    config.distill.critic.learning_rate = 2e-6  # [ll] lr_critic

    config.sample.anchors = ("longlive",)
    config.sample.frames = 240
    return config
