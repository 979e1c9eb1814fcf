"""GEMINI: a multi-branch teacher trained episodically, then frozen (arXiv 2307.07046; parent 2206.02029).

The paper calls it a multi-branch model inspired by few-shot learning that generates a reduced hypothesis
space from prior knowledge in the labelled data. How many branches, their loss and their fusion are not
public. Our reading:

- branches share a trunk (or have their own) and end in one embedding head each;
- a "class" branch is trained on N-way K-shot episodes of the labelled images with the prototypical loss, an
  "image" branch on episodes in which every image is a class of its own and its windows are the shots: prior
  knowledge that needs no labels;
- L_T = Σ_b CE(p_b) + λ_div · CKA between branches;
- the posterior is the mean of the branches' posteriors, the embedding their concatenation;
- images without labels join through targets that the teacher makes itself: the mean posterior of an image
  over its windows and over time, divided by the mean over all images (so that no class swallows the others)
  and sharpened. `refine = 0` switches that off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.core.losses import linear_cka
from stillhouse.core.train import Losses, Step

from .hypothesis import hypothesis_logits, leave_one_out_logits, mean_posterior
from .sampling import Layout
from .student import Trunk, trunk_features

if TYPE_CHECKING:
    from .config import ModelConfig, TeacherConfig

_SHARPEN = 2.0
_PRIOR_FLOOR = 0.02


class Gemini(nn.Module):
    """The multi-branch network.

    Args:
        model: sizes (`teacher_*` and `stem`).
        branches: what each branch tells apart; only their number matters here.

    Shapes: images [B, 3, H, W] → [B, branches · teacher_dim] of length 1.
    """

    def __init__(self, model: ModelConfig, branches: Sequence[str]) -> None:
        super().__init__()
        if not branches:
            raise ValueError("branches is empty; a teacher needs at least one")
        self.groupings = tuple(branches)
        count = len(branches) if model.teacher_trunk == "separate" else 1
        self.trunks = nn.ModuleList(
            Trunk(model.teacher_backbone, model.teacher_width, model.stem) for _ in range(count)
        )
        features = trunk_features(model.teacher_backbone, model.teacher_width)
        self.heads = nn.ModuleList(nn.Linear(features, model.teacher_dim) for _ in branches)
        self.dim = model.teacher_dim

    def raw_branches(self, images: Tensor) -> list[Tensor]:
        """Embedding of each branch before its length is made 1, [B, teacher_dim]."""
        pooled = [trunk(images) for trunk in self.trunks]
        return [head(pooled[i % len(pooled)]) for i, head in enumerate(self.heads)]

    def branches(self, images: Tensor) -> list[Tensor]:
        """Embedding of each branch, [B, teacher_dim] of length 1."""
        return [F.normalize(raw, dim=1) for raw in self.raw_branches(images)]

    def forward(self, images: Tensor) -> Tensor:
        """The branches' embeddings side by side, [B, branches · teacher_dim] of length 1."""
        return torch.cat(self.branches(images), dim=1) / len(self.heads) ** 0.5


def teacher_posterior(
    branches: Sequence[Tensor],
    queries: Tensor,
    support: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    tau: float,
) -> Tensor:
    """log p_T of some rows of a batch over the prototypes of others.

    Args:
        branches: embeddings of each branch for the whole batch, [B, d].
        queries: rows to ask about [Q].
        support: rows of the support [S]; where `queries` is the support itself, each row is left out of its
            own prototype.
        labels: class of each support row [S].
        num_classes: C.
        tau: temperature.

    Returns:
        [Q, C].
    """
    same = len(queries) == len(support) and torch.equal(queries, support)
    logits = [
        leave_one_out_logits(z[support], labels, num_classes, tau=tau)
        if same
        else hypothesis_logits(z[queries], z[support], labels, num_classes, tau=tau)
        for z in branches
    ]
    return mean_posterior(logits)


class GeminiDistiller:
    """Trains GEMINI: one role, "teacher". No network is frozen, it is the teacher in the making.

    Args:
        network: the teacher.
        config: temperatures and weights.
        layout: how batches are laid out (see `EpisodeSampler`).
        images: number of images, labelled ones first; each has a target that is refined.
        num_classes: C.
        labels: class of each image, −1 without a label [images].
    """

    def __init__(
        self,
        network: Gemini,
        config: TeacherConfig,
        layout: Layout,
        *,
        num_classes: int,
        labels: Sequence[int],
    ) -> None:
        self.network, self.config, self.layout, self.num_classes = network, config, layout, num_classes
        self._class_branches = [i for i, name in enumerate(network.groupings) if name == "class"]
        # Without a weight they would be parameters without a gradient, which DDP refuses.
        wanted = self._class_branches if config.classify_weight > 0 else []
        self._classify = nn.ModuleList(nn.Linear(network.dim, num_classes) for _ in wanted)
        self.parts = nn.ModuleDict({"network": network, "classify": self._classify})
        self._labels = torch.as_tensor(labels)
        self._targets = torch.zeros(len(self._labels), num_classes)
        self._seen = torch.zeros(len(self._labels), dtype=torch.bool)

    def trainable(self) -> Mapping[str, nn.Module]:
        """The teacher, with the classifiers that help to train it and are thrown away."""
        return {"teacher": self.parts}

    def frozen(self) -> Mapping[str, nn.Module]:
        """Nothing."""
        return {}

    def roles(self, step: int) -> Sequence[str]:
        """Always the teacher."""
        return ("teacher",)

    def loss(self, role: str, batch: Mapping[str, Tensor], step: Step) -> Losses:
        """Sum over branches, mean over the episodes of the batch."""
        raw = self.network.raw_branches(batch["image"])
        size = self.layout.size
        if len(batch["label"]) % size:
            raise ValueError(
                f"batch of {len(batch['label'])} images; it must be a multiple of the layout's {size}"
            )
        parts = [
            self._episode(
                [z[start : start + size] for z in raw],
                batch["label"][start : start + size],
                batch["index"][start : start + size],
                step,
            )
            for start in range(0, len(batch["label"]), size)
        ]
        terms = {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
        weights = {
            "episode": self.config.episode_weight,
            "classify": self.config.classify_weight,
            "image": self.config.image_weight,
            "refine": self.config.refine,
            "diversity": self.config.diversity,
        }
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return Losses(total, terms)

    def _episode(self, raw: list[Tensor], labels: Tensor, index: Tensor, step: Step) -> dict[str, Tensor]:
        layout, config = self.layout, self.config
        branches = [F.normalize(z, dim=1) for z in raw]
        support, query = episode_rows(layout, labels.device)
        _, own = torch.unique(
            labels[: layout.labelled], return_inverse=True
        )  # classes of this episode: 0 … N−1
        terms = {"episode": labels.new_zeros((), dtype=torch.float32)}
        pool = (
            slice(layout.labelled, layout.labelled + layout.pool),
            slice(layout.labelled + layout.pool, layout.size),
        )
        for grouping, z in zip(self.network.groupings, branches, strict=True):
            if grouping == "class":
                logits = hypothesis_logits(z[query], z[support], own[support], layout.classes, tau=config.tau)
                terms["episode"] = terms["episode"] + F.cross_entropy(logits, own[query])
            elif layout.pool:
                terms["image"] = terms.get("image", 0.0) + _instances(z[pool[0]], z[pool[1]], config.tau)
        if config.classify_weight > 0:
            known = labels[: layout.labelled]
            terms["classify"] = torch.stack(
                [
                    F.cross_entropy(head(raw[i][: layout.labelled]), known, label_smoothing=config.smoothing)
                    for head, i in zip(self._classify, self._class_branches, strict=True)
                ]
            ).sum()
        if config.diversity > 0 and len(branches) > 1:
            pairs = [(a, b) for a in range(len(branches)) for b in range(a)]
            similar = [mutual_cka(branches[a], branches[b]) for a, b in pairs]
            terms["diversity"] = torch.stack(similar).mean()
        if config.refine > 0 and layout.pool and layout.classes == self.num_classes:
            terms["refine"] = self._refine(raw, branches, labels, index, pool, step)
        return terms

    def _refine(
        self,
        raw: list[Tensor],
        branches: list[Tensor],
        labels: Tensor,
        index: Tensor,
        pool: tuple[slice, slice],
        step: Step,
    ) -> Tensor:
        """Cross-entropy of the class branches with the image's own, sharpened, long-term posterior."""
        layout, config = self.layout, self.config
        zero = sum((z.sum() * 0.0 for z in raw), start=labels.new_zeros((), dtype=torch.float32))
        if step.index < config.refine_start * step.total:
            return zero
        rows = slice(layout.labelled, layout.size)
        support = slice(0, layout.labelled)
        if config.classify_weight > 0:
            logits = [
                head(raw[i][rows]).float()
                for head, i in zip(self._classify, self._class_branches, strict=True)
            ]
        else:
            logits = [
                hypothesis_logits(
                    branches[i][rows],
                    branches[i][support].detach(),
                    labels[support],
                    self.num_classes,
                    tau=config.tau,
                )
                for i in self._class_branches
            ]
        logs = [values.log_softmax(-1) for values in logits]
        with torch.no_grad():
            posterior = mean_posterior(logs).exp()
            posterior = (posterior[: layout.pool] + posterior[layout.pool :]) / 2
            target, weight = self._targets_of(index[pool[0]], posterior)
        target, weight = torch.cat([target, target]), torch.cat([weight, weight])
        return sum((-(weight[:, None] * target * log).sum(-1).mean() for log in logs), start=zero)

    def _targets_of(self, index: Tensor, posterior: Tensor) -> tuple[Tensor, Tensor]:
        """Move the targets of some images; return them sharpened, with 1 where they are sure enough."""
        config = self.config
        index, posterior = _gathered(index.cpu(), posterior.float().cpu())
        momentum = torch.where(self._seen[index], config.refine_momentum, 0.0)[:, None]
        self._targets[index] = momentum * self._targets[index] + (1 - momentum) * posterior
        self._seen[index] = True
        prior = self._targets[self._seen].mean(0).clamp_min(_PRIOR_FLOOR)
        mine = index[_own_part(len(index))]
        target = (self._targets[mine] / prior) ** _SHARPEN
        target = target / target.sum(-1, keepdim=True)
        known = self._labels[mine]
        target = torch.where(
            known[:, None] >= 0, F.one_hot(known.clamp_min(0), self.num_classes).float(), target
        )
        sure = (target.amax(-1) > config.refine_confidence).float()
        device = next(self.network.parameters()).device
        return target.to(device), sure.to(device)

    def state_dict(self) -> dict[str, Any]:
        """The refined targets."""
        return {"targets": self._targets, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put them back."""
        self._targets = state["targets"].clone()
        self._seen = state["seen"].clone().bool()


def episode_rows(layout: Layout, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Rows of the support [N·K] and of the queries [N·Q] in the labelled block."""
    rows = torch.arange(layout.labelled, device=device).view(layout.classes, layout.per_class)
    return rows[:, : layout.support].reshape(-1), rows[:, layout.support :].reshape(-1)


def mutual_cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear CKA of two branches [B, d], in [0, 1], with gradients to both.

    `linear_cka` stops the gradient at its second argument; here each branch is the first once.
    """
    forth, back = linear_cka(a, b), linear_cka(b, a)
    return forth + back - back.detach()


def _instances(first: Tensor, second: Tensor, tau: float) -> Tensor:
    """Prototypical loss in which each image is a class and each window in turn its one shot."""
    rows = torch.arange(len(first), device=first.device)
    forth = hypothesis_logits(second, first, rows, len(rows), tau=tau)
    return 0.5 * (F.cross_entropy(forth, rows) + F.cross_entropy(forth.T, rows))


def _gathered(index: Tensor, posterior: Tensor) -> tuple[Tensor, Tensor]:
    """What all processes saw, in the same order everywhere, so that their targets stay alike."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return index, posterior
    world = torch.distributed.get_world_size()
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, (index, posterior))
    return torch.cat([i for i, _ in found]), torch.cat([p for _, p in found])


def _own_part(total: int) -> slice:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return slice(0, total)
    share = total // torch.distributed.get_world_size()
    rank = torch.distributed.get_rank()
    return slice(rank * share, (rank + 1) * share)
