"""Compiled programs, kept on disk from run to run: a command is then ready in seconds.

They are kept by JAX's own cache, under the hash of the program, the devices, the compiler and its options: another
version or another machine finds nothing that is not its own. What lies there is run, so the folder must be nobody
else's.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from adastate_jax.errors import UserError, one_line, reason

_ALL_PROGRAMS = {"persistent_cache_min_compile_time_secs": 0.0, "persistent_cache_min_entry_size_bytes": -1}


def programs_folder() -> Path:
    """Where programs are kept unless another folder is named: in the user's cache."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "adastate_jax" / "compiled"


@contextlib.contextmanager
def programs_kept(folder: Path | None) -> Iterator[None]:
    """Has JAX keep what it compiles, and take from there what was compiled before.

    Args:
        folder: made when needed. None is `programs_folder`, or what JAX itself was told (`JAX_COMPILATION_CACHE_DIR`);
            where that cannot be used, a line on stderr says so, and nothing is kept.

    Raises:
        UserError: the folder that is named cannot be written, or others can write there.
    """
    if folder is None and jax.config.jax_compilation_cache_dir:
        yield
        return
    try:
        path = _private(folder or programs_folder())
    except UserError as error:
        if folder is not None:
            raise
        print(one_line(f"note: programs are not kept: {error}"), file=sys.stderr)
        yield
        return
    settings = {"compilation_cache_dir": str(path), **_ALL_PROGRAMS}
    before = {name: getattr(jax.config, f"jax_{name}") for name in settings}
    _configure(settings)
    try:
        yield
    finally:
        _configure(before)


def _private(folder: Path) -> Path:
    """The folder, made; raises UserError if it is not this user's alone to write."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
    except OSError as error:
        raise UserError(f"--cache={folder}: cannot be written ({reason(error)}); name another") from None
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"--cache={folder}: others can write there, and what lies there is run; chmod 700 it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"--cache={folder}: cannot be written; name another")
    return folder


def _configure(settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(f"jax_{name}", value)
    compilation_cache.reset_cache()  # JAX asks once where its cache is
