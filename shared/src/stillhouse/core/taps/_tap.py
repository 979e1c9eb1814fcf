"""Taps on the inputs and outputs of a network's modules."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

# Segments that wrappers (data parallelism, compilation, sharding, checkpointing) add to module names.
_WRAPPERS = frozenset(
    {"module", "_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)

Repeats = Literal["last", "list", "error"]


class FeatureTap:
    """Collects inputs or outputs of named modules during forward passes.

    A path is ``module.path[:io[:index]]``: ``io`` is "out" (default) or "in"; ``index`` picks an element of a
    tuple (a number), of a mapping, of keyword arguments or an attribute (a name). "in" without an index is
    the first positional argument. The empty path is the network itself. Names may be written with or without
    what wrappers add to them, such as ``module.`` under DDP.

    The taps are forward hooks of this object alone; leaving the `with` block, or `remove`, takes them away.
    Hooks are seen in eager mode; put the tap on before compiling, or tap the uncompiled network.

    Args:
        model: The network, wrapped or not.
        paths: Name → path, or a sequence of paths that are their own names.
        detach: Cut the values from the graph.
        to_dtype: Convert the values; None leaves them.
        clone: Copy the values at once. Needed where the network changes a tapped tensor in place afterwards
            (an ``inplace=True`` activation, ``x += y``); without it `pop` raises in that case.
        repeats: What happens when a module runs more than once between two `pop` calls: "last" keeps the last
            value, "list" keeps all in order, "error" raises.

    Raises:
        ValueError: A path that names no module (with near misses), or is ill-formed.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> with FeatureTap(net, {"hidden": "1", "x": ":in"}) as tap:
        ...     _ = net(torch.zeros(5, 3))
        ...     {name: tuple(value.shape) for name, value in tap.pop().items()}
        {'hidden': (5, 4), 'x': (5, 3)}
    """

    def __init__(
        self,
        model: nn.Module,
        paths: Mapping[str, str] | Sequence[str],
        *,
        detach: bool = False,
        to_dtype: torch.dtype | None = None,
        clone: bool = False,
        repeats: Repeats = "last",
    ) -> None:
        if isinstance(paths, str):
            raise TypeError(f"paths must be a mapping or a sequence of paths, got the string {paths!r}")
        if repeats not in ("last", "list", "error"):
            raise ValueError(f'repeats must be "last", "list" or "error", got {repeats!r}')
        named = dict(paths) if isinstance(paths, Mapping) else {path: path for path in paths}
        if not named:
            raise ValueError("paths must hold at least one path")
        self.detach, self.to_dtype, self.clone, self.repeats = detach, to_dtype, clone, repeats
        self._paths = {name: _parse(path) for name, path in named.items()}
        modules = {name: find_module(model, path.module) for name, path in self._paths.items()}
        self._values: dict[str, list[tuple[Tensor, int]]] = {}
        self._handles = [self._hook(name, module) for name, module in modules.items()]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the taps."""
        return tuple(self._paths)

    def pop(self) -> dict[str, Any]:
        """Returns the collected values by name and forgets them.

        Returns:
            Name → tensor, or list of tensors with ``repeats="list"``.

        Raises:
            RuntimeError: A module has not run since the last call, or the network has changed a tapped tensor
                in place.
        """
        values, self._values = self._values, {}
        silent = [name for name in self._paths if name not in values]
        if silent:
            state = "the taps were removed" if not self._handles else "their modules did not run"
            raise RuntimeError(f"nothing was collected for {silent} since the last pop: {state}")
        for name, collected in values.items():
            if any(_version(value) != version for value, version in collected):
                raise RuntimeError(
                    f"the value of tap {name!r} ({self._paths[name]}) was changed in place after it was "
                    "collected; pass clone=True to keep the value itself, or tap the module that changes it"
                )
        if self.repeats == "list":
            return {name: [value for value, _ in values[name]] for name in self._paths}
        return {name: values[name][-1][0] for name in self._paths}

    def remove(self) -> None:
        """Takes the hooks away and forgets what was collected. May be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._values = {}

    def __enter__(self) -> FeatureTap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _hook(self, name: str, module: nn.Module) -> Any:
        path = self._paths[name]
        if path.io == "out":

            def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                self._collect(name, output if path.index is None else _element(output, path))

            return module.register_forward_hook(after)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index = 0 if path.index is None else path.index
            self._collect(name, _element(args if isinstance(index, int) else kwargs, path, index))

        return module.register_forward_pre_hook(before, with_kwargs=True)

    def _collect(self, name: str, value: Any) -> None:
        if not isinstance(value, Tensor):
            parts = ""
            if isinstance(value, (tuple, list)):
                parts = f" of {len(value)}; append :0 … :{len(value) - 1}"
            elif isinstance(value, Mapping):
                parts = f" with the keys {list(value)}; append one of them"
            raise TypeError(
                f"tap {name!r} ({self._paths[name]}) sees a {type(value).__name__}, not a tensor{parts}"
            )
        if self.detach:
            value = value.detach()
        if self.to_dtype is not None:
            value = value.to(self.to_dtype)
        if self.clone:
            value = value.clone()
        entry = (value, _version(value))
        if self.repeats == "list" and name in self._values:
            self._values[name].append(entry)
            return
        if self.repeats == "error" and name in self._values:
            raise RuntimeError(
                f"the module of tap {name!r} ({self._paths[name]}) ran twice since the last pop; "
                'use repeats="last" or "list"'
            )
        self._values[name] = [entry]


@dataclass(frozen=True, slots=True)
class _Path:
    module: str
    io: str
    index: int | str | None

    def __str__(self) -> str:
        return f"{self.module}:{self.io}" + ("" if self.index is None else f":{self.index}")


def find_module(model: nn.Module, path: str) -> nn.Module:
    """Finds a module by name, whatever wrappers have added to the names.

    Args:
        model: The network, wrapped or not.
        path: Dotted name, with or without the wrappers' segments; "" is the innermost network.

    Raises:
        ValueError: No such module, or several; the message lists near misses.

    Example:
        >>> net = nn.ModuleDict({"module": nn.ModuleDict({"encoder": nn.Linear(2, 2)})})   # as DDP names it
        >>> find_module(net, "encoder") is find_module(net, "module.encoder")
        True
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if path and path in modules:
        return modules[path]
    wanted = _canonical(path)
    found = {name: module for name, module in modules.items() if _canonical(name) == wanted}
    if not found:
        names = list(dict.fromkeys(_canonical(name) for name in modules if _canonical(name)))
        last = path.rpartition(".")[2]
        near = [name for name in names if name.rpartition(".")[2] == last]
        near += [name for name in difflib.get_close_matches(path, names, n=5, cutoff=0.5) if name not in near]
        hint = (
            f"did you mean {', '.join(repr(name) for name in near[:5])}"
            if near
            else f"there are {names[:10]}"
        )
        raise ValueError(f"{type(model).__name__} has no module {path!r}; {hint}?")
    outermost = min(found, key=len)
    if any(not _wraps(outermost, name) for name in found):
        raise ValueError(f"{path!r} may mean any of {sorted(found)}; write the full name")
    return _unwrap(found[outermost])


def _canonical(name: str) -> str:
    return ".".join(segment for segment in name.split(".") if segment not in _WRAPPERS)


def _wraps(outer: str, name: str) -> bool:
    return outer in ("", name) or name.startswith(f"{outer}.")


def _unwrap(module: nn.Module) -> nn.Module:
    """Follows wrappers inwards: a wrapper has one child, under one of the wrappers' names."""
    children = {id(child): (name, child) for name, child in module.named_children()}
    if len(children) == 1:
        ((name, child),) = children.values()
        if name in _WRAPPERS:
            return _unwrap(child)
    return module


def _parse(path: str) -> _Path:
    module, *rest = path.split(":")
    io = rest[0] if rest else "out"
    if io not in ("in", "out") or len(rest) > 2 or (len(rest) == 2 and not rest[1]):
        raise ValueError(f'a tap path is "module.path[:in|out[:index]]", got {path!r}')
    index: int | str | None = None
    if len(rest) == 2:
        index = int(rest[1]) if rest[1].lstrip("-").isdigit() else rest[1]
    return _Path(module, io, index)


def _element(value: Any, path: _Path, index: int | str | None = None) -> Any:
    index = path.index if index is None else index
    try:
        if isinstance(index, str) and not isinstance(value, Mapping):
            return getattr(value, index)
        return value[index]
    except (IndexError, KeyError, AttributeError, TypeError) as error:
        what = f"{len(value)} elements" if isinstance(value, (tuple, list)) else type(value).__name__
        keys = f" with the keys {list(value)}" if isinstance(value, Mapping) else ""
        raise ValueError(f"tap {path}: no element {index!r} in {what}{keys}") from error


def _version(value: Tensor) -> int:
    return 0 if value.is_inference() else value._version
