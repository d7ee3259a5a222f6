"""The evaluate command: videos in; numbers, plots and one HTML report out. And `export`, a folder that VBench reads."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import av
import cv2

from adastate_jax.console import CommandParser, claimed_output, output_argument, progress, run_command, starting
from adastate_jax.data.decoding import Unusable, read_header
from adastate_jax.data.folders import walk_files
from adastate_jax.errors import UserError, one_line, writing
from adastate_jax.evaluation import vbench
from adastate_jax.evaluation.measure import Measurement, Settings, measure_video
from adastate_jax.evaluation.report import is_of_report, write_report
from adastate_jax.evaluation.summary import Video, by_group, summarize_group
from adastate_jax.files import existing_name, what_lies_near
from adastate_jax.interrupts import if_unwritten
from adastate_jax.streaming.names import STREAM_NAMES

VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif", ".webp", ".ts", ".mpg", ".mpeg", ".wmv")
CURRENT_FOLDER = "current folder"
_EXAMPLE = """examples:
  python -m adastate_jax.evaluate runs/tiny/samples/adaptive runs/tiny/samples/static \\
      --first-chunk=3 --chunk=3 --output=report
  python -m adastate_jax.evaluate export --help"""
_EXPORT_EXAMPLE = """examples:
  python -m adastate_jax.evaluate export --vbench=vbench/adaptive --prompts=all_dimension.txt \\
      --extended=all_dimension_extended.txt --checkpoint=runs/wan
  python -m adastate_jax.evaluate export --vbench=vbench/adaptive --prompts=all_dimension.txt --videos=samples
  python -m adastate_jax.evaluate export --vbench=vbench/adaptive --prompts=all_dimension.txt --check"""


def main(arguments: Sequence[str]) -> int:
    """Parses the command line, measures all videos and writes the report."""
    if arguments[:1] == ["export"]:
        return export(arguments[1:])
    parser = CommandParser(
        prog="python -m adastate_jax.evaluate",
        description="Measures motion, camera, flicker, smoothness, chunk seams, scene lock and drift of videos, "
        "without any downloaded network. A folder is a group, and so is each of its subfolders.",
        epilog=_EXAMPLE,
    )
    parser.add_argument("videos", nargs="+", type=Path, metavar="VIDEO|DIR", help="video files, or folders of them")
    output_argument(parser, "where the report goes", default="report", metavar="DIR")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), metavar="N", help="processes (default: all cores)")
    default = Settings()
    parser.add_argument(
        "--first-chunk",
        type=int,
        default=default.first_chunk,
        metavar="FRAMES",
        help=f"video frames of the stream's first chunk, for the seams (default {default.first_chunk}, Wan's)",
    )
    parser.add_argument(
        "--chunk",
        type=int,
        default=default.chunk,
        metavar="FRAMES",
        help=f"video frames of the other chunks (default {default.chunk})",
    )
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        raise UserError(f"--jobs={options.jobs}: give at least 1")
    settings = Settings(options.first_chunk, options.chunk)
    files = find_videos(options.videos)
    with claimed_output(options, folder=True, replaces=is_of_report) as output, if_unwritten(output):
        starting("to measure")
        return _evaluate(files, settings, options.jobs, output, options.overwrite)


def _evaluate(files: Sequence[tuple[Path, str]], settings: Settings, jobs: int, output: Path, overwrite: bool) -> int:
    results = measure_files([path for path, _ in files], settings, jobs)
    videos, skipped = [], []
    for (path, group), result in zip(files, results, strict=True):
        if isinstance(result, Measurement):
            videos.append(Video(one_line(path.name), one_line(group), result))
        else:
            skipped.append((one_line(str(path)), str(result)))
    if not videos:
        more = f" (and {len(skipped) - 1} more)" if len(skipped) > 1 else ""
        raise UserError(f"{skipped[0][0]}: {skipped[0][1]}{more}; no video is left to measure, name others")
    for file, reason in skipped:
        print(f"skipped {file}: {reason}", file=sys.stderr)
    print("writing the report", file=sys.stderr, flush=True)  # which takes as long as a short video's frames
    with writing(f"--output={output}"):
        write_report(output, videos, skipped, settings, overwrite)
    for group, members in by_group(videos).items():
        print(_line(group, [video.measurement for video in members]))
    print(output / "report.html")
    return 0


def _line(group, members):
    found = {name: summarize_group([one.metrics[name] for one in members]) for name in members[0].metrics}
    luma, saturation = found["luma_drift"], found["saturation_drift"]
    return (
        f"{group}: {len(members)} video{'s'[: len(members) != 1]}, motion {found['motion'].mean:.1f} %h/s, "
        f"luma drift {luma.mean:+.1f} (size {luma.magnitude:.1f}), "
        f"saturation drift {saturation.mean:+.1f} (size {saturation.magnitude:.1f}), "
        f"colour lock at the end {found['lock_histogram_end'].mean:.2f}"
    )


def find_videos(paths: Sequence[Path]) -> list[tuple[Path, str]]:
    """The video files among paths and in folders (all levels), each with its group: (file, name of its folder).

    Groups are named by as much of the folder's path as tells them apart; that of files which were named without one is
    `CURRENT_FOLDER`. Hidden files are left out, and so is a file
    that was already named.

    Raises:
        UserError: a path is missing, or a folder holds no video.
    """
    found: dict[Path, Path] = {}
    bare: set[Path] = set()  # whose folder nobody named
    for path in paths:
        path = existing_name(path)
        if path.is_dir():
            named = (path / name for name in walk_files(path) if name.suffix.lower() in VIDEO_SUFFIXES)
            inside = [file for file in named if file.is_file()]
            if not inside:
                raise UserError(f"{path}: holds no videos ({', '.join(VIDEO_SUFFIXES)}); name another folder")
        elif path.exists():
            inside = [path]
            bare |= {path.resolve()} - found.keys() if path.parent == Path() else set()
        else:
            raise UserError(f"{path}: no such file or folder{what_lies_near(path) or '; correct the path'}")
        for file in inside:
            found.setdefault(file.resolve(), file)
    folders = {key: file.absolute().parent for key, file in found.items() if key not in bare}
    names = _tell_apart(dict.fromkeys(folders.values()))
    return [(file, CURRENT_FOLDER if key in bare else names[folders[key]]) for key, file in found.items()]


def _tell_apart(folders):
    names = {}
    for folder in folders:
        parts = folder.parts
        length = 1
        while length < len(parts) and sum(other.parts[-length:] == parts[-length:] for other in folders) > 1:
            length += 1
        names[folder] = "/".join(parts[-length:]).lstrip("/") or "/"
    return names


def measure_files(files: Sequence[Path], settings: Settings, jobs: int) -> list[Measurement | Unusable]:
    """Measures files in `jobs` processes, with a progress bar: what `measure_video` returns or raises for each.

    A file whose process is killed, for want of memory say, is unusable too.
    """
    with progress("measure (starting)", 0, unit="frame") as bar:
        for file in files:
            bar.total += _frames_by_header(file)
        if min(jobs, len(files)) == 1:
            bar.set_description("measure")
            return [_measure(file, settings, bar.update) for file in files]
        measured = _measure_in_processes(files, settings, min(jobs, len(files)), bar)
        # When one process is killed, those beside it end too. Each of their files gets another, alone.
        for number, result in enumerate(measured):
            if result is None:
                (measured[number],) = _measure_in_processes([files[number]], settings, 1, bar)
        killed = Unusable("the process that measured it was killed, perhaps for want of memory")
        return [result or killed for result in measured]


def _measure(file, settings, count_frames):
    try:
        return measure_video(file, settings, count_frames)
    except Unusable as reason:
        return reason


def _measure_in_processes(files, settings, jobs, bar):
    """What `_measure` gives for each file, or None where its process ended without."""
    # Not forked: this process has threads, of the progress bar for one.
    context = multiprocessing.get_context("spawn")
    done, before = context.Value("q", 0), bar.n
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, context, _start_worker, (done, threads))
    try:
        futures = [pool.submit(_measure_in_worker, file, settings) for file in files]
        waiting = set(futures)
        while waiting:
            _, waiting = wait(waiting, timeout=0.2)
            if done.value:
                bar.set_description("measure", refresh=False)
            bar.update(before + done.value - bar.n)
        return [None if isinstance(future.exception(), BrokenProcessPool) else future.result() for future in futures]
    except KeyboardInterrupt:  # a video may take minutes
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(done, threads):
    global _frames_done  # a lock can be handed to a process only when it starts
    _frames_done = done
    cv2.setNumThreads(threads)
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupt ends it at once, not after the videos it was handed


def _end_with_the_command():
    """Ends this process when the one that started it has ended, however it did."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _measure_in_worker(file, settings):
    def count_frames(frames):
        with _frames_done.get_lock():
            _frames_done.value += frames

    return _measure(file, settings, count_frames)


def _frames_by_header(file):
    try:
        return read_header(file).num_frames
    except (av.FFmpegError, OSError, ValueError):
        return 0  # it will be skipped, with its reason


# --- export -------------------------------------------------------------------------------------------------------


def export(arguments: Sequence[str]) -> int:
    """Parses the command line of `export` and fills or checks a folder for VBench; 1 if the check finds anything."""
    parser = CommandParser(
        prog="python -m adastate_jax.evaluate export",
        description="Fills a folder with videos named as VBench or VBench-Long reads them, or checks one. "
        "Started again, it goes on where it was interrupted.",
        epilog=_EXPORT_EXAMPLE,
    )
    parser.add_argument("--vbench", required=True, type=Path, metavar="DIR", help="the folder for VBench")
    parser.add_argument(
        "--prompts",
        required=True,
        type=Path,
        metavar="FILE",
        help="short prompts, one a line, or VBench_full_info.json",
    )
    parser.add_argument("--extended", type=Path, metavar="FILE", help="prompts to generate from, in the same order")
    parser.add_argument("--samples", type=int, metavar="N", help="videos per prompt (default 5; custom 1)")
    parser.add_argument("--custom", action="store_true", help="numbered files, and their prompts in DIR.prompts.json")
    parser.add_argument("--long", action="store_true", help="for VBench-Long, which allows no underscore in a name")
    parser.add_argument("--seed", type=int, default=0, help="of the first video; each has its own (default 0)")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--videos", type=Path, metavar="DIR", help="copy these: named by prompt or line, or captioned")
    what.add_argument("--checkpoint", type=Path, metavar="DIR", help="generate with this model, as sample does")
    what.add_argument("--check", action="store_true", help="only list what is missing or wrong")
    parser.add_argument("--seconds", type=float, default=5.0, help="length of generated videos (default 5)")
    parser.add_argument("--anchor", choices=STREAM_NAMES, help="instead of the one that the model was trained with")
    options = parser.parse_args(arguments)
    if not math.isfinite(options.seconds) or options.seconds <= 0:
        raise UserError(f"--seconds={options.seconds}: must be positive")

    samples = options.samples
    if samples is None:
        samples = 1 if options.custom else vbench.STANDARD_SAMPLES
    config = vbench.ExportConfig(samples, options.custom, options.long, options.seed)
    extended = vbench.read_prompts(options.extended) if options.extended else None
    slots = vbench.plan_export(vbench.read_prompts(options.prompts), config, extended)
    if not options.check:
        with writing(f"--vbench={options.vbench}"):
            _fill(options, slots, config)
    return _report_check(options.vbench, slots, config)


def _fill(options, slots, config):
    if options.videos:
        files, unmatched = vbench.match_files(options.videos, slots)
        for name in unmatched:
            print(f"skipped {one_line(str(options.videos / name))}: belongs to no prompt", file=sys.stderr)
        with progress("export", len(slots), unit="video") as bar:
            skipped = vbench.export_files(options.vbench, slots, config, files, bar.update)
        for file, reason in skipped:
            print(f"skipped {one_line(str(file))}: {reason}", file=sys.stderr)
        return
    starting()
    # Imported here: JAX takes seconds, which measuring and checking can do without.
    from adastate_jax.generation.loading import load
    from adastate_jax.generation.video_stream import stream

    model = load(options.checkpoint)

    def generate(text, seed):
        return stream(model, text, options.seconds, seed, options.anchor)

    # A model that ships with the package is no folder, and is the same from wherever it is named.
    checkpoint = str(options.checkpoint.resolve() if options.checkpoint.exists() else options.checkpoint)
    source = {"checkpoint": checkpoint, "seconds": options.seconds, "anchor": options.anchor}
    with progress("export", len(slots), unit="video", compiles=True) as bar:
        vbench.export_generated(options.vbench, slots, config, generate, source, bar.update)


def _report_check(folder, slots, config):
    with progress("check", len(slots), unit="video") as bar:
        check = vbench.check_export(folder, slots, config, bar.update)
    for name in check.missing:
        print(f"missing {name}")
    for problem in check.problems:
        print(f"problem {problem}")
    for note in check.notes:
        print(f"note {note}", file=sys.stderr)
    found = len(slots) - len(check.missing)
    print(f"{folder}: {found} of {len(slots)} videos, {len(check.problems)} problems", file=sys.stderr)
    return 1 if check.missing or check.problems else 0


if __name__ == "__main__":
    run_command(main)
