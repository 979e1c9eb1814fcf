"""What a domain package tells the core about itself, and how the core finds installed domains.

A domain package declares one `Domain` and an entry point of the group `stillhouse.domains`:

    [project.entry-points."stillhouse.domains"]
    kidney = "stillhouse.kidney.domain:DOMAIN"

The parts are named by strings ("module:attribute") and loaded on use, so that listing domains and showing
help imports neither torch nor the domain's libraries.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, field, fields
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from .errors import StillhouseError

if TYPE_CHECKING:
    from .doctor import Check

GROUP = "stillhouse.domains"

_REFERENCE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


class BrokenDomainError(StillhouseError):
    """An installed domain cannot be loaded; the message names its distribution and the reason."""


def load_object(reference: str) -> Any:
    """Import what "module:attribute" names.

    Raises:
        ValueError: the reference has another form.
        ImportError: the module cannot be imported.
        AttributeError: the module has no such attribute.

    Example:
        >>> load_object("math:sqrt")(9.0)
        3.0
    """
    if not _REFERENCE.fullmatch(reference):
        raise ValueError(f'reference must have the form "module:attribute", got {reference!r}')
    module, _, attribute = reference.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """A domain: its names, and where its parts are.

    Args:
        name: word of the command line, `kidney`; lower case.
        title: one line for people.
        config: "module:Class" of the configuration.
        configs: dotted name of the package with the shipped presets.
        train: "module:function", called as `train(config, run)`; returns a JSON-able dict with the paths
            `artifact` and `report`.
        evaluate: called as `evaluate(artifact, data, config, run)`: a folder, a path or None, the
            configuration, the run; returns a JSON-able dict.
        report: called as `report(folder, run)`; returns a JSON-able dict with `report`.
        export: called as `export(artifact, format, run)`; returns a JSON-able dict.
        formats: what `export --format` takes, the default first.
        distribution: name of the installed distribution; its declared requirements are what `doctor` checks.
        doctor: further checks.
        verbs: "module:function", called as `verbs(app)` to add the trade's own verbs to the `typer.Typer`;
            None where there are none. Its module is imported for `--help`, so it must be light.
        demo: name of the preset that `demo` runs.

    Raises:
        ValueError: a part has not the form that is asked for.

    Example:
        >>> Domain(
        ...     name="toy",
        ...     title="A toy",
        ...     config="toy.config:Config",
        ...     configs="toy.configs",
        ...     train="toy.run:train",
        ...     evaluate="toy.run:evaluate",
        ...     report="toy.run:report",
        ...     export="toy.run:export",
        ... ).demo
        'demo'
    """

    name: str
    title: str
    config: str
    configs: str
    train: str
    evaluate: str
    report: str
    export: str
    formats: tuple[str, ...] = ("torch",)
    distribution: str | None = None
    doctor: tuple[Check, ...] = field(default=())
    verbs: str | None = None
    demo: str = "demo"

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name must be one lower-case word, got {self.name!r}")
        if not self.formats:
            raise ValueError("formats must hold at least one format")
        if not _MODULE.fullmatch(self.configs):
            raise ValueError(f"configs must be the dotted name of a package, got {self.configs!r}")
        for part in ("config", "train", "evaluate", "report", "export", "verbs"):
            reference = getattr(self, part)
            if reference is not None and not _REFERENCE.fullmatch(reference):
                raise ValueError(f'{part} must have the form "module:attribute", got {reference!r}')

    def load(self, part: str) -> Any:
        """Import one part: `config`, `train`, `evaluate`, `report`, `export` or `verbs`.

        Raises:
            BrokenDomainError: the part is missing from the installed package.
        """
        names = {spec.name for spec in fields(self)}
        reference = getattr(self, part) if part in names else None
        if not isinstance(reference, str) or ":" not in reference:
            raise ValueError(f"part must name a reference of the domain, got {part!r}")
        module = reference.partition(":")[0]
        try:
            return load_object(reference)
        except AttributeError as error:
            raise BrokenDomainError(f"{self.name}: {reference} is missing ({error})") from error
        except ModuleNotFoundError as error:
            if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
                raise  # a library of the domain is missing: its own message says which
            raise BrokenDomainError(f"{self.name}: {reference} is missing ({error})") from error


@dataclass(frozen=True, slots=True)
class Installed:
    """An installed domain, found but not loaded."""

    name: str
    distribution: str
    version: str
    summary: str
    entry_point: EntryPoint

    def load(self) -> Domain:
        """Import the domain.

        Raises:
            BrokenDomainError: whatever goes wrong in the domain's module, in one line.
        """
        source = f"{self.name} ({self.distribution} {self.version})"
        try:
            loaded = self.entry_point.load()
        except Exception as error:  # a broken package must not stop the others
            reason = " ".join(str(error).split())
            raise BrokenDomainError(
                f"{source}: cannot be loaded: {type(error).__name__}: {reason}"
            ) from error
        if not isinstance(loaded, Domain):
            raise BrokenDomainError(
                f"{source}: {self.entry_point.value} is a {type(loaded).__name__}, no Domain"
            )
        if loaded.name != self.name:
            raise BrokenDomainError(f"{source}: its Domain calls itself {loaded.name!r}")
        return loaded


def discover() -> dict[str, Installed]:
    """Find the installed domains by their entry points, without importing any of them.

    Returns:
        Name → installed domain, sorted by name. Of two distributions that claim one name the first found
        counts.
    """
    found: dict[str, Installed] = {}
    for point in entry_points(group=GROUP):
        distribution = point.dist
        metadata = distribution.metadata if distribution is not None else None
        found.setdefault(
            point.name,
            Installed(
                name=point.name,
                distribution=metadata["Name"] if metadata is not None else "unknown",
                version=metadata["Version"] if metadata is not None else "?",
                summary=(metadata["Summary"] or "") if metadata is not None else "",
                entry_point=point,
            ),
        )
    return dict(sorted(found.items()))
