"""Panels, contact sheets and curves."""

import numpy as np

from adastate_jax.media import contact_sheet, loss_curves, side_by_side, write_image


def ramp(frames=5, size=16):
    return np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None] * 40, (frames, size, size, 3))


def test_panels_and_sheets(tmp_path):
    joined = side_by_side({"adaptive": ramp(), "static": ramp()}, 3)
    assert joined.shape[0] == 5
    assert joined.shape[2] == 2 * 48
    assert joined.shape[1] % 2 == 0
    sheet = contact_sheet([("one", ramp(9)), ("two", ramp(9))], 2, columns=3)
    assert sheet.shape[1] == 3 * (32 + 2)
    write_image(tmp_path / "sheet.png", sheet)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


def test_loss_curves(tmp_path):
    loss_curves([{"stage": "a", "step": step, "loss": 2.0 - step} for step in (0, 1)], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
