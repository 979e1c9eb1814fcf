"""The configuration of a run: data, networks, teacher, distillation, optimizer, trainer.

Numbers that the paper gives are marked so; everything else is our choice, since the recipe of the paper is
not public.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stillhouse.core.config import check_at_least, check_choice, check_finite, check_share
from stillhouse.core.errors import ConfigError
from stillhouse.core.train import OptimConfig, TrainConfig

Layout = Literal["auto", "kth_tips"]
SplitBy = Literal["stone", "patch", "given"]
Backbone = Literal["resnet10", "resnet18", "resnet34", "resnet50"]
Stem = Literal["imagenet", "small"]
Grouping = Literal["class", "image"]
Method = Literal["hypothesis", "rkd", "s2sd", "none"]
MetricLoss = Literal["multi_similarity", "triplet", "contrastive", "proxy_anchor"]
Fusion = Literal["max", "mean", "concat"]


@dataclass(kw_only=True, slots=True, frozen=True)
class DataConfig:
    """Which images, and how they are cut and shown to a network.

    Attributes:
        path: folder or CSV manifest with the images; None simulates stones.
        layout: "auto" reads `<root>/<view>/<split>/<class>/`, `<root>/<class>/` and manifests; "kth_tips" the
            file names of KTH-TIPS.
        stone_pattern: regular expression whose groups, searched in the path, give the stone.
        split: "stone" (default) keeps stones apart; "patch" is the papers' protocol and leaks; "given".
        test: share of each class's stones for the test part.
        validation: the same for the validation part, which calibrates the unknown threshold.
        shots: labelled images a class; the rest of the training part loses its labels. None keeps all.
        pool: whether teacher and guided student may look at the training images without labels.
        new_classes: classes that are never trained on, to test new-class and unknown detection.
        views: views to use; empty for all.
        image_size: side of the network's input, pixels.
        zoom: the image is first resized to `zoom × image_size`; networks then see windows of it. 1 shows the
            whole image.
        crops: windows of a test image whose embeddings are averaged.
        augment: "stones" is the papers' list (one change an image); "window" a random window, turned,
            mirrored and with changed gamma (textures); "none".
        window: smallest and largest side of the random window, as shares of the image.
        stones_per_class: simulator only: stones of each class.
        patches_per_fragment: simulator only: patches of each stone and view.
        simulate_seed: simulator only: which stones.
    """

    path: str | None = None
    layout: Layout = "auto"
    stone_pattern: str | None = None
    split: SplitBy = "stone"
    test: float = 0.2
    validation: float = 0.0
    shots: int | None = None
    pool: bool = True
    new_classes: tuple[str, ...] = ()
    views: tuple[str, ...] = ()
    image_size: int = 64
    zoom: float = 1.0
    crops: int = 1
    augment: Literal["stones", "window", "none"] = "stones"
    window: tuple[float, float] = (0.5, 1.0)
    stones_per_class: int = 12
    patches_per_fragment: int = 4
    simulate_seed: int = 0

    def __post_init__(self) -> None:
        check_finite("data", self)
        check_choice("data", "layout", self.layout, Layout)
        check_choice("data", "split", self.split, SplitBy)
        if self.augment not in ("stones", "window", "none"):
            raise ConfigError(f"data.augment is {self.augment!r}; allowed: 'stones', 'window', 'none'")
        check_at_least(
            "data", self, image_size=16, zoom=1.0, crops=1, stones_per_class=2, patches_per_fragment=1
        )
        check_share("data", self, "test", "validation")
        if self.split != "given" and self.test + self.validation >= 1:
            raise ConfigError(
                f"data.test is {self.test!r} and data.validation {self.validation!r}; together they must be "
                "below 1, or nothing is left to train on"
            )
        if self.split != "given" and self.test == 0:
            raise ConfigError("data.test is 0; a run scores its networks: give a share above 0")
        if self.shots is not None and self.shots < 1:
            raise ConfigError(f"data.shots is {self.shots!r}; it must be at least 1, or None for all labels")
        if len(self.window) != 2 or not 0 < self.window[0] <= self.window[1] <= 1:
            raise ConfigError(
                f"data.window is {self.window!r}; it must be two shares, 0 < smallest ≤ largest ≤ 1"
            )
        if self.path is None and self.layout == "kth_tips":
            raise ConfigError(
                "data.path is None; layout 'kth_tips' needs the folder of the ten class folders"
            )


@dataclass(kw_only=True, slots=True, frozen=True)
class ModelConfig:
    """The networks.

    Attributes:
        backbone: the student's ResNet (paper: "resnet50").
        width: channels of the student's first stage (64 in the standard networks).
        dim: dimensions of the student's embedding.
        stem: "imagenet" (7×7 stride 2 and max-pooling) or "small" (stride 2 only, for small images).
        weights: file with ImageNet weights of the student's backbone (safetensors or a torch state dict), or
            None.
        teacher_from_weights: start the teacher's trunks from `weights` as well (our reading); its backbone
            and width must then be the student's.
        teacher_backbone: the teacher's ResNet.
        teacher_width: channels of its first stage.
        teacher_dim: dimensions of each of its branches.
        teacher_trunk: "shared" by all branches, or "separate" trunks, one a branch.
    """

    backbone: Backbone = "resnet10"
    width: int = 16
    dim: int = 64
    stem: Stem = "small"
    weights: str | None = None
    teacher_from_weights: bool = False
    teacher_backbone: Backbone = "resnet10"
    teacher_width: int = 32
    teacher_dim: int = 64
    teacher_trunk: Literal["shared", "separate"] = "shared"

    def __post_init__(self) -> None:
        check_choice("model", "backbone", self.backbone, Backbone)
        check_choice("model", "teacher_backbone", self.teacher_backbone, Backbone)
        check_choice("model", "stem", self.stem, Stem)
        if self.teacher_trunk not in ("shared", "separate"):
            raise ConfigError(f"model.teacher_trunk is {self.teacher_trunk!r}; allowed: 'shared', 'separate'")
        check_at_least("model", self, width=1, dim=2, teacher_width=1, teacher_dim=2)
        alike = (self.backbone, self.width) == (self.teacher_backbone, self.teacher_width)
        if self.teacher_from_weights and (self.weights is None or not alike):
            raise ConfigError(
                "model.teacher_from_weights needs model.weights, and teacher_backbone and teacher_width as "
                "the student's"
            )


@dataclass(kw_only=True, slots=True, frozen=True)
class TeacherConfig:
    """How the teacher GEMINI is trained; all of it is our reading.

    Attributes:
        steps: episodes.
        lr: learning rate.
        branches: what each branch tells apart: "class", or "image" (each image is a class of its own, which
            needs no labels). GEMINI means twins.
        shots: support images of a class in an episode (K).
        queries: query images of a class in an episode.
        pool: images without labels in an episode, each shown twice; 0 for none.
        tau: temperature of the prototypical posterior, on squared distances.
        episode_weight: weight of the "class" branches' episodes.
        classify_weight: weight of a linear classifier on each "class" branch, which is thrown away after
            training; 0 for none.
        smoothing: label smoothing of these classifiers.
        diversity: weight of the branches' decorrelation (linear CKA of two branches).
        image_weight: weight of the "image" branches' loss.
        refine: weight of the self-made targets on images without labels; 0 for none.
        refine_start: share of the training after which they count.
        refine_momentum: how slowly an image's target moves.
        refine_confidence: smallest probability for a target to count.
    """

    steps: int = 400
    lr: float = 3e-3
    branches: tuple[Grouping, ...] = ("class", "image")
    shots: int = 5
    queries: int = 5
    pool: int = 48
    tau: float = 0.1
    episode_weight: float = 1.0
    classify_weight: float = 0.0
    smoothing: float = 0.1
    diversity: float = 0.0
    image_weight: float = 0.5
    refine: float = 1.0
    refine_start: float = 0.3
    refine_momentum: float = 0.8
    refine_confidence: float = 0.6

    def __post_init__(self) -> None:
        check_finite("teacher", self)
        for grouping in self.branches:
            check_choice("teacher", "branches", grouping, Grouping)
        if "class" not in self.branches:
            raise ConfigError(f"teacher.branches is {self.branches!r}; at least one must be 'class'")
        check_at_least(
            "teacher", self, steps=1, shots=1, queries=1, pool=0, diversity=0, image_weight=0, refine=0
        )
        if "image" in self.branches and self.pool == 0:
            raise ConfigError('teacher.pool is 0; an "image" branch learns from the pool: give it images')
        check_at_least("teacher", self, episode_weight=0, classify_weight=0)
        if self.episode_weight == 0 and self.classify_weight == 0:
            raise ConfigError(
                'teacher.episode_weight and teacher.classify_weight are both 0; a "class" branch learns '
                "from one of them"
            )
        if self.tau <= 0 or self.lr <= 0:
            raise ConfigError(f"teacher.tau and teacher.lr must be above 0, got {self.tau!r} and {self.lr!r}")
        check_share("teacher", self, "smoothing", "refine_start", "refine_momentum", "refine_confidence")


@dataclass(kw_only=True, slots=True, frozen=True)
class DistillConfig:
    """How the student learns: its metric loss and what it takes from the teacher.

    Attributes:
        method: "hypothesis" (KL between the posteriors over the same support, each in its own space), "rkd",
            "s2sd" or "none".
        metric_loss: "multi_similarity", "triplet" (distance-weighted, margin 0.2), "contrastive" or
            "proxy_anchor".
        weight: λ of the distillation term.
        temperature: T of the distillation term.
        tau: temperature of the student's prototypical posterior, on squared distances.
        per_class: labelled images a class in a batch (m).
        classes_per_batch: classes in a batch; 0 for all.
        pool: images without labels in a batch, each shown twice; 0 for none.
        consensus: average the teacher's posterior over the two windows of an image without a label.
        rkd_angle: weight of RKD's angle term against its distance term (2 in the reference code).
        s2sd_delay: share of the training before S2SD's feature term counts.
        shuffle_teacher: ablation: hand the teacher's answers out to the wrong images.
        classifier_smoothing: label smoothing of the cross-entropy baseline.
    """

    method: Method = "hypothesis"
    metric_loss: MetricLoss = "multi_similarity"
    weight: float = 1.0
    temperature: float = 1.0
    tau: float = 0.1
    per_class: int = 5
    classes_per_batch: int = 0
    pool: int = 48
    consensus: bool = True
    rkd_angle: float = 2.0
    s2sd_delay: float = 0.2
    shuffle_teacher: bool = False
    classifier_smoothing: float = 0.1

    def __post_init__(self) -> None:
        check_finite("distill", self)
        check_choice("distill", "method", self.method, Method)
        check_choice("distill", "metric_loss", self.metric_loss, MetricLoss)
        check_at_least("distill", self, weight=0, per_class=2, classes_per_batch=0, pool=0, rkd_angle=0)
        if self.temperature <= 0 or self.tau <= 0:
            raise ConfigError(
                f"distill.temperature and distill.tau must be above 0, got {self.temperature!r} and "
                f"{self.tau!r}"
            )
        check_share("distill", self, "classifier_smoothing", "s2sd_delay")


@dataclass(kw_only=True, slots=True, frozen=True)
class EvaluateConfig:
    """What is measured after training.

    Attributes:
        baselines: also train the cross-entropy classifier and the student without distillation.
        neighbours: k of the k-NN vote.
        new_class_shots: K of the new-class test.
        fuse: how the views of a stone are joined: "max", "mean" or "concat".
        false_unknown: share of known images that may be called unknown.
        resamples: bootstrap resamples of the intervals.
        workers: processes that load training images.
    """

    baselines: bool = True
    neighbours: int = 5
    new_class_shots: int = 5
    fuse: Fusion = "max"
    false_unknown: float = 0.05
    resamples: int = 2000
    workers: int = 0

    def __post_init__(self) -> None:
        check_choice("evaluate", "fuse", self.fuse, Fusion)
        check_at_least("evaluate", self, neighbours=1, new_class_shots=1, resamples=100, workers=0)
        if not 0 < self.false_unknown <= 0.5:
            raise ConfigError(f"evaluate.false_unknown is {self.false_unknown!r}; it must lie in (0, 0.5]")


@dataclass(kw_only=True, slots=True, frozen=True)
class KidneyConfig:
    """One run: teacher, student and baselines on one set of images."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
