"""The configuration: frozen dataclasses, built at the border from an `ml_collections.ConfigDict`.

A file under `configs/` starts from `default_config()` and sets fields; `--config.a.b=value` overrides one on the
command line. What is unknown, of a wrong type or out of range is refused by name.
"""

import ast
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from adastate_jax.data.videos import ClipConfig
from adastate_jax.data.worlds import WorldConfig
from adastate_jax.errors import UserError
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.patch_codec import PatchCodecConfig
from adastate_jax.models.text import ByteTokenizer, TextConfig
from adastate_jax.models.tiny_vae import TinyVAEConfig
from adastate_jax.models.vae import VAEConfig
from adastate_jax.streaming.anchors import ANCHORS, NoAnchor, make_anchor
from adastate_jax.streaming.presets import STREAM_NAMES
from adastate_jax.streaming.rollout import StreamConfig
from adastate_jax.training.dmd import DistillConfig, num_chunks
from adastate_jax.training.initialize import InitializeConfig, ode_sigmas, stream_of_clips
from adastate_jax.training.pretrain import PretrainConfig
from adastate_jax.training.state import require_positive

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
        kind: `worlds`, procedural clips; `videos`, a folder of files; or `none`, for networks that come trained: then
            `clips` says the size of the videos that they make.
        worlds: what the procedural clips show, and `num_worlds`, how many there are.
        folder, clips: the folder of video files, and how clips are cut from them.
        prompts: text file with one prompt per line for distillation; empty uses the clips' captions.
    """

    kind: str = "worlds"
    worlds: WorldConfig = WorldConfig()
    num_worlds: int = 2048
    folder: str = ""
    clips: ClipConfig = ClipConfig(height=32, width=32, num_frames=15)
    prompts: str = ""

    def __post_init__(self):
        if self.kind not in ("worlds", "videos", "none"):
            raise ValueError(f"kind must be worlds, videos or none, got {self.kind!r}")
        if self.kind == "videos" and not self.folder:
            raise ValueError("folder is not set; name a folder of video files with --config.data.folder=DIR")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of a video in pixels."""
        clips = self.worlds if self.kind == "worlds" else self.clips
        return clips.height, clips.width

    @property
    def num_frames(self) -> int:
        """Video frames of a clip."""
        return self.worlds.num_frames if self.kind == "worlds" else self.clips.num_frames


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """The videos that a training run ends with.

    Attributes:
        anchors: strategies, side by side in each video.
        horizon: length of the videos in training horizons.
        prompts: what they show; empty takes captions of the data.
        count: how many captions are taken then.
        seed: of the noise, the same for every anchor.
        scale: enlargement of the pixels.
    """

    anchors: tuple[str, ...] = ("adaptive", "static", "none")
    horizon: int = 3
    prompts: tuple[str, ...] = ()
    count: int = 4
    seed: int = 0
    scale: int = 4

    def __post_init__(self):
        unknown = [name for name in self.anchors if name not in STREAM_NAMES]
        if unknown or not self.anchors:
            raise ValueError(f"anchors must be some of {', '.join(STREAM_NAMES)}, got {self.anchors}")
        if self.horizon < 1 or self.scale < 1 or self.count < 1:
            raise ValueError("horizon, scale and count must be at least 1")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; `data` and `fsdp` split the batch, `fsdp` and `model` the weights."""

    data: int = 1
    fsdp: int = 1
    model: int = 1

    def __post_init__(self):
        require_positive(self, "data", "fsdp", "model")


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
        if min(self.log_every, self.save_every, self.keep) < 1:
            raise ValueError("log_every, save_every and keep must be at least 1")


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
        model: the transformer, teacher, critic and student alike.
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
    stream: StreamConfig = StreamConfig()
    data: DataConfig = DataConfig()
    pretrain: PretrainConfig = PretrainConfig()
    initialize: InitializeConfig = InitializeConfig()
    distill: DistillConfig = DistillConfig()
    sample: SampleConfig = SampleConfig()
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()

    def __post_init__(self):
        unknown = [name for name in self.stages if name not in STAGES]
        if unknown or list(self.stages) != sorted(set(self.stages), key=STAGES.index):
            raise ValueError(f"stages must be some of {', '.join(STAGES)}, in this order, got {self.stages}")
        if self.decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}, got {self.decoder!r}")
        if self.stages and self.data.kind == "none":
            raise ValueError("stages need clips, and data.kind is none; set stages to () or data.kind to videos")
        frames = [("distill.rollout_frames", self.distill.rollout_frames)]
        if self.data.kind != "none":
            frames.append(("data clip frames", self.data.num_frames))
        for name, value in frames:
            if value < 1 or value % self.stream.chunk_frames:
                raise ValueError(f"{name} {value} is no whole number of chunks of {self.stream.chunk_frames} frames")
        if self.stages and self.text.vocab_size < ByteTokenizer(self.text.text_length).vocab_size:
            raise ValueError(f"text.vocab_size {self.text.vocab_size} is too small for the tokenizer of bytes: 259")
        if "initialize" in self.stages:
            ode_sigmas(self.stream, self.initialize.ode_steps)
            if self.initialize.context in ("stream", "state"):
                stream_of_clips(self.stream, self.initialize.context)
        if "distill" in self.stages:
            num_chunks(self.distill.rollout_frames, self.stream)
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
        self.model.frame_tokens(height, width)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a latent frame; raises ValueError if latents do not tile the video's frames."""
        side, channels = self._latent[0], self._latent[2]
        height, width = self.data.size
        if height % side or width % side:
            raise ValueError(f"video of {height}x{width} is not tiled by latents of {side}x{side} pixels")
        return height // side, width // side, channels

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


def default_config() -> ml_collections.ConfigDict:
    """Every field with its default, to be changed by a file under `configs/`."""
    return ml_collections.ConfigDict(to_dict(Config()))


def to_dict(config: Any) -> Any:
    """A configuration as plain dicts, lists and numbers, as `build` reads it."""
    if isinstance(config, NoAnchor):
        name = next(name for name, kind in ANCHORS.items() if type(config) is kind)
        return {"name": name, **dataclasses.asdict(config)}
    if dataclasses.is_dataclass(config):
        return {field.name: to_dict(getattr(config, field.name)) for field in dataclasses.fields(config)}
    return tuple(to_dict(x) for x in config) if isinstance(config, tuple) else config


def from_config_dict(config: ml_collections.ConfigDict) -> Config:
    """Builds and checks the configuration.

    Raises:
        UserError: a field is unknown, of a wrong type, or out of range; the message names it.
    """
    return build(Config, config.to_dict(), "config")


def parse_config(arguments: Sequence[str]) -> Config:
    """The configuration of `--config=FILE` and the overrides `--config.a.b=value` after it.

    Raises:
        UserError: the file or a field is missing, unknown, or of a wrong type.
    """
    files = [argument for argument in arguments if argument.startswith("--config=")]
    if not files:
        raise UserError("--config is not set; name a file, for example --config=configs/tiny.py")
    if not Path(files[-1].removeprefix("--config=").partition(":")[0]).is_file():
        raise UserError(f"{files[-1]}: no such file")
    config = _parse_flags(files[-1:])
    for argument in arguments:
        name = argument.partition("=")[0]
        if name.startswith("--config."):
            _find_field(config, name)
        elif name.startswith("--") and name != "--config":
            raise UserError(f"{argument}: unknown argument; --help lists what there is")
    return from_config_dict(_parse_flags(arguments))


def _parse_flags(arguments: Sequence[str]) -> ml_collections.ConfigDict:
    values = flags.FlagValues()
    command_line = ["train", *arguments]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=command_line)
    try:
        rest = values(command_line)[1:]
    except flags.Error as error:
        message = _last_line(str(error)).removeprefix("flag ")
        raise UserError(message if "--config." in message else f"{arguments[0]}: {message}") from None
    except (AttributeError, KeyError, TypeError, ValueError, OSError, SyntaxError) as error:
        raise UserError(f"{arguments[0]}: not a configuration file ({_last_line(str(error))})") from None
    if rest:
        raise UserError(f"{rest[0]}: unknown argument; --help lists what there is")
    return values.config


def _find_field(config: ml_collections.ConfigDict, flag: str) -> None:
    group, where = config, "config"
    for name in flag.removeprefix("--config.").split("."):
        if not isinstance(group, Mapping | ml_collections.ConfigDict):
            raise UserError(f"{flag}: {where} is no group of fields")
        _refuse_unknown([name], list(group.keys()), f"--{where}")
        group, where = group[name], f"{where}.{name}"


def _last_line(text: str) -> str:
    """What a failure was: a configuration file's comes with a whole traceback, an unknown field's in nested quotes."""
    text = text.strip().splitlines()[-1]
    while text[:1] in ("'", '"') and text[:1] == text[-1:]:
        text = " ".join(str(ast.literal_eval(text)).split())
    return text


def save_config(config: Config, path: Path) -> None:
    """Writes a configuration as JSON."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(to_dict(config), indent=2) + "\n")
    partial.replace(path)


def load_config(path: Path) -> Config:
    """Reads a configuration that `save_config` wrote.

    Raises:
        UserError: the file is missing or not a configuration of this version.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; is this a folder that train wrote?") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a configuration ({error})") from None
    return build(Config, values, str(path))


def build(kind: type, values: Any, where: str) -> Any:
    """An instance of the dataclass `kind` from a mapping, field by field.

    Raises:
        UserError: a field is unknown, of a wrong type, or out of range; the message names it, after `where`.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{where}: must be a group of fields, got {values!r}")
    try:
        if issubclass(kind, NoAnchor):
            name = str(values.get("name", "adaptive"))
            types_ = typing.get_type_hints(ANCHORS[name]) if name in ANCHORS else {}
            settings = {field: value for field, value in values.items() if field != "name"}
            for field in types_.keys() & settings.keys():
                settings[field] = _convert(types_[field], settings[field], f"{where}.{field}")
            return make_anchor(name, **settings)
        types_ = typing.get_type_hints(kind)
        _refuse_unknown(values, [field.name for field in dataclasses.fields(kind)], where)
        return kind(**{name: _convert(types_[name], value, f"{where}.{name}") for name, value in values.items()})
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _refuse_unknown(values: Iterable[str], known: Sequence[str], where: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise UserError(f"{where}.{name}: unknown field{hint}")


def _convert(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    if typing.get_origin(kind) in (tuple, types.GenericAlias):
        if not isinstance(value, (tuple, list)):
            raise UserError(f"{where}: must be a list, got {value!r}")
        inner = typing.get_args(kind)
        if inner[-1] is Ellipsis:
            return tuple(_convert(inner[0], x, where) for x in value)
        if len(value) != len(inner):
            raise UserError(f"{where}: must have {len(inner)} entries, got {value!r}")
        return tuple(_convert(k, x, where) for k, x in zip(inner, value, strict=True))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise UserError(f"{where}: must be of type {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{where}: must be a finite number, got {value}")
    return value
