"""What is exported: the student with cropping and standardisation before it and its prototypes behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from stillhouse.core.errors import ConfigError

from ..data import standardise_channels
from ..data.dataset import _spread
from ..store import FinishedStudent

OUTPUTS = ("probabilities", "distance", "embedding")


class ExportedStudent(nn.Module):
    """From square RGB images in [0, 1] to class probabilities, distance to the nearest prototype, and
    embedding.

    Crops and standardisation are inside, so whoever uses the export cannot forget them; the resize to `side`
    is not.

    Args:
        student: a loaded artefact. The prototypes and temperature of its gallery are built in; classes that
            are added later need a new export.

    Attributes:
        side: side of the images that it takes, pixels.

    Shape:
        images float32 [B, 3, side, side] in [0, 1] → probabilities [B, C], distance [B], embedding [B, d].

    Raises:
        ConfigError: the student averages crops at each image's own scale, which has no fixed input size.
    """

    prototypes: Tensor

    def __init__(self, student: FinishedStudent) -> None:
        super().__init__()
        if student.crops > 1 and student.zoom is None:
            raise ConfigError(
                f"the student averages {student.crops} crops at each image's own scale, so an export would "
                f"have no input "
                "size; train with data.zoom set to export it"
            )
        self.network = student.network
        self.size = student.network.config.image_size
        self.side = self.size if student.zoom is None else round(student.zoom * self.size)
        self.temperature = student.gallery.temperature
        spare = self.side - self.size
        self.corners = [_spread(crop, student.crops, spare, spare) for crop in range(student.crops)]
        self.register_buffer("prototypes", student.gallery.prototypes.clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        total = torch.zeros_like(self.prototypes[:1])
        for top, left in self.corners:
            window = images[:, :, top : top + self.size, left : left + self.size]
            total = total + self.network(standardise_channels(window, eps=1e-4))
        embedding = total if len(self.corners) == 1 else normalize(total, dim=1)
        squared = (embedding[:, None] - self.prototypes[None]).square().sum(dim=2)
        probabilities = torch.softmax(-squared / self.temperature, dim=1)
        return probabilities, squared.amin(dim=1).sqrt(), embedding
