"""Checkpoints: any pytree, saved by Orbax under the path names of its leaves.

Saving is asynchronous and atomic. A finished checkpoint is sealed: a file beside the data lists size and CRC-32 of
every file. What is not sealed was cut short and is never loaded; what no longer matches its seal is refused by name.
"""

import json
import logging
import shutil
import threading
import zlib
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint.experimental import v1 as ocp

from adastate_jax.errors import UserError
from adastate_jax.sharding import path_name

# Orbax reports each save and restore at INFO, thousands of lines in a long run.
logging.getLogger("absl").setLevel(logging.ERROR)

_SEAL = "seal.json"


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path name, `a/b/c`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def save_tree(path: str | Path, tree: Any) -> None:
    """Saves a tree once, under a folder of its own; replaces what was there."""
    path = Path(path).absolute()
    ocp.save(path, flatten(tree), overwrite=True)
    _seal(path)


def load_tree(path: str | Path, like: Any, prefix: str = "") -> Any:
    """Loads a tree that `save_tree` or `Checkpoints` wrote, or the part of it below `prefix`.

    Args:
        path: the checkpoint's folder.
        like: arrays or `jax.ShapeDtypeStruct`s; leaves that carry a sharding are loaded into it.
        prefix: path of the part within the saved tree, `a/b`.

    Raises:
        UserError: there is no finished checkpoint, it is damaged, or it does not hold this tree.
    """
    path = Path(path).absolute()
    _verify_seal(path)
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None)), like)
    wanted = {f"{prefix}/{name}" if prefix else name: leaf for name, leaf in flatten(like).items()}
    saved = ocp.metadata(path).metadata
    _check_names(path, wanted, saved, partial=bool(prefix))
    context = ocp.Context()
    context.pytree.loading.partial_load = bool(prefix)
    with context:
        loaded = ocp.load(path, wanted)
    found = {name.removeprefix(f"{prefix}/") if prefix else name: leaf for name, leaf in loaded.items()}
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)], like)


def is_finished(path: str | Path) -> bool:
    """Whether a finished checkpoint lies at this folder."""
    return (Path(path) / _SEAL).is_file()


def latest_step(folder: str | Path) -> int | None:
    """Step of the newest finished checkpoint of a stage's folder, or None."""
    return max((int(path.name) for path in _numbered(Path(folder)) if is_finished(path)), default=None)


def _numbered(folder: Path) -> list[Path]:
    """The folders of a stage's checkpoints, finished or not."""
    return [path for path in folder.glob("[0-9]*") if path.name.isdigit()]


class Checkpoints:
    """The numbered checkpoints of one training stage, in `folder/STEP`; the newest `keep` finished ones are kept.

    An older one goes only when a newer one is sealed; what a kill left unsealed goes at the start.
    A context manager: leaving it waits for a save that is under way.
    """

    def __init__(self, folder: str | Path, keep: int):
        self.folder = Path(folder).absolute()
        self._keep = keep
        for path in _numbered(self.folder):
            if not is_finished(path):
                shutil.rmtree(path)
        self._checkpointer = ocp.training.Checkpointer(
            self.folder,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # the caller decides
            preservation_policy=ocp.training.preservation_policies.PreserveAll(),  # it does not know of our seals
            cleanup_tmp_directories=True,
        )
        self._saving: threading.Thread | None = None
        self._failure: BaseException | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_) -> None:
        try:
            self.wait()
        finally:
            self._checkpointer.close()

    @property
    def latest(self) -> int | None:
        """Step of the newest finished checkpoint."""
        return latest_step(self.folder)

    def save(self, step: int, tree: Any) -> None:
        """Starts saving a tree; returns once it is copied off the device, so that the tree may be donated."""
        self.wait()
        response = self._checkpointer.save_async(step, flatten(tree), force=True, overwrite=True)

        def finish():
            try:
                response.result()
                _seal(self.folder / str(step))
                finished = sorted(filter(is_finished, _numbered(self.folder)), key=lambda path: int(path.name))
                for path in finished[: -self._keep]:
                    (path / _SEAL).unlink()  # first, so that what a kill leaves of it is no checkpoint
                    shutil.rmtree(path)
            except BaseException as error:  # handed to the main thread by `wait`
                self._failure = error

        self._saving = threading.Thread(target=finish, name=f"checkpoint {step}")
        self._saving.start()

    def wait(self) -> None:
        """Returns when the save that was started is finished; raises what stopped it."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise UserError(f"{self.folder}: cannot save a checkpoint: {failure}; free disk space?") from failure

    def load(self, like: Any) -> Any:
        """The newest finished checkpoint, see `load_tree`."""
        return load_tree(self.folder / str(self.latest), like)


def _fingerprint(file: Path) -> list[int]:
    """Size and CRC-32, read in pieces."""
    size = checksum = 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return [size, checksum]


def _seal(path: Path) -> None:
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.name != _SEAL)
    content = {str(file.relative_to(path)): _fingerprint(file) for file in files}
    partial = path / f".{_SEAL}.partial"
    partial.write_text(json.dumps(content))
    partial.replace(path / _SEAL)


def _verify_seal(path: Path) -> None:
    if not path.is_dir():
        raise UserError(f"{path}: no checkpoint here")
    try:
        content = json.loads((path / _SEAL).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: not a finished checkpoint of ours (no {_SEAL}); name another folder") from None
    except ValueError:
        raise UserError(f"{path / _SEAL}: damaged; remove {path}, to use an older one or make it again") from None
    for name, fingerprint in content.items():
        file = path / name
        if not file.is_file() or _fingerprint(file) != fingerprint:
            state = "damaged" if file.is_file() else "missing"
            raise UserError(f"{file}: {state}; remove {path}, to use an older one or make it again")


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
