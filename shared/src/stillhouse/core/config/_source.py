"""Read configuration files and find shipped presets.

Python files are read by `mmengine.config.Config` (imported on first use), with `_base_` inheritance,
`_delete_` and `{{ fileDirname }}`, or `with read_base():` imports. Names that begin with an underscore,
imported modules and functions are helpers of the file and no fields.
"""

from __future__ import annotations
import __future__

import ast
import importlib.util
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._yapf import import_yapf
from ..errors import ConfigError
from ._convert import did_you_mean

SUFFIXES = (".py", ".json", ".yaml", ".yml")


def list_presets(presets: str) -> dict[str, Path]:
    """List the shipped presets of a package, without reading them.

    Args:
        presets: dotted name of the package that holds the files, for example `"stillhouse.kidney.configs"`.

    Returns:
        Name → file, sorted by name. Files whose name begins with an underscore are bases and not listed.

    Raises:
        ModuleNotFoundError: there is no such package.
    """
    spec = importlib.util.find_spec(presets)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"no package {presets!r} that holds presets")
    found: dict[str, Path] = {}
    for folder in spec.submodule_search_locations:
        for path in Path(folder).iterdir():
            if path.suffix in SUFFIXES and not path.name.startswith("_"):
                found[path.stem] = path
    return dict(sorted(found.items()))


def describe_preset(path: Path) -> str:
    """Return the first line of a Python preset's docstring; an empty string where there is none."""
    if path.suffix != ".py":
        return ""
    try:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    return text.splitlines()[0].strip() if text else ""


def resolve(source: str | Path, presets: str | None = None) -> Path:
    """Turn a preset's name or a path into the path of an existing file.

    A string without a suffix and without a folder is a preset's name; all else is a path.

    Raises:
        ConfigError: no such preset (with the nearest name) or no such file.
    """
    text = str(source)
    if isinstance(source, str) and re.fullmatch(r"[A-Za-z0-9_\-]+", text):
        known = list_presets(presets) if presets is not None else {}
        if text in known:
            return known[text]
        hint = did_you_mean(text, list(known))
        shipped = f"shipped: {', '.join(known)}" if known else "none are shipped here"
        raise ConfigError(
            f"no preset {text!r}{hint}; {shipped}; or give a file ending in {', '.join(SUFFIXES)}"
        )
    path = Path(text).expanduser()
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a configuration file ends in {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise ConfigError(f"{path}: no such configuration file")
    return path


def read_source(path: Path) -> dict[str, Any]:
    """Read one configuration file into plain nested dicts. Python files are executed.

    Raises:
        ConfigError: the file cannot be read; the message names the file and the reason.
    """
    try:
        if path.suffix == ".py":
            return _read_python(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    values = _parse_json(path, text) if path.suffix == ".json" else _parse_yaml(path, text)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, got {type(values).__name__}")
    if "_base_" in values:
        raise ConfigError(f"{path}: _base_ works in Python configuration files only")
    return values


def _read_python(path: Path) -> dict[str, Any]:
    with warnings.catch_warnings():
        # mmengine leaves a file open; the handle dies inside this block, and its warning with it
        warnings.simplefilter("ignore", ResourceWarning)
        import_yapf()
        from mmengine.config import Config

        try:
            # mmengine's own guess takes `import math` for the lazy style on some Python builds
            lazy = _uses_read_base(path)
            loaded = Config.fromfile(str(path), import_custom_modules=False, lazy_import=lazy).to_dict()
        except Exception as error:  # the file is code: whatever it raises is the user's to mend
            line = _line_of(error, path)
            raise ConfigError(f"{path}{line}: cannot be read: {type(error).__name__}: {error}") from error
    return {
        key: _plain(value)
        for key, value in loaded.items()
        if not key.startswith("_") and type(value) is not type(__future__.annotations)
    }


def _uses_read_base(path: Path) -> bool:
    """Say whether a Python file inherits by `with read_base():` instead of `_base_`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=path.name)):
        if isinstance(node, ast.With) and isinstance(call := node.items[0].context_expr, ast.Call):
            return isinstance(call.func, ast.Name) and call.func.id == "read_base"
    return False


def _line_of(error: BaseException, path: Path) -> str:
    """Return `:N` for the last line of `path` in the error's traceback."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}" if error.lineno else ""
    line, trace = "", error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename).name == path.name:
            line = f":{trace.tb_lineno}"
        trace = trace.tb_next
    return line


def _plain(value: Any) -> Any:
    """Replace mmengine's dict classes by dict, all the way down."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if type(value) is tuple:
        return tuple(_plain(item) for item in value)
    return value


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    values: dict[Any, Any] = {}
    for key, value in pairs:
        if key in values:
            raise ValueError(f"the key {key!r} occurs twice")
        values[key] = value
    return values


def _parse_json(path: Path, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: no valid JSON: {error}") from error


def _parse_yaml(path: Path, text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe loader, with `1e-3` read as a number and a repeated key refused."""

    def mapping(loader: Loader, node: yaml.MappingNode) -> dict[Any, Any]:
        def build(part: yaml.Node) -> Any:
            return loader.construct_object(part, deep=True)

        return _unique([(build(key), build(value)) for key, value in node.value])

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    number = re.compile(r"[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)  # a SafeLoader: plain values only
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: no valid YAML: {' '.join(str(error).split())}") from error
