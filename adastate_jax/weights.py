"""Official weights in and out: which tensor of a checkpoint is which leaf of a network, and how its axes map.

A table lists, per network, the official tensor name, the path of our leaf and the einops pattern between them. A name
with `{layer}` stands for all layers, which our networks stack along a leading axis.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import einops
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors

from adastate_jax.errors import UserError
from adastate_jax.models.dit import DiTConfig
from adastate_jax.models.text import TextConfig
from adastate_jax.models.tiny_vae import TinyVAEConfig
from adastate_jax.models.vae import VAEConfig, decoder_levels, encoder_levels
from adastate_jax.sharding import path_name
from adastate_jax.tensors import BFLOAT16, StoredTensor


@dataclasses.dataclass(frozen=True)
class Entry:
    """One row of a table: official tensor ↔ our leaf.

    Attributes:
        official: tensor name, with `{layer}` where our leaf stacks all layers.
        path: key path of our leaf.
        pattern: einops pattern from the official axes to ours (of one layer).
        sizes: sizes of the axes that the way back cannot infer.
    """

    official: str
    path: str
    pattern: str = "d -> d"
    sizes: tuple[tuple[str, int], ...] = ()

    def from_official(self, tensor: np.ndarray) -> np.ndarray:
        """Official layout (one layer) → ours."""
        return einops.rearrange(tensor, self.pattern)

    def to_official(self, leaf: np.ndarray) -> np.ndarray:
        """Our layout (one layer) → the official one."""
        left, right = (side.strip() for side in self.pattern.split("->"))
        return einops.rearrange(leaf, f"{right} -> {left}", **dict(self.sizes))


_LINEAR = "outputs inputs -> inputs outputs"


def _linear(official: str, path: str, bias: bool = True) -> list[Entry]:
    entries = [Entry(f"{official}.weight", f"{path}/kernel", _LINEAR)]
    return entries + ([Entry(f"{official}.bias", f"{path}/bias")] if bias else [])


def _conv(official: str, path: str, axes: str, bias: bool = True) -> list[Entry]:
    """A convolution over the named axes."""
    entries = [Entry(f"{official}.weight", f"{path}/kernel", f"outputs inputs {axes} -> {axes} inputs outputs")]
    return entries + ([Entry(f"{official}.bias", f"{path}/bias")] if bias else [])


def _pointwise(official: str, path: str, dimensions: int, bias: bool = True) -> list[Entry]:
    """A convolution of one pixel, which is a linear layer here."""
    ones = " 1" * dimensions
    entries = [Entry(f"{official}.weight", f"{path}/kernel", f"outputs inputs{ones} -> inputs outputs")]
    return entries + ([Entry(f"{official}.bias", f"{path}/bias")] if bias else [])


def dit_table(config: DiTConfig) -> list[Entry]:
    """The official Wan2.1 DiT (and, after its prefix, a Self-Forcing generator)."""
    _, height, width = config.patch_size
    entries = [
        Entry(
            "patch_embedding.weight",
            "patch_embedding/kernel",
            "out c pt ph pw -> (pt ph pw c) out",
            (("pt", 1), ("ph", height), ("pw", width)),
        ),
        Entry("patch_embedding.bias", "patch_embedding/bias"),
        *_linear("text_embedding.0", "text_in"),
        *_linear("text_embedding.2", "text_out"),
        *_linear("time_embedding.0", "time_in"),
        *_linear("time_embedding.2", "time_out"),
        *_linear("time_projection.1", "time_projection"),
        *_linear("head.head", "head"),
        Entry("head.modulation", "head_modulation", "one n d -> (one n) d", (("one", 1),)),
        Entry("blocks.{layer}.modulation", "blocks/modulation", "one n d -> (one n) d", (("one", 1),)),
        *_linear("blocks.{layer}.ffn.0", "blocks/ffn_in"),
        *_linear("blocks.{layer}.ffn.2", "blocks/ffn_out"),
    ]
    for theirs, ours in (("self_attn", "self_attention"), ("cross_attn", "cross_attention")):
        for short, long in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output")):
            entries += _linear(f"blocks.{{layer}}.{theirs}.{short}", f"blocks/{ours}/{long}")
        if config.qk_norm:
            for short, long in (("q", "query"), ("k", "key")):
                entries.append(
                    Entry(f"blocks.{{layer}}.{theirs}.norm_{short}.weight", f"blocks/{ours}/norm_{long}/scale")
                )
    if config.cross_attn_norm:
        entries.append(Entry("blocks.{layer}.norm3.weight", "blocks/norm_cross/scale"))
        entries.append(Entry("blocks.{layer}.norm3.bias", "blocks/norm_cross/bias"))
    return entries


# diffusers' WanTransformer3DModel → official, applied in order
_DIT_FROM_DIFFUSERS = (
    (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
    (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
    (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"^proj_out\.", "head.head."),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_(q|k|v)\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
    (r"\.norm2\.", ".norm3."),
)


def dit_name_from_diffusers(name: str) -> str:
    """Official name of a tensor of diffusers' WanTransformer3DModel."""
    for pattern, replacement in _DIT_FROM_DIFFUSERS:
        name = re.sub(pattern, replacement, name)
    return name


# official → diffusers' WanTransformer3DModel, applied in order
_DIT_TO_DIFFUSERS = (
    (r"^time_embedding\.0\.", "condition_embedder.time_embedder.linear_1."),
    (r"^time_embedding\.2\.", "condition_embedder.time_embedder.linear_2."),
    (r"^time_projection\.1\.", "condition_embedder.time_proj."),
    (r"^text_embedding\.0\.", "condition_embedder.text_embedder.linear_1."),
    (r"^text_embedding\.2\.", "condition_embedder.text_embedder.linear_2."),
    (r"^head\.modulation$", "scale_shift_table"),
    (r"^head\.head\.", "proj_out."),
    (r"\.modulation$", ".scale_shift_table"),
    (r"\.(self|cross)_attn\.(q|k|v)\.", r".\1_attn.to_\2."),
    (r"\.(self|cross)_attn\.o\.", r".\1_attn.to_out.0."),
    (r"\.self_attn\.", ".attn1."),
    (r"\.cross_attn\.", ".attn2."),
    (r"\.ffn\.0\.", ".ffn.net.0.proj."),
    (r"\.ffn\.2\.", ".ffn.net.2."),
    (r"\.norm3\.", ".norm2."),
)


def dit_name_to_diffusers(name: str) -> str:
    """What diffusers' WanTransformer3DModel calls an official tensor."""
    for pattern, replacement in _DIT_TO_DIFFUSERS:
        name = re.sub(pattern, replacement, name)
    return name


def text_table(config: TextConfig) -> list[Entry]:
    """The official UMT5 encoder."""
    entries = [
        Entry("token_embedding.weight", "token_embedding", "vocabulary d -> vocabulary d"),
        Entry("norm.weight", "norm_out/scale"),
        Entry("blocks.{layer}.norm1.weight", "blocks/norm_attention/scale"),
        Entry("blocks.{layer}.norm2.weight", "blocks/norm_ffn/scale"),
        Entry(
            "blocks.{layer}.pos_embedding.embedding.weight", "blocks/position_bias", "buckets heads -> buckets heads"
        ),
    ]
    for theirs, ours in (
        ("attn.q", "query"),
        ("attn.k", "key"),
        ("attn.v", "value"),
        ("attn.o", "output"),
        ("ffn.gate.0", "ffn_gate"),
        ("ffn.fc1", "ffn_in"),
        ("ffn.fc2", "ffn_out"),
    ):
        entries += _linear(f"blocks.{{layer}}.{theirs}", f"blocks/{ours}", bias=False)
    return entries


# transformers' UMT5EncoderModel → official, applied in order
_TEXT_FROM_TRANSFORMERS = (
    (r"^(shared|encoder\.embed_tokens)\.", "token_embedding."),
    (r"^encoder\.final_layer_norm\.", "norm."),
    (r"^encoder\.block\.", "blocks."),
    (r"\.layer\.0\.SelfAttention\.relative_attention_bias\.", ".pos_embedding.embedding."),
    (r"\.layer\.0\.SelfAttention\.", ".attn."),
    (r"\.layer\.0\.layer_norm\.", ".norm1."),
    (r"\.layer\.1\.layer_norm\.", ".norm2."),
    (r"\.layer\.1\.DenseReluDense\.wi_0\.", ".ffn.gate.0."),
    (r"\.layer\.1\.DenseReluDense\.wi_1\.", ".ffn.fc1."),
    (r"\.layer\.1\.DenseReluDense\.wo\.", ".ffn.fc2."),
)


def text_name_from_transformers(name: str) -> str:
    """Official name of a tensor of transformers' UMT5EncoderModel, whose embedding table may come under two names."""
    for pattern, replacement in _TEXT_FROM_TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name


# official → transformers' UMT5EncoderModel, applied in order
_TEXT_TO_TRANSFORMERS = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.", "encoder.block."),
    (r"\.pos_embedding\.embedding\.", ".layer.0.SelfAttention.relative_attention_bias."),
    (r"\.attn\.", ".layer.0.SelfAttention."),
    (r"\.norm1\.", ".layer.0.layer_norm."),
    (r"\.norm2\.", ".layer.1.layer_norm."),
    (r"\.ffn\.gate\.0\.", ".layer.1.DenseReluDense.wi_0."),
    (r"\.ffn\.fc1\.", ".layer.1.DenseReluDense.wi_1."),
    (r"\.ffn\.fc2\.", ".layer.1.DenseReluDense.wo."),
)


def text_name_to_transformers(name: str) -> str:
    """What transformers' UMT5EncoderModel calls an official tensor."""
    for pattern, replacement in _TEXT_TO_TRANSFORMERS:
        name = re.sub(pattern, replacement, name)
    return name


def _vae_residual(official: str, path: str, shortcut: bool) -> list[Entry]:
    entries = [
        Entry(f"{official}.residual.0.gamma", f"{path}/norm_in/gain", "c 1 1 1 -> c"),
        *_conv(f"{official}.residual.2", f"{path}/conv_in", "t h w"),
        Entry(f"{official}.residual.3.gamma", f"{path}/norm_out/gain", "c 1 1 1 -> c"),
        *_conv(f"{official}.residual.6", f"{path}/conv_out", "t h w"),
    ]
    return entries + (_pointwise(f"{official}.shortcut", f"{path}/shortcut", 3) if shortcut else [])


def vae_table(config: VAEConfig) -> list[Entry]:
    """The official Wan2.1 video autoencoder, both halves."""
    entries = [
        *_pointwise("conv1", "encoder/to_moments", 3),
        *_pointwise("conv2", "decoder/from_latents", 3),
    ]
    for half, stack, levels in (
        ("encoder", "downsamples", encoder_levels(config)),
        ("decoder", "upsamples", decoder_levels(config)),
    ):
        entries += _conv(f"{half}.conv1", f"{half}/conv_in", "t h w")
        entries.append(Entry(f"{half}.head.0.gamma", f"{half}/norm_out/gain", "c 1 1 1 -> c"))
        entries += _conv(f"{half}.head.2", f"{half}/conv_out", "t h w")
        for block in (0, 2):
            entries += _vae_residual(f"{half}.middle.{block}", f"{half}/middle/{block}", shortcut=False)
        entries.append(Entry(f"{half}.middle.1.norm.gamma", f"{half}/middle/1/norm/gain", "c 1 1 -> c"))
        entries += _pointwise(f"{half}.middle.1.to_qkv", f"{half}/middle/1/attention_in", 2)
        entries += _pointwise(f"{half}.middle.1.proj", f"{half}/middle/1/attention_out", 2)
        for block, level in enumerate(levels):
            official, path = f"{half}.{stack}.{block}", f"{half}/blocks/{block}"
            if not level.resample:
                entries += _vae_residual(official, path, shortcut=level.inputs != level.outputs)
                continue
            entries += _conv(f"{official}.resample.1", f"{path}/conv", "h w")
            if level.temporal:
                entries += _conv(f"{official}.time_conv", f"{path}/time_conv", "t h w")
    return entries


# diffusers' AutoencoderKLWan → official, applied in order
_VAE_FROM_DIFFUSERS = (
    (r"^quant_conv\.", "conv1."),
    (r"^post_quant_conv\.", "conv2."),
    (r"\.conv_in\.", ".conv1."),
    (r"\.norm_out\.", ".head.0."),
    (r"\.conv_out\.", ".head.2."),
    (r"\.mid_block\.resnets\.0\.", ".middle.0."),
    (r"\.mid_block\.attentions\.0\.", ".middle.1."),
    (r"\.mid_block\.resnets\.1\.", ".middle.2."),
    (r"\.down_blocks\.", ".downsamples."),
    (r"\.conv_shortcut\.", ".shortcut."),
)
_VAE_BLOCK_FROM_DIFFUSERS = (
    (r"(\d)\.norm1\.", r"\1.residual.0."),
    (r"(\d)\.conv1\.", r"\1.residual.2."),
    (r"(\d)\.norm2\.", r"\1.residual.3."),
    (r"(\d)\.conv2\.", r"\1.residual.6."),
)


def vae_name_from_diffusers(name: str, num_res_blocks: int = 2) -> str:
    """Official name of a tensor of diffusers' AutoencoderKLWan, which numbers the decoder's blocks per level."""

    def flat_index(match: re.Match) -> str:
        level, kind, block = match.groups()
        per_level = num_res_blocks + 2
        within = per_level - 1 if kind == "upsamplers" else int(block)
        return f".upsamples.{int(level) * per_level + within}."

    name = re.sub(r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", flat_index, name)
    for pattern, replacement in (*_VAE_FROM_DIFFUSERS, *_VAE_BLOCK_FROM_DIFFUSERS):
        name = re.sub(pattern, replacement, name)
    return name


# official → diffusers' AutoencoderKLWan, applied in order
_VAE_TO_DIFFUSERS = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"\.head\.0\.", ".norm_out."),
    (r"\.head\.2\.", ".conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"\.downsamples\.", ".down_blocks."),
    (r"\.shortcut\.", ".conv_shortcut."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
)


def vae_name_to_diffusers(name: str, num_res_blocks: int = 2) -> str:
    """What diffusers' AutoencoderKLWan calls an official tensor."""

    def leveled_index(match: re.Match) -> str:
        level, within = divmod(int(match[1]), num_res_blocks + 2)
        kind = "resnets" if within <= num_res_blocks else "upsamplers"
        return f".up_blocks.{level}.{kind}.{within if kind == 'resnets' else 0}."

    name = re.sub(r"\.upsamples\.(\d+)\.", leveled_index, name)
    for pattern, replacement in _VAE_TO_DIFFUSERS:
        name = re.sub(pattern, replacement, name)
    return name


def tiny_vae_table(config: TinyVAEConfig) -> list[Entry]:
    """TAEW2.1, both halves; layers are numbered as in the official sequence, which counts activations too."""

    def memory_blocks(official_half: str, first: int, path: str) -> list[Entry]:
        return [
            entry
            for block in range(3)
            for theirs, ours in ((0, "conv_in"), (2, "conv_middle"), (4, "conv_out"))
            for entry in _conv(f"{official_half}.{first + block}.conv.{theirs}", f"{path}/blocks/{block}/{ours}", "h w")
        ]

    entries = [
        *_conv("encoder.0", "encoder/conv_in", "h w"),
        *_conv("encoder.17", "encoder/conv_out", "h w"),
        *_conv("decoder.1", "decoder/conv_in", "h w"),
        *_conv("decoder.22", "decoder/conv_out", "h w"),
    ]
    for level in range(len(config.widths)):
        first, path = 2 + 5 * level, f"encoder/levels/{level}"
        entries += _pointwise(f"encoder.{first}.conv", f"{path}/pool", 2, bias=False)
        entries += _conv(f"encoder.{first + 1}", f"{path}/conv", "h w", bias=False)
        entries += memory_blocks("encoder", first + 2, path)
        first, path = 3 + 6 * level, f"decoder/levels/{level}"
        entries += memory_blocks("decoder", first, path)
        entries += _pointwise(f"decoder.{first + 4}.conv", f"{path}/grow", 2, bias=False)
        entries += _conv(f"decoder.{first + 5}", f"{path}/conv", "h w", bias=False)
    return entries


def tiny_vae_tensors(config: TinyVAEConfig, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """A TAEHV checkpoint with its frame-growing layers cut to this network.

    Checkpoints may hold such a layer for more frames than the network grows; the newest frame's rows, the last, count.
    """
    rows = {
        f"decoder.{7 + 6 * level}.conv.weight": width * (1 + temporal)
        for level, (width, temporal) in enumerate(zip(config.widths, config.temporal_upsample, strict=True))
    }
    return {name: tensors[name][-rows[name] :] if name in rows else tensors[name] for name in tensors}


_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": BFLOAT16,
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class SafeTensors(Mapping[str, np.ndarray]):
    """The tensors of one `.safetensors` file, each read from disk when asked for.

    Raises:
        UserError: the file is missing, truncated or not of this format.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            self._file = safetensors.safe_open(str(path), framework="numpy")
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path}: not a readable .safetensors file ({error}); copy or download it again") from error
        self._names = tuple(self._file.keys())
        self.metadata: dict[str, str] = self._file.metadata() or {}

    def stored(self) -> dict[str, StoredTensor]:
        """The tensors by name, unread; raises UserError for a dtype that this package does not know."""
        # The library has checked the header, but does not say where the tensors lie.
        with self.path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        tensors = {}
        for name in self._names:
            kind, shape = header[name]["dtype"], tuple(header[name]["shape"])
            if kind not in _SAFETENSORS_DTYPES:
                raise UserError(f"{self.path}: {name} has dtype {kind}, which cannot be read; save it as float32")
            offset = 8 + length + header[name]["data_offsets"][0]
            tensors[name] = StoredTensor.dense(self.path, offset, _SAFETENSORS_DTYPES[kind], shape)
        return tensors

    def __contains__(self, name: object) -> bool:
        return name in self._names  # without reading the tensor, as a mapping would by itself

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self:
            raise KeyError(name)
        return self._file.get_tensor(name)

    def __iter__(self):
        return iter(self._names)

    def __len__(self):
        return len(self._names)


def write_safetensors(
    path: Path,
    layout: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
    blocks: Iterable[np.ndarray],
    metadata: Mapping[str, str],
) -> None:
    """Writes a `.safetensors` file piece by piece; the library's writer wants all tensors in memory at once.

    Args:
        path: the file.
        layout: dtype and shape of every tensor by name, in the order of their elements.
        blocks: all elements, the last axis fastest, in pieces of any size.
        metadata: of the header.
    """
    kinds = {dtype: kind for kind, dtype in _SAFETENSORS_DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kinds[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)
    head = len(text).to_bytes(8, "little") + text
    with path.open("wb") as stream:
        stream.write(head)
        for block in blocks:
            stream.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8))
        if stream.tell() != len(head) + end:
            raise ValueError(f"{path}: {stream.tell() - len(head)} bytes of elements, the layout has {end}")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where an official tensor goes: a leaf of ours, or one layer of it.

    Attributes:
        entry: the row of the table.
        layer: index along the leaf's leading axis; None for the whole leaf.
        shape: of the official tensor.
    """

    entry: Entry
    layer: int | None
    shape: tuple[int, ...]


def leaf_name(path) -> str:
    """Key path of a network's leaf, `a/b/c`, as tables name it."""
    return path_name(path).removesuffix("/value")


def leaves(network: Any) -> dict[str, Any]:
    """A network's leaves by path, `a/b/c`."""
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(network)}


def official_slots(abstract: Any, table: Sequence[Entry]) -> dict[str, Slot]:
    """The official tensors that a network's leaves are made of, by name.

    Args:
        abstract: the network as `jax.eval_shape` (or a live one) gives it.
        table: the network's table.
    """
    entries = {entry.path: entry for entry in table}
    slots = {}
    for name, leaf in leaves(abstract).items():
        entry = entries[name]
        stacked = "{layer}" in entry.official
        # One byte behind all elements: the largest of these tensors have 10^9 of them.
        ours = np.broadcast_to(np.zeros((), np.bool_), leaf.shape[1:] if stacked else leaf.shape)
        shape = entry.to_official(ours).shape
        for layer in range(leaf.shape[0]) if stacked else (None,):
            slots[entry.official.format(layer=layer)] = Slot(entry, layer, shape)
    return slots


def mismatches(slots: Mapping[str, Slot], shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """What keeps tensors of these shapes from filling a network exactly, one phrase each; none if they do."""
    missing = [name for name in slots if name not in shapes]
    surplus = [name for name in shapes if name not in slots]
    faults = [f"{len(missing)} tensors are missing: {shortlist(missing)}"] if missing else []
    faults += [f"{len(surplus)} tensors belong to no known part: {shortlist(surplus)}"] if surplus else []
    return faults + [
        f"{name} has shape {list(shapes[name])}, this network needs {list(slot.shape)}"
        for name, slot in slots.items()
        if name in shapes and tuple(shapes[name]) != slot.shape
    ]


def load(abstract: Any, table: Sequence[Entry], tensors: Mapping[str, np.ndarray], source: str) -> Any:
    """Fills a network's leaves from official tensors in memory.

    Args:
        abstract: the network as `jax.eval_shape` (or a live one) gives it; leaves keep its dtypes, and its shardings
            where it has them.
        table: the network's table.
        tensors: official name → tensor.
        source: file or folder to name in errors.

    Returns:
        The network with the same structure and the checkpoint's weights.

    Raises:
        UserError: names are missing, left over, or of a wrong shape.
    """
    faults = mismatches(official_slots(abstract, table), {name: tensors[name].shape for name in tensors})
    if faults:
        raise UserError(f"{source}: {shortlist(faults, 4)}")
    entries = {entry.path: entry for entry in table}

    def fill(path, leaf):
        entry = entries[leaf_name(path)]
        if "{layer}" in entry.official:
            names = [entry.official.format(layer=layer) for layer in range(leaf.shape[0])]
            value = np.stack([entry.from_official(tensors[name]) for name in names])
        else:
            value = entry.from_official(tensors[entry.official])
        return jax.device_put(jnp.asarray(value, leaf.dtype), getattr(leaf, "sharding", None))

    return jax.tree_util.tree_map_with_path(fill, abstract)


def shortlist(names: Sequence[str], limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
