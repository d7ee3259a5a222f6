"""Checkpoints: any pytree, saved by Orbax under the path names of its leaves.

Saving is asynchronous and atomic. A checkpoint is written under a temporary name, sealed (see `seals`), and only then
gets its own. What is not sealed was cut short and is never loaded; what no longer matches its seal is refused by name.

Of several processes, each writes and checks the parts of the arrays that it holds; the first does what is done once:
the folder, the seal, the names, the removal of old ones.
"""

import contextlib
import errno
import itertools
import logging
import os
import shutil
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint.experimental import v1 as ocp

from adastate_jax import distributed
from adastate_jax.errors import UserError, reading, reason, writing
from adastate_jax.files import numbered_name, remove_leftovers, whole_folder
from adastate_jax.hidden_names import hidden_name
from adastate_jax.seals import SEAL, fingerprints, is_sealed, seal, verify
from adastate_jax.sharding import path_name, replicated

# Orbax reports each save and restore at INFO, thousands of lines in a long run, and logs what it raises, too, with a
# traceback from each of its threads.
logging.getLogger("absl").setLevel(logging.CRITICAL)


_INNER = "saving"  # where Orbax saves, within a temporary folder: it leaves files of its own beside, if it fails
_PRUNED = ".pruned"  # hidden names of checkpoints that are being removed
_ONE_AT_A_TIME = threading.Lock()  # Orbax saves from one thread of a process only
_PATIENCE = 2.0  # seconds, for writes that are under way when another one has failed

# What Orbax raises for files that match their seal and are still none that it wrote; lack of memory is not among it.
_STRANGE = (ValueError, TypeError, KeyError, AttributeError, IndexError)
_UNLIKE = "its files match their seal: another program or version wrote them; make it again with this one"


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path name, `a/b/c`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def save_tree(path: str | Path, tree: Any) -> None:
    """Saves a tree once, under a folder of its own; what was there goes when the new one is complete.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path).absolute()
    with writing(path, Exception), _temporary_of_all(path, tree, "save", replaces=None) as temporary:
        with _ONE_AT_A_TIME, _context():
            ocp.save(temporary / _INNER, _saved(tree))
        _finish(temporary, "save")


@contextlib.contextmanager
def _temporary_of_all(path: Path, tree: Any, channel: str, **replaces: None) -> Iterator[Path]:
    """A temporary folder with room for a tree, of the first process; all processes leave the context at once.

    By then it took the place of `path`, unless an exception came in any of them.
    """
    with contextlib.ExitStack() as stack:

        def begin() -> str:
            temporary = stack.enter_context(whole_folder(path, **replaces))
            stack.enter_context(_without_stragglers(temporary))
            _refuse_too_large(temporary, tree)
            return str(temporary)

        with distributed.together(f"{channel} placed"), stack:
            temporary = Path(distributed.from_first(begin, channel))
            with distributed.together(channel):
                yield temporary


def _context() -> ocp.Context:
    """Orbax' settings: which processes take part."""
    context = ocp.Context()
    if distributed.client() is not None and distributed.count() == 1:  # alone
        context.multiprocessing.active_processes = {jax.process_index()}
        context.multiprocessing.primary_host = jax.process_index()
    return context


def _saved(tree: Any) -> dict[str, Any]:
    """What Orbax is handed: by path names, and what every process has for itself as the first one has it."""
    if distributed.count() == 1:
        return flatten(tree)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("all",))

    def shared(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            return leaf
        value = multihost_utils.broadcast_one_to_all(np.asarray(leaf))
        return jax.make_array_from_callback(value.shape, replicated(mesh), lambda index: value[index])

    return {name: shared(leaf) for name, leaf in flatten(tree).items()}


def _refuse_too_large(folder: Path, tree: Any) -> None:
    """Raises OSError where a disk has less room than a tree takes, before anything is written."""
    if shutil.disk_usage(folder).free < sum(leaf.nbytes for leaf in jax.tree.leaves(tree)):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def _without_stragglers(folder: Path) -> Iterator[None]:
    """Removes what TensorStore's threads still write into a temporary folder when a save has failed; keeps them quiet.

    Orbax closes its event loop at the first write that fails, and waits for no other. The others go on for a while.
    """
    _quiet_stragglers()
    try:
        yield
    except BaseException:
        deadline = time.monotonic() + _PATIENCE
        while any(folder.iterdir()) and time.monotonic() < deadline:
            for path in folder.iterdir():
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.05)
        raise


def _quiet_stragglers() -> None:
    """Wraps `sys.excepthook` and `sys.unraisablehook`, for good, so that they say nothing of a straggling write.

    Such a write finds its event loop closed and hands that to one of the two hooks, from whatever thread it ends in,
    perhaps long after the save was given up: hooks that came and went with a save would miss it.
    """
    if not isinstance(sys.excepthook, _Hook):
        report = sys.excepthook
        sys.excepthook = _Hook(lambda kind, error, trace: _straggles(trace) or report(kind, error, trace))
    if not isinstance(sys.unraisablehook, _Hook):
        complain = sys.unraisablehook
        sys.unraisablehook = _Hook(lambda what: _straggles(what.exc_traceback) or complain(what))


class _Hook:
    """A hook of ours; told from others by its class, so that none is wrapped twice."""

    def __init__(self, function: Callable[..., object]):
        self._function = function

    def __call__(self, *arguments: Any) -> None:
        self._function(*arguments)


def _straggles(trace: types.TracebackType | None) -> bool:
    """Whether C++ called asyncio, and no function in Python did: the traceback would begin with that."""
    if trace is None:  # C++ called C
        return threading.current_thread() is not threading.main_thread()
    return trace.tb_frame.f_globals.get("__name__", "").startswith("asyncio.")


def _finish(folder: Path, channel: str) -> None:
    """Makes what all processes saved within a folder the folder's own content, and seals it.

    Each takes the checksums of the files that it wrote itself, so that no process reads what others wrote.
    """
    own = f"**/ocdbt.process_{distributed.index()}"
    parts = distributed.gather(fingerprints(folder / _INNER, own), channel)
    if not distributed.is_first():
        return
    for path in (folder / _INNER).iterdir():
        path.rename(folder / path.name)
    (folder / _INNER).rmdir()
    seal(folder, {name: tuple(listed) for part in parts for name, listed in part.items()})


def load_tree(path: str | Path, like: Any, prefix: str = "") -> Any:
    """Loads a tree that `save_tree` or `Checkpoints` wrote, or the part of it below `prefix`.

    Where a newer checkpoint lies beside it that is not finished, a line on stderr says so.

    Args:
        path: the checkpoint's folder.
        like: arrays or `jax.ShapeDtypeStruct`s; leaves that carry a sharding are loaded into it.
        prefix: path of the part within the saved tree, `a/b`.

    Raises:
        UserError: there is no finished checkpoint, it is damaged, or it does not hold this tree.
    """
    path = Path(path).absolute()
    path = path.with_name(distributed.from_first(lambda: path.name, "load"))  # the newest, where a host lists it late
    _refuse_unfinished(path)
    fix = f"remove {path}, to use an older one or make it again"
    with distributed.together("load"):
        verify(path, fix, distributed.index(), distributed.count())
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), like)
    wanted = {f"{prefix}/{name}" if prefix else name: leaf for name, leaf in flatten(like).items()}
    with _context(), reading(path, _UNLIKE, *_STRANGE):
        saved = ocp.metadata(path).metadata
    _check_names(path, wanted, saved, partial=bool(prefix))
    if distributed.is_first():
        _say_fall_back(path)
    context = _context()
    context.pytree.loading.partial_load = bool(prefix)
    with context, reading(path, _UNLIKE, *_STRANGE):
        loaded = ocp.load(path, wanted)
    found = {name.removeprefix(f"{prefix}/") if prefix else name: leaf for name, leaf in loaded.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)], like)


def is_finished(path: str | Path) -> bool:
    """Whether a finished checkpoint lies at this folder."""
    return is_sealed(path)


def latest_step(folder: str | Path) -> int | None:
    """Step of the newest finished checkpoint of a stage's folder, or None."""
    return max((int(path.name) for path in _numbered(Path(folder)) if is_finished(path)), default=None)


def _numbered(folder: Path) -> list[Path]:
    """The folders of a stage's checkpoints, finished or not; raises UserError for a file in such a place."""
    numbered = [path for path in folder.glob("[0-9]*") if path.name.isdecimal() and str(int(path.name)) == path.name]
    for path in numbered:
        if not path.is_dir():
            raise UserError(f"{path}: is a file where a checkpoint's folder should be; remove it")
    return numbered


class Checkpoints:
    """The numbered checkpoints of one training stage, in `folder/STEP`; the newest `keep` finished ones are kept.

    An older one goes only when a newer one is sealed. What lies there without a seal is not ours to remove, and is set
    aside at the start: a checkpoint gets its name with its seal.
    A context manager: leaving it waits for a save that is under way.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder: str | Path, keep: int):
        self.folder = Path(folder).absolute()
        self._keep = keep
        self._saving: threading.Thread | None = None
        self._failure: BaseException | None = None
        distributed.from_first(self._tidy)

    def _tidy(self) -> None:
        with writing(self.folder):
            self.folder.mkdir(exist_ok=True)
            for path in _numbered(self.folder):
                if not is_finished(path):
                    aside = _free_name(path.with_name(f"{path.name}.unfinished"))
                    path.rename(aside)
                    print(
                        f"note: {path}: has no {SEAL}, and is set aside as {aside.name}; {self._newest()}",
                        file=sys.stderr,
                    )
            for path in self.folder.glob(f".*{_PRUNED}"):
                shutil.rmtree(path)
        for step in {path.name[1:].partition(".")[0] for path in self.folder.glob(".*.partial")}:
            remove_leftovers(self.folder / step)

    def _newest(self) -> str:
        return "training begins anew" if self.latest is None else f"training goes on from {self.latest}"

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, *_) -> None:
        try:
            self.wait()
        except UserError as error:
            if kind is None:
                raise
            print(f"note: {error}", file=sys.stderr)  # what ended the run comes first

    @property
    def latest(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return latest_step(self.folder)

    def save(self, step: int, tree: Any) -> None:
        """Starts saving a tree; returns once it is copied off the device, so that the tree may be donated.

        Raises:
            UserError: this save cannot begin, or the one before failed.
        """
        self.wait()
        with self._refusing(), contextlib.ExitStack() as stack:
            temporary = stack.enter_context(_temporary_of_all(self.folder / str(step), tree, "saving"))
            with _context():
                response = ocp.save_async(temporary / _INNER, _saved(tree))
            unfinished = stack.pop_all()

        def finish():
            try:
                with unfinished:
                    response.result()
                    _finish(temporary, "saving")
                if distributed.is_first():
                    self._prune()
            except BaseException as error:  # handed to the main thread by `wait`
                self._failure = error

        self._saving = threading.Thread(target=finish, name=f"checkpoint {step}")
        self._saving.start()

    def _prune(self) -> None:
        """Removes all but the newest, under another name, so that what a kill leaves of one is no checkpoint."""
        finished = sorted(filter(is_finished, _numbered(self.folder)), key=lambda path: int(path.name))
        for path in finished[: -self._keep]:
            pruned = hidden_name(path, _PRUNED)
            path.rename(pruned)
            shutil.rmtree(pruned)

    def wait(self) -> None:
        """Returns when the save that was started is finished; raises UserError for what stopped it."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            with self._refusing():
                raise failure

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            kept = self.latest
            keeps = "nothing was saved before" if kept is None else f"checkpoint {kept} is kept"
            message = f"{self.folder}: cannot save a checkpoint ({reason(error)}); {keeps}; mend it and run again"
            raise UserError(message) from error

    def load(self, like: Any) -> Any:
        """The newest finished checkpoint, see `load_tree`."""
        return load_tree(self.folder / str(self.latest), like)


def _free_name(path: Path) -> Path:
    return next(name for name in (numbered_name(path, n) for n in itertools.count(1)) if not os.path.lexists(name))


def _refuse_unfinished(path: Path) -> None:
    if not path.is_dir():
        raise UserError(f"{path}: no checkpoint here")
    if not is_finished(path):
        raise UserError(f"{path}: not a finished checkpoint of ours (no {SEAL}); name another folder")


def _say_fall_back(path: Path) -> None:
    """Says that a newer checkpoint than the one that is loaded cannot be."""
    if path.name.isdecimal():
        newer = [int(other.name) for other in _numbered(path.parent) if not is_finished(other)]
        if max(newer, default=0) > int(path.name):
            print(f"note: {path.parent / str(max(newer))} was cut short: {path.name} is used instead", file=sys.stderr)


def _check_names(path: Path, wanted: dict[str, Any], saved: Any, partial: bool) -> None:
    missing = [name for name in wanted if name not in saved]
    surplus = [] if partial else [name for name in saved if name not in wanted]
    if missing or surplus:
        what = f"it lacks {missing[0]}" if missing else f"it has {surplus[0]}, which this configuration has not"
        raise UserError(f"{path}: made with another configuration: {what}; use a fresh --workdir")
    for name, leaf in wanted.items():
        if tuple(saved[name].shape) != tuple(leaf.shape):
            raise UserError(
                f"{path}: made with another configuration: {name} has shape {list(saved[name].shape)}, not "
                f"{list(leaf.shape)}; use a fresh --workdir"
            )
