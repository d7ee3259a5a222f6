"""Teacher, critic and student: where each one's weights come from, and in what it differs from `config.model`."""

import dataclasses

from adastate_jax.checks import DTYPES
from adastate_jax.config.stages import RANDOM, InitializeConfig
from adastate_jax.errors import shown
from adastate_jax.models.adapters import LoRAConfig, adapted_shapes
from adastate_jax.models.dit import REMAT_POLICIES, DiTConfig
from adastate_jax.models.quantized import QUANTIZATIONS

NETWORKS = ("teacher", "critic", "student")

# Stages of a run that leave a network behind, and which of the three it is.
TRAINED_BY = {"pretrain": "teacher", "initialize": "student"}

_SIZES = ("dim", "ffn_dim", "num_heads", "num_layers")
_NUMERICS = ("param_dtype", "dtype", "remat", "quantization")


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """Teacher, critic or student. What is 0 or empty is as in `config.model`.

    Attributes:
        weights: where they come from before the first step of distillation: a stage of this run (`pretrain`,
            `initialize`); a stage of another run (`runs/teacher/pretrain`); or a folder of one network that `convert`
            wrote. Empty is the teacher of `pretrain`, a critic that is a copy of the teacher, the student of
            `initialize`.
        dim, ffn_dim, num_heads, num_layers: sizes, which those weights must have. Embeddings and latents are the same
            for all three, so text width, channels and patches are `config.model`'s.
        param_dtype: of frozen weights, the teacher's or those that adapters are of: bfloat16 takes half the memory.
            What is trained is float32.
        dtype: of the computation.
        remat: what a backward pass keeps, by name.
        quantization: of frozen weights, but for the first and last layers': `int8` or `float8`.
        lora: of critic and student: trains adapters of the weights instead of these, in every stage that trains them.
    """

    weights: str = ""
    dim: int = 0
    ffn_dim: int = 0
    num_heads: int = 0
    num_layers: int = 0
    param_dtype: str = ""
    dtype: str = ""
    remat: str = ""
    quantization: str = ""
    lora: LoRAConfig = dataclasses.field(default_factory=LoRAConfig)

    def __post_init__(self):
        for name in _SIZES:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 1, or 0 for that of config.model, got {getattr(self, name)}")
        choices = (DTYPES, DTYPES, REMAT_POLICIES, QUANTIZATIONS)
        for name, known in zip(_NUMERICS, choices, strict=True):
            value = getattr(self, name)
            if value and value not in known:
                known = ", ".join(filter(None, known))
                raise ValueError(f"{name} must be one of {known}, or empty, got {shown(value)}")

    def of(self, model: DiTConfig) -> DiTConfig:
        """The network's own configuration; raises ValueError for sizes that do not go together."""
        own = {name: getattr(self, name) for name in (*_SIZES, *_NUMERICS) if getattr(self, name)}
        return dataclasses.replace(model, **own)


def trained_sizes(config: DiTConfig) -> DiTConfig:
    """A network as it is trained: float32 weights, none of them quantised."""
    return dataclasses.replace(config, param_dtype="float32", quantization="")


def require_consistent_networks(
    model: DiTConfig, networks: dict[str, NetworkConfig], stages: tuple[str, ...], initialize: InitializeConfig
) -> None:
    """Refuses networks that cannot be what the stages need of them.

    Args:
        model: `config.model`.
        networks: by their names.
        stages: of the run.
        initialize: `config.initialize`.

    Raises:
        ValueError: the message names the field.
    """
    own = {}
    for name, network in networks.items():
        try:
            own[name] = network.of(model)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    trained = [stage for stage in stages if stage != "sample"]
    if trained and model.quantization:
        raise ValueError(f"model.quantization is {model.quantization}, but stage {trained[0]} trains; leave it empty")
    if networks["teacher"].lora.rank:
        raise ValueError("teacher.lora: the teacher is frozen, or pretrained whole; set teacher.lora.rank to 0")
    for name in ("critic", "student"):
        if networks[name].lora.rank:
            try:
                adapted_shapes(own[name], networks[name].lora)
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from None
            continue
        for field in ("param_dtype", "quantization"):
            if getattr(networks[name], field):
                raise ValueError(f"{name}.{field}: the {name} is trained, in float32; leave it empty")
    if "pretrain" in stages and networks["teacher"].weights not in ("", "pretrain"):
        raise ValueError(
            f"teacher.weights is {shown(networks['teacher'].weights)}, and stage pretrain trains another teacher; take "
            "it out of stages, or leave teacher.weights empty"
        )
    if "initialize" in stages:
        _require_causal_teacher(networks["teacher"].weights, stages, initialize)
    sources = {f"{name}.weights": (name, network.weights) for name, network in networks.items()}
    if "distill" not in stages:
        needed = "initialize" in stages and initialize.targets != "clips"
        sources = {"teacher.weights": sources["teacher.weights"]} if needed else {}
    if "initialize" in stages and initialize.weights == RANDOM:
        if networks["student"].lora.rank:
            raise ValueError("student.lora: adapters of random weights; set initialize.weights to others, or rank to 0")
    elif "initialize" in stages:
        sources["initialize.weights"] = ("student", initialize.weights)
    for field, (name, weights) in sources.items():
        if weights == "distill" or (field == "initialize.weights" and weights == "initialize"):
            raise ValueError(f"{field}: stage {weights} of this run comes too late; name another run's, DIR/{weights}")
        copied = TRAINED_BY.get(weights) or ("teacher" if field in ("critic.weights", "initialize.weights") else name)
        if (not weights or weights in TRAINED_BY) and (different := _differing_size(own[name], own[copied])):
            raise ValueError(
                f"{field} is {shown(weights)}, a copy of the {copied}, whose {different} is "
                f"{getattr(own[copied], different)} and not {getattr(own[name], different)}; name the weights of a "
                f"{name} of its own"
            )


def _require_causal_teacher(teacher: str, stages: tuple[str, ...], initialize: InitializeConfig) -> None:
    """Refuses a teacher of consistency that this run trains itself, or distils: those are bidirectional."""
    if initialize.targets != "consistency":
        return
    if teacher in ("", "pretrain"):
        raise ValueError(
            "teacher.weights: initialize.targets consistency needs a causal teacher, and stage pretrain trains none; "
            "name DIR/initialize of a run with initialize.targets clips"
        )
    if "distill" in stages:
        raise ValueError(
            "stages: distill needs another teacher than initialize.targets consistency; put it into a run of its own, "
            "with student.weights DIR/initialize"
        )


def _differing_size(one: DiTConfig, other: DiTConfig) -> str | None:
    return next((name for name in _SIZES if getattr(one, name) != getattr(other, name)), None)
