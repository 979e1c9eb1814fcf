"""Pictures as data URIs: small, of the right kind, from arrays or files."""

from __future__ import annotations

import base64
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError


def image_uri(source: Any, *, name: str, max_side: int) -> tuple[str, int, int]:
    """Encode a picture as a data URI.

    Args:
        source: A file, or an array `[H, W]`, `[H, W, 1]`, `[H, W, 3]` or `[H, W, 4]`: uint8, boolean, or
            floating in [0, 1].
        name: How error messages name it.
        max_side: Larger pictures are scaled down so that no side is longer, in pixels.

    Returns:
        The URI (JPEG for photographs, PNG for small or transparent pictures), width and height in pixels.

    Raises:
        ValueError: For an array of another shape, type or range.
        DataError: For a file that is not a readable picture.
    """
    from PIL import Image

    if isinstance(source, str | Path):
        picture = _open(Path(source), max_side)
    else:
        picture = Image.fromarray(_array(source, name))
    if picture.mode not in ("L", "RGB", "RGBA"):
        picture = picture.convert("RGBA" if "transparency" in picture.info else "RGB")
    if max(picture.size) > max_side:
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    lossy = picture.mode != "RGBA" and picture.width * picture.height > 64 * 64
    if lossy:
        picture.save(buffer, "JPEG", quality=85, optimize=True)
    else:
        picture.save(buffer, "PNG", optimize=True)
    kind = "jpeg" if lossy else "png"
    return (
        f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}",
        picture.width,
        picture.height,
    )


def _open(path: Path, max_side: int) -> Any:
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as picture:
                picture.draft("RGB", (2 * max_side, 2 * max_side))
                picture.load()
                return ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError, Warning) as error:
        raise DataError(f"{path}: cannot be read as a picture ({error}); replace or leave it out") from error


def _array(source: Any, name: str) -> np.ndarray:
    array = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))) or 0 in array.shape:
        raise ValueError(f"{name} has shape {array.shape}; give [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]")
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype.kind != "f":
        raise ValueError(f"{name} has dtype {array.dtype}; give uint8, booleans, or floats in [0, 1]")
    if not np.isfinite(array).all() or array.min() < -1e-3 or array.max() > 1 + 1e-3:
        raise ValueError(f"{name} has values outside [0, 1]; undo the standardisation, or scale and clip it")
    return (array.clip(0, 1) * 255 + 0.5).astype(np.uint8)
