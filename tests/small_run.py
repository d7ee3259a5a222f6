"""A folder as `train` leaves it, everything in it random, made without training; and hostile changes to folders."""

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
from conftest import make_dit
from flax import nnx

from adastate_jax.checkpoint import save_tree
from adastate_jax.config.files import parse_config, save_config
from adastate_jax.config.run import Config
from adastate_jax.models.patch_codec import PatchCodec
from adastate_jax.models.text import TextEncoder
from adastate_jax.training.frozen import Frozen
from adastate_jax.training.stages.trajectories import write_trajectories

ROOT = Path(__file__).parents[1]
TRAJECTORY_SHAPE = (3, 2, 1, 1, 8)
TRAJECTORIES_PER_FILE = 2


def small_config() -> Config:
    sizes = [f"{name}=8" for name in ("codec.channels", "model.in_channels", "model.out_channels")]
    sizes += ["model.dim=16", "model.ffn_dim=16", "model.num_heads=1", "model.num_layers=1"]
    return parse_config([f"--config={ROOT / 'configs' / 'tiny.py'}", *(f"--config.{size}" for size in sizes)])


def write_run(folder: Path) -> Config:
    """Two checkpoints of the student, the frozen parts, trajectories and records."""
    config, rng = small_config(), np.random.default_rng(0)
    size, channels = 3 * config.codec.patch**2, config.codec.channels
    codec = PatchCodec(*(rng.standard_normal(shape, np.float32) for shape in (size, (size, channels), channels)))
    encoder = jax.jit(lambda: TextEncoder(config.text, rngs=nnx.Rngs(0)))()
    folder.mkdir(parents=True)
    save_config(config, folder / "config.json")
    (folder / "data.json").write_text(json.dumps({"clips": "worlds/a", "prompts": "worlds/a"}) + "\n")
    save_tree(folder / "frozen", Frozen(codec, encoder))
    for step in (2, 4):
        save_tree(folder / "distill" / str(step), {"student": {"ema": make_dit(config.model, step)}})
    (folder / "trajectories").mkdir()
    sealed = {}
    for index in range(2):
        drawn = rng.standard_normal((TRAJECTORIES_PER_FILE, *TRAJECTORY_SHAPE), np.float32)
        write_trajectories(folder / "trajectories" / f"{index:06d}.npy", drawn, sealed)
    records = [{"stage": "distill", "step": step, "loss": 1.0 / (1 + step)} for step in range(4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return config


def damage(folder: Path, rng: random.Random) -> str:
    """Damages one file of a folder, and says what it did."""
    file = rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    name, content = file.relative_to(folder), bytearray(file.read_bytes())
    kind = rng.choice(
        ["flip", "flip", "cut", "remove", "folder", "empty", "append", "zeros", "other", "stray"]
        + (["json"] * 6 if file.suffix in (".json", ".jsonl") else [])
    )
    if kind == "flip" and content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        content = content[: rng.randrange(len(content) + 1)]
    elif kind == "empty":
        content.clear()
    elif kind == "append":
        content += bytes(rng.randrange(256) for _ in range(1 + rng.randrange(8)))
    elif kind == "zeros":
        start = rng.randrange(len(content) + 1)
        content[start:] = bytes(len(content) - start)
    elif kind == "other":
        content = bytearray(rng.choice(sorted(path for path in folder.rglob("*") if path.is_file())).read_bytes())
    elif kind == "json":
        content = bytearray(_hostile_json(bytes(content), rng), "utf-8", "surrogatepass")
    if kind in ("remove", "folder"):
        file.unlink()
        if kind == "folder":
            file.mkdir()
    elif kind == "stray":
        shutil.copy(file, file.with_name(f"{file.name}.copy"))
    else:
        file.write_bytes(content)
    return f"{kind} {name}"


def _hostile_json(content: bytes, rng: random.Random) -> str:
    """A JSON text of another kind, or with one of its values exchanged."""
    strange = ["null", "[]", "{}", "0", '"x"', "true", "NaN", "1e999", "9" * 5000, "[" * 100_000, '{"a":' * 5000]
    strange += ["-1", "[[1, 2], [3]]", '{"seal.json": [1, 2]}', '{"../../x": [1, 2]}', '{"x": 5}', '{"": ""}']
    try:
        value = json.loads(content)
    except ValueError:
        return rng.choice(strange)
    if not isinstance(value, dict) or not value or rng.random() < 0.3:
        return rng.choice(strange)
    name = rng.choice(sorted(value))
    if rng.random() < 0.2:
        del value[name]
        return json.dumps(value)
    value[name] = "\0"
    return json.dumps(value).replace('"\\u0000"', rng.choice(strange))
