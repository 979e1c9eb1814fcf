"""Image files to arrays, by stated rules, and the per-channel standardisation.

An image is uint8 RGB [H, W, 3] or it is refused with one line that names the file and the remedy. The rules:

- Formats: PNG, JPEG, TIFF and BMP, recognised by content, never by the name.
- Grey, 1-bit and palette images become RGB. An alpha channel is dropped: colours stay as stored.
- EXIF orientation is applied; colour profiles are ignored.
- 16-bit, float, CMYK, Lab and HSV images, and files with several pages, are refused: a silent conversion
  would change colours, which is what the classes differ in.
- More than `max_pixels` declared pixels are refused before anything is decoded.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps
from torch import Tensor

from stillhouse.core.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
"""Endings of file names that count as images when a folder is read."""

MAX_PIXELS = 64_000_000
"""Most pixels that an image may declare."""

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_DIRECT = {"RGB", "L", "LA", "RGBA", "RGBX", "P", "PA", "1", "YCbCr", "RGBa", "La"}
_TIFF_BITS = 258

ArrayOrTensor = TypeVar("ArrayOrTensor", np.ndarray, Tensor)


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an image file.

    Args:
        path: a PNG, JPEG, TIFF or BMP file.
        max_pixels: most pixels (width × height) that the file may declare.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        DataError: the file is missing, empty, damaged, no image, too large, or of a kind refused by the
            rules in the module's text; the message names the file and what to do.
    """
    image = _decode(Path(path), max_pixels)
    return np.array(image.convert("RGB"), dtype=np.uint8)


def load_mask(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a mask file: where the stone is.

    Two grey values are black (0, background) and anything else (stone). Files with grey edges, as JPEG and
    smoothed masks have, are cut at half of the range, provided that at most 5 % of the pixels lie between
    the ends.

    Returns:
        bool [H, W], True on the stone.

    Raises:
        DataError: see `load_image`; also a mask that is empty or not black and white.
    """
    path = Path(path)
    grey = np.array(_decode(path, max_pixels).convert("L"), dtype=np.uint8)
    values = np.unique(grey)
    if len(values) <= 2:
        mask = grey > 0
    else:
        between = float(np.mean((grey > 32) & (grey < 223)))
        if between > 0.05 or values[-1] < 223:
            raise DataError(
                f"{path}: is not a black-and-white mask ({len(values)} grey values); save it as 8-bit PNG "
                "with 0 for background and 255 for the stone"
            )
        mask = grey >= 128
    if not mask.any():
        raise DataError(f"{path}: the mask is black all over; draw the stone in white (255)")
    return mask


def standardise_channels(x: ArrayOrTensor, *, eps: float = 1e-6) -> ArrayOrTensor:
    """Shift and scale each channel of each image to mean 0 and standard deviation 1.

    I_c' = (I_c − m_c) / σ_c with the mean m_c and the (population) standard deviation σ_c of that image and
    channel. The stone literature calls it whitening; it is not ZCA, as it leaves the channels correlated. A
    channel that is constant becomes 0.

    Args:
        x: an array uint8 or float [..., H, W, 3] (channels last) or a tensor [..., 3, H, W] (channels first).
        eps: a standard deviation at or below it, in the units of `x`, counts as constant.

    Returns:
        float32 of the same shape.

    Source: the pre-processing of the endoscopic stone papers, "per patch and per channel".

    Example:
        >>> patch = torch.arange(12.0).reshape(3, 2, 2)
        >>> standardise_channels(patch)[0].flatten().tolist()[0]
        -1.3416407108306885
        >>> standardise_channels(torch.full((3, 2, 2), 7.0)).abs().max().item()
        0.0
    """
    if isinstance(x, Tensor):
        _need_spatial(x.ndim, x.shape[-3] if x.ndim >= 3 else 0, "[..., 3, H, W]", tuple(x.shape))
        y = x.to(torch.float32)
        y = y - y.mean(dim=(-2, -1), keepdim=True)
        sd = y.pow(2).mean(dim=(-2, -1), keepdim=True).sqrt()
        constant = sd <= eps
        return torch.where(constant, torch.zeros_like(y), y / torch.where(constant, torch.ones_like(sd), sd))
    _need_spatial(x.ndim, x.shape[-1] if x.ndim >= 3 else 0, "[..., H, W, 3]", x.shape)
    z = x.astype(np.float32)
    z -= z.mean(axis=(-3, -2), keepdims=True)
    spread = np.sqrt(np.mean(np.square(z), axis=(-3, -2), keepdims=True))
    flat = spread <= eps
    return np.where(flat, np.float32(0), z / np.where(flat, np.float32(1), spread))


def _need_spatial(ndim: int, channels: int, wanted: str, shape: tuple[int, ...]) -> None:
    if ndim < 3 or channels != 3:
        raise ValueError(f"standardise_channels: x has shape {tuple(shape)}; it must be {wanted}")


def _decode(path: Path, max_pixels: int) -> Image.Image:
    """Open, check and decode; every way in which that can fail ends as one DataError."""
    try:
        size = os.stat(path).st_size
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be opened ({_reason(error)}); check the path") from error
    if size == 0:
        raise DataError(f"{path}: is empty (0 bytes); copy it again or take it out of the set")
    try:
        # Pillow's own bomb check warns below its limit; ours comes first and is an error, so the warning is
        # noise.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=_FORMATS) as image:
                _check_header(path, image, max_pixels)
                image.load()
                upright = ImageOps.exif_transpose(image)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(_too_large(path, "far more pixels", max_pixels)) from error
    except Image.UnidentifiedImageError as error:
        raise DataError(
            f"{path}: is no PNG, JPEG, TIFF or BMP image, or its header is damaged; convert it to 8-bit "
            "RGB PNG or take it out of the set"
        ) from error
    except Exception as error:
        # The decoders of Pillow raise OSError, SyntaxError, ValueError, struct.error, IndexError and more on
        # damaged files; whichever it is, the user can do the same thing about it.
        raise DataError(
            f"{path}: is damaged or cut short ({_reason(error)}); copy it again or take it out of the set"
        ) from error
    return upright


def _check_header(path: Path, image: ImageFile.ImageFile, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(_too_large(path, f"{width} × {height} pixels", max_pixels))
    if image.mode not in _DIRECT or _bits(path, image) > 8:
        kind = (
            "a CMYK image"
            if image.mode == "CMYK"
            else "a 16-bit image"
            if image.mode.startswith("I") or _bits(path, image) == 16
            else f"an image of mode {image.mode!r} with {_bits(path, image)} bits"
        )
        raise DataError(f"{path}: is {kind}; convert it to 8-bit RGB, for example as PNG")
    if image.format in ("TIFF", "PNG") and getattr(image, "n_frames", 1) > 1:
        raise DataError(
            f"{path}: holds {getattr(image, 'n_frames', 1)} pages or frames; save the one that is meant as "
            f"8-bit RGB PNG"
        )


def _bits(path: Path, image: ImageFile.ImageFile) -> int:
    """Bits per channel as the file says: Pillow cuts 16-bit RGB to 8 bits without a word."""
    if image.format == "PNG":
        with open(path, "rb") as file:
            header = file.read(25)
        return header[24] if len(header) == 25 else 8
    if image.format == "TIFF":
        tags = getattr(image, "tag_v2", {})
        value = tags.get(_TIFF_BITS, (8,))
        return max(value) if isinstance(value, tuple) else int(value)
    return 8


def _too_large(path: Path, what: str, max_pixels: int) -> str:
    return (
        f"{path}: declares {what}, the limit is {max_pixels:,}; crop or shrink it, or take it out of the set"
    )


def _reason(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:120]
