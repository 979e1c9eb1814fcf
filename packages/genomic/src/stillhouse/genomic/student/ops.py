"""The gated delta rule: one step at a time, and in chunks.

A head keeps a matrix S [d_v, d_k] of associations key → value. At every step it forgets by α, erases what was
stored under the key k, writes the value v there, and is read with the query q:

- "gated_delta": S_t = α_t S_{t−1} (I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ (Gated DeltaNet, arXiv 2412.06464);
- "printed":     S_t = S_{t−1} (α_t I − β_t k_t k_tᵀ) + β_t v_t k_tᵀ, as a summary of HAD prints it;

and o_t = S_t q_t. The two agree where α = 1. With α < 1 the second does not overwrite: after writing (k, v)
with β = 1 it reads S k = v − (1 − α) S_old k (our reading).

Chunked form. Write u_t = β_t (v_t − S' k_t) with what is erased, S' = α_t S_{t−1} ("gated_delta") or
S' = S_{t−1} ("printed"). Then S_t = α_t S_{t−1} + u_t k_tᵀ in both, so inside a chunk that begins with S_0,
with G_t = Σ_{i≤t} log α_i and E_t = G_t ("gated_delta") or G_{t−1} ("printed"),

    u_t + β_t Σ_{j<t} exp(E_t − G_j) (k_j·k_t) u_j = β_t (v_t − exp(E_t) S_0 k_t):

a unit lower-triangular system for every chunk, solved for all chunks at once: U = U_0 − W S_0ᵀ, the WY form.
Only the small states then go from chunk to chunk. Every exponent is a sum of log α over steps in between,
so none is positive and nothing overflows, however strong the decay. Time and memory are linear in L.

    o, S = gated_delta_chunked(q, k, v, log_alpha, beta)        # any device and length
    o, S = gated_delta_recurrent(q, k, v, log_alpha, beta)      # the reference, L steps

Legend: B batch, L length, H heads, N chunks, C steps of a chunk, K = d_k, V = d_v, Z = B·H.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

Variant = Literal["gated_delta", "printed"]


def gated_delta_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    *,
    initial: Tensor | None = None,
    variant: Variant = "gated_delta",
) -> tuple[Tensor, Tensor]:
    """The recurrence, step by step: the reference, and what generation one letter at a time needs.

    Args:
        q: queries [B, L, H, d_k], already scaled.
        k: keys [B, L, H, d_k]; of length 1 where the state is to stay bounded.
        v: values [B, L, H, d_v].
        log_alpha: log of the decay [B, L, H], ≤ 0.
        beta: strength of writing [B, L, H]: 0 leaves the state as it is, 1 overwrites, up to 2 makes negative
            eigenvalues.
        initial: state before the first step [B, H, d_v, d_k]; None is zero.
        variant: see the head of the module.

    Returns:
        Outputs [B, L, H, d_v] and the state after the last step [B, H, d_v, d_k]; in float64 where the inputs
        are, else computed in float32. Outputs have the dtype of `v`.

    Raises:
        ValueError: shapes that do not fit, an unknown variant.

    Example:
        >>> k = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
        >>> v = torch.tensor([5.0]).view(1, 1, 1, 1)
        >>> old = torch.tensor([[3.0, 4.0]]).view(1, 1, 1, 2)
        >>> o, state = gated_delta_recurrent(
        ...     k, k, v, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), initial=old)
        >>> o.item(), state.flatten().tolist()       # the value under k is overwritten, the rest stays
        (5.0, [5.0, 4.0])
    """
    _check(q, k, v, log_alpha, beta, initial, variant)
    out_dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log_alpha, beta = _precise(q, k, v, log_alpha, beta)
        state = _start(q, v, initial)
        alpha = log_alpha.exp()
        outputs = []
        steps = zip(*(x.unbind(1) for x in (q, k, v, alpha, beta)), strict=True)
        for q_t, k_t, v_t, alpha_t, beta_t in steps:
            decayed = alpha_t[..., None, None] * state
            erased = decayed if variant == "gated_delta" else state
            u = beta_t[..., None] * (v_t - (erased * k_t[..., None, :]).sum(-1))
            state = decayed + u[..., :, None] * k_t[..., None, :]
            outputs.append((state * q_t[..., None, :]).sum(-1))
        o = torch.stack(outputs, 1) if outputs else torch.zeros_like(v)
    return o.to(out_dtype), state


def gated_delta_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    *,
    initial: Tensor | None = None,
    variant: Variant = "gated_delta",
    chunk: int = 32,
) -> tuple[Tensor, Tensor]:
    """The same as `gated_delta_recurrent`, chunk by chunk: for training and for whole sequences.

    Args:
        q: queries [B, L, H, d_k], already scaled.
        k: keys [B, L, H, d_k].
        v: values [B, L, H, d_v].
        log_alpha: log of the decay [B, L, H], ≤ 0.
        beta: strength of writing [B, L, H].
        initial: state before the first step [B, H, d_v, d_k]; None is zero.
        variant: see the head of the module; the chunked form is exact for both.
        chunk: steps of a chunk, ≥ 1; any L. On a CPU 16 … 32 is fastest.

    Returns:
        Outputs [B, L, H, d_v] in the dtype of `v` and the last state [B, H, d_v, d_k].

    Raises:
        ValueError: shapes that do not fit, an unknown variant, `chunk` < 1.

    Example:
        >>> q, k, v = (torch.randn(2, 50, 3, 4) for _ in range(3))
        >>> k = torch.nn.functional.normalize(k, dim=-1)
        >>> decay, beta = -torch.rand(2, 50, 3), torch.rand(2, 50, 3)
        >>> one, _ = gated_delta_recurrent(q, k, v, decay, beta)
        >>> two, _ = gated_delta_chunked(q, k, v, decay, beta, chunk=16)
        >>> torch.allclose(one, two, atol=1e-4)
        True
    """
    _check(q, k, v, log_alpha, beta, initial, variant)
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be an integer of at least 1")
    if not q.shape[1]:
        return gated_delta_recurrent(q, k, v, log_alpha, beta, initial=initial, variant=variant)
    out_dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v, log_alpha, beta = _precise(q, k, v, log_alpha, beta)
        o, state = _chunks(q, k, v, log_alpha, beta, _start(q, v, initial), variant, min(chunk, q.shape[1]))
    return o.to(out_dtype), state


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    *,
    variant: Variant = "gated_delta",
    chunk: int = 32,
) -> Tensor:
    """The fastest exact way for where the tensors are.

    On CUDA, in bfloat16 or float16 and with flash-linear-attention installed, its Triton kernels run; these
    take no float32 and know "gated_delta" alone. Everything else goes through `gated_delta_chunked`.

    Args:
        q: queries [B, L, H, d_k], already scaled.
        k: keys [B, L, H, d_k].
        v: values [B, L, H, d_v].
        log_alpha: log of the decay [B, L, H], ≤ 0.
        beta: strength of writing [B, L, H].
        variant: see the head of the module.
        chunk: steps of a chunk of the PyTorch form.

    Returns:
        Outputs [B, L, H, d_v].
    """
    half = v.dtype in (torch.bfloat16, torch.float16)
    if v.is_cuda and half and variant == "gated_delta" and (kernel := _cuda_kernel()) is not None:
        _check(q, k, v, log_alpha, beta, None, variant)
        o, _ = kernel(q.to(v.dtype), k.to(v.dtype), v, log_alpha.float(), beta.to(v.dtype), scale=1.0)
        return o
    return gated_delta_chunked(q, k, v, log_alpha, beta, variant=variant, chunk=chunk)[0]


# --------------------------------------------------------------------------------------------------- chunked


def _chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    state: Tensor,
    variant: Variant,
    size: int,
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    count = -(-length // size)

    def split(x_BLHD: Tensor) -> Tensor:
        """[B, L, H, D] → [N, Z, C, D]; what is beyond the end is zero: no decay, nothing written."""
        missing = count * size - length
        x = F.pad(x_BLHD, (0, 0, 0, 0, 0, missing)) if missing else x_BLHD
        x = x.reshape(batch, count, size, heads, -1).permute(1, 0, 3, 2, 4)
        return x.reshape(count, batch * heads, size, -1)

    q, k, v = split(q), split(k), split(v)
    log_alpha, beta = split(log_alpha[..., None]), split(beta[..., None])
    # Differences of these sums are taken: in float64, else a strong decay would blur the weak ones after it.
    # exp(−100) is nothing, and unlike −inf it can be subtracted.
    summed = log_alpha.double().clamp_min(-100.0).cumsum(-2)
    past = summed.to(q.dtype)  # G_t, [N, Z, C, 1]
    first = summed if variant == "gated_delta" else F.pad(summed[..., :-1, :], (0, 0, 1, 0))
    before = first.to(q.dtype)  # E_t

    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    reach = (summed - summed.transpose(-1, -2)).to(q.dtype)
    decay = reach.masked_fill(later, -torch.inf).exp()  # exp(G_t − G_j), j ≤ t
    k_t = k.transpose(-1, -2)
    written = k * beta
    if variant == "gated_delta":
        lower = (written @ k_t) * decay
    else:
        never = later.logical_or(torch.eye(size, dtype=torch.bool, device=q.device))
        reach = (first - summed.transpose(-1, -2)).to(q.dtype)
        lower = (written @ k_t) * reach.masked_fill(never, -torch.inf).exp()
    # The diagonal of `lower` is taken as 1 and what lies above it is not read.
    right = torch.cat([v * beta, written * before.exp()], -1)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    # Left V columns: U_0; right K columns: W; U = U_0 − W S_0ᵀ. Products below are made for both at once.
    sizes = [v.shape[-1], k.shape[-1]]
    kept = (k * (summed[..., -1:, :] - summed).to(q.dtype).exp()).transpose(-1, -2)  # [N, Z, K, C]
    wrote, erased = (kept @ solved).split(sizes, -1)  # what a chunk adds to the state it gets, and takes
    eye = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    carry = eye * past[..., -1:, :].exp() - erased  # [N, Z, K, K]
    current = state.reshape(batch * heads, v.shape[-1], k.shape[-1]).transpose(-1, -2)
    states = []
    for carry_c, wrote_c in zip(carry.unbind(0), wrote.unbind(0), strict=True):
        states.append(current)
        current = torch.baddbmm(wrote_c, carry_c, current)

    inside, through = (((q @ k_t) * decay) @ solved).split(sizes, -1)
    o = inside + (q * past.exp() - through) @ torch.stack(states)
    o = o.view(count, batch, heads, size, -1).permute(1, 0, 3, 2, 4).reshape(batch, count * size, heads, -1)
    return o[:, :length], current.transpose(-1, -2).reshape(batch, heads, v.shape[-1], k.shape[-1])


# ---------------------------------------------------------------------------------------------------- helpers


def _precise(*tensors: Tensor) -> tuple[Tensor, ...]:
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32
    return tuple(x.to(dtype) for x in tensors)


def _start(q: Tensor, v: Tensor, initial: Tensor | None) -> Tensor:
    if initial is not None:
        return initial.to(q.dtype)
    return q.new_zeros(q.shape[0], q.shape[2], v.shape[3], q.shape[3])


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_alpha: Tensor,
    beta: Tensor,
    initial: Tensor | None,
    variant: str,
) -> None:
    if variant not in get_args(Variant):
        raise ValueError(f"variant is {variant!r}; allowed: {', '.join(get_args(Variant))}")
    if q.dim() != 4:
        raise ValueError(f"q has the shape {tuple(q.shape)}; it must be [B, L, H, d_k]")
    if k.shape != q.shape:
        raise ValueError(f"k has the shape {tuple(k.shape)}; it must be that of q, {tuple(q.shape)}")
    if v.dim() != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"v has the shape {tuple(v.shape)}; it must be [B, L, H, d_v] with q's B, L and H")
    for name, x in (("log_alpha", log_alpha), ("beta", beta)):
        if x.shape != q.shape[:3]:
            raise ValueError(f"{name} has the shape {tuple(x.shape)}; it must be {tuple(q.shape[:3])}")
    wanted = (q.shape[0], q.shape[2], v.shape[3], q.shape[3])
    if initial is not None and tuple(initial.shape) != wanted:
        raise ValueError(
            f"initial has the shape {tuple(initial.shape)}; it must be [B, H, d_v, d_k], {wanted}"
        )


@functools.cache
def _cuda_kernel() -> Callable[..., Any] | None:
    """The chunked kernel of flash-linear-attention, or None where it is not installed."""
    try:
        return importlib.import_module("fla.ops.gated_delta_rule").chunk_gated_delta_rule
    except ImportError:
        return None
