"""Pictures in: upright, on white where they are transparent, of any depth; refused by name where they are not whole."""

import struct
import zlib

import imageio.v3 as iio
import numpy as np
import pytest
from PIL import Image, ImageOps

from adastate_jax.errors import UserError
from adastate_jax.media import read_image


def corners(height=40, width=60):
    """Four corners of four colours."""
    pixels = np.full((height, width, 3), 200, np.uint8)
    pixels[: height // 2, : width // 2] = (220, 20, 20)
    pixels[: height // 2, width // 2 :] = (20, 220, 20)
    pixels[height // 2 :, : width // 2] = (20, 20, 220)
    return pixels


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_picture_is_turned_as_it_says(tmp_path, orientation, ending):
    """As Pillow turns it; 0 and 9 are no orientations, and turn nothing."""
    path = tmp_path / f"a.{ending}"
    picture = Image.fromarray(corners())
    exif = picture.getexif()
    exif[0x0112] = orientation
    picture.save(path, exif=exif, quality=95)
    turned = np.asarray(ImageOps.exif_transpose(Image.open(path).convert("RGB")))
    found = read_image(path, *turned.shape[:2])[0]
    np.testing.assert_array_equal(found, turned)
    assert found.shape[:2] == ((60, 40) if orientation in (5, 6, 7, 8) else (40, 60))


def clear_half(mode):
    """A picture whose right half is transparent, over hidden magenta; and what its left half shows."""
    if mode == "RGBA":
        pixels = np.zeros((32, 32, 4), np.uint8)
        pixels[:, :16], pixels[:, 16:] = (30, 30, 220, 255), (255, 0, 255, 0)
        return Image.fromarray(pixels), {}, (30, 30, 220)
    if mode == "LA":
        pixels = np.zeros((32, 32, 2), np.uint8)
        pixels[:, :16], pixels[:, 16:] = (90, 255), (40, 0)
        return Image.fromarray(pixels), {}, (90, 90, 90)
    if mode == "P":
        picture = Image.fromarray(np.repeat([[0] * 16 + [1] * 16], 32, axis=0).astype(np.uint8), mode="P")
        picture.putpalette([30, 30, 220, 255, 0, 255])
        return picture, {"transparency": 1}, (30, 30, 220)
    pixels = np.full((32, 32, 3), (30, 30, 220), np.uint8)
    pixels[:, 16:] = (255, 0, 255)
    return Image.fromarray(pixels), {"transparency": (255, 0, 255)}, (30, 30, 220)


@pytest.mark.parametrize(
    ("mode", "ending"),
    [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("RGB", "png"), ("RGBA", "webp"), ("RGBA", "tiff")],
)
def test_transparency_is_put_on_white(tmp_path, mode, ending):
    picture, options, shown = clear_half(mode)
    path = tmp_path / f"a.{ending}"
    picture.save(path, lossless=True, **options)
    found = read_image(path, 32, 32)[0]
    np.testing.assert_array_equal(found[:, 16:], 255)
    np.testing.assert_array_equal(found[:, :16], np.broadcast_to(shown, (32, 16, 3)))


def test_half_transparency_is_a_mixture(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[...] = (200, 100, 0, 51)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 8, 8)[0, 0, 0].tolist() == [244, 224, 204]


@pytest.mark.parametrize(
    ("name", "pixels"),
    [
        ("bits.png", np.array([[0, 255]] * 2, np.uint8) > 0),
        ("grey.png", np.array([[0, 255]] * 2, np.uint8)),
        ("deep.png", np.array([[0, 65535]] * 2, np.uint16)),
        ("deep.tiff", np.array([[0, 65535]] * 2, np.uint16)),
        ("float.tiff", np.array([[0, 1]] * 2, np.float32)),
    ],
)
def test_grey_of_any_depth_is_brought_to_eight_bits(tmp_path, name, pixels):
    Image.fromarray(pixels).save(tmp_path / name)
    np.testing.assert_array_equal(read_image(tmp_path / name, 2, 2)[0], [[[0] * 3, [255] * 3]] * 2)


def test_deep_grey_keeps_its_steps(tmp_path):
    iio.imwrite(tmp_path / "a.png", np.arange(256, dtype=np.uint16)[None] * 257)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 1, 256)[0, 0, :, 0], np.arange(256))


@pytest.mark.parametrize("value", [np.nan, np.inf, -0.5, 1.5])
def test_values_that_are_no_brightness_are_refused(tmp_path, value):
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(UserError, match=r"a\.tiff: not a readable picture \(.*(finite|beyond)"):
        read_image(tmp_path / "a.tiff", 4, 4)


def test_a_print_of_four_inks_has_its_colours(tmp_path):
    Image.fromarray(corners()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg", 40, 60)[0], expected)


@pytest.mark.parametrize("ending", ["jpg", "png", "gif", "webp", "bmp", "tiff"])
def test_a_picture_that_was_cut_off_is_refused_by_name(tmp_path, ending):
    path = tmp_path / f"cut.{ending}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)).save(path)
    whole = path.read_bytes()
    assert read_image(path, 16, 16).shape == (1, 16, 16, 3)
    for part in (0.0, 0.02, 0.3, 0.9):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(UserError, match=rf"cut\.{ending}: not a readable picture \(.+\); name a PNG"):
            read_image(path, 16, 16)


def png_header(width, height):
    """A PNG that states a size and holds next to nothing."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60000, 60000), (12000, 12000), (1 << 31, 1 << 31), (1, 1 << 30)])
def test_a_small_file_that_states_a_huge_picture_is_refused(tmp_path, size, recwarn):
    (tmp_path / "huge.png").write_bytes(png_header(*size))
    with pytest.raises(UserError, match=r"huge\.png: not a readable picture \(.*(pixels|broken|truncated)"):
        read_image(tmp_path / "huge.png", 8, 8)
    assert not recwarn.list


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    (tmp_path / "a.txt").write_text("a fox")
    (tmp_path / "folder.png").mkdir()
    for name, message in (
        ("a.eps", "PostScript"),
        ("a.txt", "of no known format"),
        ("folder.png", "no such file"),
        ("none.png", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / name, 8, 8)


def test_a_name_typed_in_another_unicode_form_is_found(tmp_path):
    Image.fromarray(corners()).save(tmp_path / "Ange\u0301lique.png")
    assert read_image(tmp_path / "Ang\u00e9lique.png", 8, 8).shape == (1, 8, 8, 3)
    (tmp_path / "a.zip").mkdir()  # imageio would look into an archive
    Image.fromarray(corners()).save(tmp_path / "a.zip" / "b.png")
    assert read_image(tmp_path / "a.zip" / "b.png", 8, 8).shape == (1, 8, 8, 3)


def test_extreme_shapes_are_fitted(tmp_path):
    for height, width in ((1, 5000), (5000, 1), (1, 1)):
        iio.imwrite(tmp_path / "a.png", np.full((height, width, 3), 77, np.uint8))
        assert (read_image(tmp_path / "a.png", 24, 32) == 77).all()
