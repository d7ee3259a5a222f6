"""Programs kept on disk: found again by who compiles them anew, and only in a folder that is nobody else's."""

import os

import jax
import jax.numpy as jnp
import pytest

from adastate_jax.errors import UserError
from adastate_jax.generation.programs import programs_folder, programs_kept

_HIT = "/jax/compilation_cache/cache_hits"


def double() -> list[str]:
    """Compiles a program that JAX has not seen in this process; returns what its cache had to say."""
    heard: list[str] = []

    def listen(event: str, **_) -> None:
        heard.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        assert int(jax.jit(lambda x: 2 * x)(jnp.int32(4))) == 8
    finally:
        jax.monitoring.unregister_event_listener(listen)
    return heard


def test_a_program_is_compiled_once_and_the_settings_return(tmp_path):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    with programs_kept(tmp_path / "programs"):
        assert double().count(_HIT) == 0
        assert list((tmp_path / "programs").iterdir())
        assert double().count(_HIT) == 1
    assert before == (jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs)
    assert double().count(_HIT) == 0


def test_a_folder_that_others_can_write_is_refused_and_without_a_name_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = programs_folder()
    assert folder.is_relative_to(tmp_path)
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(UserError, match=f"--cache={folder}: others can write there"), programs_kept(folder):
        pass
    with programs_kept(None):
        double()
    assert not os.listdir(folder)
    assert capsys.readouterr().err.startswith("note: programs are not kept: ")


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), programs_kept(tmp_path / "file"):
        pass


def test_what_jax_was_told_stays(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "told"))
    try:
        with programs_kept(None):
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / "told")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    assert not programs_folder().exists()
