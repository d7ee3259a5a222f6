"""Everything that determines a run, as one tree of frozen dataclasses."""

import dataclasses

from adastate_jax.checks import require_at_least_one
from adastate_jax.config.mesh import MeshConfig, require_divisible_network, require_divisible_text
from adastate_jax.config.networks import NETWORKS, NetworkConfig, require_consistent_networks
from adastate_jax.config.rollouts import require_parts
from adastate_jax.config.stages import (
    DistillConfig,
    InitializeConfig,
    PretrainConfig,
    ode_sigmas,
    stream_of_clips,
)
from adastate_jax.data.videos import ClipConfig
from adastate_jax.data.worlds import WorldConfig
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.patch_codec import PatchCodecConfig
from adastate_jax.models.text import ByteTokenizer, TextConfig
from adastate_jax.models.tiny_vae import TinyVAEConfig
from adastate_jax.models.vae import VAEConfig
from adastate_jax.streaming.presets import STREAM_NAMES
from adastate_jax.streaming.schedule import StreamConfig

STAGES = ("pretrain", "initialize", "distill", "sample")
DECODERS = ("patch", "wan", "tiny")


# What Wan2.1's teacher is guided away from. Source: wan/configs/shared_config.py sample_neg_prompt; Self-Forcing's
# configs/self_forcing_dmd.yaml negative_prompt is the same.
WAN_NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"  # noqa: RUF001
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"  # noqa: RUF001
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The video clips, and the prompts of distillation.

    Attributes:
        kind: `worlds`, procedural clips; `videos`, a folder of files; `latents`, clips that `encode` has encoded; or
            `none`, no clips. With the last two, all texts come from data sets of `embed`, and neither text encoder nor
            video autoencoder is in memory while training; `clips` says the size of the videos.
        worlds: what the procedural clips show, and `num_worlds`, how many there are.
        folder, clips: the folder of video files, and how clips are cut from them.
        prompts: text file with one prompt per line for distillation; empty uses the clips' captions.
        critic_prompts: the same for the critic's updates; empty uses those of the student.
        latents: folder that `encode` wrote.
        captions: folder that `embed` made of its captions.
        embeddings: folder that `embed` made of the prompts of distillation; empty uses the captions.
        critic_embeddings: the same for the critic's updates; empty uses those of the student.
        encoders: folder of the converted networks that all of these were made with (`text_encoder` and its
            `tokenizer.json`, `vae`): data sets of others are refused, and sample videos are made with them. Empty
            leaves that unchecked, and there are no sample videos.
    """

    kind: str = "worlds"
    worlds: WorldConfig = WorldConfig()
    num_worlds: int = 2048
    folder: str = ""
    clips: ClipConfig = ClipConfig(height=32, width=32, num_frames=15)
    prompts: str = ""
    critic_prompts: str = ""
    latents: str = ""
    captions: str = ""
    embeddings: str = ""
    critic_embeddings: str = ""
    encoders: str = ""

    def __post_init__(self):
        if self.kind not in ("worlds", "videos", "latents", "none"):
            raise ValueError(f"kind must be worlds, videos, latents or none, got {self.kind!r}")
        if self.kind == "videos" and not self.folder:
            raise ValueError("folder is not set; name a folder of video files with --config.data.folder=DIR")
        if self.kind == "latents" and not self.latents:
            raise ValueError("latents is not set; name a folder that encode wrote with --config.data.latents=DIR")
        if self.captions and self.kind != "latents":
            raise ValueError(f"captions belong to latents, but kind is {self.kind}; leave it empty")
        for name in ("prompts", "critic_prompts") if self.encoded else ("embeddings", "critic_embeddings"):
            if getattr(self, name):
                other = name.replace("prompts", "embeddings") if self.encoded else name.replace("embeddings", "prompts")
                raise ValueError(f"{name} cannot be read where kind is {self.kind}; set {other} instead")
        require_at_least_one(self, "num_worlds")

    @property
    def encoded(self) -> bool:
        """Whether texts and clips were encoded beforehand, by `embed` and `encode`."""
        return self.kind in ("latents", "none")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a video in pixels."""
        clips = self.worlds if self.kind == "worlds" else self.clips
        return clips.height, clips.width

    @property
    def num_frames(self) -> int:
        """Video frames of a clip."""
        return self.worlds.num_frames if self.kind == "worlds" else self.clips.num_frames


def require_inputs(stages: tuple[str, ...], data: DataConfig, decoder: str, targets: str) -> None:
    """Raises ValueError, naming the field, if a stage has nothing to read."""
    trained = [name for name in stages if name != "sample"]
    if not data.encoded:
        if trained and decoder != "patch":
            raise ValueError(
                f"decoder is {decoder}, but stage {trained[0]} fits the patch codec to data.kind {data.kind}; encode "
                "the videos with python -m adastate_jax.encode, and set data.kind to latents"
            )
        return
    of_clips = [name for name in ("pretrain", "initialize") if name == "pretrain" or targets != "trajectories"]
    for stage in of_clips:
        if stage in stages and data.kind == "none":
            raise ValueError(f"stage {stage} needs clips, and data.kind is none; set data.kind to latents or videos")
    if trained and decoder == "patch":
        raise ValueError(f"decoder is patch, but data.kind is {data.kind}; set decoder to wan or tiny")
    if {"pretrain", "initialize"} & {*stages} and data.kind == "latents" and not data.captions:
        raise ValueError(
            "data.captions is not set; make it of the latents' captions.jsonl with python -m adastate_jax.embed"
        )
    if stages and not (data.embeddings or data.captions):
        raise ValueError(
            f"data.embeddings is not set, and stage {stages[0]} needs prompts; make them with python -m "
            "adastate_jax.embed"
        )
    if "sample" in stages and not data.encoders:
        raise ValueError(
            "data.encoders is not set, and stage sample encodes prompts and decodes videos; name the folder of the "
            "converted text_encoder and vae, or take sample out of stages"
        )


def require_whole_decay(config: "Config") -> None:
    """Raises ValueError if the rate of an optimizer would be zero before its stage ends, and train nothing from there.

    A run that was made so can still be loaded, and sampled of.
    """
    last = config.distill
    optimizers = {
        "pretrain": [("optimizer", config.pretrain.steps)],
        "initialize": [("optimizer", config.initialize.steps)],
        "distill": [("critic", last.steps), ("student", -(-last.steps // last.critic_ratio))],
    }
    for stage in config.stages:
        for name, updates in optimizers.get(stage, ()):
            if 0 < (decay := getattr(getattr(config, stage), name).decay_steps) < updates:
                field = f"{stage}.{name}.decay_steps"
                raise ValueError(
                    f"config.{field} {decay} ends before the {updates} updates of stage {stage} do, at a rate of zero; "
                    f"set {field} to {updates}, or to 0 for no decay"
                )


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The videos that a training run ends with.

    Attributes:
        anchors: strategies, side by side in each video.
        horizon: length of the videos in training horizons.
        frames: their length in content latent frames instead (the paper's 51 and 120), whatever the chunks: the last
            one is cut to fit. 0 is by the horizon.
        prompts: what they show; empty takes captions of the data.
        count: how many captions are taken then.
        seed: of the noise, the same for every anchor.
        scale: enlargement of the pixels.
    """

    anchors: tuple[str, ...] = ("adaptive", "static", "none")
    horizon: int = 3
    frames: int = 0
    prompts: tuple[str, ...] = ()
    count: int = 4
    seed: int = 0
    scale: int = 4

    def __post_init__(self):
        unknown = [name for name in self.anchors if name not in STREAM_NAMES]
        if unknown or not self.anchors:
            raise ValueError(f"anchors must be some of {', '.join(STREAM_NAMES)}, got {self.anchors}")
        require_at_least_one(self, "horizon", "scale", "count")
        if self.frames < 0:
            raise ValueError(f"frames must be at least 1, or 0 for the length in horizons, got {self.frames}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in 0 … {2**32 - 1}, got {self.seed}")


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """How often a run reports and saves.

    Attributes:
        log_every: steps between metrics lines; losses are also checked for NaN then, and before every save.
        save_every: steps between checkpoints.
        keep: newest checkpoints kept per stage.
    """

    log_every: int = 10
    save_every: int = 200
    keep: int = 2

    def __post_init__(self):
        require_at_least_one(self, "log_every", "save_every", "keep")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that determines a run.

    Attributes:
        start_from: work directory of another run with the same networks and data: its clips, its frozen parts and the
            networks of its stages are taken over, so that several runs can start from one teacher.
        negative_prompt: what the teacher is guided away from.
        decoder: between latents and video: `patch`, a linear codec that training fits to its data; `wan`, Wan2.1's
            autoencoder; `tiny`, its fast stand-in TAEW2.1.
        codec, vae, tiny_vae: of the three.
        model: the transformer: what teacher, critic and student are where their own configurations do not say else.
        teacher, critic, student: where each one's weights come from, and its own sizes.
    """

    seed: int = 0
    stages: tuple[str, ...] = STAGES
    start_from: str = ""
    negative_prompt: str = ""
    text: TextConfig = TextConfig()
    decoder: str = "patch"
    codec: PatchCodecConfig = PatchCodecConfig()
    vae: VAEConfig = dataclasses.field(default_factory=VAEConfig)
    tiny_vae: TinyVAEConfig = dataclasses.field(default_factory=TinyVAEConfig)
    model: DiTConfig = DiTConfig()
    teacher: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    critic: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    student: NetworkConfig = dataclasses.field(default_factory=NetworkConfig)
    stream: StreamConfig = StreamConfig()
    data: DataConfig = DataConfig()
    pretrain: PretrainConfig = PretrainConfig()
    initialize: InitializeConfig = InitializeConfig()
    distill: DistillConfig = DistillConfig()
    sample: SampleConfig = SampleConfig()
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()

    def __post_init__(self):
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in 0 … {2**32 - 1}, got {self.seed}")
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown or list(self.stages) != sorted(set(self.stages), key=STAGES.index):
            raise ValueError(f"stages must be some of {', '.join(STAGES)}, in this order, got {self.stages}")
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {self.decoder!r}")
        trained = [name for name in self.stages if name != "sample"]
        if trained and self.model.param_dtype != "float32":
            raise ValueError(
                f"model.param_dtype is {self.model.param_dtype}, but stage {trained[0]} trains the transformer, and "
                "small updates vanish in fewer bits: set it to float32; model.dtype is what it computes in"
            )
        networks = {name: getattr(self, name) for name in NETWORKS}
        require_consistent_networks(self.model, networks, self.stages, self.initialize)
        frames = [("distill.rollout_frames", self.distill.rollout_frames)]
        if self.data.kind != "none":
            latents = self.data.kind == "latents"
            frames.append(("data clip frames", self.clip_frames if latents else self.data.num_frames))
        for name, value in frames:
            if value < 1 or value % self.stream.chunk_frames:
                raise ValueError(f"{name} {value} is no whole number of chunks of {self.stream.chunk_frames} frames")
        if (
            self.stages
            and not self.data.encoded
            and self.text.vocab_size < ByteTokenizer(self.text.text_length).vocab_size
        ):
            raise ValueError(f"text.vocab_size {self.text.vocab_size} is too small for the tokenizer of bytes: 259")
        if "initialize" in self.stages:
            if self.initialize.targets != "clips":
                ode_sigmas(self.stream, self.initialize.ode_steps)
            if self.initialize.context in ("stream", "state"):
                stream_of_clips(self.stream, self.initialize.context)
        if "distill" in self.stages:
            require_parts(self.distill, self.stream)
            if self.distill.continue_rollout and (self.data.critic_prompts or self.data.critic_embeddings):
                field = "critic_prompts" if self.data.critic_prompts else "critic_embeddings"
                raise ValueError(
                    f"distill.continue_rollout has student and critic go on with one rollout: data.{field} are never "
                    "read, leave it empty"
                )
        if self.model.text_dim != self.text.dim or self.model.text_length != self.text.text_length:
            raise ValueError(
                f"model.text_dim {self.model.text_dim} and model.text_length {self.model.text_length} must be text.dim "
                f"{self.text.dim} and text.text_length {self.text.text_length}"
            )
        height, width, channels = self.latent_shape
        if self.model.in_channels != channels or self.model.out_channels != channels:
            raise ValueError(
                f"model.in_channels {self.model.in_channels} and model.out_channels {self.model.out_channels} must be "
                f"the {channels} channels of the {self.decoder} decoder's latents"
            )
        require_inputs(self.stages, self.data, self.decoder, self.initialize.targets)
        tokens = self.model.frame_tokens(height, width)
        require_divisible_network(self.mesh, "model", self.model, tokens)
        for name in NETWORKS:
            require_divisible_network(self.mesh, name, self.network(name), tokens)
        if not self.data.encoded:  # else it is on no device of the mesh
            require_divisible_text(self.mesh, self.text)

    def network(self, name: str) -> DiTConfig:
        """Sizes and numerics of the `teacher`, the `critic` or the `student`."""
        return getattr(self, name).of(self.model)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a latent frame; raises ValueError if latents do not tile the video's frames."""
        side, channels = self._latent[0], self._latent[2]
        height, width = self.data.size
        if height % side or width % side:
            raise ValueError(f"video of {height}x{width} is not tiled by latents of {side}x{side} pixels")
        return height // side, width // side, channels

    @property
    def clip_frames(self) -> int:
        """Latent frames of a clip."""
        return 1 + (self.data.num_frames - 1) // self.time_factor

    @property
    def trajectory_frames(self) -> int:
        """Latent frames of a teacher's trajectory: those of a clip, or without clips those that distillation scores."""
        return self.distill.clip_frames if self.data.kind == "none" else self.clip_frames

    @property
    def sample_frames(self) -> int:
        """Video frames of each video that a run ends with."""
        latent_frames = self.sample.frames or self.sample.horizon * self.distill.rollout_frames
        return 1 + (latent_frames - 1) * self.time_factor

    @property
    def time_factor(self) -> int:
        """Video frames per latent frame; with more than one, a video's first latent frame is one frame."""
        return self._latent[1]

    @property
    def _latent(self) -> tuple[int, int, int]:
        """Pixels along a side of a latent, frames per latent frame, and channels."""
        if self.decoder == "patch":
            return self.codec.patch, 1, self.codec.channels
        network = self.vae if self.decoder == "wan" else self.tiny_vae
        return network.space_factor, network.time_factor, network.latent_channels
