"""Checkpoints that are whole or not there: safetensors for tensors, JSON for the rest, a digest per file.

A checkpoint is the folder `step-00000050`:

    weights.student.safetensors, optimizer.student.safetensors, …   the tensors of each part
    state.json                                                      everything else, and where each tensor
    belongs manifest.json                                                   step, and size and SHA-256 of the
    files above

It is written under another name, flushed to the disk and renamed, so that a kill at any moment leaves the
folders before it untouched. Nothing is pickled, so that reading one cannot run code.
"""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from .._folders import flush, replace, sha256
from ..errors import DataError

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{8,})")
_FORMAT = {"format": "stillhouse-checkpoint", "version": 1}


@dataclass(slots=True)
class Checkpoint:
    """A checkpoint read back.

    Attributes:
        path: its folder.
        step: finished optimizer steps.
        parts: what was saved, by name; tensors are on the CPU.
    """

    path: Path
    step: int
    parts: dict[str, Any]


def save_checkpoint(folder: Path, step: int, parts: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint and remove old ones.

    Args:
        folder: folder of the checkpoints of one run; made when missing.
        step: finished optimizer steps (≥ 0); a checkpoint of the same step is replaced.
        parts: name → nested dicts, lists and tuples of tensors, numbers, strings, booleans and None. Names
            may use letters, digits, ".", "_" and "-".
        keep: how many good checkpoints stay (≥ 1); older ones are removed after the new one is on the disk.

    Returns:
        The folder of the new checkpoint.

    Raises:
        TypeError: a part holds something else; the message names its place.
        ValueError: a wrong name, a negative step or `keep` < 1.

    Example:
        >>> import tempfile, torch
        >>> parts = {"weights": {"w": torch.ones(2)}, "run": {"a": (1, None)}}
        >>> path = save_checkpoint(Path(tempfile.mkdtemp()), 50, parts)
        >>> path.name
        'step-00000050'
        >>> load_checkpoint(path).parts["weights"]["w"], load_checkpoint(path).parts["run"]
        (tensor([1., 1.]), {'a': (1, None)})
    """
    if step < 0:
        raise ValueError(f"step is {step}; it must be ≥ 0")
    if keep < 1:
        raise ValueError(f"keep is {keep}; at least one checkpoint must stay")
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    target = folder / f"step-{step:08d}"
    work = folder / f".partial-{secrets.token_hex(6)}"
    work.mkdir()
    try:
        state: dict[str, Any] = {}
        for name, part in parts.items():
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"part {name!r} must be named with letters, digits, '.', '_' and '-' only")
            tensors: dict[str, Tensor] = {}
            state[name] = _encode(part, name, tensors, {})
            if tensors:
                save_file(tensors, work / f"{name}.safetensors")
        (work / "state.json").write_text(json.dumps(state, allow_nan=False), encoding="utf-8")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(work.iterdir())
        }
        manifest = json.dumps({**_FORMAT, "step": step, "files": files}, indent=1)
        # no final newline: whatever is cut off, the rest does not parse
        (work / "manifest.json").write_text(manifest, encoding="utf-8")
        flush(work)
        replace(work, target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    _prune(folder, keep)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint after checking every byte of it.

    Raises:
        DataError: it is missing, cut, changed or of another format; the message names the file and what to
            do.
    """
    manifest = _verify(path)
    state = json.loads((path / "state.json").read_bytes())
    parts = {}
    for name, skeleton in state.items():
        file = path / f"{name}.safetensors"
        parts[name] = _decode(skeleton, load_file(file) if file.name in manifest["files"] else {})
    return Checkpoint(path, manifest["step"], parts)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest good checkpoint of a run; None when there is none.

    A broken one is skipped with a one-line warning through the logger of this module.
    """
    for path in reversed(_steps(folder)):
        try:
            _verify(path)
        except DataError as error:
            _LOG.warning("skipping a broken checkpoint: %s", error)
            continue
        return path
    return None


def _verify(path: Path) -> dict[str, Any]:
    """Check names, sizes and digests of a checkpoint's files and return its manifest."""
    remedy = "resume from another checkpoint, or remove this folder"
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
    except FileNotFoundError:
        raise DataError(f"{path}: no checkpoint here (manifest.json is missing); {remedy}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path / 'manifest.json'}: cannot be read ({error}); {remedy}") from None
    try:
        if {key: manifest[key] for key in _FORMAT} != _FORMAT:
            raise DataError(f"{path / 'manifest.json'}: not a checkpoint of this version; {remedy}")
        files = {name: (int(f["bytes"]), str(f["sha256"])) for name, f in manifest["files"].items()}
        int(manifest["step"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path / 'manifest.json'}: incomplete ({error!r}); {remedy}") from None
    for name, (size, digest) in {"state.json": (-1, ""), **files}.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise DataError(f"{file}: missing from the checkpoint; {remedy}")
        if file.stat().st_size != size:
            raise DataError(f"{file}: {file.stat().st_size} bytes of {size}, it was cut or changed; {remedy}")
        if sha256(file) != digest:
            raise DataError(f"{file}: its SHA-256 is not the recorded one, the file was changed; {remedy}")
    return manifest


def _steps(folder: Path) -> list[Path]:
    """Checkpoint folders by name, oldest first, good or not."""
    if not folder.is_dir():
        return []
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=lambda p: int(p.name[5:]))


def _whole(path: Path) -> bool:
    """Whether the files of a checkpoint have their recorded sizes: cheap, for deciding what to keep."""
    try:
        files = json.loads((path / "manifest.json").read_bytes())["files"]
        return all((path / name).stat().st_size == file["bytes"] for name, file in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _prune(folder: Path, keep: int) -> None:
    """Remove what is older than the `keep` newest good checkpoints."""
    good = 0
    for path in reversed(_steps(folder)):
        if good >= keep:
            gone = folder / f".removed-{secrets.token_hex(6)}"
            path.rename(gone)  # a kill in mid-removal leaves no half checkpoint under its name
            shutil.rmtree(gone, ignore_errors=True)
        else:
            good += _whole(path)


def _sweep(folder: Path) -> None:
    """Remove what a killed save left; one process writes a run's checkpoints, so nothing here is in use."""
    for left in (*folder.glob(".partial-*"), *folder.glob(".removed-*"), *folder.glob(".step-*.old-*")):
        shutil.rmtree(left, ignore_errors=True)


def _encode(value: Any, where: str, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]) -> Any:
    """Turn a nest into JSON types; its tensors go to `tensors` under their place, tied ones once."""
    if isinstance(value, Tensor):
        return {"$tensor": _collect(value.detach(), where, tensors, seen)}
    if value is None or type(value) in (bool, int, str):
        return value
    if isinstance(value, np.generic):
        return _encode(value.item(), where, tensors, seen)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, tuple | list):
        items = [_encode(item, f"{where}.{i}", tensors, seen) for i, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return {key: _encode(item, f"{where}.{key}", tensors, seen) for key, item in value.items()}
        return {
            "$items": [
                [_encode(key, where, tensors, seen), _encode(item, f"{where}.{key}", tensors, seen)]
                for key, item in value.items()
            ]
        }
    raise TypeError(
        f"{where} is a {type(value).__name__}; a checkpoint holds dicts, lists and tuples of "
        "tensors, numbers, strings, booleans and None"
    )


def _collect(tensor: Tensor, where: str, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]) -> str:
    start = tensor.untyped_storage().data_ptr()
    same = (start, tensor.device, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
    if tensor.numel() and same in seen:
        return seen[same]
    while where in tensors:  # {"a.b": …, "a": {"b": …}}
        where += "'"
    seen[same] = where
    # a copy: safetensors refuses views of one storage
    tensors[where] = tensor.to("cpu", copy=True).contiguous()
    return where


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"$tensor": name}:
            return tensors[name]
        case {"$float": text}:
            return float(text)
        case {"$tuple": items}:
            return tuple(_decode(item, tensors) for item in items)
        case {"$items": pairs}:
            return {_decode(key, tensors): _decode(item, tensors) for key, item in pairs}
    return {key: _decode(item, tensors) for key, item in value.items()}
