"""A small Wan model in a folder, as `convert` leaves it, shared by the tests of generation."""

import pytest
import small_wan

import adastate_jax as ada


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return small_wan.write_model(tmp_path_factory.mktemp("model") / "weights")


@pytest.fixture(scope="session")
def model(folder):
    return ada.load(folder, small_wan.CONFIG)
