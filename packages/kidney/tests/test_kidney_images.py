"""Image files become uint8 RGB by stated rules, or one DataError."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from stillhouse.core.errors import DataError
from stillhouse.kidney.data import load_image, load_mask, standardise_channels

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 17, 3), dtype=np.uint8)


def png_bytes(width: int, height: int, *, depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    """A PNG with any header, made by hand."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content) & 0xFFFFFFFF)
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


def one_line(error: pytest.ExceptionInfo[DataError], path: Path) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert path.name in text
    return text


def attempt(path: Path) -> tuple[np.ndarray | None, str]:
    """The image, or the text of the DataError; any other error passes on and fails the test."""
    try:
        return load_image(path), ""
    except DataError as error:
        return None, str(error)


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp"])
def test_lossless_formats_return_the_pixels(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(PIXELS).save(path)
    image = load_image(path)
    assert image.dtype == np.uint8
    assert np.array_equal(image, PIXELS)


def test_format_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    Image.fromarray(PIXELS).save(path, format="PNG")
    assert np.array_equal(load_image(path), PIXELS)


def test_grey_bilevel_and_palette_become_rgb(tmp_path: Path) -> None:
    grey = PIXELS[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(load_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))
    Image.fromarray(grey > 100).save(tmp_path / "bit.png")
    assert np.array_equal(load_image(tmp_path / "bit.png")[..., 1], np.where(grey > 100, 255, 0))
    blocks = np.kron(np.array([[[255, 0, 0], [0, 0, 255]]], np.uint8), np.ones((4, 4, 1), np.uint8))
    Image.fromarray(blocks).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "palette.png")
    assert np.array_equal(load_image(tmp_path / "palette.png"), blocks)


def test_alpha_is_dropped_and_colours_stay(tmp_path: Path) -> None:
    alpha = RNG.integers(0, 256, (12, 17, 1), dtype=np.uint8)
    Image.fromarray(np.concatenate([PIXELS, alpha], 2)).save(tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png"), PIXELS)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_image(tmp_path / "a.png"), np.rot90(PIXELS, -1))


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "F", "LAB"])
def test_modes_that_would_change_colours_are_refused(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "a.tif"
    Image.new(mode, (9, 9)).save(path)
    with pytest.raises(DataError, match="convert it to 8-bit RGB") as error:
        load_image(path)
    one_line(error, path)


def test_sixteen_bit_png_is_refused_in_grey_and_in_colour(tmp_path: Path) -> None:
    for colour, channels in ((0, 1), (2, 3)):
        path = tmp_path / f"{colour}.png"
        row = b"\0" + bytes(2 * channels * 4)
        path.write_bytes(png_bytes(4, 4, depth=16, colour=colour, data=row * 4))
        with pytest.raises(DataError, match="16-bit") as error:
            load_image(path)
        one_line(error, path)


def test_several_pages_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    image = Image.fromarray(PIXELS)
    image.save(path, save_all=True, append_images=[image, image])
    with pytest.raises(DataError, match="3 pages"):
        load_image(path)


@pytest.mark.parametrize(
    ("width", "height"), [(2**31 - 1, 2**31 - 1), (100_000, 100_000), (8001, 8001), (1, 2**30)]
)
def test_huge_declared_sizes_are_refused_before_decoding(tmp_path: Path, width: int, height: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_bytes(width, height))
    with pytest.raises(DataError) as error:
        load_image(path)
    one_line(error, path)


def test_a_size_just_above_the_limit_names_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(PIXELS).save(path)
    with pytest.raises(DataError, match="limit is 203"):
        load_image(path, max_pixels=203)
    assert load_image(path, max_pixels=204).shape == PIXELS.shape


def test_missing_empty_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "zip.png").write_bytes(b"PK\x03\x04" + bytes(100))
    for name, words in (
        ("missing.png", "cannot be opened"),
        ("empty.png", "0 bytes"),
        ("text.png", "is no PNG"),
        ("zip.png", "is no PNG"),
    ):
        with pytest.raises(DataError, match=words) as error:
            load_image(tmp_path / name)
        one_line(error, tmp_path / name)
    with pytest.raises(DataError):
        load_image(tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_cut_short_anywhere_is_a_data_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    picture = Image.fromarray(RNG.integers(0, 256, (40, 40, 3), dtype=np.uint8))
    picture.save(path, format=kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    whole = path.read_bytes()
    refused = 0
    for cut in [*range(64), *np.linspace(64, len(whole) - 1, 60, dtype=int).tolist()]:
        path.write_bytes(whole[:cut])
        image, problem = attempt(path)
        if image is None:
            assert "\n" not in problem
            refused += 1
        else:
            # Only the last few bytes (an end marker, padding) may be missing without loss.
            assert image.shape == (40, 40, 3)
            assert cut > 0.98 * len(whole)
    assert refused > 100


@given(
    data=st.binary(max_size=400),
    head=st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"MM\0*", b"BM"]),
)
def test_random_bytes_are_a_data_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, head: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.png"
    path.write_bytes(head + data)
    with pytest.raises(DataError):
        load_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP"])
def test_flipped_bytes_give_an_image_or_a_data_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    Image.fromarray(PIXELS).save(path, format=kind)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for _ in range(300):
        damaged = bytearray(whole)
        for place in rng.integers(0, min(len(whole), 200), rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        path.write_bytes(bytes(damaged))
        image, problem = attempt(path)
        if image is None:
            assert "\n" not in problem
        else:
            assert image.dtype == np.uint8
            assert image.ndim == 3


def test_mask_rules(tmp_path: Path) -> None:
    wanted = np.zeros((20, 30), bool)
    wanted[4:15, 5:20] = True
    for high in (1, 7, 255):
        Image.fromarray(wanted.astype(np.uint8) * high).save(tmp_path / "m.png")
        assert np.array_equal(load_mask(tmp_path / "m.png"), wanted)
    Image.fromarray(wanted.astype(np.uint8) * 255).save(tmp_path / "m.jpg", quality=95)
    assert np.array_equal(load_mask(tmp_path / "m.jpg"), wanted)
    Image.fromarray(RNG.integers(0, 256, (20, 30), dtype=np.uint8)).save(tmp_path / "noise.png")
    with pytest.raises(DataError, match="not a black-and-white mask"):
        load_mask(tmp_path / "noise.png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "black.png")
    with pytest.raises(DataError, match="black all over"):
        load_mask(tmp_path / "black.png")


def test_standardise_matches_the_definition_and_both_layouts_agree() -> None:
    image = RNG.integers(0, 256, (5, 9, 8, 3), dtype=np.uint8)
    out = standardise_channels(image)
    wanted = (image - image.mean((1, 2), keepdims=True)) / image.std((1, 2), keepdims=True)
    np.testing.assert_allclose(out, wanted, atol=2e-6)
    tensor = standardise_channels(torch.from_numpy(image).permute(0, 3, 1, 2))
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), out, atol=2e-6)


def test_standardise_keeps_channels_correlated() -> None:
    """It is not ZCA: two equal channels stay equal."""
    image = np.repeat(RNG.integers(0, 256, (8, 8, 1), dtype=np.uint8), 3, 2)
    out = standardise_channels(image)
    np.testing.assert_allclose(out[..., 0], out[..., 2])
    np.testing.assert_allclose(np.corrcoef(out.reshape(-1, 3).T), 1, atol=1e-6)


def test_a_constant_channel_becomes_zero_and_the_others_do_not() -> None:
    image = RNG.random((8, 8, 3)).astype(np.float32)
    image[..., 1] = 0.3
    out = standardise_channels(image)
    assert np.all(out[..., 1] == 0)
    assert np.isfinite(out).all()
    assert out[..., 0].std() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 4), (3, 8, 8)])
def test_standardise_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="it must be"):
        standardise_channels(np.zeros(shape))
