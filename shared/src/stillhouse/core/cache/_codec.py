"""Signals to arrays of rows and back.

Every array has one row a stored unit (a token, or a sample), so that a lookup is a gather of rows. Logits are
stored relative to their row's maximum: float16 has its precision near zero, which is where the probability
mass is. Dense ones get the maximum back (``shift``, float32); top-k ones stay relative, as do their
logsumexps, which is the same distribution at every temperature. Token ids take two, three or four bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..losses.topk import SparseTeacher
from ..teacher import DenseSignal, EmbeddingSignal, HiddenSignal, RelationSignal, TeacherSignal
from ._spec import CacheSpec

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
Arrays = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]  # inner shape of each field behind the row axis


@dataclass(frozen=True, slots=True)
class Encoded:
    """A batch ready to be stored.

    Attributes:
        arrays: Field → [rows, ...].
        rows: Number of rows of each sample [n].
        shapes: Shape of one row of each user-visible field, and of the rows of one sample ("", when not
            ragged).
    """

    arrays: Arrays
    rows: Tensor
    shapes: Shapes


def encode(spec: CacheSpec, signal: TeacherSignal, mask: Tensor | None) -> Encoded:
    """Turns a batch into arrays.

    Args:
        spec: What the cache holds.
        signal: Leading dimension [n] of samples; for ragged ones [n, L, ...] with `mask`.
        mask: [n, L] bool, True = store the row; for ragged caches, where None stores all.

    Raises:
        TypeError: A signal of another kind.
        ValueError: Shapes, values or settings that do not fit the specification.
    """
    parts, shapes = _split(spec, signal)
    first = next(iter(parts.values()))
    lead = (
        first.shape[: first.dim() - 1]
        if spec.kind in ("dense", "topk")
        else first.shape[: 2 if spec.ragged else 1]
    )
    if not lead:
        raise ValueError("a signal must have a leading dimension of samples")
    if spec.ragged and len(lead) != 2:
        raise ValueError(f"a ragged signal must be [n, L, …], got the leading shape {list(lead)}")
    if mask is not None and not spec.ragged:
        raise ValueError("a mask belongs to ragged=True; this cache stores every row")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != lead):
        raise ValueError(f"mask must be bool {list(lead)}, got {mask.dtype} {list(mask.shape)}")
    if spec.ragged:
        keep = torch.ones(lead, dtype=torch.bool) if mask is None else mask.detach().cpu()
        rows = keep.sum(1)
        arrays = {name: part[keep] for name, part in parts.items()}
    else:
        per_sample = math.prod(lead[1:])
        rows = torch.full((lead[0],), per_sample)
        arrays = {
            name: part.reshape(lead[0] * per_sample, *part.shape[len(lead) :]) for name, part in parts.items()
        }
        shapes[""] = tuple(lead[1:])
    return Encoded(_pack(spec, arrays), rows, shapes)


def decode(spec: CacheSpec, arrays: Arrays) -> Arrays:
    """Turns gathered rows into the tensors of a signal: field → [rows, ...] in float32, ids in int64."""
    if spec.kind == "topk":
        result = {"ids": unpack_ids(arrays["ids"], spec.id_bytes), "logits": _unshift(arrays)}
        if "lse" in arrays:
            result["lse"] = arrays["lse"]
        return result
    if spec.kind == "dense":
        return {"logits": _unshift(arrays)}
    names = [name for name in arrays if not name.startswith("scale.")]
    if spec.dtype == "int8":
        return {name: arrays[name].float() * arrays[f"scale.{name}"].unsqueeze(-1) for name in names}
    return {name: arrays[name].float() for name in names}


def assemble(spec: CacheSpec, fields: Arrays) -> TeacherSignal:
    """Makes the signal of decoded fields, whatever their leading shape."""
    if spec.kind == "topk":
        return SparseTeacher(
            ids=fields["ids"],
            logits=fields["logits"],
            lse=fields.get("lse"),
            temperatures=spec.temperatures,
            vocab=spec.vocab or 0,
            log_values=spec.log_values,
        )
    if spec.kind == "dense":
        return DenseSignal(fields["logits"], log_values=spec.log_values)
    if spec.kind == "embedding":
        return EmbeddingSignal(fields["values"])
    if spec.kind == "relation":
        return RelationSignal(fields["values"], log_values=spec.log_values)
    return HiddenSignal(fields)


def select(signal: TeacherSignal, index: Tensor) -> TeacherSignal:
    """Picks samples [m] of a signal by position."""
    if isinstance(signal, SparseTeacher):
        return SparseTeacher(
            ids=signal.ids[index],
            logits=signal.logits[index],
            lse=None if signal.lse is None else signal.lse[index],
            temperatures=signal.temperatures,
            vocab=signal.vocab,
            log_values=signal.log_values,
            weights=None if signal.weights is None else signal.weights[index],
            weights_temperature=signal.weights_temperature,
        )
    if isinstance(signal, DenseSignal):
        return DenseSignal(signal.logits[index], signal.log_values)
    if isinstance(signal, EmbeddingSignal):
        return EmbeddingSignal(signal.values[index])
    if isinstance(signal, RelationSignal):
        return RelationSignal(signal.values[index], signal.log_values)
    return HiddenSignal({name: value[index] for name, value in signal.values.items()})


def pack_ids(ids: Tensor, width: int) -> Tensor:
    """Integers [..., k] in 2 (int16 bits), 3 (uint8 [..., k, 3]) or 4 bytes (int32)."""
    if width == 4:
        return ids.to(torch.int32)
    if width == 2:
        return ids.to(torch.int16)  # wraps: the low 16 bits
    wide = ids.to(torch.int32)
    return torch.stack([wide & 0xFF, (wide >> 8) & 0xFF, (wide >> 16) & 0xFF], -1).to(torch.uint8)


def unpack_ids(packed: Tensor, width: int) -> Tensor:
    """The inverse of `pack_ids`, int64."""
    if width == 4:
        return packed.long()
    if width == 2:
        return packed.long() & 0xFFFF
    low, middle, high = packed.long().unbind(-1)
    return low | middle << 8 | high << 16


def _split(spec: CacheSpec, signal: TeacherSignal) -> tuple[Arrays, Shapes]:
    """The tensors of a signal on the CPU, by field, after a check of their kind."""
    if spec.kind == "topk":
        return _split_topk(spec, signal)
    expected = {
        "dense": DenseSignal,
        "embedding": EmbeddingSignal,
        "hidden": HiddenSignal,
        "relation": RelationSignal,
    }[spec.kind]
    if not isinstance(signal, expected):
        raise TypeError(f"a {spec.kind!r} cache takes {expected.__name__}, got {type(signal).__name__}")
    if isinstance(signal, (DenseSignal, RelationSignal)) and signal.log_values != spec.log_values:
        raise ValueError(f"the signal has log_values={signal.log_values}, the cache {spec.log_values}")
    if isinstance(signal, DenseSignal):
        if signal.logits.shape[-1] != spec.vocab:
            raise ValueError(f"logits have {signal.logits.shape[-1]} classes, the cache vocab={spec.vocab}")
        return {"logits": signal.logits.detach().cpu()}, {}
    if isinstance(signal, HiddenSignal):
        parts = {name: value.detach().cpu() for name, value in signal.values.items()}
        if not parts or any(name.startswith("scale.") or not name for name in parts):
            raise ValueError(f"hidden states need names that do not start with 'scale.', got {list(parts)}")
    else:
        parts = {"values": signal.values.detach().cpu()}  # type: ignore[union-attr]
    lead = 2 if spec.ragged else 1
    if any(part.dim() <= lead for part in parts.values()):
        raise ValueError(
            f"values must have more than {lead} dimension(s), got {[list(p.shape) for p in parts.values()]}"
        )
    if len({part.shape[:lead] for part in parts.values()}) != 1:
        raise ValueError("all values of a signal must have the same leading shape")
    return parts, {name: tuple(part.shape[lead:]) for name, part in parts.items()}


def _split_topk(spec: CacheSpec, signal: TeacherSignal) -> tuple[Arrays, Shapes]:
    if isinstance(signal, DenseSignal):
        if signal.logits.shape[-1] != spec.vocab:
            raise ValueError(f"logits have {signal.logits.shape[-1]} classes, the cache vocab={spec.vocab}")
        if signal.log_values != spec.log_values:
            raise ValueError(f"the signal has log_values={signal.log_values}, the cache {spec.log_values}")
        if signal.log_values:
            values, ids = signal.logits.detach().topk(spec.k or 1, dim=-1)
            return {"ids": ids.cpu(), "logits": values.cpu()}, {}
        logits = signal.logits.detach()
        wide = logits if logits.dtype == torch.float64 else logits.float()
        relative = wide - wide.amax(-1, keepdim=True)  # NaN where the maximum is not finite; refused below
        values, ids = wide.topk(spec.k or 1, dim=-1)
        signal = SparseTeacher(
            ids=ids,
            logits=values - values[..., :1],
            lse=torch.stack([torch.logsumexp(relative / t, -1) for t in spec.temperatures], -1),
            temperatures=spec.temperatures,
            vocab=spec.vocab or 0,
        )
    if not isinstance(signal, SparseTeacher):
        raise TypeError(f"a 'topk' cache takes SparseTeacher or DenseSignal, got {type(signal).__name__}")
    for name, mine, theirs in (
        ("k", signal.ids.shape[-1], spec.k),
        ("vocab", signal.vocab, spec.vocab),
        ("log_values", signal.log_values, spec.log_values),
        ("temperatures", signal.temperatures, spec.temperatures),
    ):
        if mine != theirs:
            raise ValueError(f"the signal has {name}={mine}, the cache {theirs}")
    if signal.weights is not None:
        raise ValueError("sampled signals with importance weights cannot be cached; store top-k logits")
    ids = signal.ids.detach().cpu()
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= signal.vocab):
        raise ValueError(f"ids must lie in [0, {signal.vocab}), got [{int(ids.min())}, {int(ids.max())}]")
    parts = {"ids": ids, "logits": signal.logits.detach().cpu()}
    if signal.lse is not None and not spec.log_values:
        parts["lse"] = signal.lse.detach().cpu()
    return parts, {}


def _pack(spec: CacheSpec, parts: Mapping[str, Tensor]) -> Arrays:
    if spec.kind == "topk":
        arrays = _pack_topk(spec, parts)
    elif spec.kind == "dense":
        arrays = _pack_dense(spec, parts["logits"].float())
    else:
        arrays = {}
        for name, part in parts.items():
            arrays |= _pack_values(spec, name, part.float())
    return {name: array.contiguous() for name, array in arrays.items()}


def _pack_dense(spec: CacheSpec, logits: Tensor) -> Arrays:
    shift = _row_maximum(logits)
    if spec.dtype == "float32":
        return {"values": logits}
    return {"values": _to(logits - shift.unsqueeze(-1), _DTYPES[spec.dtype]), "shift": shift}


def _pack_topk(spec: CacheSpec, parts: Mapping[str, Tensor]) -> Arrays:
    """Kept logits relative to their maximum, and logsumexps that belong to the *rounded* ones.

    Rounding moves the kept mass by some 1e-4, and a tail computed as what is missing to 1 would drown in
    that. The stored logsumexp is therefore that of the rounded kept logits and the true tail.
    """
    ids, exact = pack_ids(parts["ids"], spec.id_bytes), parts["logits"].double()
    shift = _row_maximum(exact)
    relative = exact - shift.unsqueeze(-1)
    values = _to(relative.float(), _DTYPES[spec.dtype])
    rounded = values.double()
    if spec.log_values:  # no logsumexp: the maximum takes up what rounding did to the mass
        lost = torch.logsumexp(relative, -1) - torch.logsumexp(rounded, -1)
        return {"ids": ids, "values": values, "shift": (shift + lost).float()}
    lse = parts["lse"].double()
    if not bool(lse.isfinite().all()):
        raise ValueError("the logsumexp of a row is not finite")
    temperatures = torch.tensor(spec.temperatures, dtype=torch.float64)
    lse = lse - shift.unsqueeze(-1) / temperatures
    exact_mass = torch.logsumexp(relative.unsqueeze(-2) / temperatures.unsqueeze(-1), -1)
    stored_mass = torch.logsumexp(rounded.unsqueeze(-2) / temperatures.unsqueeze(-1), -1)
    if spec.k == spec.vocab:
        return {"ids": ids, "values": values, "lse": stored_mass.float()}
    tail = lse + torch.log(-torch.expm1((exact_mass - lse).clamp_max(0.0)))
    return {"ids": ids, "values": values, "lse": torch.logaddexp(stored_mass, tail).float()}


def _pack_values(spec: CacheSpec, name: str, values: Tensor) -> Arrays:
    if not bool(values.isfinite().all() if not spec.log_values else ~values.isnan().any()):
        raise ValueError(f"{name} holds NaN or infinite values")
    if spec.dtype == "int8":
        scale = values.abs().amax(-1) / 127.0
        steps = torch.round(values / scale.clamp_min(1e-38).unsqueeze(-1))
        return {name: steps.to(torch.int8), f"scale.{name}": scale}
    stored = values.to(_DTYPES[spec.dtype])
    if spec.dtype == "float16" and bool(stored.isinf().logical_xor(values.isinf()).any()):
        raise ValueError(f"{name} exceeds the range of float16; use bfloat16, float32 or int8")
    return {name: stored}


def _row_maximum(logits: Tensor) -> Tensor:
    maximum = logits.amax(-1)
    if not bool(maximum.isfinite().all()):
        raise ValueError("every row of logits needs a finite maximum: NaN, +inf and rows of −inf are refused")
    return maximum


def _to(wide: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts; differences below the dtype's range become its smallest number, −inf stays −inf."""
    if dtype != torch.float16:
        return wide.to(dtype)
    return torch.where(wide.isneginf(), wide, wide.clamp_min(-65504.0)).to(dtype)


def _unshift(arrays: Arrays) -> Tensor:
    values = arrays["values"].float()
    return (
        values.add_(arrays["shift"].unsqueeze(-1)) if "shift" in arrays else values
    )  # gathered: ours to change
