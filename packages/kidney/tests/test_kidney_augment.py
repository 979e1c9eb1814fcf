"""The five changes of the papers: exact where a closed form exists, reproducible, within their ranges."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from stillhouse.kidney.data import Augment
from stillhouse.kidney.data.augment import KINDS, Kind, perspective_homography, warp


def smooth(side: int = 64) -> Tensor:
    field = np.random.default_rng(0).standard_normal((3, side, side))
    return torch.from_numpy(ndimage.gaussian_filter(field, (0, 2, 2)).astype(np.float32))


def turn(degrees: float, scale: float = 1.0) -> Tensor:
    c, s = np.cos(np.radians(degrees)) / scale, np.sin(np.radians(degrees)) / scale
    return torch.tensor([[[c, -s, 0], [s, c, 0], [0, 0, 1]]], dtype=torch.float32)


def test_identity_flips_and_quarter_turns_are_exact() -> None:
    x = torch.rand(2, 3, 17, 17)
    torch.testing.assert_close(warp(x, torch.eye(3).expand(2, 3, 3)), x, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        warp(x, torch.diag(torch.tensor([-1.0, 1, 1])).expand(2, 3, 3)), x.flip(-1), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        warp(x, turn(90).expand(2, 3, 3)), torch.rot90(x, 1, (-2, -1)), atol=1e-5, rtol=0
    )


def test_flip_is_one_of_three() -> None:
    x = smooth()
    wanted = [x.flip(-1), x.flip(-2), x.flip(-1, -2)]
    seen = Counter(
        next(i for i, w in enumerate(wanted) if torch.allclose(Augment(kinds=("flip",))(x, s), w, atol=1e-4))
        for s in range(25)
    )
    assert set(seen) == {0, 1, 2}


def test_pad_equals_a_mirrored_border_resized() -> None:
    x = smooth(64)
    out = Augment(kinds=("pad",), pad=64)(x, 0)
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (16, 16), (16, 16)), mode="symmetric"))
    wanted = F.interpolate(padded[None], (64, 64), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=0)


def test_perspective_maps_the_moved_corners_onto_the_corners() -> None:
    rng = np.random.default_rng(0)
    corners = np.array([[-1.0, -1, 1], [1, -1, 1], [1, 1, 1], [-1, 1, 1]])
    for _ in range(20):
        inwards = rng.uniform(0, 0.4, (4, 2))
        moved = corners.copy()
        moved[:, :2] *= 1 - inwards
        mapped = moved @ perspective_homography(inwards).T
        np.testing.assert_allclose(mapped / mapped[:, 2:], corners, atol=1e-12)
    np.testing.assert_allclose(perspective_homography(np.zeros((4, 2))), np.eye(3), atol=1e-12)


def test_draws_stay_in_the_stated_ranges_and_fill_them() -> None:
    sizes, turns, rotations = [], [], []
    for seed in range(1500):
        matrix = Augment(kinds=("affine",)).homography(seed)[:2, :2]
        scale = np.sqrt(np.linalg.det(matrix))
        np.testing.assert_allclose(matrix.T @ matrix, scale**2 * np.eye(2), atol=1e-12)  # both axes alike
        sizes.append(1 / scale)
        turns.append(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))
        matrix = Augment(kinds=("rotation",)).homography(seed)
        np.testing.assert_allclose(matrix @ matrix.T, np.eye(3), atol=1e-12)
        rotations.append(np.degrees(np.arctan2(matrix[1, 0], matrix[0, 0])))
    for values, low, high in ((sizes, 0.5, 1.0), (turns, -90, 90), (rotations, -180, 180)):
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.05 * (high - low))


def test_each_change_is_picked_equally_often() -> None:
    def kind(matrix: np.ndarray) -> str:
        if abs(matrix[2, :2]).max() > 0:
            return "perspective"
        size = np.sqrt(abs(np.linalg.det(matrix)))
        if np.allclose(matrix, np.diag(np.diag(matrix))) and size == pytest.approx(1):
            return "flip"
        if matrix[0, 1] == 0:
            return "pad"
        return "rotation" if size == pytest.approx(1) else "affine"

    seen = Counter(kind(Augment().homography(seed)) for seed in range(4000))
    assert set(seen) == set(KINDS)
    assert max(abs(n - 800) for n in seen.values()) < 5 * np.sqrt(4000 * 0.2 * 0.8)


@pytest.mark.parametrize("backend", ["fast", "monai"])
@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_same_image_whatever_the_global_generators_do(backend: str, kind: Kind) -> None:
    augment = Augment(kinds=(kind,), backend=backend)  # type: ignore[arg-type]
    x = smooth(32)
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  # the point is that the global generator does not matter
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first = augment(x, 2**63 - 5)
    assert torch.equal(before[0], torch.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002
    augment(x, 3)
    torch.manual_seed(9)
    np.random.seed(9)  # noqa: NPY002
    assert torch.equal(augment(x, 2**63 - 5), first)
    assert type(first) is Tensor
    assert first.shape == x.shape
    assert first.dtype == x.dtype
    assert not torch.equal(first, x)
    if kind != "pad":
        assert any(not torch.equal(augment(x, seed), first) for seed in range(10))


def test_a_batch_is_its_images_one_by_one() -> None:
    x = torch.rand(9, 3, 24, 24)
    augment = Augment()
    together = augment.batch(x, list(range(9)))
    for n in range(9):
        torch.testing.assert_close(together[n], augment(x[n], n), atol=1e-6, rtol=0)
    slow = Augment(backend="monai")
    assert torch.equal(slow.batch(x[:2], [4, 5])[1], slow(x[1], 5))


@pytest.mark.parametrize("backend", ["fast", "monai"])
def test_values_stay_within_those_of_the_image(backend: str) -> None:
    """Mirroring fills the corners: no black, whatever the change."""
    x = 0.5 + 0.4 * torch.rand(3, 32, 32)
    for seed in range(40):
        out = Augment(backend=backend)(x, seed)  # type: ignore[arg-type]
        assert out.min() >= x.min() - 1e-5
        assert out.max() <= x.max() + 1e-5


@pytest.mark.parametrize("backend", ["fast", "monai"])
def test_probability_zero_changes_nothing_and_half_changes_half(backend: str) -> None:
    x = smooth(16)
    never = Augment(probability=0, backend=backend)  # type: ignore[arg-type]
    half = Augment(probability=0.5, backend=backend)  # type: ignore[arg-type]
    assert all(torch.allclose(never(x, seed), x, atol=1e-5) for seed in range(10))
    changed = sum(not torch.allclose(half(x, seed), x, atol=1e-3) for seed in range(200))
    assert 65 < changed < 135


@pytest.mark.oracle
def test_warp_against_monai() -> None:
    from monai.transforms import Affine, Rotate

    x = smooth()
    for degrees, size in ((20.0, 0.7), (-75.0, 0.5), (130.0, 1.0)):
        change = Affine(
            rotate_params=-float(np.radians(degrees)),
            scale_params=(1 / size, 1 / size),
            padding_mode="reflection",
            image_only=True,
        )
        torch.testing.assert_close(
            warp(x[None], turn(degrees, size))[0],
            torch.as_tensor(change(x)).as_subclass(Tensor),
            atol=1e-4,
            rtol=0,
        )
    turned = Rotate(angle=-float(np.radians(33)), padding_mode="reflection")(x)
    torch.testing.assert_close(
        warp(x[None], turn(33))[0], torch.as_tensor(turned).as_subclass(Tensor), atol=1e-4, rtol=0
    )


@pytest.mark.oracle
def test_monai_pads_as_the_fast_backend_does() -> None:
    x = smooth()
    fast, slow = (Augment(kinds=("pad",), pad=64, backend=b)(x, 0) for b in ("fast", "monai"))  # type: ignore[arg-type]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=0)


def test_monai_is_not_imported_until_it_is_asked_for() -> None:
    code = (
        "import sys, torch, stillhouse.kidney.data as data; data.Augment()(torch.rand(3, 8, 8), 1); "
        "print('monai' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize(
    "wrong",
    [
        {"kinds": ()},
        {"kinds": ("shear",)},
        {"pad": -1},
        {"perspective": 1.5},
        {"affine_degrees": 181},
        {"affine_scale": (0.0, 1.0)},
        {"affine_scale": (1.0, 0.5)},
        {"rotation_degrees": -1},
        {"probability": 2},
        {"backend": "torchvision"},
    ],
)
def test_arguments_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Augment(**wrong)  # type: ignore[arg-type]


def test_images_are_checked() -> None:
    with pytest.raises(ValueError, match="H = W"):
        Augment()(torch.rand(3, 8, 9), 0)
    with pytest.raises(ValueError, match="must be float"):
        Augment()(torch.zeros(3, 8, 8, dtype=torch.uint8), 0)
    with pytest.raises(ValueError, match="1 seeds for 2 images"):
        Augment().batch(torch.rand(2, 3, 8, 8), [1])
