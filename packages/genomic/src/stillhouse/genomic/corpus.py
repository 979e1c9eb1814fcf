"""What a run reads: genomes, their parts that never touch, windows to train on, tasks to probe with.

Everything follows from one cut of the genomes into blocks. Teacher and student are trained on the training
blocks alone; a probe is fitted on windows of training blocks and scored on windows of validation or test
blocks, which no network has seen. Tasks are cut from each part by itself, so that no window reaches from one
part into another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from stillhouse.core.errors import DataError

from .config import DataConfig, EvaluateConfig, GenomicConfig, Task
from .data import (
    Fasta,
    Feature,
    Genome,
    Interval,
    Sequences,
    SimulateConfig,
    WindowDataset,
    check_disjoint,
    genome_lengths,
    known_tiles,
    read_bed,
    read_genome,
    regions,
    simulate_genome,
    species,
    splice_sites,
    split_records,
    tile,
)
from .scoring import ProbeTask

Part = Literal["train", "validation", "test"]
_USE = {"train": "train on", "validation": "choose settings on", "test": "report on"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """Genomes, cut.

    Attributes:
        source: the genomes in memory; one genome without annotation stays on disk.
        parts: part → its intervals, on records named as `genome_lengths` names them; no two parts share a
            base.
        simulated: whether the genomes are simulated.
        config: how it was cut.
        notes: what a reader has to know.
    """

    source: Fasta | tuple[Genome, ...]
    parts: dict[str, list[Interval]]
    simulated: bool
    config: DataConfig
    notes: tuple[str, ...] = ()

    @property
    def genomes(self) -> tuple[Genome, ...]:
        """The genomes in memory."""
        return () if isinstance(self.source, Fasta) else self.source

    @property
    def name(self) -> str:
        """For people."""
        if self.simulated:
            return "two simulated genomes"
        if isinstance(self.source, Fasta):
            return self.source.path.name
        return ", ".join(genome.name for genome in self.source)

    def training(self, length: int | None = None) -> WindowDataset:
        """Windows of the training blocks, at random places and on either strand.

        A tile is two windows long and begins one window (`data.stride`) after the one before it, so that
        k-mers are met in every frame.

        Args:
            length: characters of a window; None: `data.length`.

        Raises:
            DataError: no window has enough nucleotides.
        """
        size = self.config.length if length is None else length
        tiles = self.tiles("train", 2 * size, self.config.stride or size)
        if not tiles:
            raise DataError(
                f"{self.name}: no training block holds {2 * size} bp with {self.config.letters:.0%} "
                "nucleotides; give more sequence, or lower data.length"
            )
        return WindowDataset(
            self.source,
            tiles,
            size,
            reverse_complement=self.config.reverse_complement,
            max_unknown=1 - self.config.letters,
        )

    def tiles(self, part: Part, length: int, stride: int | None = None) -> list[Interval]:
        """Tiles of a part that hold enough nucleotides."""
        cut = tile(self.parts[part], length, stride)
        return known_tiles(self.source, cut, max_unknown=1 - self.config.letters)

    def counts(self) -> dict[str, dict[str, int]]:
        """Part → {"blocks", "bases", "records"}."""
        return {
            part: {
                "blocks": len(blocks),
                "bases": sum(len(block) for block in blocks),
                "records": len({block.record for block in blocks}),
            }
            for part, blocks in self.parts.items()
        }

    def summary(self) -> str:
        """One line for people."""
        bases = {part: count["bases"] / 1e6 for part, count in self.counts().items()}
        shown = ", ".join(f"{size:.2f} Mb to {_USE[part]}" for part, size in bases.items() if size)
        return f"{self.name}: {shown}"

    def cut(self, part: Part) -> tuple[Genome, ...]:
        """The genomes cut down to one part; an interval of it is a record. Genomes with nothing left go."""
        found = []
        for genome in self.genomes:
            prefix = "" if len(self.genomes) == 1 else f"{genome.name}/"
            own = [
                replace(block, record=block.record.removeprefix(prefix))
                for block in self.parts[part]
                if block.record.startswith(prefix) and block.record.removeprefix(prefix) in genome.records
            ]
            if own:
                found.append(restrict(genome, own))
        return tuple(found)


def read_corpus(config: GenomicConfig) -> Corpus:
    """Read (or simulate) the genomes of a configuration and cut them into parts.

    Args:
        config: `data`, and the lengths of windows elsewhere, which are left out where parts meet.

    Raises:
        DataError: files that cannot be used, or genomes too small to cut.
    """
    data = config.data
    guard = max(data.length, config.evaluate.length, config.teacher.length or 0)
    source: Fasta | tuple[Genome, ...]
    if not data.fasta:
        source = simulated(data)
    elif len(data.fasta) == 1 and set(data.annotation) <= {"-"} and not _in_memory(Path(data.fasta[0])):
        source = Fasta(data.fasta[0])
    else:
        source = _read_all(data)
    parts = _parts(source, data, guard)
    notes = []
    if data.bed is not None:
        wanted = read_bed(data.bed, _lengths(source))
        before = sum(map(len, parts["train"]))
        parts["train"] = intersection(parts["train"], wanted)
        if not parts["train"]:
            raise DataError(f"data.bed: {data.bed} holds nothing of the training blocks; give more rows")
        share = sum(map(len, parts["train"])) / before
        notes.append(f"trained on the {share:.1%} of the training blocks that {data.bed} names")
    check_disjoint(parts)
    return Corpus(source=source, parts=parts, simulated=not data.fasta, config=data, notes=tuple(notes))


def _lengths(source: Fasta | tuple[Genome, ...]) -> dict[str, int]:
    return dict(source.lengths) if isinstance(source, Fasta) else genome_lengths(source)


def _parts(source: Fasta | tuple[Genome, ...], data: DataConfig, guard: int) -> dict[str, list[Interval]]:
    """Each genome cut by itself, so that every part has its share of every genome."""
    whole = {"": _lengths(source)}
    if not isinstance(source, Fasta) and len(source) > 1:
        whole = {f"{genome.name}/": genome.lengths for genome in source}
    parts: dict[str, list[Interval]] = {"train": [], "validation": [], "test": []}
    for prefix, lengths in whole.items():
        _enough(prefix, lengths, source, data, guard)
        cut = split_records(
            lengths,
            by="block",
            validation=data.validation,
            test=data.test,
            block=_block(data.block, guard),
            guard=guard,
            seed=data.split_seed,
        )
        for part, blocks in cut.items():
            parts[part] += [replace(block, record=prefix + block.record) for block in blocks]
    return parts


def _block(block: int, guard: int) -> int:
    return max(block, 2 * guard + 1)


def _enough(
    prefix: str,
    lengths: dict[str, int],
    source: Fasta | tuple[Genome, ...],
    data: DataConfig,
    guard: int,
) -> None:
    """Refuse a genome of fewer blocks than parts.

    Raises:
        DataError: naming it, and what helps.
    """

    def count(size: int) -> int:
        return sum(max(1, round(length / size)) for length in lengths.values())

    wanted = 2 + (data.validation > 0)
    block, least = _block(data.block, guard), _block(4_000, guard)  # data.block is at least 4,000
    if count(block) >= wanted:
        return
    names = [source.path.name] if isinstance(source, Fasta) else [genome.name for genome in source]
    at = names.index(prefix.removesuffix("/")) if prefix else 0
    name = data.fasta[at] if data.fasta else names[at]
    records = f"{len(lengths)} record{'' if len(lengths) == 1 else 's'}"
    if count(least) >= wanted:
        remedy = f"set data.block to {least}"
    elif data.validation > 0 and count(least) >= wanted - 1:
        remedy = f"set data.block to {least} and data.validation to 0"
    else:
        remedy = f"give at least {wanted * block:,} bp" + (", or leave it out" if len(names) > 1 else "")
    raise DataError(
        f"{name}: {sum(lengths.values()):,} bp in {records} are too few to be cut into {wanted} parts by "
        f"blocks of {block:,} bp; {remedy}"
    )


def simulated(data: DataConfig) -> tuple[Genome, ...]:
    """Two simulated genomes that differ in composition, codon use and introns."""
    length = 20_000
    records = max(2, data.simulate_kilobases * 1000 // length)
    first = SimulateConfig(name="north", records=records, record_length=length, seed=2 * data.simulate_seed)
    second = replace(
        first, name="south", seed=2 * data.simulate_seed + 1, gc=0.36, introns=4.0, codon_bias=1.5
    )
    return simulate_genome(first), simulate_genome(second)


def _in_memory(path: Path) -> bool:
    """Whether a file must be read as a whole: gzip that is no bgzf, and GenBank."""
    return path.suffix.lower() in (".gz", ".gb", ".gbk", ".gbff", ".genbank")


def _read_all(data: DataConfig) -> tuple[Genome, ...]:
    annotation = data.annotation or ("-",) * len(data.fasta)
    names = data.names or (None,) * len(data.fasta)
    found = tuple(
        read_genome(fasta, None if given == "-" else given, name)
        for fasta, given, name in zip(data.fasta, annotation, names, strict=True)
    )
    if len({genome.name for genome in found}) != len(found):
        raise DataError(
            f"data.fasta has two genomes called {found[0].name!r}; give each another name in data.names"
        )
    return found


def intersection(blocks: Sequence[Interval], wanted: Sequence[Interval]) -> list[Interval]:
    """What both lists of intervals cover, strands aside, in order and without repeats.

    Example:
        >>> rows = [Interval("a", 5, 8), Interval("a", 7, 20)]
        >>> [str(i) for i in intersection([Interval("a", 0, 10)], rows)]
        ['a:5-10']
    """
    merged: dict[str, list[list[int]]] = {}
    for item in sorted(wanted):
        runs = merged.setdefault(item.record, [])
        if runs and item.start <= runs[-1][1]:
            runs[-1][1] = max(runs[-1][1], item.end)
        else:
            runs.append([item.start, item.end])
    return [
        Interval(block.record, max(block.start, start), min(block.end, end))
        for block in blocks
        for start, end in merged.get(block.record, ())
        if max(block.start, start) < min(block.end, end)
    ]


def restrict(genome: Genome, blocks: Sequence[Interval]) -> Genome:
    """A genome cut down to intervals, each a record of its own.

    Features are cut off at the ends of their interval: what lies outside is gone, and a gene that reaches
    over the end still covers what it covered. Where the end of an interval cuts an exon, that end is no
    splice site, and no window of a task is centred there, since it would reach over the end of the record.

    Args:
        genome: the genome.
        blocks: intervals that do not overlap.

    Returns:
        Records named "record:start-end"; IDs of features are marked with the start of their interval.
    """
    by_record: dict[str, list[Feature]] = {}
    for feature in genome.features:
        by_record.setdefault(feature.record, []).append(feature)
    records, features = {}, []
    for block in blocks:
        name, mark = str(block), f"@{block.start}"
        records[name] = genome.records[block.record][block.start : block.end]
        for feature in by_record.get(block.record, ()):
            start, end = max(feature.start, block.start), min(feature.end, block.end)
            if start < end:
                cut = replace(
                    feature,
                    record=name,
                    start=start - block.start,
                    end=end - block.start,
                    id=feature.id + mark if feature.id else "",
                    parents=tuple(parent + mark for parent in feature.parents),
                )
                features.append(cut)
    return replace(genome, records=records, features=tuple(features))


def probe_tasks(
    corpus: Corpus,
    settings: EvaluateConfig,
    *,
    seed: int,
    part: Part = "test",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[ProbeTask], list[str]]:
    """Cut the tasks of a configuration: windows of training blocks to fit on, of another part to score on.

    Args:
        corpus: the corpus.
        settings: which tasks, windows and decoys.
        seed: of the choice of windows and decoys.
        part: where to score: "test", or "validation" to choose settings.
        progress: called as `progress(done, total)`, in tasks.

    Returns:
        The tasks, and a sentence for each that the corpus does not allow.
    """
    found, left_out = [], []
    for done, name in enumerate(settings.tasks):
        try:
            sides = [_sequences(corpus.cut(side), name, settings, seed) for side in ("train", part)]
        except DataError as error:
            left_out.append(f"no task {name!r}: {error}")
            continue
        fit, score = sides[0], without_copies(*sides)
        if len(np.unique(score.labels)) < len(score.classes):
            left_out.append(f"no task {name!r}: its windows to score on are copies of windows to fit on")
            continue
        site = name in ("donor", "acceptor")
        found.append(
            ProbeTask(
                name=f"{name}, {settings.decoys} decoys" if site else name,
                fit=fit,
                score=score,
                pool=settings.site_pool if site else "mean" if name == "species" else settings.pool,
                middle=settings.site_middle if site else settings.middle,
                note=_NOTES.get(settings.decoys if site else name, ""),
            )
        )
        if progress is not None:
            progress(done + 1, len(settings.tasks))
    return found, left_out


def without_copies(fit: Sequences, score: Sequences, *, word: int = 32) -> Sequences:
    """What is left to score on without windows that repeat a stretch of a window that a probe was fitted on.

    Genomes hold copies of genes; a window whose copy was fitted on says nothing about others.

    Args:
        fit: windows to fit on.
        score: windows to score on, read on the same strand.
        word: length of a stretch that counts as a copy, bp; stretches with N do not.
    """
    known = np.unique(_words(fit.sequences, word))
    found = _words(score.sequences, word)
    return score.subset(~(np.isin(found, known) & (found != b"")).any(1))


def _words(windows: np.ndarray, word: int) -> np.ndarray:
    """All stretches of windows as byte strings [N, L − word + 1]; those with N are empty."""
    if windows.shape[1] < word:
        return np.zeros((len(windows), 0), f"S{word}")
    cut = np.lib.stride_tricks.sliding_window_view(windows, word, axis=1)
    words = np.ascontiguousarray(cut).view(f"S{word}")[..., 0]
    words[(cut == ord("N")).any(-1)] = b""
    return words


_NOTES = {
    "hard": "each true site against itself with the 42 letters about it drawn anew, column by column over "
    "the sites of its group: a position weight matrix is at chance, what letters say together tells",
    "matched": "against GT or AG elsewhere whose score under a position weight matrix is nearest",
    "easy": "against GT or AG elsewhere",
    "regions": "the 64 letters in the middle lie in one class",
    "species": "windows tile the genomes; composition alone tells much",
}


def _sequences(genomes: Sequence[Genome], name: Task, settings: EvaluateConfig, seed: int) -> Sequences:
    """One task over all genomes of a part that have annotation.

    Raises:
        DataError: there are too few windows.
    """
    annotated = [genome for genome in genomes if genome.features]
    if name == "species":
        wanted = annotated if len(annotated) > 1 else list(genomes)
        if len(wanted) < 2:
            raise DataError("it takes two genomes")
        return species(wanted, length=settings.length, limit=settings.limit, seed=seed)
    if not annotated:
        raise DataError("no genome has annotation; give a GFF3 in data.annotation")
    if name == "regions":
        each = [
            regions(genome, length=settings.length, limit=settings.limit, seed=seed) for genome in annotated
        ]
    else:
        each = [
            splice_sites(
                genome,
                name,
                length=settings.site_length,
                decoys=settings.decoys,
                limit=settings.limit,
                seed=seed,
            )
            for genome in annotated
        ]
    return joined(name, each)


def joined(name: str, each: Sequence[Sequences]) -> Sequences:
    """One task of several with the same classes.

    Raises:
        ValueError: other classes or widths.
    """
    first = each[0]
    if any(
        one.classes != first.classes or one.sequences.shape[1] != first.sequences.shape[1] for one in each
    ):
        raise ValueError("each must have the same classes and width")
    return Sequences(
        name=name,
        sequences=np.concatenate([one.sequences for one in each]),
        lengths=np.concatenate([one.lengths for one in each]),
        labels=np.concatenate([one.labels for one in each]),
        classes=first.classes,
        groups=tuple(group for one in each for group in one.groups),
    )
