"""Guided deep metric learning: the student's metric loss plus what it takes from the frozen teacher.

    L = L_DML(z_s, y) + λ · L_KD,   L_KD ∈ {hypothesis-space KD, RKD, S2SD}

The metric losses and miners are pytorch-metric-learning's. `none` is the student without distillation;
`ClassifierDistiller` is the plain cross-entropy baseline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.core.losses import rkd_angle, rkd_distance, similarity_kl
from stillhouse.core.teacher import freeze
from stillhouse.core.train import Losses, Step

from .config import DistillConfig
from .hypothesis import hypothesis_kd, hypothesis_logits, leave_one_out_logits
from .sampling import Layout
from .student import Student
from .teacher import Gemini, teacher_posterior

_S2SD_WIDE = 512


class MetricLoss(nn.Module):
    """A metric loss of pytorch-metric-learning with its usual miner.

    Args:
        name: "multi_similarity" (with its miner), "triplet" (margin 0.2, distance-weighted miner),
            "contrastive" or "proxy_anchor" (which has parameters: a proxy a class).
        num_classes: C.
        dim: d of the embeddings.

    Shapes: embeddings [B, d], labels [B] → scalar.
    """

    def __init__(self, name: str, num_classes: int, dim: int) -> None:
        super().__init__()
        from pytorch_metric_learning import losses, miners

        self.miner: nn.Module | None = None
        if name == "multi_similarity":
            self.loss, self.miner = losses.MultiSimilarityLoss(), miners.MultiSimilarityMiner()
        elif name == "triplet":
            self.loss, self.miner = losses.TripletMarginLoss(margin=0.2), miners.DistanceWeightedMiner()
        elif name == "contrastive":
            self.loss = losses.ContrastiveLoss()
        elif name == "proxy_anchor":
            self.loss = losses.ProxyAnchorLoss(num_classes, dim)
        else:
            raise ValueError(
                f"name is {name!r}; allowed: 'multi_similarity', 'triplet', 'contrastive', 'proxy_anchor'"
            )

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a labelled batch."""
        if self.miner is None:
            return self.loss(embeddings, labels)
        return self.loss(embeddings, labels, self.miner(embeddings, labels))


class WideHeads(nn.Module):
    """S2SD's auxiliary teacher: a two-layer head that embeds the student's pooled features in more
    dimensions.

    Source: S2SD (Roth et al. 2021); the width is our choice.
    """

    def __init__(self, features: int, wide: int = _S2SD_WIDE) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(features, wide), nn.ReLU(), nn.Linear(wide, wide))

    def forward(self, features: Tensor) -> Tensor:
        """Embeddings of length 1, [B, wide]."""
        return F.normalize(self.net(features), dim=1)


class GuidedDistiller:
    """Trains a student under a frozen teacher (or none): one role, "student".

    Args:
        student: the network to train.
        teacher: GEMINI, or None with the methods "none" and "s2sd" (which teaches itself).
        config: method, losses, weights.
        layout: how batches are laid out (see `GuidedSampler`).
        num_classes: C.
        teacher_tau: temperature of the teacher's posterior.

    Raises:
        ValueError: a method that needs a teacher has none.
    """

    def __init__(
        self,
        student: Student,
        teacher: Gemini | None,
        config: DistillConfig,
        layout: Layout,
        *,
        num_classes: int,
        teacher_tau: float,
    ) -> None:
        if teacher is None and config.method in ("hypothesis", "rkd"):
            raise ValueError(f"method {config.method!r} needs a teacher")
        self.student, self.config, self.layout = student, config, layout
        self.teacher = None if teacher is None else freeze(teacher)
        self.num_classes, self.teacher_tau = num_classes, teacher_tau
        parts: dict[str, nn.Module] = {
            "student": student,
            "metric": MetricLoss(config.metric_loss, num_classes, student.config.dim),
        }
        if config.method == "s2sd":
            parts["wide"] = WideHeads(student.trunk.features)
            parts["wide_metric"] = MetricLoss(config.metric_loss, num_classes, _S2SD_WIDE)
        self.parts = nn.ModuleDict(parts)

    def trainable(self) -> Mapping[str, nn.Module]:
        """The student with whatever of its losses has parameters."""
        return {"student": self.parts}

    def frozen(self) -> Mapping[str, nn.Module]:
        """The teacher."""
        return {} if self.teacher is None else {"teacher": self.teacher}

    def roles(self, step: int) -> Sequence[str]:
        """Always the student."""
        return ("student",)

    def loss(self, role: str, batch: Mapping[str, Tensor], step: Step) -> Losses:
        """Metric loss of the labelled images, distillation on all, mean over the layouts of the batch."""
        pooled = self.student.trunk(batch["image"])
        raw = self.student.head(pooled)
        size = self.layout.size
        if len(raw) % size:
            raise ValueError(f"batch of {len(raw)} images; it must be a multiple of the layout's {size}")
        answers = None
        if (
            self.teacher is not None
            and self.config.method in ("hypothesis", "rkd")
            and self.config.weight > 0
        ):
            with torch.no_grad():
                answers = self.teacher.branches(batch["image"])
        found = []
        for start in range(0, len(raw), size):
            rows = slice(start, start + size)
            mine = None if answers is None else [z[rows] for z in answers]
            found.append(self._terms(pooled[rows], raw[rows], mine, batch["label"][rows], step))
        terms = {name: torch.stack([part[name] for part in found]).mean() for name in found[0]}
        weights = {name: 1.0 if name == "metric" else self.config.weight for name in terms}
        total = torch.stack([weights[name] * value for name, value in terms.items()]).sum()
        return Losses(total, terms, weights=weights, task="metric")

    def _terms(
        self, pooled: Tensor, raw: Tensor, answers: list[Tensor] | None, labels: Tensor, step: Step
    ) -> dict[str, Tensor]:
        config, labelled = self.config, self.layout.labelled
        z = F.normalize(raw, dim=1)
        own = labels[:labelled]
        terms = {"metric": self.parts["metric"](z[:labelled], own)}
        if config.method == "s2sd":
            return self._s2sd(pooled, z, own, terms, step)
        if answers is None:
            return terms
        if config.shuffle_teacher:
            order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(step.index))
            answers = [a[order.to(a.device)] for a in answers]
        if config.method == "rkd":
            target = torch.cat(answers, dim=1)
            terms["rkd"] = rkd_distance(raw, target) + config.rkd_angle * rkd_angle(raw, target)
            return terms
        terms["hypothesis"] = self._hypothesis(z, answers, own)
        return terms

    def _hypothesis(self, z: Tensor, answers: list[Tensor], labels: Tensor) -> Tensor:
        """KL over the batch's classes; its labelled images are support, and queries without themselves."""
        config, layout = self.config, self.layout
        _, own = torch.unique(labels, return_inverse=True)
        classes = int(own.max()) + 1
        support = torch.arange(layout.labelled, device=z.device)
        pool = torch.arange(layout.labelled, layout.size, device=z.device)
        student = [leave_one_out_logits(z[support], own, classes, tau=config.tau)]
        teacher = [teacher_posterior(answers, support, support, own, classes, tau=self.teacher_tau)]
        if layout.pool:
            student.append(hypothesis_logits(z[pool], z[support], own, classes, tau=config.tau))
            answer = teacher_posterior(answers, pool, support, own, classes, tau=self.teacher_tau)
            if config.consensus:
                first, second = answer.split(layout.pool)
                mean = torch.logaddexp(first, second) - torch.log(torch.tensor(2.0, device=answer.device))
                answer = torch.cat([mean, mean])
            teacher.append(answer)
        return hypothesis_kd(torch.cat(student), torch.cat(teacher), temperature=config.temperature)

    def _s2sd(
        self, pooled: Tensor, z: Tensor, labels: Tensor, terms: dict[str, Tensor], step: Step
    ) -> dict[str, Tensor]:
        """S2SD: total = (target + source loss)/2 + w · KL; the feature term joins after a delay."""
        config, size = self.config, len(labels)
        wide = self.parts["wide"](pooled[:size])
        source = self.parts["wide_metric"](wide, labels)
        terms["metric"] = 0.5 * (terms["metric"] + source)
        kl = similarity_kl(z[:size], wide, temperature=config.temperature)
        if step.index >= config.s2sd_delay * step.total:
            features = F.normalize(pooled[:size], dim=1)
            kl = 0.5 * (kl + similarity_kl(z[:size], features, temperature=config.temperature))
        terms["s2sd"] = kl
        return terms


class Classifier(nn.Module):
    """The student's trunk with a linear classifier on its pooled features: what plain deep learning does.

    It has no embedding head: parameters that no loss reaches are an error under DDP.

    Args:
        student: whose trunk is taken.
        num_classes: C.

    Shapes: images [B, 3, H, W] → logits [B, C].
    """

    def __init__(self, student: Student, num_classes: int) -> None:
        super().__init__()
        self.trunk = student.trunk
        self.classify = nn.Linear(student.trunk.features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits."""
        return self.classify(self.trunk(images))

    def embed(self, images: Tensor) -> Tensor:
        """Pooled features of length 1 [B, features], for retrieval."""
        return F.normalize(self.trunk(images), dim=1)


class ClassifierDistiller:
    """Trains the cross-entropy baseline: the same backbone, images and steps, no teacher.

    Args:
        network: the classifier.
        smoothing: label smoothing.
    """

    def __init__(self, network: Classifier, *, smoothing: float) -> None:
        self.network, self.smoothing = network, smoothing

    def trainable(self) -> Mapping[str, nn.Module]:
        """The classifier."""
        return {"student": self.network}

    def frozen(self) -> Mapping[str, nn.Module]:
        """Nothing."""
        return {}

    def roles(self, step: int) -> Sequence[str]:
        """Always the student."""
        return ("student",)

    def loss(self, role: str, batch: Mapping[str, Tensor], step: Step) -> Losses:
        """Cross-entropy of the labelled images."""
        value = F.cross_entropy(self.network(batch["image"]), batch["label"], label_smoothing=self.smoothing)
        return Losses(value, {"cross_entropy": value}, weights={"cross_entropy": 1.0}, task="cross_entropy")
