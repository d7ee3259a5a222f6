"""Where devices of several slices stand in a mesh."""

import dataclasses

import numpy as np
import pytest

from adastate_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Device:
    """What arranging devices looks at, of one that is not here."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "of no grid"


@pytest.fixture
def two_slices() -> list[Device]:
    """Four devices each, listed by turns: the order of a list must not matter."""
    return [Device(number, number % 2) for number in range(8)]


@pytest.mark.parametrize(
    "sizes", [{"data": 2, "fsdp": 4}, {"data": 4, "model": 2}, {"data": 2, "context": 2, "fsdp": 2}]
)
def test_data_alone_crosses_from_slice_to_slice(two_slices, sizes, caplog):
    mesh = make_mesh(**sizes, devices=two_slices)
    assert {name: mesh.shape[name] for name in sizes} == sizes
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)  # [data, fsdp, context, model]
    first, second = np.split(slices, 2)  # along data
    assert not first.any()
    assert second.all()
    assert len({device.id for device in mesh.devices.flat}) == 8
    assert not caplog.records


def test_fsdp_crosses_where_data_cannot_and_it_is_said(two_slices, caplog):
    mesh = make_mesh(fsdp=4, model=2, devices=two_slices)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    assert all(len(set(slices[:, i].flat)) == 1 for i in range(4))  # `context` and `model` stay inside
    assert "mesh.data 1 is no multiple of the 2 slices: fsdp crosses the slow network, too" in caplog.text


def test_what_must_stay_inside_a_slice_is_refused_across(two_slices):
    with pytest.raises(ValueError, match="2 slices need data, or data times fsdp, that is a multiple of 2: data is 1"):
        make_mesh(model=8, devices=two_slices)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What arranging devices looks at, of a chip of a TPU's torus."""

    id: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    slice_index: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v6 lite"


@pytest.mark.parametrize(
    "sizes", [{"fsdp": 4, "model": 4}, {"fsdp": 8, "model": 2}, {"data": 4, "fsdp": 2, "model": 2}]
)
def test_axes_may_take_parts_of_a_torus_sides(sizes):
    """Of four by four chips: what a plan says fits can be laid out, with neighbours along `model`."""
    chips = [Chip(number, (number % 4, number // 4, 0)) for number in range(16)]
    mesh = make_mesh(**sizes, devices=chips)
    assert {name: mesh.shape[name] for name in sizes} == sizes
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(16))
    for row in mesh.devices.reshape(-1, sizes["model"]):
        spans = [max(chip.coords[side] for chip in row) - min(chip.coords[side] for chip in row) for side in range(2)]
        assert sum(spans) == sizes["model"] - 1
