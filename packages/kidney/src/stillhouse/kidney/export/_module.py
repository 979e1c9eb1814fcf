"""What is exported: the student with its standardisation before it and its gallery's prototypes behind it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..data import standardise_channels
from ..gallery import Gallery

OUTPUTS = ("probabilities", "distance", "embedding")


class ExportedStudent(nn.Module):
    """From RGB images in [0, 1] to class probabilities, distance to the nearest prototype, and embedding.

    Standardisation is inside, so whoever uses the export cannot forget it; the resize to `size` is not.

    Args:
        network: images [B, 3, size, size] → L2-normalised embeddings [B, d].
        gallery: its prototypes and temperature are built in; classes that are added later need a new export.

    Shape:
        images float32 [B, 3, size, size] in [0, 1] → probabilities [B, C], distance [B], embedding [B, d].
    """

    prototypes: Tensor

    def __init__(self, network: nn.Module, gallery: Gallery) -> None:
        super().__init__()
        self.network = network
        self.temperature = gallery.temperature
        self.register_buffer("prototypes", gallery.prototypes.clone())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the class."""
        embedding = self.network(standardise_channels(images, eps=1e-4))
        squared = (embedding[:, None] - self.prototypes[None]).square().sum(dim=2)
        probabilities = torch.softmax(-squared / self.temperature, dim=1)
        return probabilities, squared.amin(dim=1).sqrt(), embedding
