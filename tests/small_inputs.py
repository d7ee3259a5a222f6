"""Prompts, videos and a small Wan2.1-like model on disk, and the commands that make data sets of them."""

import os
import subprocess
import sys
from pathlib import Path

import av
import small_wan

from adastate_jax import embed, encode
from adastate_jax.data.worlds import WorldConfig, render_world

PROMPTS = (
    "a red fox",
    "snow through café & snow",
    "a red fox",
    " ".join(["fox"] * 90),
    "runs",
    "a fox runs through snow",
)
CAPTIONS = ("a red fox runs", "a café & snow", "a red fox runs", "")
FRAMES, FPS = 30, 16  # of each video: three clips of nine frames
_SHARD_MEGABYTES = 0.002  # several shards of each data set


def write_videos(folder: Path) -> Path:
    """Four videos, two with the same caption and one without."""
    folder.mkdir()
    for number, caption in enumerate(CAPTIONS):
        world = render_world(WorldConfig(height=32, width=48, num_frames=FRAMES), 0, number)
        with av.open(os.fspath(folder / f"{number}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"crf": "10", "preset": "ultrafast"})
            stream.height, stream.width = world.video.shape[1:3]
            for pixels in world.video:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
        if caption:
            (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    return folder


def write_prompts(path: Path) -> Path:
    """The prompts as Windows' editor saves them, with a byte-order mark and its line ends."""
    path.write_bytes(("\ufeff" + "\r\n".join(PROMPTS) + "\r\n").encode())
    return path


def embed_arguments(weights: Path, prompts: Path, output: Path, *others: str) -> list[str]:
    size = [f"--text-length={small_wan.CONFIG.text.text_length}", f"--shard-megabytes={_SHARD_MEGABYTES}"]
    return [f"--checkpoint={weights}", f"--prompts={prompts}", f"--output={output}", *size, "--batch-size=2", *others]


def encode_arguments(weights: Path, videos: Path, output: Path, *others: str) -> list[str]:
    clips = small_wan.CONFIG.data.clips
    size = [f"--height={clips.height}", f"--width={clips.width}", f"--frames={clips.num_frames}"]
    size += [f"--shard-megabytes={2 * _SHARD_MEGABYTES * 2}", "--batch-size=2"]
    return [f"--checkpoint={weights}", f"--videos={videos}", f"--output={output}", *size, *others]


class Inputs:
    """A folder with `weights`, `videos` and `prompts.txt`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.weights = small_wan.write_model(folder / "weights")
        self.videos = write_videos(folder / "videos")
        self.prompts = write_prompts(folder / "prompts.txt")

    def embed(self, output: Path, *others: str, prompts: Path | None = None) -> Path:
        embed.main(embed_arguments(self.weights, prompts or self.prompts, output, *others))
        return output

    def encode(self, output: Path, *others: str) -> Path:
        encode.main(encode_arguments(self.weights, self.videos, output, *others))
        return output


# Kills itself before the record with this number is written, as if from outside.
_KILLED = """
import importlib, os, signal, sys
from adastate_jax.data import shards
write, left = shards.serialized, [int(sys.argv[1])]
def counted(*arguments):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*arguments)
shards.serialized = counted
importlib.import_module("adastate_jax." + sys.argv[2]).main(sys.argv[3:])
"""


def run_killed(command: str, records: int, arguments: list[str]) -> int:
    """Runs a command in a process of its own that SIGKILL ends after so many records; returns its exit code."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    call = [sys.executable, "-c", _KILLED, str(records), command, *arguments]
    return subprocess.run(call, env=environment, capture_output=True, check=False).returncode


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of all files in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
