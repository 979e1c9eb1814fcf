"""The configuration of a run: drives, networks, teacher, distillation, optimizer, trainer, evaluation.

Numbers of the reference code are marked "reference"; everything else is our choice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stillhouse.core.config import check_at_least, check_choice, check_finite
from stillhouse.core.errors import ConfigError
from stillhouse.core.train import OptimConfig, TrainConfig

Student = Literal["distillation_dpo", "vsd", "scorelidar", "single_pass", "single_pass_alone"]
Sampler = Literal["local", "vp_reference", "lidpm"]
PairWeight = Literal["none", "sigmoid"]
PairNoise = Literal["scaled_1.1", "independent"]


def _check(section: str, owner: object, **limits: float) -> None:
    check_finite(section, owner)
    check_at_least(section, owner, **limits)


@dataclass(kw_only=True, slots=True, frozen=True)
class DataConfig:
    """Which drives, and what a training pair is made of.

    Attributes:
        path: folder with `sequences/NN/{velodyne,labels,poses.txt,calib.txt}`; None simulates streets.
        train: names of the sequences to train on (reference: 00–07, 09, 10); empty takes all but the others.
        validation: sequences for the curves during training (reference: 08).
        test: sequences that are scored at the end.
        static: keep only points whose label says that they stand still, where there are labels.
        icp: refine the poses by ICP before the map is merged.
        points: partial points n (reference: 18000).
        factor: completed points are n × factor (reference: 10).
        max_range: metres around the sensor (reference: 50).
        min_range: points nearer than this are dropped, metres (reference: 3.5).
        map_voxel: the map keeps one point a voxel of this side, metres (reference: 0.1).
        augment: rotate, tilt, scale and mirror both clouds of a pair.
        cache: folder where maps of sequences are kept; None makes them anew each run.
        streets: simulator only: number of drives to train on.
        test_streets: simulator only: number of drives that are held out.
        scans: simulator only: sweeps of a drive.
        rings: simulator only: lasers.
        azimuths: simulator only: rays of one laser in a turn.
        map_rays: simulator only: rays from each place on the drive that make the exact map.
        simulate_seed: simulator only: which streets.
        workers: processes that load training pairs.
    """

    path: str | None = None
    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    static: bool = True
    icp: bool = False
    points: int = 400
    factor: int = 10
    max_range: float = 20.0
    min_range: float = 3.5
    map_voxel: float = 0.1
    augment: bool = True
    cache: str | None = None
    streets: int = 24
    test_streets: int = 4
    scans: int = 4
    rings: int = 32
    azimuths: int = 512
    map_rays: int = 32_768
    simulate_seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        _check("data", self, points=16, factor=1, min_range=0, streets=1, test_streets=1, scans=1)
        _check("data", self, rings=2, azimuths=8, map_rays=64, simulate_seed=0, workers=0)
        if not self.map_voxel > 0:
            raise ConfigError(f"data.map_voxel is {self.map_voxel!r}; it must be above 0 metres")
        if not self.min_range < self.max_range:
            raise ConfigError(
                f"data.max_range is {self.max_range!r}; it must be above data.min_range ({self.min_range!r})"
            )
        for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
            both = sorted(set(getattr(self, first)) & set(getattr(self, second)))
            if both:
                raise ConfigError(f"data.{first} and data.{second} both hold sequence {both[0]!r}")


@dataclass(kw_only=True, slots=True, frozen=True)
class ModelConfig:
    """The networks.

    Attributes:
        channels: widths of the noise net: stem, encoder stages, decoder stages (reference: 32, 32, 64, 128,
            256, 256, 128, 96, 96).
        voxel: side of the finest voxel, metres (reference: 0.05).
        point_offsets: show the networks where in its voxel a point lies; for voxels as coarse as a CPU's
            (the reference does not).
        refine_channels: widths of the refinement net; empty trains none.
        refine_factor: points that the refinement net makes of one (reference: 6).
        single_channels: widths of the single-pass network.
        batch_size: pairs in a batch of each process (reference: 2 for the teacher, 1 after).
    """

    channels: tuple[int, ...] = (16, 16, 32, 64, 64, 32, 24)
    voxel: float = 0.25
    point_offsets: bool = True
    refine_channels: tuple[int, ...] = ()
    refine_factor: int = 6
    single_channels: tuple[int, ...] = (16, 16, 24, 32, 32, 24, 16)
    batch_size: int = 2

    def __post_init__(self) -> None:
        _check("model", self, refine_factor=1, batch_size=1)
        if not self.voxel > 0:
            raise ConfigError(f"model.voxel is {self.voxel!r}; it must be above 0 metres")
        for name in ("channels", "refine_channels", "single_channels"):
            widths = getattr(self, name)
            if name == "refine_channels" and not widths:
                continue
            if len(widths) < 3 or len(widths) % 2 == 0 or min(widths) < 1:
                raise ConfigError(
                    f"model.{name} is {widths!r}; give the stem, then as many encoder as decoder widths, "
                    "for example (16, 16, 32, 64, 64, 32, 24)"
                )


@dataclass(kw_only=True, slots=True, frozen=True)
class TeacherConfig:
    """How the teacher is trained: LiDiff's local point diffusion.

    Attributes:
        weights: folder of a finished teacher, or None to train one.
        steps: optimizer steps.
        lr: learning rate (reference: Adam 1e-4, halved every five epochs).
        timesteps: T of the noise schedule (reference: 1000).
        beta_start: first β (reference: 3.5e-5).
        beta_end: last β (reference: 0.007).
        drop_condition: share of the pairs that are trained without condition (reference: 0.1 a batch).
        moment_weight: weight of the regulariser of mean and standard deviation (reference: 5).
        preference_steps: steps of Diffusion-DPO fine-tuning after that; 0 for none.
        preference_beta: β·T of its sigmoid (our reading).
        preference_lr: its learning rate.
        refine_steps: steps of the refinement net, where `model.refine_channels` asks for one.
    """

    weights: str | None = None
    steps: int = 1500
    lr: float = 2e-3
    timesteps: int = 1000
    beta_start: float = 3.5e-5
    beta_end: float = 0.007
    drop_condition: float = 0.1
    moment_weight: float = 5.0
    preference_steps: int = 0
    preference_beta: float = 1.0
    preference_lr: float = 1e-4
    refine_steps: int = 0

    def __post_init__(self) -> None:
        _check("teacher", self, steps=1, timesteps=2, moment_weight=0, preference_steps=0, refine_steps=0)
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ConfigError(
                f"teacher.beta_start is {self.beta_start!r} and teacher.beta_end {self.beta_end!r}; they "
                "must ascend within (0, 1)"
            )
        if not 0 <= self.drop_condition < 1:
            raise ConfigError(f"teacher.drop_condition is {self.drop_condition!r}; it must lie in [0, 1)")
        for name in ("lr", "preference_beta", "preference_lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"teacher.{name} is {getattr(self, name)!r}; it must be above 0")


@dataclass(kw_only=True, slots=True, frozen=True)
class DistillConfig:
    """Which students, and how they learn from the teacher.

    Attributes:
        students: which are trained, in this order; the first is the one that is saved as the artefact. None
            trains the teacher alone, which is the artefact then.
            "distillation_dpo", "vsd" and "scorelidar" are few-step copies of the teacher; "single_pass" is
            the light network with the teacher's help, "single_pass_alone" the same without.
        steps: optimizer steps of a few-step student.
        lr: its learning rate (reference: SGD 1e-5; ours is for Adam).
        critic_lr: learning rate of the auxiliary score networks.
        critic_ratio: updates of the auxiliary networks for one of the student (reference: 1).
        student_steps: sampler steps of the student while it is trained (reference: 1).
        loser_weight: λ of the loser (reference: 1, which diverges in closed form; 0 is plain VSD).
        anchor: weight of an additional VSD term on the winner.
        pair_weight: "none", or "sigmoid" of the pair's gap.
        pair_noise: "scaled_1.1" (reference: the loser starts from the same noise, a tenth larger) or
            "independent".
        times: lowest and highest index at which scores are compared; empty takes all (reference).
        score_guidance: w of the teacher's guidance in the score difference (reference: 1, none).
        scene: weight of ScoreLiDAR's scene term (reference: 0.5).
        point: weight of its point term (reference: 0.01).
        data_weight: weight of the Chamfer distance to the ground truth, beside the score term; 0 for none.
        single_steps: optimizer steps of a single-pass network.
        single_lr: its learning rate.
        single_weight: weight of the teacher's terms in a single-pass student.
        single_terms: what the teacher gives it: "denoise" (its denoiser pulls the points onto surfaces),
            "completion" (its own completion is a second target), or both.
    """

    students: tuple[Student, ...] = ("distillation_dpo", "vsd", "single_pass", "single_pass_alone")
    steps: int = 300
    lr: float = 1e-4
    critic_lr: float = 2e-4
    critic_ratio: int = 1
    student_steps: int = 1
    loser_weight: float = 0.25
    anchor: float = 0.0
    pair_weight: PairWeight = "none"
    pair_noise: PairNoise = "scaled_1.1"
    times: tuple[int, ...] = ()
    score_guidance: float = 1.0
    scene: float = 0.5
    point: float = 0.01
    data_weight: float = 0.0
    single_steps: int = 800
    single_lr: float = 2e-3
    single_weight: float = 0.5
    single_terms: tuple[str, ...] = ("denoise",)

    def __post_init__(self) -> None:
        for student in self.students:
            check_choice("distill", "students", student, Student)
        if len(set(self.students)) < len(self.students):
            raise ConfigError(f"distill.students is {self.students!r}; name each once")
        check_choice("distill", "pair_weight", self.pair_weight, PairWeight)
        check_choice("distill", "pair_noise", self.pair_noise, PairNoise)
        _check("distill", self, steps=1, critic_ratio=1, student_steps=1, loser_weight=0, anchor=0)
        _check("distill", self, scene=0, point=0, data_weight=0, single_steps=1, single_weight=0)
        _check("distill", self, score_guidance=0)
        if self.times and not (len(self.times) == 2 and 0 <= self.times[0] < self.times[1]):
            raise ConfigError(f"distill.times is {self.times!r}; give two ascending indices, or none")
        if not self.single_terms or not set(self.single_terms) <= {"denoise", "completion"}:
            raise ConfigError(
                f"distill.single_terms is {self.single_terms!r}; name 'denoise', 'completion' or both"
            )
        for name in ("lr", "critic_lr", "single_lr"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"distill.{name} is {getattr(self, name)!r}; it must be above 0")


@dataclass(kw_only=True, slots=True, frozen=True)
class EvaluateConfig:
    """What is measured after training, and how the saved student completes.

    Attributes:
        sampler: "local" (exact for an ideal network at any number of steps), "vp_reference" (DPM-Solver++ as
            the reference code has it) or "lidpm".
        teacher_steps: numbers of steps at which the teacher is scored (reference: 50).
        student_steps: numbers of steps at which few-step students are scored (reference: 8).
        teacher_guidance: w of the teacher's guidance; 1 is none (reference: 6).
        student_guidance: w of the students' (reference: 3.5).
        steps: steps of the saved student when it completes a scan.
        scans: scans of each test drive that are scored.
        convention: "correct" or "reference" metrics.
        levels: voxel sides of the completion IoU, metres.
        resamples: bootstrap resamples of the intervals.
    """

    sampler: Sampler = "local"
    teacher_steps: tuple[int, ...] = (50, 8, 4, 2, 1)
    student_steps: tuple[int, ...] = (8, 4, 2, 1)
    teacher_guidance: float = 2.0
    student_guidance: float = 1.0
    steps: int = 2
    scans: int = 2
    convention: Literal["correct", "reference"] = "correct"
    levels: tuple[float, ...] = (0.5, 0.2, 0.1)
    resamples: int = 2000

    def __post_init__(self) -> None:
        check_choice("evaluate", "sampler", self.sampler, Sampler)
        if self.convention not in ("correct", "reference"):
            raise ConfigError(f"evaluate.convention is {self.convention!r}; allowed: 'correct', 'reference'")
        _check("evaluate", self, teacher_guidance=0, student_guidance=0, steps=1, scans=1, resamples=100)
        for name in ("teacher_steps", "student_steps"):
            steps = getattr(self, name)
            if not steps or min(steps) < 1:
                raise ConfigError(f"evaluate.{name} is {steps!r}; give numbers of steps, each at least 1")
        if not self.levels or min(self.levels) <= 0:
            raise ConfigError(f"evaluate.levels is {self.levels!r}; give voxel sides above 0 metres")


@dataclass(kw_only=True, slots=True, frozen=True)
class LidarConfig:
    """One run: teacher and students on one set of drives."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
