"""Where a result comes from: versions, platform, git commit, command line, time, licences."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

_LIBRARIES = ("torch", "torchvision", "lightning-fabric", "numpy", "scipy", "safetensors", "mmengine-lite")
_SECRET = re.compile(r"(?i)token|secret|passw|credential|api[-_]?key|access[-_]?key|auth")
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")


@dataclass(frozen=True, slots=True, kw_only=True)
class Licence:
    """Terms that a student inherits from weights or data it was made with.

    Attributes:
        what: The role, for example "teacher weights" or "training data".
        name: What it is called.
        licence: SPDX identifier or the licence's name, for example "CC-BY-NC-4.0"; "unknown" is an honest
            answer.
        terms: What it asks for, in a sentence.
        url: Where the terms are written.
        commercial: Whether commercial use is allowed; None when that is not known.
    """

    what: str
    name: str
    licence: str
    terms: str = ""
    url: str = ""
    commercial: bool | None = None


def git_state(folder: Path | None = None) -> dict[str, Any] | None:
    """Return the commit of the git checkout around a folder, and whether it has uncommitted changes.

    Args:
        folder: Where to look; the working directory when None.

    Returns:
        `{"commit": str, "dirty": bool}`, or None outside a checkout, before the first commit, or without git.
    """
    base = ["git", "-c", "core.fsmonitor=false", "-C", str(folder or Path.cwd())]
    env = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        head = subprocess.run(
            [*base, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, env=env, check=True
        )
        status = subprocess.run(
            [*base, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            timeout=30,
            env=env,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": head.stdout.strip(), "dirty": bool(status.stdout.strip())}


def redact(arguments: Sequence[str]) -> list[str]:
    """Return a command line with the values of secret-looking options, and passwords in URLs, blanked.

    Example:
        >>> redact(["train", "--token", "abc", "--api-key=def", "--lr", "1e-3"])
        ['train', '--token', '***', '--api-key=***', '--lr', '1e-3']
    """
    result: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if hide_next and not argument.startswith("-"):
            result.append("***")
            hide_next = False
            continue
        secret = bool(_SECRET.search(name))
        if secret and equals:
            result.append(f"{name}=***")
        else:
            result.append(_USERINFO.sub("***@", argument))
        hide_next = secret and not equals and argument.startswith("-")
    return result


def timestamp() -> str:
    """Return the time in UTC, ISO 8601 to the second; SOURCE_DATE_EPOCH in the environment overrides it."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    when = (
        datetime.datetime.fromtimestamp(int(epoch), datetime.UTC)
        if epoch
        else datetime.datetime.now(datetime.UTC)
    )
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def library_versions() -> dict[str, str]:
    """Return distribution → version of the installed libraries a result depends on, Stillhouse's included."""
    versions = {}
    for distribution in metadata.distributions():
        name = distribution.metadata["Name"]
        if name and (name in _LIBRARIES or name.startswith("stillhouse-")):
            versions[name] = distribution.version
    return dict(sorted(versions.items()))


def collect_provenance(extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Gather what can be known without asking, and add what the caller knows.

    Neither the user's nor the machine's name is recorded, and secrets in the command line are blanked.

    Args:
        extra: Plain JSON from the caller, for example "data" with a name and fingerprint, "teacher", and
            "licences" (mappings with the fields of `Licence`).

    Returns:
        A JSON-able mapping with "created", "command", "python", "platform", "libraries", "git" and the
        caller's keys.

    Raises:
        ValueError: When `extra` uses one of these keys, or a licence lacks "what", "name" or "licence".
    """
    extra = dict(extra or {})
    facts: dict[str, Any] = {
        "created": timestamp(),
        "command": redact(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": library_versions(),
        "git": git_state(),
    }
    taken = sorted(set(facts) & set(extra))
    if taken:
        raise ValueError(f"provenance has the key {taken[0]!r}, which is collected automatically; rename it")
    for i, entry in enumerate(extra.get("licences", [])):
        for key in ("what", "name", "licence"):
            if not isinstance(entry, Mapping) or not isinstance(entry.get(key), str):
                raise ValueError(
                    f"provenance.licences[{i}] is {entry!r}; it needs text for {key!r}; give a Licence"
                )
    return {**facts, **extra}


def card_sections(facts: Mapping[str, Any], sizes: Mapping[str, int], *, kind: str) -> str:
    """Write the closing sections of an artefact's card: licences, contents, provenance.

    Args:
        facts: What `collect_provenance` returned.
        sizes: File name → bytes.
        kind: The artefact's kind.

    Returns:
        Markdown, ending with a newline.
    """
    lines: list[str] = []
    licences = facts.get("licences", [])
    if licences:
        lines += ["## Licences and terms", ""]
        if any(entry.get("commercial") is False for entry in licences):
            lines += [
                "**Not for commercial use**: a licence below forbids it, and this student inherits it.",
                "",
            ]
        lines += ["| what | name | licence | terms |", "|---|---|---|---|"]
        for entry in licences:
            terms = " ".join(t for t in (entry.get("terms", ""), entry.get("url", "")) if t)
            lines.append(
                "| "
                + " | ".join(_cell(entry[k]) for k in ("what", "name", "licence"))
                + f" | {_cell(terms)} |"
            )
        lines.append("")
    lines += [
        "## Contents",
        "",
        f"A Stillhouse artefact of kind `{kind}`.",
        "",
        "| file | bytes |",
        "|---|---:|",
    ]
    lines += [f"| {_cell(name)} | {size:,} |" for name, size in sorted(sizes.items())]
    git = facts.get("git")
    commit = "none" if git is None else git["commit"] + (", with uncommitted changes" if git["dirty"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in facts["libraries"].items())
    lines += [
        "",
        "Read it with `stillhouse.core.artifact.Artifact.load(folder)`; check it with "
        "`sha256sum -c SHA256SUMS`.",
        "",
    ]
    lines += ["## Provenance", ""]
    lines += [f"- Made: {facts['created']}", f"- Python {facts['python']} on {facts['platform']}"]
    lines += [f"- Libraries: {versions}", f"- Git commit of the working directory: {commit}"]
    lines += ["- The command and everything else: `provenance.json`"]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(str(text).split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
