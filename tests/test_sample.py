"""The sample command on random weights and on converted networks: what it writes, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
import small_wan

from adastate_jax import sample
from adastate_jax.config.files import parse_config
from adastate_jax.errors import UserError
from adastate_jax.fields import to_dict
from adastate_jax.generation import loading, takes, video_stream
from adastate_jax.generation.provenance import describe_takes
from adastate_jax.media import VideoWriter, enlarge, open_writer, read_image, read_last_frames, read_metadata

ROOT = Path(__file__).parents[1]
TINY = f"--config={ROOT / 'configs' / 'tiny.py'}"


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Where the command keeps its programs, not in the home of who runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_wan.write_model(tmp_path_factory.mktemp("model") / "weights")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """`small_wan.CONFIG` as a file of --config."""
    file = tmp_path_factory.mktemp("config") / "small_wan.py"
    values = json.dumps(to_dict(small_wan.CONFIG))
    file.write_text(
        "import json\nimport ml_collections\n\n\n"
        f"def get_config():\n    return ml_collections.ConfigDict(json.loads({values!r}))\n"
    )
    return f"--config={file}"


def frames_of(path):
    with av.open(str(path)) as video:
        assert video.streams.video[0].average_rate == 16
        return np.stack([frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)])


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[:, :, 2] = 200  # red
    cv2.imwrite(str(path), pixels)
    return path


@pytest.fixture
def clip(tmp_path):
    """One second at 16 frames per second, each brighter than the one before."""
    path = tmp_path / "clip.mp4"
    with VideoWriter(path) as writer:
        writer.write(np.broadcast_to(np.arange(16, dtype=np.uint8)[:, None, None, None] * 10, (16, 64, 64, 3)))
    return path


def test_a_dry_run_needs_no_files(tmp_path, capsys):
    output = tmp_path / "out.mp4"
    options = ["--random-weights", TINY, "--prompt=x", "--seconds=0.5", f"--output={output}"]
    assert sample.main(options) == 0
    assert frames_of(output).shape == (8, 32, 32, 3)
    said = capsys.readouterr()
    assert "random: transformer, codec and text embeddings" in said.err
    assert said.out == f"{output}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_a_video_is_made_again_from_what_it_says_of_itself(folder, config, picture, tmp_path):
    output, again = tmp_path / "out.mp4", tmp_path / "again.mp4"
    options = [f"--checkpoint={folder}", config, "--config.stream.past_frames=6", f"--text-cache={tmp_path / 'cache'}"]
    options += ["--prompt=x", "--prompt=y", "--seed", "3", "4", f"--image={picture}", "--scale=2"]
    assert sample.main([*options, "--seconds=0.7", f"--output={output}"]) == 0
    videos = [tmp_path / f"out{number}.mp4" for number in ("", "-2", "-3", "-4")]
    frames = [frames_of(video) for video in videos]
    assert [one.shape for one in frames] == [(12, 32, 48, 3)] * 4
    assert not np.array_equal(frames[2], frames[3])
    metadata = read_metadata(videos[-1])
    assert {"prompt": "y", "seed": "4", "seconds": "0.7", "scale": "2"}.items() <= metadata.items()
    like = [f"--like={videos[-1]}", config, f"--text-cache={tmp_path / 'cache'}"]
    assert sample.main([*like, f"--output={again}"]) == 0
    np.testing.assert_array_equal(frames_of(again), frames[-1])
    assert {**read_metadata(again), "command": ""} == {**metadata, "command": ""}

    other = tmp_path / "other.png"
    cv2.imwrite(str(other), np.full((32, 32, 3), 9, np.uint8))
    for name, texts in (
        ("changed.mp4", {**metadata, "model": "0"}),
        ("foreign.mp4", {}),
        ("bad.mp4", {"seed": "x"}),
        ("chooses.mp4", {"overrides": '["--config=a_program.py"]'}),
        ("number.mp4", {"overrides": "[5]"}),
    ):
        with open_writer(tmp_path / name, texts and {**metadata, **texts}) as writer:
            writer.write(frames[0])
    for arguments, message in (
        ([*like, "--prompt=z"], "--prompt: --like takes it from the video"),
        ([*like, "--config.seed=3"], "--config.seed=3: --like takes it from the video"),
        ([*like, f"--image={other}"], r"out-4\.mp4: started from other frames"),
        (like[::2], r"out-4\.mp4: was made with a configuration file; name it with --config"),
        (
            [f"--like={tmp_path / 'changed.mp4'}", config],
            r"changed\.mp4: was made with another model; name that with --check",
        ),
        ([f"--like={tmp_path / 'foreign.mp4'}"], r"foreign\.mp4: does not say how it was made"),
        ([f"--like={tmp_path / 'bad.mp4'}"], r"bad\.mp4: what it says of how it was made is damaged"),
        ([f"--like={tmp_path / 'chooses.mp4'}", config], r"chooses\.mp4: what it says of how it was made is damaged"),
        ([f"--like={tmp_path / 'number.mp4'}", config], r"number\.mp4: what it says of how it was made is damaged"),
    ):
        with pytest.raises(UserError, match=message):
            sample.main([*arguments, f"--output={tmp_path / 'new.mp4'}"])
        assert not (tmp_path / "new.mp4").exists()


def test_a_sessions_video_is_replayed(folder, config, tmp_path, monkeypatch, capsys):
    """From what it says of itself, as `--session` does it from the session's file."""
    cache = tmp_path / "cache"
    model = loading.load(folder, small_wan.CONFIG, text_cache=cache)
    running = takes.RunningTake(model, "x", 3, [None])
    frames = np.concatenate([running.step().frames for _ in range(2)])
    metadata = describe_takes(takes.session_head(model), ["serve"], [takes.take_to_dict(running.take())], scale=2)
    with open_writer(tmp_path / "live.mp4", metadata) as writer:
        writer.write(enlarge(frames, 2))
    again = tmp_path / "again.mp4"
    like = [f"--like={tmp_path / 'live.mp4'}", config, f"--text-cache={cache}", f"--output={again}"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"live\.mp4: was made with weights, which is not here; name it with --checkp"):
        sample.main(like)
    assert sample.main([*like, f"--checkpoint={folder}"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{again}\n"
    assert "all 2 chunks have the session's latents, bit for bit" in captured.err
    np.testing.assert_array_equal(frames_of(again), frames_of(tmp_path / "live.mp4"))
    assert {**read_metadata(again), "command": ""} == {**metadata, "checkpoint": str(folder), "command": ""}


def test_a_schedule_is_remembered(folder, config, tmp_path):
    story = tmp_path / "story.txt"
    story.write_text("0 | x\n1 blend:2 | y\n")
    common = [f"--checkpoint={folder}", config, f"--text-cache={tmp_path / 'cache'}"]
    assert sample.main([*common, "--seconds=2", f"--prompts={story}", f"--output={tmp_path / 'one.mp4'}"]) == 0
    story.unlink()
    like = [f"--like={tmp_path / 'one.mp4'}", config, f"--text-cache={tmp_path / 'cache'}"]
    assert sample.main([*like, f"--output={tmp_path / 'other.mp4'}"]) == 0
    np.testing.assert_array_equal(frames_of(tmp_path / "one.mp4"), frames_of(tmp_path / "other.mp4"))


def test_a_model_of_worlds_says_what_it_knows(capsys):
    model = SimpleNamespace(config=parse_config([TINY]))
    options = SimpleNamespace(image=None)
    sample._note_what_it_knows(model, options, ["a camera pans left over green hills", "and the RED ball"])
    assert capsys.readouterr().err == ""
    sample._note_what_it_knows(model, options, ["a camera pans left", "a zebra plays chess", "Chess with a red zebra"])
    told = capsys.readouterr().err
    assert told.startswith("note: this model does not know 'zebra', 'plays', 'chess'; it knows: a camera pans left/")
    assert told.count("\n") == 1
    sample._note_what_it_knows(model, SimpleNamespace(image="fox.jpg"), ["red"])
    assert "keeps one frame of --image" in capsys.readouterr().err


def test_converted_networks_make_a_video(folder, config, clip, tmp_path):
    output = tmp_path / "out" / "fox.mp4"
    common = [f"--checkpoint={folder}", config, "--prompt=a red fox", f"--text-cache={tmp_path / 'cache'}"]
    assert sample.main([*common, "--seconds=1.3", f"--output={output}"]) == 0
    assert frames_of(output).shape == (21, 16, 24, 3)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert sample.main([*common, "--seconds=2", f"--output={output}", "--overwrite", f"--video={clip}"]) == 0
    assert frames_of(output).shape == (32, 16, 24, 3)


@pytest.mark.parametrize(("option", "count"), [("image", 1), ("video", 6)])
def test_what_to_start_from_reaches_the_stream(option, count, picture, clip, tmp_path, monkeypatch):
    """A picture is one frame; of a clip, as many as fill the window: two chunks of three."""
    monkeypatch.setattr(video_stream, "stream", lambda *_, start, prompts: iter([start]))
    file = picture if option == "image" else clip
    output = tmp_path / "out.mp4"
    options = ["--random-weights", TINY, "--prompt=x", f"--{option}={file}", f"--output={output}"]
    assert sample.main(options) == 0
    frames = frames_of(output)
    assert frames.shape == (count, 32, 32, 3)
    expected = [200, 0, 0] if option == "image" else [150, 150, 150]
    np.testing.assert_allclose(frames[-1].mean(axis=(0, 1)), expected, atol=4)


def test_pictures_and_clips_are_fitted(picture, clip):
    pixels = read_image(picture, 32, 48)
    assert pixels.shape == (1, 32, 48, 3)
    assert pixels[0, 16, 24].tolist() == [200, 0, 0]
    frames = read_last_frames(clip, 5, 32, 48)
    assert frames.shape == (5, 32, 48, 3)
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), np.arange(11, 16) * 10, atol=3)
    assert len(read_last_frames(clip, 100, 32, 48)) == 16


def test_what_is_no_picture_or_clip_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("a fox")
    for read, arguments, message in (
        (read_image, (8, 8), "not a readable picture"),
        (read_last_frames, (2, 8, 8), "not a readable video"),
    ):
        with pytest.raises(UserError, match=rf"notes\.txt: {message}"):
            read(tmp_path / "notes.txt", *arguments)
        with pytest.raises(UserError, match="nowhere: no such file"):
            read("nowhere", *arguments)


def test_a_clip_is_read_at_sixteen_frames_per_second(tmp_path):
    with VideoWriter(tmp_path / "fast.mp4", fps=48) as writer:
        writer.write(np.broadcast_to(np.arange(48, dtype=np.uint8)[:, None, None, None] * 5, (48, 64, 64, 3)))
    frames = read_last_frames(tmp_path / "fast.mp4", 4, 64, 64)
    np.testing.assert_allclose(frames.mean(axis=(1, 2, 3)), np.array([38, 41, 44, 47]) * 5, atol=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=x"], "--checkpoint: name a model: --checkpoint=tiny, which ships with this package, or a folder"),
        (["--prompt=x", "--checkpoint=w", "--random-weights"], "--checkpoint and --random-weights: give only one"),
        (["--prompt=x", "--random-weights"], "--random-weights: needs --config"),
        (["--prompt=x", "--checkpoint=nowhere"], "nowhere: no such folder"),
        (["--prompt=x", "--checkpoint=tiny", "--config.seed=3"], "--config.seed=3: a trained student"),
        (["--prompt=x", "--checkpoint=tiny", TINY], r"--config=.*: a trained student"),
        (["--prompt=x", "--checkpoint=tiny", "--steps=50"], "--steps=50: a trained student"),
        (["--prompt=x", "--checkpoint=tiny", "--negative-prompt", "blurred"], "--negative-prompt: a trained student"),
        (["--prompt=x", "--checkpoint=tiny", "--scale=0"], "--scale=0: must be at least 1"),
        (["--prompt=x", "--checkpoint=tiny", "--seed", "0", "-1"], "--seed=-1: must not be negative"),
        (["--like=no.mp4"], "no.mp4: no such file"),
        (["--prompt=x", "--checkpoint=tiny", "--output=x.avi"], r"--output=x.avi: must end in .mp4, .gif, .webp"),
        (["--prompt=x", "--random-weights", TINY, "--config.sed=3"], "sed"),
        (["--prompt=x", "--random-weights", TINY, "--loud"], "loud"),
        (["--prompt=x", "--random-weights", TINY, "--decoder=wan"], "decoder wan: .*must be the 16 channels"),
        (["--random-weights", TINY], "--prompt: say what to show, or name a schedule"),
        (["--prompt=x", "--prompts=y", "--random-weights", TINY], "--prompt and --prompts: give only one"),
        (["--prompt= ", "--random-weights", TINY], "--prompt: is empty"),
        (["--prompts=no.txt", "--random-weights", TINY], r"no\.txt: no such file"),
        (["--prompt=x", "--random-weights", TINY, "--image=no.png"], r"no\.png: no such file"),
        (["--prompt=x", "--random-weights", TINY, "--video=no.mp4"], r"no\.mp4: no such file"),
        (["--prompt=x", "--random-weights", TINY, "--video=a", "--image=b"], "starts from one of them"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        sample.main(arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "start"), [("x.MP4", b"ftyp"), ("x.Gif", b"GIF89a"), ("x.WEBP", b"RIFF")])
def test_an_ending_may_be_written_in_capitals(name, start, tmp_path):
    """As the writers take it."""
    options = ["--random-weights", TINY, "--prompt=x", "--seconds=0.1", f"--output={tmp_path / name}"]
    assert sample.main(options) == 0
    assert start in (tmp_path / name).read_bytes()[:8]


def test_what_stops_the_compression_stops_the_command(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(VideoWriter, "_compress", full)
    options = ["--random-weights", TINY, "--prompt=x", "--seconds=1", f"--output={tmp_path / 'out.mp4'}"]
    with pytest.raises(UserError, match=r"out\.mp4: cannot be written \(No space left on device\)"):
        sample.main(options)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_read_is_not_blamed_on_the_output(tmp_path):
    (tmp_path / "run" / "config.json").mkdir(parents=True)
    options = [f"--checkpoint={tmp_path / 'run'}", "--prompt=x", f"--output={tmp_path / 'out.mp4'}"]
    with pytest.raises(UserError, match=r"run/config\.json: cannot be read \(Is a directory\)"):
        sample.main(options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_what_was_there_before(number, code, tmp_path):
    output = tmp_path / "out.mp4"
    output.write_text("of an earlier run")
    command = [sys.executable, "-m", "adastate_jax.sample", "--random-weights", TINY, "--prompt=x", "--seconds=100000"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [*command, f"--output={output}", "--overwrite"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 200
    while not any(path.stat().st_size for path in tmp_path.glob(".out.*.partial.mp4")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert errors.strip().splitlines()[-1] == f"stopped; {output} was not written"
    assert "Traceback" not in errors
    assert output.read_text() == "of an earlier run"
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]
