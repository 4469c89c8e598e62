"""Every kind of image becomes the same kind of tensor, and everything else a BadExample."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from data_files import encoded, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor

from harmony.data.decode import LARGEST_LIMIT, MAX_PIXELS, Opened, decode
from harmony.data.sources import BadExample


def rgb(pixels: Tensor) -> np.ndarray:
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3
    return pixels.permute(1, 2, 0).numpy()


def noise(shape: tuple[int, ...], seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)


def raw_png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG from its unfiltered scan lines, for the kinds that Pillow does not write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 100))
def test_lossless_colour_images_come_out_as_they_went_in(width: int, height: int, seed: int) -> None:
    values = noise((height, width, 3), seed)
    np.testing.assert_array_equal(rgb(decode(encoded(Image.fromarray(values)))), values)


def test_an_image_that_is_already_open_is_taken_as_well() -> None:
    values = noise((5, 7, 3))
    np.testing.assert_array_equal(rgb(decode(Image.fromarray(values))), values)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "TIFF"])
def test_greyscale_gives_three_equal_channels(kind: str) -> None:
    values = noise((6, 9))
    pixels = rgb(decode(encoded(Image.fromarray(values), kind)))
    for channel in range(3):
        np.testing.assert_array_equal(pixels[..., channel], values)


def test_one_bit_images_are_black_and_white() -> None:
    values = noise((6, 9)) > 127
    pixels = rgb(decode(encoded(Image.fromarray(values))))
    np.testing.assert_array_equal(pixels, np.where(values, 255, 0)[..., None].repeat(3, 2))


@pytest.mark.parametrize("channels", [2, 4])
def test_transparency_is_laid_on_white(channels: int) -> None:
    values = noise((8, 9, channels))
    colour, alpha = values[..., :-1].astype(float), values[..., -1:] / 255
    expected = np.broadcast_to(colour * alpha + 255 * (1 - alpha), (8, 9, 3))
    pixels = rgb(decode(encoded(Image.fromarray(values, "LA" if channels == 2 else "RGBA"))))
    assert np.abs(pixels - expected).max() <= 1  # Pillow blends in whole numbers


def test_a_palette_with_a_transparent_colour_shows_white_there() -> None:
    image = Image.fromarray(noise((6, 6)) % 4, "P")
    image.putpalette([0, 0, 0, 250, 0, 0, 0, 250, 0, 0, 0, 250])
    expected = np.array([[255, 255, 255], [250, 0, 0], [0, 250, 0], [0, 0, 250]])[np.asarray(image)]
    np.testing.assert_array_equal(rgb(decode(encoded(image, transparency=0))), expected)
    expected[np.asarray(image) == 0] = 0
    np.testing.assert_array_equal(rgb(decode(encoded(image))), expected)


def test_a_palette_with_a_transparency_for_each_colour_is_blended() -> None:
    image = Image.fromarray(np.arange(4, dtype=np.uint8)[None], "P")
    image.putpalette([0, 0, 0] * 4)
    pixels = rgb(decode(encoded(image, transparency=bytes([0, 85, 170, 255]))))
    np.testing.assert_array_equal(pixels[0, :, 0], [255, 170, 85, 0])


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_colour_that_stands_for_transparent_shows_white(mode: str) -> None:
    values = np.full((4, 4, 3), 10, dtype=np.uint8)
    values[1, 2] = 200
    image = Image.fromarray(values).convert(mode)
    pixels = rgb(decode(encoded(image, transparency=(200, 200, 200) if mode == "RGB" else 200)))
    assert (pixels[1, 2] == 255).all()
    assert (pixels[0, 0] == 10).all()


def test_sixteen_bit_greyscale_keeps_its_whole_range() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for kind in ("PNG", "TIFF"):
        pixels = rgb(decode(encoded(Image.fromarray(values), kind)))
        np.testing.assert_array_equal(pixels[..., 0], np.rint(values / 257))
        np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])


def test_sixteen_bit_colour_keeps_its_whole_range() -> None:
    values = noise((5, 6, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    pixels = rgb(decode(raw_png(6, 5, 16, 2, rows)))
    assert np.abs(pixels - values / 257).max() <= 1


def test_cmyk_gives_the_colours_of_the_inks() -> None:
    inks = {(0, 0, 0, 0): (255, 255, 255), (0, 255, 255, 0): (255, 0, 0), (255, 255, 0, 0): (0, 0, 255)}
    for ink, colour in inks.items():
        for kind in ("JPEG", "TIFF"):
            pixels = rgb(decode(encoded(Image.new("CMYK", (16, 16), ink), kind)))
            assert np.abs(pixels.astype(int) - colour).max() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_rotation_is_undone(kind: str, orientation: int) -> None:
    image = picture(3, (24, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert expected.size == ((24, 16) if orientation < 5 else (16, 24))
    np.testing.assert_array_equal(rgb(decode(data)), np.asarray(expected))


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_header_tells_the_size_that_the_pixels_have(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = Opened(encoded(picture(3, (24, 16)), kind, exif=exif))
    assert opened.size == ((24, 16) if orientation == 6 else (16, 24))
    assert opened.pixels().shape[1:] == opened.size


@pytest.mark.parametrize("mode", ["RGBA", "P", "I;16"])
def test_exif_rotation_and_an_odd_mode_go_together(mode: str) -> None:
    values = noise((16, 24)) // 32 * 32
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    if mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(values).convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    pixels = rgb(decode(encoded(image, exif=exif)))
    np.testing.assert_array_equal(pixels, np.rot90(values, -1)[..., None].repeat(3, 2))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_broken_exif_does_not_lose_the_image() -> None:
    image = picture(1)
    data = encoded(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xee" * 30)
    assert decode(data).shape == (3, 32, 40)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (12, 10), colour) for colour in ("red", "blue", "lime")]
    data = encoded(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )
    np.testing.assert_array_equal(rgb(decode(data)), np.broadcast_to([255, 0, 0], (10, 12, 3)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_half_an_image_is_truncated(kind: str) -> None:
    data = encoded(Image.fromarray(noise((64, 64, 3))), kind)
    with pytest.raises(BadExample) as error:
        decode(data[: len(data) // 2], key="half")
    assert error.value.key == "half"
    assert error.value.reason.startswith(("is truncated", "is damaged") if kind in ("WEBP", "GIF") else "is truncated")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html><body>404</body></html>", "web page"),
        (b"\n <html>no hotlinking</html>", "web page"),
        (b'{"error": "gone"}', "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    ],
)
def test_what_is_no_image_says_what_it_is(data: bytes, reason: str) -> None:
    with pytest.raises(BadExample, match=reason) as error:
        decode(data, key="some key")
    assert str(error.value).startswith("some key: is ")


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(BadExample, match="floating-point"):
        decode(encoded(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"))


def test_large_images_are_refused_by_their_header() -> None:
    data = raw_png(60_000, 60_000, 8, 2, b"")  # 10 GB of pixels, none of them there
    with pytest.raises(BadExample, match=r"larger than|more than the limit"):
        decode(data)
    with pytest.raises(BadExample, match="10000 x 10000 px, more than the limit of 67108864"):
        decode(Image.new("1", (10_000, 10_000)))
    assert MAX_PIXELS < LARGEST_LIMIT


def test_the_limit_is_on_width_times_height() -> None:
    data = encoded(picture(0, (20, 10)))
    assert decode(data, max_pixels=200).shape == (3, 10, 20)
    with pytest.raises(BadExample, match="20 x 10"):
        decode(data, max_pixels=199)


@given(st.binary(max_size=200))
def test_noise_is_never_anything_but_a_bad_example(data: bytes) -> None:
    with pytest.raises(BadExample):
        decode(data)


GOOD = {kind: encoded(picture(7), kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")}


@pytest.mark.filterwarnings("ignore::UserWarning")
@given(st.sampled_from(sorted(GOOD)), st.data())
def test_damage_gives_a_bad_example_or_an_image_and_nothing_else(kind: str, data: st.DataObject) -> None:
    damaged = bytearray(GOOD[kind])
    for place in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=6)):
        damaged[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    try:
        pixels = decode(bytes(damaged[:cut]), max_pixels=10**6)
    except BadExample:
        return
    assert pixels.dtype == torch.uint8
    assert pixels.shape[0] == 3
