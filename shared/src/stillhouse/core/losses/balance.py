"""How the terms of an objective are combined: fixed weights, normalised weights, GradNorm, uncertainty.

When to use: fixed weights first; `SumNormalised` to keep the learning rate's meaning while weights change;
`GradNorm` where one term starves the others, `Uncertainty` where weights are to be learnt with the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn


class LossBalancer(nn.Module):
    """Static weights: ``total = Σ w_i L_i``. The base of the other balancers.

    Example:
        >>> terms = {"ce": torch.tensor(2.0), "kd": torch.tensor(1.0)}
        >>> LossBalancer()(terms, {"ce": 0.5, "kd": 3.0})
        (tensor(4.), {'ce': 0.5, 'kd': 3.0})
    """

    def forward(
        self, terms: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """Combines the terms.

        Args:
            terms: Unweighted scalar of each term.
            weights: Scheduled weight of each term.

        Returns:
            The differentiable total, and the weight each term had in it.
        """
        return _weighted(terms, weights), dict(weights)

    def check_names(self, names: Sequence[str]) -> None:
        """Raises ValueError unless the balancer was made for terms of these names."""


class SumNormalised(LossBalancer):
    """Weights divided by the sum of their magnitudes: ramping one weight leaves the scale of the total alone.

    Raises:
        ValueError: On call, when all weights are zero.

    Example:
        >>> SumNormalised()({"ce": torch.tensor(2.0), "kd": torch.tensor(1.0)}, {"ce": 1.0, "kd": 3.0})[1]
        {'ce': 0.25, 'kd': 0.75}
    """

    def forward(
        self, terms: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """Combines the terms, see `LossBalancer.forward`."""
        scale = sum(abs(weight) for weight in weights.values())
        if scale == 0.0:
            raise ValueError(f"all weights are zero, nothing to normalise: {dict(weights)}")
        used = {name: weight / scale for name, weight in weights.items()}
        return _weighted(terms, used), used


class GradNorm(LossBalancer):
    """Task weights that equalise gradient norms and training rates (Chen et al., ICML 2018).

    With ``G_i = v_i ‖∇_W L_i‖`` over the shared parameters W, its mean G, and the inverse training rate
    ``r_i = (L_i / L_i(0)) / mean_j(L_j / L_j(0))``, the learned weights v descend ``Σ |G_i − sg[G r_i^α]|``
    and are rescaled to ``Σ v_i = number of terms``. The derivative in v_i is ``sign(G_i − G r_i^α) ‖∇_W
    L_i‖``, so that no second backward pass is needed. The scheduled weights multiply v.

    `update` is called by the training step, once per optimizer step and before the backward pass frees the
    graph. Under data parallelism losses and norms are averaged over the ranks (the average of the norms, not
    the norm of the average gradient), so that all ranks keep the same weights.

    Args:
        names: Names of the terms, at least two.
        alpha: Strength α of the pull towards equal training rates, ≥ 0; 0 equalises the gradient norms alone.
        lr: Step size of the weights, > 0.
        minimum: Smallest weight before rescaling, > 0; the paper has no such guard.

    Example:
        >>> shared = nn.Parameter(torch.tensor([1.0]))
        >>> balancer = GradNorm(("a", "b"), alpha=0.0, lr=0.1)
        >>> balancer.update({"a": 3 * shared.sum(), "b": shared.sum()}, [shared])
        >>> balancer.weights.tolist()   # the steeper term is damped
        [0.7777777777777778, 1.2222222222222223]
    """

    weights: Tensor
    initial: Tensor

    def __init__(
        self, names: Sequence[str], *, alpha: float = 1.5, lr: float = 0.025, minimum: float = 1e-3
    ) -> None:
        super().__init__()
        self.names = _checked_names(names)
        if not alpha >= 0.0:
            raise ValueError(f"alpha must be ≥ 0, got {alpha!r}")
        if not lr > 0.0:
            raise ValueError(f"lr must be positive, got {lr!r}")
        if not minimum > 0.0:
            raise ValueError(f"minimum must be positive, got {minimum!r}")
        self.alpha, self.lr, self.minimum = float(alpha), float(lr), float(minimum)
        self.register_buffer("weights", torch.ones(len(self.names), dtype=torch.float64))
        self.register_buffer("initial", torch.zeros(len(self.names), dtype=torch.float64))

    def forward(
        self, terms: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """Combines the terms, see `LossBalancer.forward`."""
        learned = dict(zip(self.names, self.weights.tolist(), strict=True))
        used = {name: weight * learned[name] for name, weight in weights.items()}
        return _weighted(terms, used), used

    def update(self, terms: Mapping[str, Tensor], shared: Iterable[nn.Parameter]) -> None:
        """Moves the weights by one step.

        Args:
            terms: Unweighted, attached, positive scalar of each term; the graph is kept.
            shared: The parameters W all terms depend on, usually those of the last shared layer. A term that
                does not reach one of them has no gradient there.

        Raises:
            ValueError: Other names than at construction, no shared parameters, a loss that is not positive
                and finite.
        """
        if set(terms) != set(self.names):
            raise ValueError(f"terms must be {list(self.names)}, got {sorted(terms)}")
        parameters = list(shared)
        if not parameters:
            raise ValueError("shared must hold at least one parameter")
        losses = torch.stack([terms[name].detach().double() for name in self.names]).to(self.weights.device)
        norms = torch.stack([_gradient_norm(terms[name], parameters) for name in self.names]).to(losses)
        losses, norms = _rank_mean(losses), _rank_mean(norms)
        if not bool((losses.isfinite() & (losses > 0.0)).all()):
            values = dict(zip(self.names, losses.tolist(), strict=True))
            raise ValueError(f"GradNorm needs positive finite losses, got {values}")
        if not bool(self.initial.any()):
            self.initial.copy_(losses)
        progress = losses / self.initial
        weighted = self.weights * norms
        target = weighted.mean() * (progress / progress.mean()).pow(self.alpha)
        moved = (self.weights - self.lr * torch.sign(weighted - target) * norms).clamp_min(self.minimum)
        self.weights.copy_(moved * (len(self.names) / moved.sum()))

    def check_names(self, names: Sequence[str]) -> None:
        """Raises ValueError unless the balancer was made for terms of these names."""
        _same_names(self.names, names)


class Uncertainty(LossBalancer):
    """Homoscedastic uncertainty (Kendall, Gal & Cipolla, CVPR 2018): ``Σ w_i · ½ (exp(−s_i) L_i + s_i)``.

    ``s_i = log σ_i²`` is a parameter, 0 at the start; at its optimum ``s_i = log L_i``, where a positive loss
    L_i enters with weight ½ w_i / L_i. This is the paper's regression form for every term; it has ``exp(−s) L
    + s/2`` for cross-entropies, which shifts the optimum by log 2. The parameters must be
    in the optimizer, without weight decay.

    Args:
        names: Names of the terms, at least two.

    Example:
        >>> balancer = Uncertainty(("ce", "kd"))
        >>> total, used = balancer({"ce": torch.tensor(2.0), "kd": torch.tensor(4.0)}, {"ce": 1.0, "kd": 1.0})
        >>> total.item(), used
        (3.0, {'ce': 0.5, 'kd': 0.5})
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = _checked_names(names)
        self.log_variance = nn.Parameter(torch.zeros(len(self.names)))

    def forward(
        self, terms: Mapping[str, Tensor], weights: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """Combines the terms, see `LossBalancer.forward`. The total holds the ``s_i`` too and can be
        negative."""
        parts, used = [], {}
        factors = torch.exp(-self.log_variance.detach()).tolist()
        for index, name in enumerate(self.names):
            s = self.log_variance[index].to(terms[name].device)
            parts.append(0.5 * weights[name] * (torch.exp(-s) * terms[name] + s))
            used[name] = 0.5 * weights[name] * factors[index]
        return torch.stack(parts).sum(), used

    def check_names(self, names: Sequence[str]) -> None:
        """Raises ValueError unless the balancer was made for terms of these names."""
        _same_names(self.names, names)


def _weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    return torch.stack([weights[name] * value for name, value in terms.items()]).sum()


def _gradient_norm(value: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    squares = [gradient.double().square().sum() for gradient in gradients if gradient is not None]
    return torch.stack(squares).sum().sqrt() if squares else value.new_zeros((), dtype=torch.float64)


def _rank_mean(values: Tensor) -> Tensor:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(values)
        values = values / torch.distributed.get_world_size()
    return values


def _checked_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or len(names) < 2 or len(set(names)) != len(names):
        raise ValueError(f"names must hold at least two different names, got {names!r}")
    return tuple(names)


def _same_names(mine: Sequence[str], names: Sequence[str]) -> None:
    if set(mine) != set(names):
        raise ValueError(f"the balancer was made for the terms {sorted(mine)}, the loss has {sorted(names)}")
