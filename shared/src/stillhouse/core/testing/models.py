"""Tiny deterministic networks, data and distillers on which the machinery is tested."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ..train.contract import Losses, Step


class TinyMLP(nn.Module):
    """Two linear layers with a GELU, and dropout between them where asked for.

    Args:
        inputs, hidden, outputs: widths.
        dropout: probability of dropout, in [0, 1).
        seed: fixes the initial weights; the global generator is left alone.
    """

    def __init__(
        self, inputs: int = 8, hidden: int = 16, outputs: int = 4, *, dropout: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden = nn.Linear(inputs, hidden)
            self.dropout = nn.Dropout(dropout)
            self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs] to logits [B, outputs]."""
        return self.head(self.dropout(F.gelu(self.hidden(x))))


class TinyConvNet(nn.Module):
    """Two convolutions, the second with stride 2, and a linear head on the mean over positions.

    Args:
        channels: channels of the image.
        width: channels of the convolutions.
        classes: number of logits.
        seed: fixes the initial weights; the global generator is left alone.
    """

    def __init__(self, channels: int = 3, width: int = 8, classes: int = 4, *, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.stem = nn.Conv2d(channels, width, 3, padding=1)
            self.body = nn.Conv2d(width, width, 3, stride=2, padding=1)
            self.head = nn.Linear(width, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Map [B, channels, H, W] to logits [B, classes]."""
        features = F.relu(self.body(F.relu(self.stem(image))))
        return self.head(features.mean(dim=(2, 3)))


def toy_teacher() -> TinyMLP:
    """The network whose decisions are the labels of `toy_data`; in eval mode."""
    teacher = TinyMLP(hidden=32, seed=99)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(3.0)  # fresh weights decide almost nothing
    return teacher.eval()


def toy_data(count: int = 64, *, seed: int = 0) -> TensorDataset:
    """Samples x [8] from a normal distribution with the label in {0, …, 3} that `toy_teacher` gives them."""
    x = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return TensorDataset(x, toy_teacher()(x).argmax(dim=1))


class ToyDistiller:
    """Cross entropy plus KL(teacher ‖ student) from `toy_teacher` into a `TinyMLP`; the role is "student".

    Args:
        student: another student of the same shape.
        dropout: dropout of the default student.
        kd_weight: weight of the KL term.
    """

    def __init__(
        self, student: nn.Module | None = None, *, dropout: float = 0.0, kd_weight: float = 1.0
    ) -> None:
        self.student = student if student is not None else TinyMLP(dropout=dropout, seed=1)
        self.teacher = toy_teacher()
        self.kd_weight = kd_weight

    def trainable(self) -> Mapping[str, nn.Module]:
        """The student."""
        return {"student": self.student}

    def frozen(self) -> Mapping[str, nn.Module]:
        """The teacher."""
        return {"teacher": self.teacher}

    def roles(self, step: int) -> Sequence[str]:
        """The student, always."""
        return ("student",)

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        """CE + `kd_weight` · KL on a batch (x [B, 8], y [B])."""
        x, y = batch
        logits = self.student(x)
        with torch.no_grad():
            target = self.teacher(x).float().softmax(dim=-1)
        ce = F.cross_entropy(logits.float(), y)
        kd = F.kl_div(logits.float().log_softmax(dim=-1), target, reduction="batchmean")
        weights = {"ce": 1.0, "kd": self.kd_weight}
        return Losses(ce + self.kd_weight * kd, {"ce": ce, "kd": kd}, weights=weights, task="ce")


class TwoRoleDistiller:
    """Adversarial distillation: a critic tells the teacher's logits from the student's, which learns to pass.

    The critic is updated at every step and first; the student at every `ratio`-th step, beginning with step
    0. The distiller counts its student updates in `passes` and stores the count in its state.

    Args:
        ratio: critic updates per student update (≥ 1).
        dropout: dropout of the student.
    """

    def __init__(self, *, ratio: int = 2, dropout: float = 0.0) -> None:
        self.ratio = ratio
        self.student = TinyMLP(dropout=dropout, seed=1)
        self.critic = TinyMLP(inputs=4, hidden=8, outputs=1, seed=2)
        self.teacher = toy_teacher()
        self.passes = 0

    def trainable(self) -> Mapping[str, nn.Module]:
        """Student and critic."""
        return {"student": self.student, "critic": self.critic}

    def frozen(self) -> Mapping[str, nn.Module]:
        """The teacher."""
        return {"teacher": self.teacher}

    def roles(self, step: int) -> Sequence[str]:
        """The critic, then at every `ratio`-th step the student."""
        return ("critic", "student") if step % self.ratio == 0 else ("critic",)

    def loss(self, role: str, batch: Any, step: Step) -> Losses:
        """Logistic loss of the critic, or cross entropy plus the adversarial term of the student."""
        x, y = batch
        with torch.no_grad():
            real = self.teacher(x)
        if role == "critic":
            with torch.no_grad():
                fake = self.student(x)
            loss = F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake)).mean()
            return Losses(loss, {"logistic": loss})
        fake = self.student(x)
        ce, adversarial = F.cross_entropy(fake, y), F.softplus(-self.critic(fake)).mean()
        weights = {"ce": 1.0, "adversarial": 0.5}
        total = ce + 0.5 * adversarial
        return Losses(total, {"ce": ce, "adversarial": adversarial}, weights=weights, task="ce")

    def after_update(self, role: str, step: Step) -> None:
        """Count the student's updates."""
        self.passes += role == "student"

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"passes": self.passes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the count."""
        self.passes = int(state["passes"])
