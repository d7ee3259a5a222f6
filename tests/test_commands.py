"""What all commands have in common: what they refuse and say before JAX is imported, their help, their list."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from adastate_jax import __main__, sample, verify
from adastate_jax.__main__ import COMMANDS
from adastate_jax.data.worlds import WorldConfig, caption_pattern
from adastate_jax.errors import UserError
from adastate_jax.generation.shipped import shipped_config
from adastate_jax.models.attention import BACKENDS
from adastate_jax.streaming import names, presets

ROOT = Path(__file__).parents[1]


def test_commands_are_imported_without_jax():
    code = (
        "import sys, adastate_jax, adastate_jax.__main__, adastate_jax.sample, adastate_jax.probe, adastate_jax.bench\n"
        "assert {*adastate_jax.__all__} <= {*dir(adastate_jax)}\n"
        "print(sorted({'jax', 'numpy', 'cv2', 'av'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


WRONG = {
    "train": (
        ["--config=no.py", "--workdir=a"],
        ["--config=configs/tiny.py"],
        ["--config=configs/tiny.py", "--workdir=a", "--x"],
        ["--config=configs/tiny.py", "--workdir=README.md"],
        ["--config=configs/clips.py", "--workdir=a", "--config.data.folder=nowhere"],
    ),
    "sample": (
        ["--checkpoint=tiny"],
        ["--checkpoint=nowhere", "--prompt=x"],
        ["--checkpoint=tiny", "--prompts=launch/gke.sh"],
        ["--like=docs/tiny.gif", "--prompt=x"],
        ["--like=docs/tiny.gif", "--output=README.md"],
        ["--checkpoint=tiny", "--prompt=x", "--output=docs", "--overwrite"],
    ),
    "serve": (
        ["--checkpoint=nowhere"],
        ["--checkpoint=tiny", "--port=70000"],
        ["--checkpoint=tiny", "--anchors", "static", "none", "ema"],
        ["--checkpoint=tiny", "--token=short"],
    ),
    "watch": (
        ["http://127.0.0.1:9/", "--seconds=nan"],
        ["http://127.0.0.1:9/", "--output=a.gif"],
        ["http://127.0.0.1:9/", "--prompts=nowhere"],
        ["http://127.0.0.1:9/", "--prompts=launch/gke.sh"],
    ),
    "convert": (
        ["--source=no.pt", "--output=a"],
        ["--source=configs", "--output=README.md"],
        ["--source=configs", "--output=a", "--set", "x"],
        ["--source=configs", "--output=a", "--lora=no.pt"],
        ["--source=configs", "--output=a", "--lora-alpha=1"],
        ["--source=README.md", "--output=a"],
    ),
    "verify": (["nowhere"], ["configs"], ["--only=x"], ["--attention=x"], ["--attention=cudnn"]),
    "evaluate": (["nowhere"], ["configs"], ["README.md", "--jobs=0"], ["README.md", "--output=README.md"]),
    "probe": (["--checkpoint=nowhere", "--prompt=x"],),
    "bench": (["--config=no.py"], ["--config=configs/tiny.py", "--repeats=0"], ["--config=configs/tiny.py", "--x"]),
    "bundle": (["--run=nowhere", "--output=a.safetensors"], ["--run=configs", "--output=a"]),
    "embed": (
        ["--checkpoint=nowhere", "--prompts=README.md", "--output=a"],
        ["--checkpoint=configs", "--prompts=nowhere", "--output=a"],
        ["--checkpoint=configs", "--prompts=README.md", "--output=a", "--batch-size=0"],
        ["--checkpoint=configs", "--prompts=README.md"],
    ),
    "encode": (
        ["--checkpoint=nowhere", "--videos=configs", "--output=a"],
        ["--checkpoint=configs", "--videos=nowhere", "--output=a"],
        ["--checkpoint=configs", "--videos=configs", "--output=a", "--stride=-1"],
    ),
}


def test_wrong_arguments_are_refused_before_jax_is_imported(tmp_path):
    assert {*WRONG} == {*COMMANDS}
    code = (
        "import importlib, json, sys\n"
        "for name, calls in json.loads(sys.argv[1]).items():\n"
        "  for arguments in calls:\n"
        "    try:\n"
        "      importlib.import_module(f'adastate_jax.{name}').main(arguments)\n"
        "    except Exception as error:\n"
        "      print(name, arguments, type(error).__name__, 'jax' in sys.modules)\n"
        "    else:\n"
        "      print(name, arguments, 'accepted')\n"
    )
    command = [sys.executable, "-c", code, json.dumps(WRONG)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    expected = [f"{name} {call} UserError False" for name, calls in WRONG.items() for call in calls]
    assert done.stdout.splitlines() == expected
    assert "starting" not in done.stderr


def test_a_command_that_starts_says_so(tmp_path):
    """Before the imports that take seconds."""
    code = (
        "import importlib, json, sys\n"
        "class Stop(BaseException): pass\n"
        "def starting(what='JAX'):\n"
        "  raise Stop('jax' in sys.modules)\n"
        "for name, arguments in json.loads(sys.argv[1]).items():\n"
        "  module = importlib.import_module(f'adastate_jax.{name}')\n"
        "  module.starting = starting\n"
        "  try:\n"
        "    module.main(arguments)\n"
        "  except Stop as stop:\n"
        "    print(name, stop)\n"
    )
    right = {
        "train": ["--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}"],
        "sample": ["--checkpoint=tiny", "--prompt=x", f"--output={tmp_path / 'a.mp4'}"],
        "convert": ["--source=configs", f"--output={tmp_path / 'a'}"],
        "verify": [],
        "probe": ["--checkpoint=tiny", "--prompt=x", f"--output={tmp_path / 'a'}"],
        "bench": ["--config=configs/tiny.py", f"--output={tmp_path / 'a'}"],
        "bundle": ["--run=configs", f"--output={tmp_path / 'a.safetensors'}"],
        "embed": ["--checkpoint=configs", "--prompts=README.md", f"--output={tmp_path / 'a'}"],
        "encode": ["--checkpoint=configs", "--videos=configs", f"--output={tmp_path / 'a'}"],
    }
    command = [sys.executable, "-c", code, json.dumps(right)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"{name} False" for name in right]
    assert os.listdir(tmp_path) == []


def test_the_package_has_what_it_lists():
    import adastate_jax as ada

    for name in ada.__all__:
        assert getattr(ada, name).__module__.startswith("adastate_jax.")
    with pytest.raises(AttributeError, match="no attribute 'sampler'"):
        _ = ada.sampler


def test_names_that_are_known_without_jax_are_the_real_ones():
    assert verify.ATTENTION == BACKENDS
    assert tuple(presets.PRESETS) == names.PRESET_NAMES
    assert tuple(presets.ANCHORS) == names.STRATEGY_NAMES
    assert names.STREAM_NAMES == presets.STREAM_NAMES


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as exited:
        importlib.import_module(f"adastate_jax.{name}").main(["--help"])
    assert exited.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    assert f"python -m adastate_jax.{name} " in text.partition("example")[2]


def test_all_commands_are_listed(capsys):
    texts = {path.stem: path.read_text() for path in (ROOT / "adastate_jax").glob("*.py")}
    assert {*COMMANDS} == {name for name, text in texts.items() if "run_command(main)" in text}
    assert all("interrupts.install()" in texts[name] for name in COMMANDS)
    for arguments in ([], ["--help"]):
        assert __main__._dispatch(arguments) == 0
        assert capsys.readouterr().out.count("\n  ") == len(COMMANDS)
    with pytest.raises(UserError, match="nonsense: no such command; use one of sample, serve, watch, train"):
        __main__._dispatch(["nonsense"])
    with pytest.raises(UserError, match="--anchor: invalid choice: 'x'"):
        __main__._dispatch(["sample", "--anchor=x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smaple"], "smaple: no such command; did you mean sample?"),
        (["sample", "--promt=x", "--checkpoint=tiny"], "--promt: unknown argument; did you mean --prompt?"),
        (["bundle", "--rnu=runs/tiny"], "--rnu: unknown argument; did you mean --run?"),
        (["train", "--confg=configs/tiny.py"], "--confg: unknown argument; did you mean --config?"),
        (["sample", "--anchor=longliv"], "--anchor: invalid choice: 'longliv'; did you mean longlive?"),
    ],
)
def test_a_name_much_like_a_known_one_is_suggested(arguments, message):
    with pytest.raises(UserError) as refused:
        __main__._dispatch(arguments)
    assert str(refused.value).startswith(message)


def test_the_words_that_the_shipped_model_knows_are_told(capsys):
    words = caption_pattern(WorldConfig(**shipped_config("tiny")["data"]["worlds"]))
    assert words == "a camera pans left/right over green hills/sand dunes/purple mountains with a red/white ball"
    assert words in (ROOT / "README.md").read_text()
    with pytest.raises(SystemExit):
        sample.main(["--help"])
    assert words in capsys.readouterr().out
