"""How far weights in eight bits move a chunk's latents: relative L2 errors of a stream's first chunks, random weights.

    python -m benchmarks.eight_bits --config=configs/wan_1_3b.py --config.model.num_layers=2 \\
        --config.data.clips.height=64 --config.data.clips.width=64

The first chunk differs by its own passes alone; each later one also by what the cache has of those before it.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adastate_jax.config.files import parse_config
from adastate_jax.generation.placement import WEIGHTS, in_eight_bits
from adastate_jax.models.dit import DiT
from adastate_jax.sharding import make_mesh
from adastate_jax.streaming.carry import initial_carry, seed_keys
from adastate_jax.streaming.rollout import stream


def main() -> None:
    """Prints a line per kind of weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/wan_1_3b.py")
    parser.add_argument("--chunks", type=int, default=3)
    options, overrides = parser.parse_known_args()
    config = parse_config([f"--config={options.config}", *overrides])
    student = jax.jit(lambda: DiT(config.network("student"), rngs=nnx.Rngs(0)))()
    rng = np.random.default_rng(0)
    head = student.head.kernel  # starts at zero: what the network makes would not be seen
    head[...] = jnp.asarray(rng.standard_normal(head.shape) / np.sqrt(head.shape[0]), head.dtype)
    embeddings = jnp.asarray(rng.standard_normal((1, config.text.text_length, config.text.dim)), config.text.dtype)

    def latents(model: DiT) -> list[np.ndarray]:
        text = jax.jit(DiT.text_keys_values)(model, embeddings)
        carry = initial_carry(model.config, config.stream, seed_keys(0, 1), *config.latent_shape[:2])
        chunks = stream(model, carry, text, config.stream, config.latent_shape, options.chunks)
        return [np.asarray(chunk.content, np.float64) for _, chunk in chunks]

    wanted = latents(student)
    for weights in WEIGHTS:
        found = latents(in_eight_bits(student, weights, make_mesh()))
        errors = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(found, wanted, strict=True)]
        print(f"{weights:8}" + "  ".join(f"{error:.4f}" for error in errors), flush=True)


if __name__ == "__main__":
    main()
