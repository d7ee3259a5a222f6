"""The train command: runs a configuration's stages in order, and resumes where the work directory left off."""

if __name__ == "__main__":  # before all other imports: a signal that comes during them ends the command, too
    from adastate_jax import interrupts

    interrupts.install()

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adastate_jax import distributed
from adastate_jax.console import CommandParser, refuse_configuration, run_command, starting
from adastate_jax.distributed import from_first, gather
from adastate_jax.errors import UserError, shown, writing
from adastate_jax.fields import to_dict
from adastate_jax.files import what_lies_near, write_text
from adastate_jax.interrupts import Stopped, if_stopped
from adastate_jax.lockstep import watched
from adastate_jax.texts import read_json

if TYPE_CHECKING:
    from adastate_jax.config.run import Config
    from adastate_jax.training.metrics import Metrics
    from adastate_jax.training.profile import Profile

# Fields in which a run and the one that it starts from must be alike.
_INHERITED_FIELDS = ("text", "decoder", "codec", "vae", "tiny_vae", "model", "data")

# Fields that a later call with the same work directory may change: they do not alter what was trained so far.
_FREE_FIELDS = ("stages", "sample", "logging", "mesh")

# Neither do these, by the ends of their names, but for the order of sums: what does not fit can go on with others.
_FREE_SETTINGS = ("accumulate", "remat")


def train(config: "Config", workdir: Path, begun: float | None = None, profile: str | None = None) -> None:
    """Runs the stages; those that the work directory has already finished are not repeated.

    Args:
        begun: `time.monotonic()` when the command began, for the report on its time; by default now.
        profile: FIRST:LAST, the steps of each stage that a trace in `workdir/profile` is written of.

    Raises:
        UserError: bad input, a work directory of another configuration, or a loss that is not finite.
        Stopped: after SIGTERM or Ctrl-C, when the state is saved; the same call goes on.
    """
    from adastate_jax.benchmarking.utilisation import device_peak, step_flops
    from adastate_jax.sharding import all_devices
    from adastate_jax.training.metrics import Metrics
    from adastate_jax.training.profile import Profile
    from adastate_jax.training.spans import Spans, Work, device_memory

    all_devices()
    traced = Profile(profile, config, workdir / "profile") if profile else None
    work = Work(functools.partial(step_flops, config), math.prod(dataclasses.astuple(config.mesh)), device_peak())
    metrics = Metrics(workdir, Spans(begun), work)
    with contextlib.ExitStack() as stack:

        def open_workdir() -> None:
            stack.enter_context(_open_workdir(workdir))

        from_first(open_workdir)
        if traced:
            stack.enter_context(traced)
        try:
            _train(config, workdir, metrics, traced)
        except Stopped:
            _say(metrics.summary(device_memory()))
            raise
        devices = {name: peak for part in gather(device_memory()) for name, peak in part.items()}
    _say(metrics.summary(devices))


def _say(lines: Sequence[str]) -> None:
    for line in lines:
        print(line, file=sys.stderr)


def _train(config: "Config", workdir: Path, metrics: "Metrics", profile: "Profile | None") -> None:
    import jax

    from adastate_jax.config.files import save_config
    from adastate_jax.generation.samples import sample
    from adastate_jax.sharding import make_mesh
    from adastate_jax.training.networks import check_networks
    from adastate_jax.training.stages.distill import distill
    from adastate_jax.training.stages.initialize import initialize
    from adastate_jax.training.stages.inputs import guiding_texts, make_frozen, open_inputs
    from adastate_jax.training.stages.pretrain import pretrain
    from adastate_jax.training.stages.run import Run

    stages = {"pretrain": pretrain, "initialize": initialize, "distill": distill, "sample": sample}
    _refuse_other_configuration(workdir, config)
    _refuse_other_start(config)
    networks = from_first(lambda: check_networks(config, workdir))
    try:
        mesh = make_mesh(**dataclasses.asdict(config.mesh))
    except ValueError as error:
        raise UserError(f"config.mesh: {error}") from None
    _refuse_uneven_batches(config)
    if not (workdir / "config.json").exists():  # a run that began so can go on
        _refuse_early_end(config)
    metrics.spans.lap("start")
    with jax.set_mesh(mesh):
        inputs = open_inputs(config, workdir)
        from_first(lambda: _refuse_other_data(workdir, inputs.names, networks))
        frozen = make_frozen(config, workdir, inputs.clips, mesh)
        with writing(workdir / "config.json"):  # only now: until here the input may have been refused
            from_first(lambda: save_config(config, workdir / "config.json"))
        texts = inputs.clips, inputs.captions, inputs.prompts, inputs.critic_prompts
        metrics.spans.lap("data")
        run = Run(config, workdir, mesh, *texts, frozen, *guiding_texts(config, inputs, frozen), metrics, profile)
        for stage in config.stages:
            if not from_first(functools.partial(run.is_finished, stage)):
                stages[stage](run)
                if stage == "sample":
                    metrics.spans.lap("sample")
                    metrics.close("sample", 0)
            from_first(run.refuse_removed)


def _refuse_uneven_batches(config: "Config") -> None:
    """What is computed at once is split over the devices of the mesh's axes data and fsdp."""
    from adastate_jax.config.mesh import require_divisible_batches

    batches = {}
    for stage in (stage for stage in config.stages if stage != "sample"):
        parts = getattr(config, stage).accumulate
        name = f"config.{stage}.batch_size" + (" / accumulate =" if parts > 1 else "")
        batches[name] = getattr(config, stage).batch_size // parts
    try:
        require_divisible_batches(config.mesh, batches)
    except ValueError as error:
        raise UserError(str(error)) from None


def _refuse_early_end(config: "Config") -> None:
    """A rate that is zero before a stage ends wastes what comes behind."""
    from adastate_jax.config.run import require_whole_decay

    try:
        require_whole_decay(config)
    except ValueError as error:
        raise UserError(str(error)) from None


@contextlib.contextmanager
def _open_workdir(workdir: Path) -> Iterator[None]:
    """Makes the work directory if need be, and keeps other runs out of it; one that it made goes if it stays empty."""
    missing = [folder for folder in (workdir, *workdir.absolute().parents) if not folder.exists()]
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = os.open(workdir, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be used ({error.strerror}); name another folder") from None
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, missing)
        stack.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # freed when the process ends, however it does
        except BlockingIOError:
            raise UserError(f"--workdir={workdir}: another run is at work there; name another folder") from None
        yield


def _remove_empty(folders: Sequence[Path]) -> None:
    """Removes folders, the innermost first, as far as they are empty."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _refuse_other_configuration(workdir: Path, config: "Config") -> None:
    """Checks that what the work directory holds was made with this configuration, but for more steps of its end."""
    from adastate_jax.config.files import load_config
    from adastate_jax.config.run import Config

    path = workdir / "config.json"
    if path.exists():
        fields = [field.name for field in dataclasses.fields(Config) if field.name not in _FREE_FIELDS]
        old = load_config(path)
        extended = _extended(old, config, workdir)
        difference = _difference(extended, config, fields)
        if difference:
            raise UserError(f"{workdir}: was made with {difference}; use a fresh --workdir or the old value")
        if extended != old:
            _refuse_early_end(config)


def _extended(old: "Config", new: "Config", workdir: Path) -> "Config":
    """The old configuration with as many steps as the new one's, of stages that no other went on from."""
    made = ("pretrain", "trajectories", "initialize", "distill")  # each of what stands before it
    for stage in ("pretrain", "initialize", "distill"):
        steps = getattr(new, stage).steps
        begun = any((workdir / later).exists() for later in made[made.index(stage) + 1 :])
        if steps > getattr(old, stage).steps and not begun:
            old = dataclasses.replace(old, **{stage: dataclasses.replace(getattr(old, stage), steps=steps)})
    return old


def _refuse_other_start(config: "Config") -> None:
    """Checks that the run to start from has this one's networks and data."""
    from adastate_jax.config.files import load_config

    if config.start_from:
        path = Path(config.start_from) / "config.json"
        difference = _difference(load_config(path), config, _INHERITED_FIELDS)
        if difference:
            raise UserError(f"config.start_from={config.start_from}: was made with {difference}; they must be alike")


def _difference(old: "Config", new: "Config", fields: Sequence[str]) -> str:
    """The first of the fields in which two configurations differ, or nothing."""
    from adastate_jax.checkpoint import flatten

    before, after = (flatten({name: to_dict(config)[name] for name in fields}) for config in (old, new))
    for name in sorted({*before, *after}):
        if name.rpartition("/")[2] not in _FREE_SETTINGS and before.get(name) != after.get(name):
            return f"config.{name.replace('/', '.')}={before.get(name)!r}, now it is {after.get(name)!r}"
    return ""


def _refuse_other_data(workdir: Path, names: Mapping[str, str], networks: Mapping[str, str] | None = None) -> None:
    """Notes what the work directory is made with, or checks that it is still the same.

    Args:
        names: of its data sets, with the hash of all that each is built from: names, sizes and times of files, for one.
        networks: see `check_networks`; noted from the first call on whose stages ask for them.
    """
    path = workdir / "data.json"
    fix = "remove it, to go on with the data as they are now"
    noted = dict(networks or {})
    old = read_json(path, fix) if path.exists() else dict(names)
    if not isinstance(old, dict) or {kind for kind in old if not kind.endswith(".weights")} != names.keys():
        raise UserError(f"{path}: is damaged; {fix}")
    for kind, name in {**names, **noted}.items():
        if old.get(kind, name) != name:
            raise UserError(
                f"{workdir}: its {kind} have changed since it was begun: {shown(old[kind])} is now {name}; bring them "
                "back, or use a fresh --workdir"
            )
    if not path.exists() or not noted.keys() <= old.keys():
        with writing(path):
            write_text(path, json.dumps({**old, **noted}, indent=2) + "\n")


_DESCRIPTION = """Trains the stages of a configuration, and ends with sample videos in the work directory.
The same command resumes a run that was stopped."""
_EXAMPLE = """example:
  python -m adastate_jax.train --config=configs/tiny.py --workdir=runs/tiny --config.distill.steps=200"""


def _plan(options: argparse.Namespace, rest: Sequence[str]) -> int:
    """Prints what training takes on the chips that were named; 1 if it does not fit, and nothing near does."""
    if not 0 < options.share <= 1:
        raise UserError(f"--share={options.share}: must lie in (0, 1]")
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing runs; an accelerator that is here is left alone
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # else XLA asks for a bug report where compiling takes minutes
    starting()
    from adastate_jax.benchmarking.ahead import cache_folder
    from adastate_jax.benchmarking.plan import plan, table
    from adastate_jax.config.files import parse_config

    config = parse_config([f"--config={options.config}", *rest])
    record = plan(config, config.network("teacher"), options.plan, options.share, cache_folder())
    print(table(record))
    return 0 if record["asked"]["fits"] != "no" or record["nearest"] else 1


def main(arguments: Sequence[str]) -> int:
    """Parses the command line and trains."""
    parser = CommandParser(
        prog="python -m adastate_jax.train",
        description=_DESCRIPTION,
        epilog=_EXAMPLE,
    )
    parser.add_argument(
        "--config", required=True, metavar="FILE", help="a file under configs/; its docstring says more"
    )
    parser.add_argument("--workdir", type=Path, metavar="DIR", help="everything is written here; needed but for --plan")
    distributed.add_arguments(parser)
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="writes a trace of these steps of each stage, 20:24 for one, into DIR/profile, by jax.profiler",
    )
    plan = parser.add_argument_group("planning")
    plan.add_argument(
        "--plan",
        metavar="CHIP:SIZES",
        help="trains nothing: says what the stages take on chips that need not be here: v5p:2x2x2, v6e:4x4, h100:8",
    )
    plan.add_argument(
        "--share",
        type=float,
        default=0.4,
        metavar="X",
        help="with --plan: the share of the chips' peak speed that predicted times count on (default 0.4)",
    )
    parser.add_argument("--config.FIELD", metavar="VALUE", dest="unused", help="overrides a field of the configuration")
    known, rest = parser.parse_known_args(arguments)
    refuse_configuration(known.config, rest)
    if known.plan is not None:
        return _plan(known, rest)
    if known.workdir is None:
        parser.error("the following arguments are required: --workdir")
    if re.match(r"[a-z][a-z0-9+.-]*:/", str(known.workdir)):  # `Path` has made one slash of two
        raise UserError(
            f"--workdir={known.workdir}: is no folder; mount the bucket (gcsfuse for gs://) and name where: data sets, "
            "trajectories and checkpoints are renamed into place, which a bucket's address cannot do"
        )
    if not os.path.isdir(known.workdir) and os.path.lexists(known.workdir):
        raise UserError(f"--workdir={known.workdir}: is a file; name a folder")
    for argument in rest:
        name, _, folder = argument.partition("=")
        if name == "--config.data.folder" and not os.path.isdir(folder):
            if os.path.lexists(folder):
                raise UserError(f"{argument}: is a file; name the folder that holds it")
            raise UserError(f"{argument}: no such folder{what_lies_near(folder) or '; name one of video files'}")
    begun = time.monotonic()
    starting()
    distributed.start(known.coordinator, known.processes, known.process, known.start_timeout)
    from adastate_jax.config.files import parse_config

    with if_stopped(f"the same command resumes {known.workdir}"), watched():
        config = parse_config([f"--config={known.config}", *rest])
        train(config, known.workdir, begun, known.profile)
    return 0


if __name__ == "__main__":
    run_command(main)
