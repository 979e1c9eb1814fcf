"""``stillhouse cache info|verify|clean DIR``."""

from __future__ import annotations

import json as _json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import DataError
from ._verify import cache_info, clean, verify_cache

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of the cache.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]

app = typer.Typer(
    help="Look at caches of teacher outputs, check them and tidy up after interrupted writers.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def info(folder: Folder, json: Json = False) -> None:
    """Say what a cache holds, what it was made from and how large it is."""
    content = cache_info(folder)
    if json:
        print(_json.dumps(content, ensure_ascii=False))
        return
    for name, value in _lines(content):
        print(f"{name:<20} {value}")


@app.command()
def verify(folder: Folder, json: Json = False) -> None:
    """Read every byte and compare it with the manifest; exit code 1 when something is wrong."""
    problems = verify_cache(folder, progress=_progress if sys.stderr.isatty() else None)
    if json:
        print(
            _json.dumps({"path": str(folder), "ok": not problems, "problems": problems}, ensure_ascii=False)
        )
        if problems:
            raise typer.Exit(1)
        return
    if problems:
        raise DataError("; ".join(problems))
    print(f"{folder}: every byte is as it was written")


@app.command(name="clean")
def clean_(folder: Folder, json: Json = False) -> None:
    """Remove what interrupted writers left; stored samples stay."""
    removed = clean(folder)
    if json:
        print(_json.dumps({"path": str(folder), "removed": removed}, ensure_ascii=False))
        return
    print("\n".join(f"removed {name}" for name in removed) or "nothing to remove")


def _lines(content: dict[str, Any]) -> list[tuple[str, Any]]:
    spec = content["spec"]
    lines = [("folder", content["path"]), ("state", "complete" if content["complete"] else "not finished")]
    for name, value in spec.items():
        if value not in (None, "", False):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else value
            lines.append((name.replace("_", " "), shown))
    for name in ("samples", "rows", "shards", "duplicates"):
        lines.append((name, f"{content[name]:,}"))
    lines.append(("size", f"{content['bytes'] / 1e6:,.1f} MB"))
    if content["bytes_per_row"] is not None:
        lines.append(("bytes per row", content["bytes_per_row"]))
    if not content["complete"]:
        for name, writer in content["writers"].items():
            state = "closed" if writer["closed"] else "interrupted or at work"
            lines.append((name, f"{writer['samples']:,} samples, {state}"))
    return lines


def _progress(done: int, total: int) -> None:
    print(f"\r{done} of {total} files", end="\n" if done == total else "", file=sys.stderr, flush=True)
