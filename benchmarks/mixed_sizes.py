"""`configs/mixed_sizes.py` from nothing: writes its files, then runs each command in a process of its own.

python -m benchmarks.mixed_sizes --folder=runs/mixed_sizes     # 2 minutes of processor time in all
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from adastate_jax.config import Config, parse_config
from adastate_jax.data.worlds import WorldConfig, render_world
from adastate_jax.media import VideoWriter
from adastate_jax.weights.kinds import KINDS
from adastate_jax.weights.safetensors_file import write_safetensors

VIDEOS = 4


def write_official(file: Path, kind: str, config, rng: np.random.Generator) -> None:
    """A network of random float32 weights, which neither damp nor blow up, under official names."""
    slots = KINDS[kind].slots(config)

    def tensors():
        for slot in slots.values():
            inputs = int(np.prod(slot.shape[1:]))
            noise = rng.standard_normal(slot.shape, np.float32) / np.float32(np.sqrt(inputs))
            yield noise if inputs > 1 else 0.5 + 0.3 * noise

    write_safetensors(file, {name: (np.dtype(np.float32), slot.shape) for name, slot in slots.items()}, tensors(), {})


def write_tokenizer(path: Path, words: list[str]) -> None:
    """A tokenizer.json of UMT5's make that knows these words."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in words), ("▁", -3.0)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(path))


def write_files(folder: Path, config: Config) -> None:
    """Five networks, a tokenizer, captioned videos and prompts."""
    official, videos, rng = folder / "official", folder / "videos", np.random.default_rng(0)
    official.mkdir(parents=True)
    for name in ("teacher", "critic", "student"):
        write_official(official / f"{name}.safetensors", "transformer", config.network(name), rng)
    write_official(official / "text_encoder.safetensors", "text_encoder", config.text, rng)
    write_official(official / "vae.safetensors", "vae", config.vae, rng)
    height, width = config.data.size
    worlds = [
        render_world(WorldConfig(height=height, width=width, num_frames=config.data.num_frames), 0, number)
        for number in range(VIDEOS)
    ]
    videos.mkdir()
    for number, world in enumerate(worlds):
        with VideoWriter(videos / f"{number}.mp4") as writer:
            writer.write(world.video)
        (videos / f"{number}.txt").write_text(world.caption)
    captions = [world.caption for world in worlds]
    (folder / "prompts.txt").write_text("\n".join(captions) + "\n")
    words = sorted({word for caption in captions for word in caption.split()})
    (folder / "weights").mkdir()
    write_tokenizer(folder / "weights" / "tokenizer.json", words[: config.text.vocab_size - 4])


def commands(folder: Path, config: Config) -> list[list[str]]:
    """What a lab would type, with the published files in `official`."""
    weights, heads = folder / "weights", {name: config.network(name).num_heads for name in ("teacher", "critic")}
    heads["student"] = heads["critic"]
    found = []
    for name in (*heads, "text_encoder", "vae"):
        source = [f"--source={folder / 'official' / name}.safetensors", f"--output={weights / name}"]
        told = [f"--set=num_heads={heads[name]}"] if name in heads else []  # heads of 128 need not be told
        found.append(["convert", *source, *told])
    height, width = config.data.size
    size = [f"--height={height}", f"--width={width}", f"--frames={config.data.num_frames}"]
    length = f"--text-length={config.text.text_length}"
    encoders = f"--checkpoint={weights}"
    found.append(["encode", encoders, f"--videos={folder / 'videos'}", f"--output={folder / 'clips'}", *size])
    for prompts, output in ((folder / "clips" / "captions.jsonl", "captions"), (folder / "prompts.txt", "prompts")):
        found.append(["embed", encoders, f"--prompts={prompts}", f"--output={folder / output}", length])
    found.append(["train", f"--config=configs/mixed_sizes.py:{folder}", f"--workdir={folder / 'run'}"])
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, type=Path, help="a new folder")
    folder = parser.parse_args().folder
    config = parse_config([f"--config=configs/mixed_sizes.py:{folder}"])
    begun = time.perf_counter()
    write_files(folder, config)
    for name, *arguments in commands(folder, config):
        command = ["python", "-m", f"adastate_jax.{name}", *arguments]
        print(" ".join(command), flush=True)
        started = time.perf_counter()
        subprocess.run([sys.executable, *command[1:]], check=True)
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
    print(f"{time.perf_counter() - begun:.0f} s in all; the videos are in {folder / 'run' / 'samples'}")


if __name__ == "__main__":
    main()
