"""The student: a MONAI ResNet with a linear embedding head, L2-normalised.

Paper (2307.07046): ImageNet ResNet-50. The head, 2048 → d, and its size are recalled, not read; smaller
backbones serve machines without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from stillhouse.core.errors import ConfigError, DataError

if TYPE_CHECKING:
    from .config import Backbone, Stem

_LAYERS: dict[str, tuple[str, list[int]]] = {
    "resnet10": ("basic", [1, 1, 1, 1]),
    "resnet18": ("basic", [2, 2, 2, 2]),
    "resnet34": ("basic", [3, 4, 6, 3]),
    "resnet50": ("bottleneck", [3, 4, 6, 3]),
}


@dataclass(kw_only=True, slots=True, frozen=True)
class StudentConfig:
    """What is needed to build the network again.

    Attributes:
        backbone: "resnet10", "resnet18", "resnet34" or "resnet50".
        width: channels of the first stage; 64 in the standard networks.
        dim: dimensions of the embedding.
        image_size: side of the input the network was trained for, pixels.
        stem: "imagenet" or "small".
    """

    backbone: Backbone = "resnet10"
    width: int = 16
    dim: int = 64
    image_size: int = 64
    stem: Stem = "small"

    def __post_init__(self) -> None:
        if self.backbone not in _LAYERS:
            raise ConfigError(f"backbone is {self.backbone!r}; allowed: {', '.join(_LAYERS)}")
        if self.stem not in ("imagenet", "small"):
            raise ConfigError(f"stem is {self.stem!r}; allowed: 'imagenet', 'small'")
        for name in ("width", "dim", "image_size"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be an integer of at least 1")


def trunk_features(backbone: str, width: int) -> int:
    """Number of pooled features of a trunk: 2048 for the standard ResNet-50, 512 for the smaller ones."""
    return 8 * width * (4 if _LAYERS[backbone][0] == "bottleneck" else 1)


class Trunk(nn.Module):
    """A MONAI ResNet up to its pooled features.

    Args:
        backbone: a key of StudentConfig.backbone.
        width: channels of the first stage.
        stem: "imagenet" or "small".

    Shapes: images [B, 3, H, W] → features [B, `features`].
    """

    def __init__(self, backbone: str, width: int, stem: str) -> None:
        super().__init__()
        from monai.networks.nets.resnet import ResNet  # takes seconds to import

        block, layers = _LAYERS[backbone]
        self.net = ResNet(
            block,
            layers,
            [width, 2 * width, 4 * width, 8 * width],
            spatial_dims=2,
            n_input_channels=3,
            conv1_t_size=7 if stem == "imagenet" else 5,
            conv1_t_stride=2,
            no_max_pool=stem == "small",
            bias_downsample=False,
            feed_forward=False,
        )
        self.features = trunk_features(backbone, width)

    def forward(self, images: Tensor) -> Tensor:
        """Pooled features [B, `features`] of images [B, 3, H, W]."""
        return self.net(images)


class Student(nn.Module):
    """Images [B, 3, H, W] → embeddings [B, dim] of length 1.

    Args:
        config: see `StudentConfig`.

    Example:
        >>> student = build_student(StudentConfig(width=4, dim=8, image_size=32))
        >>> embedding = student.eval()(torch.zeros(2, 3, 32, 32))
        >>> embedding.shape, [round(x, 3) for x in embedding.norm(dim=1).tolist()]
        (torch.Size([2, 8]), [1.0, 1.0])
    """

    def __init__(self, config: StudentConfig) -> None:
        super().__init__()
        self.config = config
        self.trunk = Trunk(config.backbone, config.width, config.stem)
        self.head = nn.Linear(self.trunk.features, config.dim)

    def features(self, images: Tensor) -> Tensor:
        """Embedding before its length is made 1, [B, dim]: what RKD compares.

        On the sphere RKD's freedom of scale and shift is gone (our reading).
        """
        return self.head(self.trunk(images))

    def forward(self, images: Tensor) -> Tensor:
        """Embedding of length 1, [B, dim]."""
        return normalize(self.features(images), dim=1)


def build_student(config: StudentConfig) -> Student:
    """Build a student with fresh weights."""
    return Student(config)


def load_imagenet_weights(trunk: Trunk, path: str | Path) -> int:
    """Load weights of a standard ResNet (torchvision's or timm's names) into a trunk.

    Args:
        trunk: with width 64 and the "imagenet" stem, for which such weights exist.
        path: a safetensors file, or a state dict saved by torch (read with `weights_only=True`).

    Returns:
        Number of tensors loaded. The classifier (`fc.*`) is left out.

    Raises:
        DataError: the file is missing, damaged, or its shapes are of another network.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> one, two = Trunk("resnet10", 4, "imagenet"), Trunk("resnet10", 4, "imagenet")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_file(imagenet_names(one), f"{folder}/weights.safetensors")
        ...     loaded = load_imagenet_weights(two, f"{folder}/weights.safetensors")
        >>> loaded == len(one.net.state_dict()), torch.equal(one.net.conv1.weight, two.net.conv1.weight)
        (True, True)
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; give a local file with the weights of the backbone (model.weights)"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            given = load_file(path)
        else:
            given = torch.load(path, map_location="cpu", weights_only=True)
        given = {
            str(k): v for k, v in given.items() if isinstance(v, Tensor) and not str(k).startswith("fc.")
        }
    except Exception as error:  # every reader has errors of its own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{path}: is no readable state dict ({reason}); give safetensors or a torch state dict"
        ) from error
    wanted = trunk.net.state_dict()
    missing = sorted(set(wanted) - set(given))
    wrong = [k for k in wanted if k in given and given[k].shape != wanted[k].shape]
    if missing or wrong:
        first = (
            f"{missing[0]} is missing"
            if missing
            else (f"{wrong[0]} is {tuple(given[wrong[0]].shape)}, not {tuple(wanted[wrong[0]].shape)}")
        )
        raise DataError(
            f"{path}: does not fit the backbone ({first}); standard weights need width 64, stem 'imagenet'"
        )
    trunk.net.load_state_dict({k: given[k] for k in wanted})
    return len(wanted)


def imagenet_names(trunk: Trunk) -> dict[str, Tensor]:
    """The trunk's weights under the names of the standard ResNets, for saving."""
    return {k: v.clone().contiguous() for k, v in trunk.net.state_dict().items()}
