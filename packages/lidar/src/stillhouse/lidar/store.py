"""A finished student as an artefact: weights, network settings and preprocessing in one folder."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from stillhouse.core.artifact import Artifact
from stillhouse.core.errors import ConfigError, DataError

from .networks import NetworkConfig
from .pairs import PairConfig
from .process import LocalProcess, VPProcess
from .samplers import SamplerName

if TYPE_CHECKING:
    from torch import nn

    from .complete import Completer

KIND = "lidar.completer"
SETTINGS = "completer.json"
CompleterKind = Literal["diffusion", "single_pass"]
_FORMAT, _SCHEMA = "stillhouse-lidar-completer", 1
_ROLES = {"diffusion": ("noise", "encoder"), "single_pass": ("single",)}
_PROCESS = {"beta_start": 3.5e-5, "beta_end": 0.007, "steps": 1000}

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleterSettings:
    """How a student completes a sweep; saved beside its weights.

    Attributes:
        kind: "diffusion" (noise net with partial encoder) or "single_pass".
        pairs: what is done with a sweep before: points, factor, ranges. A mapping of such fields will do.
        sampler: "diffusion": how its steps are made.
        steps: "diffusion": how many.
        guidance: "diffusion": w of the guidance; 1 is none.
        process: "diffusion": `beta_start`, `beta_end` and `steps` T of the noise schedule.
        network: "diffusion": sizes of noise net and encoder; a mapping of such fields will do.
        single: "single_pass": sizes of the network.
        refine: sizes of the refinement net, None where there is none.

    Raises:
        ValueError: a value that is not allowed, or sizes of a network that the kind needs are missing.
        TypeError: a field that `PairConfig` or `NetworkConfig` does not have.

    Example:
        >>> small = NetworkConfig.reduced(stages=3)
        >>> settings = CompleterSettings(pairs={"points": 100, "max_range": 20.0}, steps=2, network=small)
        >>> CompleterSettings.from_dict(settings.to_dict()) == settings
        True
    """

    kind: CompleterKind = "diffusion"
    pairs: PairConfig | Mapping[str, Any] = field(default_factory=PairConfig)
    sampler: SamplerName = "local"
    steps: int = 1
    guidance: float = 1.0
    process: Mapping[str, float] = field(default_factory=lambda: dict(_PROCESS))
    network: NetworkConfig | Mapping[str, Any] | None = None
    single: NetworkConfig | Mapping[str, Any] | None = None
    refine: NetworkConfig | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _choice("kind", self.kind, CompleterKind)
        _choice("sampler", self.sampler, SamplerName)
        object.__setattr__(self, "pairs", _typed(PairConfig, self.pairs))
        for name in ("network", "single", "refine"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _typed(NetworkConfig, value))
        needed = "network" if self.kind == "diffusion" else "single"
        if getattr(self, needed) is None:
            raise ValueError(f"{needed} is None; a completer of kind {self.kind!r} needs its sizes")
        process = dict(self.process)
        if set(process) != set(_PROCESS):
            raise ValueError(f"process has {sorted(process)}; it needs {sorted(_PROCESS)}")
        start, end, steps = process["beta_start"], process["beta_end"], process["steps"]
        if not (0 < start <= end < 1 and isinstance(steps, int) and steps >= 2):
            raise ValueError(f"process is {process}; need 0 < beta_start ≤ beta_end < 1 and whole steps ≥ 2")
        object.__setattr__(self, "process", process)
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or not 1 <= self.steps < steps:
            raise ValueError(f"steps is {self.steps!r}; it must be an integer in 1 … {steps - 1}")
        if not (isinstance(self.guidance, int | float) and 0 <= self.guidance < math.inf):
            raise ValueError(f"guidance is {self.guidance!r}; it must be a finite number ≥ 0")

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the networks that it needs: "noise" and "encoder", or "single"; and "refine" if any."""
        return _ROLES[self.kind] + (("refine",) if self.refine is not None else ())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        table: dict[str, Any] = json.loads(json.dumps(asdict(self)))  # tuples become lists
        return table

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CompleterSettings:
        """The settings that `to_dict` wrote.

        Raises:
            ValueError, TypeError: a field is unknown, missing or wrong.
        """
        known = {spec.name for spec in fields(cls)}
        strange = sorted(set(values) - known)
        if strange:
            raise ValueError(f"unknown entry {strange[0]!r}")
        missing = sorted(known - set(values))
        if missing:
            raise ValueError(f"missing entry {missing[0]!r}")
        return cls(**values)

    def make_process(self) -> LocalProcess:
        """The noise process; variance preserving for the sampler "lidpm"."""
        kind = VPProcess if self.sampler == "lidpm" else LocalProcess
        values = self.process
        return kind(values["beta_start"], values["beta_end"], int(values["steps"]))

    def build(self) -> dict[str, nn.Module]:
        """Networks of these sizes with fresh weights, by role."""
        from .networks import NoiseNet, PartialEncoder, RefineNet, SinglePassNet

        makers: dict[str, tuple[Callable[[Any], nn.Module], Any]] = {
            "noise": (NoiseNet, self.network),
            "encoder": (PartialEncoder, self.network),
            "single": (SinglePassNet, self.single),
            "refine": (RefineNet, self.refine),
        }
        return {role: makers[role][0](makers[role][1]) for role in self.roles}


def save_completer(
    folder: str | os.PathLike[str],
    networks: Mapping[str, nn.Module],
    settings: CompleterSettings,
    *,
    config: Mapping[str, Any],
    metrics: Mapping[str, Any],
    card: str,
    provenance: Mapping[str, Any] | None = None,
    files: Mapping[str, bytes | Path] | None = None,
) -> Artifact:
    """Write a student's artefact, atomically.

    Args:
        folder: where to; an artefact that lies there is replaced.
        networks: role → network: "noise" and "encoder", or "single"; and "refine" where there is one.
        settings: how it completes.
        config: the resolved configuration of the run.
        metrics: what was measured.
        card: Markdown for README.md.
        provenance: data, teacher, licences.
        files: further files, name → bytes or path.

    Returns:
        The artefact, of the kind "lidar.completer", with `completer.json` beside the weights.

    Raises:
        ValueError: networks that the settings do not name, or that are missing, or of other sizes.
    """
    _check_networks(networks, settings)
    table = {"format": _FORMAT, "schema": _SCHEMA, **settings.to_dict()}
    own: dict[str, bytes | Path] = {SETTINGS: (json.dumps(table, indent=1) + "\n").encode()}
    tensors = {
        f"{role}.{name}": tensor
        for role, network in networks.items()
        for name, tensor in network.state_dict().items()
    }
    return Artifact.save(
        folder,
        kind=KIND,
        tensors=tensors,
        config=config,
        metrics=metrics,
        card=card,
        provenance=provenance,
        files={**own, **dict(files or {})},
    )


def load_completer(source: str | os.PathLike[str] | Artifact, device: str = "cpu") -> Completer:
    """Read a student's artefact.

    Args:
        source: its folder, the folder of the run whose `student/` it is, or the artefact.
        device: where the networks go.

    Returns:
        A `Completer` in evaluation mode.

    Raises:
        DataError: there is no artefact, it is of another kind, or it is damaged.
    """
    from .complete import Completer

    artifact = (source if isinstance(source, Artifact) else Artifact.load(_find(Path(source)))).expect(KIND)
    path = artifact.file(SETTINGS)
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict) or table.pop("format", None) != _FORMAT:
            raise ValueError("it is not the settings of a completer")
        schema = table.pop("schema", None)
        if schema != _SCHEMA:
            raise ValueError(f"it has schema {schema!r} where {_SCHEMA} is known; upgrade stillhouse-lidar")
        settings = CompleterSettings.from_dict(table)
        networks = settings.build()
        _load_tensors(networks, artifact)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{path}: does not describe the weights beside it ({reason}); train again") from error
    return Completer(networks, settings, device=device, artifact=artifact)


FORMATS = ("artifact",)
"""What `export_completer` writes. `torch.export` refuses a completer: which voxels are occupied, and so every
shape, follows from the values of the points."""


def export_completer(completer: Completer, format: str, out: str | os.PathLike[str]) -> dict[str, Any]:
    """Copy a student's artefact, verified: safetensors and JSON, which `load_completer` reads anywhere.

    Args:
        completer: a loaded artefact.
        format: "artifact", see `FORMATS`.
        out: folder to make; must not exist or be empty.

    Returns:
        JSON-able: `format`, `folder`, `digest`, `files` (name → bytes) and a `note`.

    Raises:
        ConfigError: another format.
        DataError: the folder is not empty, or cannot be written.
        ValueError: the completer came from no artefact.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: allowed are {', '.join(FORMATS)}")
    if completer.artifact is None:
        raise ValueError("completer was not loaded from an artefact; save it with save_completer first")
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: exists and is not empty; give another folder")
    if target.resolve().is_relative_to(completer.artifact.folder.resolve()):
        raise DataError(f"{target}: lies inside the artefact; give another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise DataError(f"{target}: cannot be made ({error.strerror}); give another folder") from error
    try:
        copied = Artifact.load(shutil.copytree(completer.artifact.folder, work / "copy"))
        if target.exists():
            target.rmdir()
        os.replace(work / "copy", target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {
        "format": format,
        "folder": str(target),
        "digest": copied.digest,
        "files": copied.sizes,
        "note": "a verified copy of the artefact; load it with stillhouse.lidar.store.load_completer",
    }


def _load_tensors(networks: Mapping[str, nn.Module], artifact: Artifact) -> None:
    tensors = artifact.tensors()
    strange = sorted(name for name in tensors if name.partition(".")[0] not in networks)
    if strange:
        raise ValueError(f"the tensor {strange[0]!r} belongs to none of its networks")
    for role, network in networks.items():
        head = f"{role}."
        network.load_state_dict(
            {name.removeprefix(head): value for name, value in tensors.items() if name.startswith(head)}
        )


def _check_networks(networks: Mapping[str, nn.Module], settings: CompleterSettings) -> None:
    if set(networks) != set(settings.roles):
        raise ValueError(
            f"networks has {sorted(networks)}; a completer of kind {settings.kind!r} with these settings "
            f"needs {sorted(settings.roles)}"
        )
    wanted = {"noise": settings.network, "encoder": settings.network}
    wanted |= {"single": settings.single, "refine": settings.refine}
    for role, network in networks.items():
        if getattr(network, "config", None) != wanted[role]:
            raise ValueError(f"networks[{role!r}] was built from other sizes than the settings have")


def _find(folder: Path) -> Path:
    """The artefact itself, or the one inside a run's folder."""
    inside = folder / "student"
    own = (folder / "artifact.json").is_file()
    return inside if not own and (inside / "artifact.json").is_file() else folder


def _choice(name: str, value: object, allowed: object) -> None:
    options = get_args(allowed)
    if value not in options:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, options))}")


def _typed(kind: type[T], value: Any) -> T:
    """A configuration from itself or from a mapping of its fields; lists become tuples."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{value!r} is neither a {kind.__name__} nor a mapping of its fields")
    known = {spec.name for spec in fields(kind)}  # type: ignore[arg-type]
    strange = sorted(set(value) - known)
    if strange:
        raise TypeError(f"{kind.__name__} has no field {strange[0]!r}")
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in value.items()})
