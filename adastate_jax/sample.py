"""The sample command: prompts and a model in, a video for each out, streamed to disk as chunks arrive."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import argparse
import contextlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adastate_jax.console import CommandParser, claimed_output, output_argument, progress, run_command, starting
from adastate_jax.errors import UserError, shortlist
from adastate_jax.files import what_lies_near
from adastate_jax.generation.placement import add_arguments, placement_of
from adastate_jax.generation.shipped import find_model, vocabulary
from adastate_jax.interrupts import if_unwritten
from adastate_jax.streaming.cues import parse_schedule, read_schedule
from adastate_jax.streaming.names import STREAM_NAMES, TRANSITION_TEXTS, TRANSITIONS
from adastate_jax.texts import parse_json

if TYPE_CHECKING:
    import numpy as np

    from adastate_jax.generation.loading import Model
    from adastate_jax.streaming.cues import Cue

_EXAMPLE = """examples:
  python -m adastate_jax.sample --checkpoint=tiny --prompt="a camera pans left over green hills with a red ball" \\
      --seconds=30 --output=hills.mp4
  python -m adastate_jax.sample --checkpoint=tiny --prompt="a camera pans right over sand dunes with a white ball" \\
      --seed 0 1 2 --scale=4 --output=dunes.gif
  python -m adastate_jax.sample --like=hills.mp4 --output=again.mp4
  python -m adastate_jax.sample --checkpoint=tiny --session=session.json --output=session.mp4
  python -m adastate_jax.sample --checkpoint=weights --prompt="a red fox runs through fresh snow" --seconds=30
  python -m adastate_jax.sample --checkpoint=weights --prompts=story.txt --seconds=60
  python -m adastate_jax.sample --checkpoint=weights --decoder=tiny --image=fox.jpg --prompt="the fox runs on"
  python -m adastate_jax.sample --random-weights --config=configs/tiny.py --prompt="a dry run" --seconds=1"""

_FEW_STEPS = (
    "a trained student's settings are fixed, and it has neither guidance nor a negative prompt; leave it out "
    "(converted networks take --config=FILE and after it --config.FIELD=VALUE)"
)
# What other tools call the settings that a few-step student has not.
_OF_OTHER_TOOLS = ("steps", "num-steps", "guidance", "guidance-scale", "cfg", "cfg-scale", "negative-prompt")

# Options that --like takes from the video.
_OF_THE_VIDEO = ("prompt", "prompts", "seed", "seconds", "anchor", "scale", "decoder", "weights", "random_weights")

_SUFFIXES = (".mp4", ".gif", ".webp")
_SECONDS = 5.0


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m adastate_jax.sample",
        description="Streams videos of any length, one for each prompt and seed, into files.",
        epilog=lambda: f"{vocabulary()}\n\n{_transitions()}\n\n{_EXAMPLE}",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR|tiny",
        help="a folder that train wrote, or a file that bundle made of it; tiny, the one that ships with this package "
        "(a folder of that name goes before it); or a folder of networks that convert wrote (transformer, "
        "text_encoder, vae or tiny_vae) with the text encoder's tokenizer.json",
    )
    parser.add_argument(
        "--prompt", action="append", help="what to show; may be given several times, for a video of each"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="instead of --prompt, a schedule: lines of SECOND [TRANSITION] | PROMPT, or a JSON list of objects; "
        f"transitions, which are explained below, are {', '.join(TRANSITIONS)}",
    )
    parser.add_argument("--seconds", type=float, help=f"length of a video (default {_SECONDS:g})")
    parser.add_argument(
        "--seed", type=int, nargs="+", metavar="SEED", help="of the noise (default 0); of several, a video of each"
    )
    parser.add_argument(
        "--anchor",
        choices=STREAM_NAMES,
        metavar="NAME",
        help="published stream or bare anchor strategy, instead of what the model is configured for: "
        + ", ".join(STREAM_NAMES),
    )
    parser.add_argument("--image", type=Path, metavar="FILE", help="picture to start from, scaled and cropped to fit")
    parser.add_argument(
        "--video", type=Path, metavar="FILE", help="clip to continue; the video starts with the clip's last moments"
    )
    parser.add_argument(
        "--decoder", choices=("wan", "tiny"), help="of converted networks: Wan2.1's, or the fast and less sharp TAEW2.1"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="configuration of converted networks (default: as they are, at 480x832)"
    )
    parser.add_argument("--config.FIELD", metavar="VALUE", dest="unused", help="overrides a field of the configuration")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="dry run of --config without any files: networks and text embeddings are random, the video is noise",
    )
    parser.add_argument(
        "--text-cache", type=Path, metavar="DIR", help="keeps prompts' embeddings (default CHECKPOINT/text_cache)"
    )
    parser.add_argument("--scale", type=int, metavar="N", help="repeats every pixel N times in both directions")
    parser.add_argument(
        "--like",
        type=Path,
        metavar="VIDEO",
        help="makes a video of this command or of a session of serve again, from what it says of itself; to the same "
        "frames on the same machine",
    )
    parser.add_argument(
        "--session",
        type=Path,
        metavar="FILE",
        help="replays a session of the serve command, to the same latents on the same machine",
    )
    output_argument(
        parser,
        "a file that ends in .mp4, .gif or .webp, or without ending a folder of PNG files; several videos are "
        "numbered: FILE, FILE-2",
        default="out.mp4",
    )
    add_arguments(parser)
    return parser


def _transitions() -> str:
    lines = (f"  {name:12}{text}" for name, text in TRANSITION_TEXTS.items())
    return "\n".join(["transitions of --prompts, from one prompt to the next:", *lines])


def _check(options: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Refuses what can be refused before JAX is imported."""
    placement_of(options)
    for argument in overrides:
        name = argument.partition("=")[0].removeprefix("--")
        if name in _OF_OTHER_TOOLS or (name.startswith("config.") and not options.config):
            raise UserError(f"{argument}: {_FEW_STEPS}")
        if not name.startswith("config."):
            raise UserError(f"{argument}: unknown argument; --help lists what there is")
    output = options.output or options.default_output
    if output.suffix.lower() not in (*_SUFFIXES, ""):
        raise UserError(
            f"--output={output}: must end in {', '.join(_SUFFIXES)}, or be a folder of PNG files, without an ending"
        )
    if options.seconds is not None and (not math.isfinite(options.seconds) or options.seconds <= 0):
        raise UserError(f"--seconds={options.seconds}: must be positive")
    for seed in options.seed or ():
        if seed < 0:
            raise UserError(f"--seed={seed}: must not be negative")
    if options.scale is not None and options.scale < 1:
        raise UserError(f"--scale={options.scale}: must be at least 1")
    if options.session:
        for name in ("prompt", "prompts", "seed", "seconds", "anchor", "image", "video", "like"):
            if getattr(options, name) is not None:
                raise UserError(f"--{name}: --session takes it from the session; leave one of them out")
    elif options.prompt is not None and options.prompts is not None:
        raise UserError("--prompt and --prompts: give only one, a prompt or a schedule of several")
    elif not options.like and options.prompt is None and options.prompts is None:
        raise UserError("--prompt: say what to show, or name a schedule with --prompts instead")
    if not all(prompt.strip() for prompt in options.prompt or ()):
        raise UserError("--prompt: is empty; say what to show")
    if options.image and options.video:
        raise UserError("--image and --video: a video starts from one of them")
    for option in ("image", "video", "prompts", "like", "session"):
        if (file := getattr(options, option)) and not (file.exists() if option == "like" else file.is_file()):
            raise UserError(f"--{option}={file}: no such file{what_lies_near(file)}")
    if options.prompts:
        read_schedule(options.prompts)
    if options.random_weights and options.checkpoint is not None:
        raise UserError("--checkpoint and --random-weights: give only one")
    if not (options.random_weights or options.checkpoint or options.like):
        raise UserError(
            "--checkpoint: name a model: --checkpoint=tiny, which ships with this package, or a folder of your own; "
            "for a dry run without any, --random-weights and --config"
        )
    if options.random_weights and not options.config:
        raise UserError("--random-weights: needs --config, for example --config=configs/wan_1_3b.py")
    if options.checkpoint:
        folder = find_model(options.checkpoint)
        if options.config and not (folder / "transformer").exists():
            raise UserError(f"--config={options.config}: {_FEW_STEPS}")


def _load(options: argparse.Namespace, overrides: Sequence[str]) -> "Model":
    from adastate_jax.config.files import parse_config
    from adastate_jax.generation.loading import load

    config = parse_config([f"--config={options.config}", *overrides]) if options.config else None
    if options.random_weights:
        print("random: transformer, codec and text embeddings; the video shows noise", file=sys.stderr)
    return load(
        options.checkpoint,
        config,
        decoder=options.decoder,
        random_weights=options.random_weights,
        text_cache=options.text_cache,
        **vars(placement_of(options)),
    )


def _start(options: argparse.Namespace, model: "Model") -> "np.ndarray | None":
    """The frames to start from."""
    from adastate_jax.generation.loading import num_given_frames
    from adastate_jax.media import read_image, read_last_frames

    size = model.config.data.size
    if options.image:
        return read_image(options.image, *size)
    if options.video:
        most = num_given_frames(model.config, sys.maxsize, options.anchor)
        return read_last_frames(options.video, max(most, 1), *size)  # a stream that can start from none says so itself
    return None


def _note_what_it_knows(model: "Model", options: argparse.Namespace, prompts: Sequence[str]) -> None:
    """Says what a model of small worlds was trained on, where it is asked for something else."""
    from adastate_jax.data.worlds import caption_pattern, unknown_words

    if model.config.data.kind != "worlds":
        return
    worlds = model.config.data.worlds
    unknown = list(dict.fromkeys(word for prompt in prompts for word in unknown_words(worlds, prompt)))
    if unknown:
        print(
            f"note: this model does not know {shortlist([repr(word) for word in unknown])}; it knows: "
            f"{caption_pattern(worlds)}",
            file=sys.stderr,
        )
    if options.image:
        print(
            "note: this model keeps one frame of --image, and goes on with what it was trained on: "
            f"{caption_pattern(worlds)}",
            file=sys.stderr,
        )


def _remember(options: argparse.Namespace) -> tuple[Sequence[str], dict[str, str]]:
    """Sets the options as the video of --like was made; returns overrides, and what must be as it was."""
    from adastate_jax.generation.provenance import recall
    from adastate_jax.media import read_metadata

    found = recall(options.like, read_metadata(options.like))
    for name in ("checkpoint", "image", "video"):
        found[name] = getattr(options, name) or found.get(name)
    if not options.checkpoint and found["checkpoint"]:
        try:
            find_model(found["checkpoint"])
        except UserError:
            was = f"was made with {found['checkpoint']}, which is not here"
            raise UserError(f"--like={options.like}: {was}; name it with --checkpoint") from None
    if found.pop("config", None) and not options.config:  # a program, which a video shall not choose
        raise UserError(f"--like={options.like}: was made with a configuration file; name it with --config")
    overrides = found.pop("overrides")
    rest = {name: found.pop(name) for name in ("schedule", "model", "start", "made_with", "takes", "format")}
    for name, value in found.items():
        setattr(options, name, [value] if name in ("prompt", "seed") else value)
    return overrides, rest


def _refuse_another(like: Path, then: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuses to make a video again from anything else than it was made from."""
    if then["model"] != now["model"]:
        raise UserError(f"--like={like}: was made with another model; name that with --checkpoint")
    if then["start"] != now.get("start", ""):
        raise UserError(f"--like={like}: started from other frames; name their file with --image or --video")
    if then["made_with"] != now["made_with"]:
        print(f"note: {like} was made with {then['made_with']}; its frames may differ a little", file=sys.stderr)


def _write(
    options: argparse.Namespace,
    overrides: Sequence[str],
    outputs: Sequence[Path],
    then: Mapping[str, str],
    command: Sequence[str],
) -> None:
    """Makes the videos."""
    from adastate_jax.generation.provenance import describe, digest
    from adastate_jax.generation.saved_streams import fingerprint
    from adastate_jax.generation.video_stream import stream
    from adastate_jax.media import FPS, enlarge, open_writer

    model = _load(options, overrides)
    cues: Sequence[Cue] | None = None
    if options.prompts:
        cues = read_schedule(options.prompts)
    elif then.get("schedule"):
        cues = parse_schedule(then["schedule"], str(options.like))
    start = _start(options, model)
    _note_what_it_knows(model, options, options.prompt or [cue.prompt for cue in cues])
    calls = [(prompt, seed) for prompt in options.prompt or [None] for seed in options.seed or [0]]
    common = (overrides, cues, fingerprint(model), digest(start), command)
    seconds = options.seconds or _SECONDS
    for (prompt, seed), output in zip(calls, outputs, strict=True):
        kept = {"prompt": prompt, "seed": seed, "seconds": seconds, "weights": placement_of(options).quantization}
        metadata = describe({**vars(options), **kept}, *common)
        if options.like:
            _refuse_another(options.like, then, metadata)
        title = "sample" if len(calls) == 1 else output.name
        with (
            if_unwritten(output),
            open_writer(output, metadata, replace=options.overwrite) as writer,
            progress(title, math.ceil(seconds * FPS), unit="frame", compiles=output is outputs[0]) as bar,
        ):
            for frames in stream(model, prompt, seconds, seed, options.anchor, start=start, prompts=cues):
                writer.write(enlarge(frames, options.scale or 1))
                bar.update(len(frames))
        print(writer.path, flush=True)


def _replay(
    options: argparse.Namespace,
    overrides: Sequence[str],
    output: Path,
    then: Mapping[str, str],
    command: Sequence[str],
) -> int:
    """Makes the video of a session again; 1 where its latents are others than they were."""
    from adastate_jax.generation.provenance import describe_takes, named_from_anywhere
    from adastate_jax.generation.takes import read_session, replay, session_head, session_takes, take_to_dict
    from adastate_jax.media import enlarge, fitted, open_writer

    model = _load(options, overrides)
    if options.session:
        takes = read_session(options.session, model)
    else:
        said = {**then, "takes": parse_json(then["takes"], str(options.like))}
        takes = session_takes(said, options.like, model)
    checksums = [checksum for take in takes for checksum in take.checksums]
    others, size = [], None
    kept = {"checkpoint": named_from_anywhere(options.checkpoint), "scale": options.scale or 1}
    kept["weights"] = placement_of(options).quantization
    metadata = describe_takes(session_head(model), command, list(map(take_to_dict, takes)), **kept)
    with (
        if_unwritten(output),
        open_writer(output, metadata, replace=options.overwrite) as writer,
        progress("replay", len(checksums), unit="chunk", compiles=True) as bar,
    ):
        for number, (step, checksum) in enumerate(zip(replay(model, takes), checksums, strict=True)):
            size = size or step.frames.shape[1:3]
            writer.write(enlarge(fitted(step.frames, *size), options.scale or 1))
            if step.checksum != checksum:
                others.append(number)
            bar.update()
    print(writer.path, flush=True)
    if others:
        what = f"from chunk {others[0]} on, {len(others)} of {len(checksums)} differ from the session's latents"
        print(f"note: {what}", file=sys.stderr)
        return 1
    print(f"all {len(checksums)} chunks have the session's latents, bit for bit", file=sys.stderr)
    return 0


def _is_picture(name: str) -> bool:
    """Whether a file is of a video that is a folder of pictures."""
    from adastate_jax.media.writers import is_picture

    return is_picture(name)


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and writes the videos."""
    options, overrides = _parser().parse_known_args(arguments)
    command, then = ["python", "-m", "adastate_jax.sample", *arguments], {}
    _check(options, overrides)
    for name in _OF_THE_VIDEO if options.like else ():
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: --like takes it from the video; leave one of them out")
    count = len(options.prompt or [None]) * len(options.seed or [0])
    kind = {"folder": not (options.output or options.default_output).suffix, "replaces": _is_picture}
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(claimed_output(options, number=n + 1, **kind)) for n in range(count)]
        starting()
        if options.like:
            remembered, then = _remember(options)
            if overrides and not then["takes"]:
                raise UserError(f"{overrides[0]}: --like takes it from the video; leave one of them out")
            overrides = remembered or overrides
            _check(options, overrides)
        from adastate_jax.generation.programs import programs_kept

        stack.enter_context(programs_kept(options.cache))
        if options.session or then.get("takes"):
            return _replay(options, overrides, outputs[0], then, command)
        _write(options, overrides, outputs, then, command)
    return 0


if __name__ == "__main__":
    run_command(main)
