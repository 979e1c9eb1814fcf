"""Complete a sweep: thin it, let the student fill the scene, keep what the sensor could have seen."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.core.errors import ConfigError, DataError

from .io import SUFFIXES, Scan
from .pairs import PairConfig, farthest_points, partial_points
from .process import tile
from .samplers import keep_scene, sample
from .store import CompleterSettings
from .store import load_completer as load_completer

if TYPE_CHECKING:
    from stillhouse.core.artifact import Artifact


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """A completed scene.

    Attributes:
        points: float32 [M, 3], metres, in the frame of the sensor.
        evaluations: passes through a network: those of the noise net (a guided step counts two) or the one
            of a single-pass network, and one more for the refinement. The partial encoder is not counted.
        seconds: what it took, from the sweep to the points.
    """

    points: np.ndarray
    evaluations: int
    seconds: float


class Completer:
    """A student that completes sweeps.

    Args:
        networks: role → network: "noise" and "encoder", or "single"; and "refine" where there is one. They
            are put on the device, and into evaluation mode.
        settings: how it completes.
        device: where it runs.
        artifact: the folder it came from, None where it came from none.

    Raises:
        ValueError: networks that the settings do not name, or that are missing.

    Example:
        >>> from stillhouse.lidar.networks import NetworkConfig
        >>> settings = CompleterSettings(
        ...     pairs={"points": 50, "max_range": 20.0}, network=NetworkConfig.reduced(stages=3)
        ... )
        >>> completer = Completer(settings.build(), settings)
        >>> points = np.random.default_rng(0).uniform(-15, 15, (300, 3)).astype(np.float32)
        >>> done = completer(Scan(points), steps=2)
        >>> done.evaluations, done.points.shape[1]
        (2, 3)
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        settings: CompleterSettings,
        *,
        device: str | torch.device = "cpu",
        artifact: Artifact | None = None,
    ) -> None:
        if set(networks) != set(settings.roles):
            raise ValueError(f"networks has {sorted(networks)}; needed are {sorted(settings.roles)}")
        self.settings = settings
        self.device = torch.device(device)
        self.networks = {role: network.to(self.device).eval() for role, network in networks.items()}
        self.artifact = artifact
        self._process = settings.make_process()

    @property
    def pairs(self) -> PairConfig:
        """What is done with a sweep before."""
        return cast(PairConfig, self.settings.pairs)

    @property
    def max_range(self) -> float:
        """Metres around the sensor that are completed."""
        return self.pairs.max_range

    @property
    def parameters(self) -> int:
        """Number of parameters of all its networks."""
        return sum(p.numel() for network in self.networks.values() for p in network.parameters())

    def check(self, *, steps: int | None = None, guidance: float | None = None) -> None:
        """Raise ConfigError unless it can complete with these steps and this guidance."""
        if self.settings.kind == "single_pass":
            if steps not in (None, 1) or guidance not in (None, 1, 1.0):
                raise ConfigError(
                    "the student completes in a single pass, without steps and guidance; leave them out"
                )
            return
        total = int(self.settings.process["steps"])
        if steps is not None and not 1 <= steps < total:
            raise ConfigError(f"steps is {steps}; the student's noise schedule allows 1 to {total - 1}")
        if guidance is not None and not 0 <= guidance < float("inf"):
            raise ConfigError(f"guidance is {guidance}; it must be a finite number, at least 0")

    def prepare(self, scan: Scan) -> np.ndarray:
        """The sweep as the networks see it, float32 [n, 3]: within range, thinned as in an evaluation.

        Raises:
            DataError: no point of the sweep is within range.
        """
        points = partial_points(scan, self.pairs)
        return points[farthest_points(points, self.pairs.points)].astype(np.float32)

    @torch.no_grad()
    def complete(
        self,
        partial: Tensor,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, int]:
        """Complete prepared sweeps.

        Args:
            partial: float32 [B, n, 3] on any device.
            steps: steps of the sampler; the student's own where None.
            guidance: w; the student's own where None.
            generator: of the noise; on the CPU, results do not depend on the device's own.

        Returns:
            Points [B, N, 3] on the completer's device, N = n · factor and as many times more as the
            refinement makes; and the evaluations.
        """
        self.check(steps=steps, guidance=guidance)
        partial = partial.to(self.device)
        total = partial.shape[1] * self.pairs.factor
        if self.settings.kind == "single_pass":
            points = self.networks["single"](partial, total=total, generator=generator)
            evaluations = 1
        else:
            done = sample(
                self.networks["noise"],
                self.networks["encoder"](partial),
                tile(partial, total),
                steps=self.settings.steps if steps is None else steps,
                sampler=self.settings.sampler,
                guidance=float(self.settings.guidance if guidance is None else guidance),
                process=self._process,
                generator=generator,
            )
            points, evaluations = done.points, done.evaluations
        if "refine" in self.networks:
            points = self.networks["refine"](points).flatten(1, 2)
            evaluations += 1
        return points, evaluations

    def __call__(
        self, scan: Scan, *, steps: int | None = None, guidance: float | None = None, seed: int = 0
    ) -> Completion:
        """Complete one sweep; the same sweep, options and seed give the same points.

        Args:
            scan: the sweep.
            steps: steps of the sampler; the student's own where None.
            guidance: w of the guidance, 1 for none; the student's own where None.
            seed: of the noise.

        Raises:
            DataError: no point of the sweep is within range, or nothing is left of the completed scene.
            ConfigError: steps or guidance that the student does not have.
        """
        begun = time.perf_counter()
        partial = torch.from_numpy(self.prepare(scan))
        self.check(steps=steps, guidance=guidance)
        generator = torch.Generator().manual_seed(seed)
        try:
            points, evaluations = self.complete(
                partial[None], steps=steps, guidance=guidance, generator=generator
            )
        except ValueError as error:  # points that no voxel holds
            raise DataError(
                f"{scan.name}: the student diverged ({error}); try other steps or guidance"
            ) from error
        cloud = points[0].cpu()
        if not torch.isfinite(cloud).all():
            raise DataError(f"{scan.name}: the student diverged and gave NaN; try other steps or guidance")
        cloud = cloud[keep_scene(cloud, partial, max_range=self.max_range)]
        if len(cloud) == 0:
            raise DataError(f"{scan.name}: nothing is left of the completed scene; the student does not fit")
        return Completion(cloud.numpy(), evaluations, time.perf_counter() - begun)


def find_scans(sources: Iterable[str | Path]) -> list[Path]:
    """The sweeps that files and folders name.

    Args:
        sources: files; folders of sweeps, whose files are taken sorted by name; sequence folders, whose
            `velodyne/` is taken.

    Returns:
        Paths in the order of the sources, each once.

    Raises:
        DataError: a source does not exist, has an unknown format or holds no sweep; no sources.
    """
    found: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            found += _inside(source)
        elif not source.exists():
            raise DataError(f"{source}: does not exist; give a sweep or a folder of sweeps")
        elif not source.name.lower().endswith(SUFFIXES):
            raise DataError(f"{source}: has an unknown format; known are {', '.join(SUFFIXES)}")
        else:
            found.append(source)
    if not found:
        raise DataError("no sweep is named; give files or folders")
    return list(dict.fromkeys(found))


def _inside(folder: Path) -> list[Path]:
    scans = folder / "velodyne" if (folder / "velodyne").is_dir() else folder
    try:
        entries = sorted(scans.iterdir())
    except OSError as error:
        raise DataError(f"{scans}: cannot be read ({error.strerror}); check its rights") from error
    paths = [
        path
        for path in entries
        if path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".") and path.is_file()
    ]
    if not paths:
        raise DataError(f"{scans}: holds no sweeps ({', '.join(SUFFIXES)})")
    return paths
