"""The artefact: the folder that a finished student is.

```
student/
  artifact.json        format, schema, kind, sizes, aliases of tied tensors
  model.safetensors    every tensor
  config.json          the resolved configuration
  metrics.json         what was measured
  provenance.json      library versions, platform, git commit, command line, data and teacher, licences
  README.md            the card, for people
  SHA256SUMS           checksums of everything above and of any further file, as `sha256sum -c` reads them
```

Saving is atomic: the folder is written beside its final place, flushed to disk and renamed, so a reader sees
the old artefact or the new one and never half of one. Loading verifies every checksum. Nothing is ever
unpickled, so opening an artefact cannot execute code. The checksums find damage; they are not a signature,
and whoever can rewrite the folder can rewrite them.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from safetensors.torch import save_file
from torch import Tensor

from ._folders import flush, replace, sha256, sweep, walk
from ._json import dumps, jsonable
from .errors import DataError
from .provenance import Licence as Licence
from .provenance import card_sections, collect_provenance

FORMAT = "stillhouse-artifact"
SCHEMA = 1
MANIFEST, TENSORS, CONFIG, METRICS = "artifact.json", "model.safetensors", "config.json", "metrics.json"
PROVENANCE, CARD, SUMS = "provenance.json", "README.md", "SHA256SUMS"
_OWN = (MANIFEST, TENSORS, CONFIG, METRICS, PROVENANCE, CARD, SUMS)
_DEVICES = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")
_PART = re.compile(r"[\w][\w .,+@=()\[\]{}~#%&'!-]*")
_LINE = re.compile(r"([0-9a-f]{64})  ([^\n]+)\n")
_REMEDY = "copy the artefact again from its source, or save it again"
_TEXT_LIMIT = 64 << 20  # bytes; a JSON file or card above this is not one that `save` wrote


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished student on disk, opened and verified.

    Build one with `Artifact.save` or `Artifact.load`. Tensors stay on disk until `tensors` or `tensor` asks
    for them.

    Attributes:
        folder: Where it lies.
        kind: What it is, for example "kidney.student"; the loader of a domain checks it.
        config: The resolved configuration.
        metrics: What was measured; a number that was not finite when it was saved is None.
        provenance: Where it comes from: versions, platform, git commit, command, data, teacher, licences.
        card: The text of README.md.
        created: Time of saving, UTC, ISO 8601.
        sizes: File name → bytes, for every file in the folder but the checksums.
        digest: SHA-256 of the checksum file: one name for the whole content.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp()) / "student"
        >>> saved = Artifact.save(folder, kind="example", tensors={"weight": torch.eye(2)},
        ...                       config={}, metrics={"accuracy": 0.5}, card="# A student")
        >>> student = Artifact.load(folder)
        >>> student.tensors()["weight"].tolist(), student.metrics["accuracy"]
        ([[1.0, 0.0], [0.0, 1.0]], 0.5)
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    provenance: dict[str, Any]
    card: str
    created: str
    sizes: dict[str, int]
    digest: str
    _aliases: dict[str, str] = field(repr=False, default_factory=dict)

    # --------------------------------------------------------------------------------------------------- save

    @classmethod
    def save(
        cls,
        folder: str | os.PathLike[str],
        *,
        kind: str,
        tensors: Mapping[str, Tensor],
        config: Mapping[str, Any],
        metrics: Mapping[str, Any],
        card: str,
        provenance: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes | Path] | None = None,
    ) -> Artifact:
        """Write an artefact, atomically, and return it opened.

        An artefact that already lies at `folder` is replaced, and stays whole until the new one is. A folder
        that is not an artefact, or that holds files of other origin, is never touched. Under several
        processes call it on one rank.

        Args:
            folder: The folder to become the artefact.
            kind: What it is, a non-empty line such as "kidney.student".
            tensors: Name → tensor of any shape and device; tied tensors (the same memory) are stored once.
            config: The resolved configuration; finite numbers only.
            metrics: What was measured; NaN and infinities are stored as null.
            card: Markdown for README.md; sections on licences, contents and provenance are appended.
            provenance: What only the caller knows: for example "data" (name, fingerprint), "teacher", and
                "licences", a list of `Licence` for weights and data whose terms the student inherits.
            files: Further files, name → bytes or path to copy; names use "/" and stay inside the folder.

        Returns:
            The artefact, read back from disk and verified.

        Raises:
            ValueError: For a name that is not allowed, a tensor that cannot be stored, a non-finite number
                in `config`.
            TypeError: For content that JSON cannot hold.
            DataError: When `folder` holds something that is not an artefact, or a source file cannot be read.
        """
        target = Path(folder).resolve()
        if not kind or kind != kind.strip() or "\n" in kind:
            raise ValueError(f"kind is {kind!r}; it must be one non-empty line, for example 'kidney.student'")
        extra = dict(files or {})
        _check_names(extra)
        stored, aliases = _storable(tensors)
        facts = collect_provenance(jsonable(provenance or {}, where="provenance"))
        texts = {
            CONFIG: dumps(jsonable(config, where="config")),
            METRICS: dumps(jsonable(metrics, where="metrics", nonfinite="null")),
            PROVENANCE: dumps(facts),
        }
        _check_replaceable(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target)
        work = target.parent / f".{target.name}.partial-{secrets.token_hex(6)}"
        work.mkdir()
        try:
            save_file(stored, work / TENSORS, metadata={"format": "pt"})
            for name, text in texts.items():
                (work / name).write_bytes(text.encode())
            for name, source in extra.items():
                _copy(source, work / name, name)
            sizes = {p.relative_to(work).as_posix(): p.stat().st_size for p in walk(work)}
            text = card.rstrip() + "\n\n" + card_sections(facts, sizes, kind=kind)
            (work / CARD).write_bytes(text.encode())
            sizes[CARD] = len(text.encode())
            manifest = {
                "format": FORMAT,
                "schema": SCHEMA,
                "kind": kind,
                "created": facts["created"],
                "aliases": aliases,
                "files": dict(sorted(sizes.items())),
            }
            (work / MANIFEST).write_bytes(dumps(manifest).encode())
            sums = {name: sha256(work / name) for name in [*sizes, MANIFEST]}
            (work / SUMS).write_bytes(_sums_text(sums).encode())
            flush(work)
            replace(work, target)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        return cls.load(target)

    # --------------------------------------------------------------------------------------------------- load

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, verify: bool = True) -> Artifact:
        """Open an artefact and verify it; tensors stay on disk.

        Args:
            folder: The folder that `save` wrote.
            verify: Check the SHA-256 of every file. False checks names and sizes alone, for large models
                that this machine has verified before.

        Returns:
            The artefact.

        Raises:
            DataError: When a file is missing, added, damaged or not what it claims; the message names it and
                the remedy.
        """
        root = Path(folder).absolute()
        if not root.is_dir():
            left = (
                [p.name for p in root.parent.glob(f".{glob.escape(root.name)}.old-*")]
                if root.parent.is_dir()
                else []
            )
            hint = (
                f"saving was interrupted and the previous artefact is at {root.parent / left[0]}: rename it"
                if left
                else "give the folder that holds artifact.json"
            )
            raise DataError(f"{root}: there is no artefact folder here; {hint}")
        try:
            return cls._load(root, verify)
        except OSError as error:
            raise DataError(
                f"{root}: cannot be read ({error}); check the disk and the permissions"
            ) from error

    @classmethod
    def _load(cls, root: Path, verify: bool) -> Artifact:
        present = {p.relative_to(root).as_posix() for p in walk(root)}
        for name in (SUMS, MANIFEST):
            if name not in present:
                raise DataError(f"{root / name}: missing, so this is not a whole artefact; {_REMEDY}")
        for name in sorted(present):
            if not stat.S_ISREG((root / name).stat().st_mode):
                raise DataError(f"{root / name}: not a regular file; {_REMEDY}")
        raw = _read(root / SUMS)
        sums = _parse_sums(raw, root / SUMS)
        _compare_names(root, set(sums) | {SUMS}, present)
        manifest_raw = _read(root / MANIFEST)
        if hashlib.sha256(manifest_raw).hexdigest() != sums[MANIFEST]:
            raise DataError(f"{root / MANIFEST}: the content does not match its checksum; {_REMEDY}")
        manifest = _parse_manifest(manifest_raw, root / MANIFEST)
        sizes: dict[str, int] = manifest["files"]
        if set(sizes) | {MANIFEST} != set(sums):
            raise DataError(f"{root / MANIFEST}: lists other files than {SUMS} does; {_REMEDY}")
        for name, size in sizes.items():
            actual = (root / name).stat().st_size
            if actual != size:
                raise DataError(f"{root / name}: {actual} bytes where {size} were written; {_REMEDY}")
            if verify and sha256(root / name) != sums[name]:
                raise DataError(f"{root / name}: the content does not match its checksum; {_REMEDY}")
        artifact = cls(
            folder=root,
            kind=manifest["kind"],
            config=_json_object(root / CONFIG),
            metrics=_json_object(root / METRICS),
            provenance=_json_object(root / PROVENANCE),
            card=_decode(_read(root / CARD), root / CARD),
            created=manifest["created"],
            sizes={**sizes, MANIFEST: len(manifest_raw)},
            digest=hashlib.sha256(raw).hexdigest(),
            _aliases=manifest["aliases"],
        )
        names = set(artifact._stored_names())
        for alias, of in artifact._aliases.items():
            if of not in names or alias in names:
                raise DataError(
                    f"{root / MANIFEST}: the alias {alias!r} of {of!r} does not fit {TENSORS}; {_REMEDY}"
                )
        return artifact

    # ------------------------------------------------------------------------------------------------ content

    def expect(self, kind: str) -> Artifact:
        """Return itself when its kind is `kind`; raise DataError saying what it is otherwise."""
        if self.kind != kind:
            raise DataError(
                f"{self.folder}: is a {self.kind!r} where a {kind!r} is needed; give the right artefact"
            )
        return self

    def tensor_names(self) -> tuple[str, ...]:
        """Return the names of all tensors, sorted, without reading any."""
        return tuple(sorted([*self._stored_names(), *self._aliases]))

    def tensor_info(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return name → (safetensors dtype such as "F32", shape) of all tensors, without reading any."""
        with self._open("cpu") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118, not a mapping
            info = {name: (str(s.get_dtype()), tuple(s.get_shape())) for name, s in slices.items()}
        info.update({alias: info[of] for alias, of in self._aliases.items()})
        return dict(sorted(info.items()))

    def tensors(
        self, names: Iterable[str] | None = None, *, device: str | torch.device = "cpu"
    ) -> dict[str, Tensor]:
        """Read tensors, all or the named ones.

        Args:
            names: Which tensors; None reads all.
            device: Where they go.

        Returns:
            Name → tensor; tied tensors come back as one object under both names.

        Raises:
            KeyError: For a name that the artefact does not have.
            DataError: When the file can no longer be read.
        """
        known = self.tensor_names()
        wanted = known if names is None else tuple(names)
        for name in wanted:
            if name not in known:
                raise KeyError(f"{self.folder} has no tensor {name!r}; tensor_names() lists what it has")
        read: dict[str, Tensor] = {}
        with self._open(str(device)) as handle:
            for name in wanted:
                stored = self._aliases.get(name, name)
                if stored not in read:
                    read[stored] = handle.get_tensor(stored)
        return {name: read[self._aliases.get(name, name)] for name in wanted}

    def tensor(self, name: str, *, device: str | torch.device = "cpu") -> Tensor:
        """Read one tensor; see `tensors`."""
        return self.tensors([name], device=device)[name]

    def file(self, name: str) -> Path:
        """Return the path of a file of the artefact, verified when the artefact was loaded.

        Args:
            name: The name under which `save` stored it, for example "student.onnx".

        Raises:
            DataError: When the artefact has no such file; the message lists those it has.
        """
        if name not in self.sizes:
            have = ", ".join(n for n in sorted(self.sizes) if n not in _OWN) or "none beside its own"
            raise DataError(f"{self.folder}: has no file {name!r}; files: {have}")
        return self.folder / name

    @property
    def bytes(self) -> int:
        """Size of the whole artefact on disk, in bytes, without the checksum file."""
        return sum(self.sizes.values())

    @property
    def tensor_bytes(self) -> int:
        """Size of the tensor file on disk, in bytes."""
        return self.sizes[TENSORS]

    def _stored_names(self) -> list[str]:
        with self._open("cpu") as handle:
            return list(handle.keys())

    @contextlib.contextmanager
    def _open(self, device: str) -> Iterator[Any]:
        path = self.folder / TENSORS
        try:
            with safe_open(path, framework="pt", device=device) as handle:
                yield handle
        except (SafetensorError, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as safetensors ({error}); {_REMEDY}") from error


# ----------------------------------------------------------------------------------------------------- checks


def _name_problem(name: str) -> str | None:
    """Say why a file name is not allowed, or None: relative, inside the folder, the same on every system."""
    if not isinstance(name, str) or not name or len(name.encode("utf-8", "surrogatepass")) > 400:
        return "it must be a string of 1 to 400 bytes"
    if unicodedata.normalize("NFC", name) != name:
        return "it must be in Unicode normal form NFC"
    for part in name.split("/"):
        if not _PART.fullmatch(part) or part.endswith((".", " ")) or _DEVICES.fullmatch(part):
            return "a part starts with a letter or digit and holds no backslash, colon or control character"
    return None


def _check_names(files: Mapping[str, object]) -> None:
    seen = {name.lower(): name for name in _OWN}
    for name in files:
        problem = _name_problem(name)
        if problem:
            raise ValueError(f"files has the name {name!r}, which is not allowed: {problem}")
        other = seen.get(name.lower())
        if other is not None:
            raise ValueError(
                f"files has the name {name!r}, which collides with {other!r}; choose another name"
            )
        seen[name.lower()] = name


def _storable(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return contiguous CPU tensors that share no memory, and alias → name for those that were the same."""
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name or name == "__metadata__":
            raise ValueError(f"tensors has the name {name!r}; names must be non-empty strings")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{name!r}] is a {type(tensor).__name__}; give a torch.Tensor")
        if hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"tensors[{name!r}] is sharded over processes; call full_tensor() on every rank first"
            )
        if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
            raise ValueError(
                f"tensors[{name!r}] is sparse, quantised or on 'meta'; give a dense tensor with values"
            )
    _check_dtypes(tensors)
    owners = Counter(tensor.untyped_storage().data_ptr() for tensor in tensors.values())
    stored: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in seen and tensor.is_conj() is tensors[seen[key]].is_conj():
            aliases[name] = seen[key]
            continue
        seen[key] = name
        plain = tensor.detach().resolve_conj().resolve_neg().to("cpu").contiguous()
        whole = plain.untyped_storage().nbytes() == plain.numel() * plain.element_size()
        alone = owners[tensor.untyped_storage().data_ptr()] == 1
        stored[name] = plain if whole and alone else plain.clone()
    return stored, aliases


def _check_dtypes(tensors: Mapping[str, Tensor]) -> None:
    first = {tensor.dtype: name for name, tensor in reversed(list(tensors.items()))}
    for dtype, name in first.items():
        try:
            serialise({"x": torch.empty(0, dtype=dtype)})
        except (SafetensorError, KeyError, ValueError) as error:
            raise ValueError(
                f"tensors[{name!r}] has dtype {dtype}, which safetensors cannot store; convert it"
            ) from error


def _check_replaceable(target: Path) -> None:
    """Refuse to replace what `save` did not write: nobody loses a folder because they mistyped one."""
    if not target.exists():
        return
    if not target.is_dir():
        raise DataError(f"{target}: is a file; nothing was written; give another folder")
    present = {p.relative_to(target).as_posix() for p in walk(target)}
    if not present:
        return
    try:
        _parse_manifest(_read(target / MANIFEST), target / MANIFEST)
        known = set(_parse_sums(_read(target / SUMS), target / SUMS)) | {SUMS}
    except (DataError, OSError) as error:
        raise DataError(
            f"{target}: exists and is not a whole artefact; nothing was written; "
            "delete it or give another folder"
        ) from error
    foreign = sorted(present - known)
    if foreign:
        raise DataError(
            f"{target / foreign[0]}: is not part of the artefact there, which would be replaced; "
            "nothing was written; move the file or give another folder"
        )


# ---------------------------------------------------------------------------------------------------- reading


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(f"{path}: missing or not a regular file; {_REMEDY}")
    if path.stat().st_size > _TEXT_LIMIT:
        raise DataError(
            f"{path}: larger than {_TEXT_LIMIT >> 20} MiB, which no file of its kind is; {_REMEDY}"
        )
    return path.read_bytes()


def _decode(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text; {_REMEDY}") from error


def _json_object(path: Path, raw: bytes | None = None) -> dict[str, Any]:
    text = _decode(_read(path) if raw is None else raw, path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: is not valid JSON ({error}); {_REMEDY}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: holds a {type(value).__name__} where a JSON object belongs; {_REMEDY}")
    return value


def _parse_manifest(raw: bytes, path: Path) -> dict[str, Any]:
    manifest = _json_object(path, raw)
    if manifest.get("format") != FORMAT:
        raise DataError(
            f"{path}: is not the manifest of a Stillhouse artefact; give the folder that `save` wrote"
        )
    schema = manifest.get("schema")
    if schema != SCHEMA or isinstance(schema, bool):
        raise DataError(
            f"{path}: has schema {schema!r}, this version reads {SCHEMA}; upgrade stillhouse-core"
        )
    files, aliases = manifest.get("files"), manifest.get("aliases")
    good = (
        isinstance(manifest.get("kind"), str)
        and isinstance(manifest.get("created"), str)
        and isinstance(files, dict)
        and all(type(size) is int and size >= 0 for size in files.values())
        and set(_OWN) - {MANIFEST, SUMS} <= set(files)
        and isinstance(aliases, dict)
        and all(isinstance(of, str) for of in aliases.values())
    )
    if not good:
        raise DataError(f"{path}: lacks a field or has one of the wrong type; {_REMEDY}")
    return manifest


def _parse_sums(raw: bytes, path: Path) -> dict[str, str]:
    text = _decode(raw, path)
    sums = {match[2]: match[1] for match in _LINE.finditer(text)}
    for name in sums:
        problem = _name_problem(name)
        if problem:
            raise DataError(f"{path}: names the file {name!r}, which is not allowed: {problem}")
    if _sums_text(sums) != text or not set(_OWN) - {SUMS} <= set(sums) or SUMS in sums:
        raise DataError(f"{path}: is not the checksum file that was written; {_REMEDY}")
    return sums


def _sums_text(sums: Mapping[str, str]) -> str:
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))


def _compare_names(root: Path, wanted: set[str], present: set[str]) -> None:
    missing, extra = sorted(wanted - present), sorted(present - wanted)
    if missing:
        raise DataError(f"{root / missing[0]}: missing; {_REMEDY}")
    if extra:
        raise DataError(f"{root / extra[0]}: does not belong to the artefact; move it out of the folder")


# ---------------------------------------------------------------------------------------------------- writing


def _copy(source: bytes | Path, to: Path, name: str) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(source, bytes):
        to.write_bytes(source)
        return
    if not Path(source).is_file():
        raise DataError(f"{source}: cannot be stored as {name!r}: it is missing or not a regular file")
    try:
        shutil.copyfile(source, to)
    except OSError as error:
        raise DataError(f"{source}: cannot be stored as {name!r} ({error})") from error
