"""The configuration of a run: data, student, teacher, distillation, optimizer, trainer, evaluation.

What HAD's authors state is marked so (HAD); what comes from the lineage whose tables it is compared with
(Caduceus, HyenaDNA) is marked (lineage); all else is our choice, since layer counts, widths, weights, mask
ratio, learning rate and window of HAD were not seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from stillhouse.core.config import check_at_least, check_choice, check_finite, check_share
from stillhouse.core.errors import ConfigError
from stillhouse.core.train import OptimConfig, TrainConfig

from .student import StudentConfig
from .teacher import KmerTransformerConfig

Method = Literal["had", "distill_only", "reconstruct_only", "masked_only", "logit_kd", "none"]
TeacherKind = Literal["trained", "random", "shuffled"]
Reduction = Literal["mean", "sum"]
Task = Literal["donor", "acceptor", "regions", "species"]

ALIGNS: tuple[Method, ...] = ("had", "distill_only", "masked_only")
RECONSTRUCTS: tuple[Method, ...] = ("had", "reconstruct_only", "masked_only")


def _choices(section: str, owner: object, **allowed: object) -> None:
    for name, options in allowed.items():
        check_choice(section, name, getattr(owner, name), options)


@dataclass(kw_only=True, slots=True, frozen=True)
class DataConfig:
    """Which sequences, and how they are cut.

    Attributes:
        fasta: genomes, plain, gz or bgzf; none: a simulated genome.
        annotation: GFF3 of each genome, or "-" where it has none, in their order; probes are cut from them.
        names: a name for each genome; none: that of its file.
        bed: intervals to pre-train on, instead of everything that is not held out.
        length: characters of a pre-training window, bp (1,024 in the lineage's short recipe).
        stride: characters between the starts of neighbouring windows; None: `length`, no overlap.
        block: genomes are held out in blocks of about this length, bp; shorter records whole. Where blocks of
            different parts meet, a window's length is left out.
        validation: share of the blocks that is held out to choose settings on.
        test: share of the blocks that is held out to report on.
        split_seed: which blocks.
        reverse_complement: share of the windows that are turned to the other strand, before both
            tokenisations (lineage: 0.5).
        letters: smallest share of nucleotides, N not counted, of a window that is trained on.
        simulate_kilobases: simulator only: size of each of the two genomes, kb.
        simulate_seed: simulator only: which genomes.
        workers: processes that cut windows.
    """

    fasta: tuple[str, ...] = ()
    annotation: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    bed: str | None = None
    length: int = 512
    stride: int | None = None
    block: int = 20_000
    validation: float = 0.1
    test: float = 0.2
    split_seed: int = 0
    reverse_complement: float = 0.5
    letters: float = 0.5
    simulate_kilobases: int = 200
    simulate_seed: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        check_finite("data", self)
        check_at_least("data", self, length=24, block=4_000, simulate_kilobases=40, workers=0)
        check_at_least("data", self, split_seed=0, simulate_seed=0)
        check_share("data", self, "validation", "test")
        check_share("data", self, "reverse_complement", "letters", ends=(True, True))
        if self.stride is not None and self.stride < 1:
            raise ConfigError(f"data.stride is {self.stride!r}; it must be at least 1, or None")
        if self.validation + self.test >= 1 or self.test == 0:
            raise ConfigError(
                f"data.validation is {self.validation!r} and data.test {self.test!r}; test must be above 0 "
                "and both together below 1"
            )
        if 2 * self.length >= self.block:
            raise ConfigError(
                f"data.length is {self.length!r} and data.block {self.block!r}; a block must be longer than "
                "two windows"
            )
        for name in ("annotation", "names"):
            given = getattr(self, name)
            if given and len(given) != len(self.fasta):
                raise ConfigError(
                    f"data.{name} has {len(given)} entries for {len(self.fasta)} in data.fasta; give one "
                    "for each, in their order"
                )


@dataclass(kw_only=True, slots=True, frozen=True)
class TeacherConfig:
    """The teacher: one that is trained here, or one that is there already.

    Attributes:
        source: None trains a k-mer Transformer on the training tiles. Otherwise a folder that an earlier run
            left as `teacher`, or a folder or name of a masked language model of Hugging Face (NTv2).
        trust_remote_code: run the code that comes with a Hugging Face model; NTv2 of the hub needs it.
        width, depth, heads, mlp_ratio, dropout, tied, k: the network that is trained here.
        steps: its steps.
        batch: its windows a step.
        length: characters of its windows; None: `data.length`.
        lr: its learning rate.
        weight_decay: its weight decay.
        warmup: share of its steps over which the rate rises.
        ratio: share of its tokens that are hidden (BERT: 0.15).
    """

    source: str | None = None
    trust_remote_code: bool = False
    width: int = 128
    depth: int = 4
    heads: int = 4
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    tied: bool = True
    k: int = 6
    steps: int = 400
    batch: int = 32
    length: int | None = None
    lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    ratio: float = 0.15

    def __post_init__(self) -> None:
        check_finite("teacher", self)
        check_at_least("teacher", self, steps=1, batch=1, weight_decay=0)
        check_share("teacher", self, "warmup")
        check_share("teacher", self, "ratio", ends=(False, True))
        if self.lr <= 0:
            raise ConfigError(f"teacher.lr is {self.lr!r}; it must be above 0")
        if self.length is not None and self.length < 24:
            raise ConfigError(f"teacher.length is {self.length!r}; it must be at least 24, or None")
        self.network()

    def network(self) -> KmerTransformerConfig:
        """Sizes of the network that is trained here."""
        return KmerTransformerConfig(
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_ratio=self.mlp_ratio,
            dropout=self.dropout,
            tied=self.tied,
            k=self.k,
        )


@dataclass(kw_only=True, slots=True, frozen=True)
class DistillConfig:
    """How the student learns.

    Attributes:
        method: "had" (alignment of visible tokens and reconstruction of masked ones), "distill_only",
            "reconstruct_only", "masked_only" (alignment of the masked tokens and reconstruction: the paper's
            ablation), "logit_kd" (the teacher's nucleotide distributions on unmasked windows) or "none"
            (random weights).
        teacher: "trained"; "random" (its architecture with fresh weights) and "shuffled" (its answers for
            other tokens) are controls.
        teacher_view: what the teacher sees: "visible" tokens alone, or the "full" window (our reading:
            "visible", which cannot leak what is masked).
        batch: windows a step.
        mask_ratio: share of the teacher's tokens that are masked (not seen for HAD; 0.15 in the lineage).
        reconstruct_weight: λ of the reconstruction term (not seen for HAD).
        reduction: over the teacher's channels, of the squared error: "mean" or "sum"; a factor of the
            teacher's width in λ (not seen for HAD).
        target_norm: LayerNorm without parameters on the teacher's features.
        layers: which hidden states of the teacher are targets; −1 is the last (HAD), several are averaged
            over, each with a projector of its own.
        projector: "linear" or "mlp", from the student's width to the teacher's.
        decoder_depth, decoder_width, decoder_heads: the reconstruction decoder; width None: the student's.
        gradient_every: steps between measurements of both terms' gradient norms at the student's features,
            logged as gradient_align and gradient_reconstruct; 0 for none.
        temperature: T of "logit_kd" (caduceus-distill: 4).
        soft_weight: a of "logit_kd": a · KL + (1 − a) · hard loss (caduceus-distill: 0.8).
        compat: "none": the hard loss of "logit_kd" is on masked characters, read in a second pass, and KL has
            its factor T². "reference": as caduceus-distill has it, one pass, the hard loss on *unmasked*
            characters (a copying task) and T² only where a < 1.
    """

    method: Method = "had"
    teacher: TeacherKind = "trained"
    teacher_view: Literal["visible", "full"] = "visible"
    batch: int = 32
    mask_ratio: float = 0.15
    reconstruct_weight: float = 1.0
    reduction: Reduction = "mean"
    target_norm: bool = True
    layers: tuple[int, ...] = (-1,)
    projector: Literal["linear", "mlp"] = "linear"
    decoder_depth: int = 1
    decoder_width: int | None = None
    decoder_heads: int = 2
    gradient_every: int = 50
    temperature: float = 4.0
    soft_weight: float = 0.8
    compat: Literal["none", "reference"] = "none"

    def __post_init__(self) -> None:
        check_finite("distill", self)
        _choices(
            "distill",
            self,
            method=Method,
            teacher=TeacherKind,
            teacher_view=Literal["visible", "full"],
            reduction=Reduction,
            projector=Literal["linear", "mlp"],
            compat=Literal["none", "reference"],
        )
        check_at_least("distill", self, batch=1, reconstruct_weight=0, decoder_depth=1, decoder_heads=1)
        check_at_least("distill", self, gradient_every=0)
        check_share("distill", self, "mask_ratio", ends=(False, False))
        check_share("distill", self, "soft_weight", ends=(True, True))
        if self.temperature <= 0:
            raise ConfigError(f"distill.temperature is {self.temperature!r}; it must be above 0")
        if not self.layers:
            raise ConfigError("distill.layers is empty; name at least one, −1 is the last")

    @property
    def aligns(self) -> bool:
        """Whether the student's features are compared with the teacher's."""
        return self.method in ALIGNS

    @property
    def reconstructs(self) -> bool:
        """Whether a decoder reconstructs masked characters."""
        return self.method in RECONSTRUCTS

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher is asked at all."""
        return self.aligns or self.method == "logit_kd"


@dataclass(kw_only=True, slots=True, frozen=True)
class EvaluateConfig:
    """What is measured after training: linear probes on frozen features.

    Attributes:
        tasks: "donor", "acceptor", "regions", "species"; those without annotation or a second genome are
            left out with a note.
        length: characters of a window of "regions" and "species", bp.
        site_length: the same of "donor" and "acceptor", whose site is in the middle.
        decoys: negatives of the splice sites: "easy", "matched" or "hard"; see `data.splice_sites`.
        limit: most windows of a class and genome.
        pool: how features become one vector in "regions": the "mean" of the window, or of its "center". In
            "species" it is always the mean of the window.
        middle: characters of that center; the class is that of the 64 in the middle.
        site_pool, site_middle: the same in "donor" and "acceptor"; hard decoys differ from sites in the
            42 characters about the site.
        baselines: also show random weights, and train a student without the teacher (reconstruction alone).
        resamples: bootstrap resamples of the intervals.
        batch: windows embedded at once.
    """

    tasks: tuple[Task, ...] = ("donor", "acceptor", "regions", "species")
    length: int = 256
    site_length: int = 128
    decoys: Literal["easy", "matched", "hard"] = "hard"
    limit: int = 1500
    pool: Literal["mean", "center"] = "center"
    middle: int = 64
    site_pool: Literal["mean", "center"] = "center"
    site_middle: int = 42
    baselines: bool = True
    resamples: int = 1000
    batch: int = 64

    def __post_init__(self) -> None:
        pools = Literal["mean", "center"]
        _choices("evaluate", self, decoys=Literal["easy", "matched", "hard"], pool=pools, site_pool=pools)
        for task in self.tasks:
            if task not in get_args(Task):
                raise ConfigError(
                    f"evaluate.tasks has {task!r}; allowed: {', '.join(map(repr, get_args(Task)))}"
                )
        check_at_least("evaluate", self, length=24, site_length=24, limit=10, resamples=100, batch=1)
        check_at_least("evaluate", self, middle=1, site_middle=1)


@dataclass(kw_only=True, slots=True, frozen=True)
class GenomicConfig:
    """One run: teacher, student and baselines on one corpus.

    `model` is the student's network, see `stillhouse.genomic.student.StudentConfig`.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    def __post_init__(self) -> None:
        inner = self.distill.decoder_width or self.model.width * (2 if self.model.rc_equivariant else 1)
        if self.distill.reconstructs and inner % (2 * self.distill.decoder_heads):
            raise ConfigError(
                f"distill.decoder_width is {inner} and distill.decoder_heads {self.distill.decoder_heads}; "
                "their quotient must be an even integer"
            )
        depth = self.teacher.depth
        if self.teacher.source is None and self.distill.needs_teacher:
            for layer in self.distill.layers:
                if not -depth - 1 <= layer <= depth:
                    raise ConfigError(
                        f"distill.layers has {layer}; the teacher has the embeddings 0 and the blocks "
                        f"1 … {depth} (or −1 … {-depth - 1})"
                    )
