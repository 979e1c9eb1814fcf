"""Windows for pre-training: random places in tiles, both strands, a function of a seed alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from .access import Fasta
from .genome import Genome
from .intervals import Interval
from .sequence import Bytes, N, reverse_complement

_DRAWS = 8


class WindowDataset:
    """A window of a tile for each (index, seed); made for `core.train.SeededLoader`.

    A tile longer than the window gives a window at a random place in it, a shorter one is padded with N at
    its end. A window with more than `max_unknown` N is drawn anew, up to eight times in all. The reverse
    complement is taken here, on letters, so that every tokenizer sees the same strand (six-mers of the other
    strand are not the six-mers read backwards).

    Args:
        genomes: genomes in memory, or one `Fasta` on disk. Over several genomes tiles name their record as
            `genome/record` (see `genome_lengths`); the plain name does where only one genome has it.
        tiles: places to take windows from; see `tile`. A tile on `-` is read on that strand.
        length: letters of a window.
        reverse_complement: share of windows that are turned to the other strand, 0 … 1.
        max_unknown: largest share of N (padding counts) that is not drawn anew.

    Raises:
        ValueError: an argument out of range, no tile, or a tile that does not lie on a record.

    Example:
        >>> genome = Genome("toy", {"one": np.frombuffer(b"AAAACCCCGGGG", np.uint8)})
        >>> data = WindowDataset([genome], [Interval("one", 0, 8)], 6, reverse_complement=0)
        >>> bytes(data[(0, 3)]) == bytes(data[(0, 3)]), len(data[(0, 1)])
        (True, 6)
    """

    seeded = True

    def __init__(
        self,
        genomes: Sequence[Genome] | Fasta,
        tiles: Sequence[Interval],
        length: int,
        *,
        reverse_complement: float = 0.5,
        max_unknown: float = 0.5,
    ) -> None:
        if length < 1:
            raise ValueError(f"length is {length}; it must be at least 1")
        for name, share in (("reverse_complement", reverse_complement), ("max_unknown", max_unknown)):
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; it must lie in [0, 1]")
        if not len(tiles):
            raise ValueError("tiles is empty; cut the genome with tile(…), with a size that fits its records")
        self.source = _Source(genomes)
        for place in tiles:
            self.source.check(place)
        self.tiles = list(tiles)
        self.length = length
        self.reverse_complement = reverse_complement
        self.max_unknown = max_unknown

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, key: tuple[int, int]) -> Bytes:
        index, seed = key
        place = self.tiles[index]
        rng = np.random.default_rng(seed)
        turn = rng.random() < self.reverse_complement
        for draw in range(_DRAWS):
            room = len(place) - self.length
            start = place.start + (int(rng.integers(room + 1)) if room > 0 else 0)
            end = min(start + self.length, place.end)
            window = self.source.fetch(place.record, start, end)
            unknown = np.count_nonzero(window == N) + self.length - len(window)
            if room <= 0 or unknown <= self.max_unknown * self.length or draw == _DRAWS - 1:
                break
        if turn != (place.strand == "-"):
            window = reverse_complement(window)
        return pad(window, self.length)


def iterate_windows(
    source: Sequence[Genome] | Fasta, places: Iterable[Interval], length: int, *, batch: int = 256
) -> Iterator[tuple[list[Interval], Bytes]]:
    """Windows of some places in order, by batches: what embedding and tokenising a genome goes through.

    Args:
        source: as in `WindowDataset`.
        places: at most `length` long each; `-` gives the reverse complement.
        length: letters of a window; shorter places are padded with N at the end.
        batch: windows of a batch; the last one may be smaller.

    Yields:
        (places, uint8 [batch, length]).

    Raises:
        ValueError: a place that is longer than `length` or lies on no record; length or batch below 1.
    """
    if length < 1 or batch < 1:
        raise ValueError(f"length is {length} and batch {batch}; both must be at least 1")
    reader = _Source(source)
    held: list[Interval] = []
    rows: list[Bytes] = []
    for place in places:
        if len(place) > length:
            raise ValueError(f"places: {place} is {len(place)} bp long; a window holds {length}")
        reader.check(place)
        window = reader.fetch(place.record, place.start, place.end)
        rows.append(pad(reverse_complement(window) if place.strand == "-" else window, length))
        held.append(place)
        if len(held) == batch:
            yield held, np.stack(rows)
            held, rows = [], []
    if held:
        yield held, np.stack(rows)


def known_tiles(
    source: Sequence[Genome] | Fasta, tiles: Iterable[Interval], *, max_unknown: float = 0.5
) -> list[Interval]:
    """Tiles without those that are mostly N.

    Args:
        source: as in `WindowDataset`.
        tiles: what to filter.
        max_unknown: largest share of N that is kept, 0 … 1.

    Raises:
        ValueError: a share out of range, or a tile that lies on no record.
    """
    if not 0 <= max_unknown <= 1:
        raise ValueError(f"max_unknown is {max_unknown}; it must lie in [0, 1]")
    reader = _Source(source)
    kept: list[Interval] = []
    for place in tiles:
        reader.check(place)
        letters = reader.fetch(place.record, place.start, place.end)
        if np.count_nonzero(letters == N) <= max_unknown * len(letters):
            kept.append(place)
    return kept


def pad(window: Bytes, length: int) -> Bytes:
    """A copy of a window with N at the end up to a length; uint8 [length]."""
    padded = np.full(length, N, np.uint8)
    padded[: len(window)] = window
    return padded


class _Source:
    """Letters by record name, whether in memory or on disk."""

    def __init__(self, source: Sequence[Genome] | Fasta) -> None:
        self._fasta = source if isinstance(source, Fasta) else None
        self._records: dict[str, Bytes] = {}
        if self._fasta is not None:
            self._lengths = dict(self._fasta.lengths)
            return
        genomes: list[Genome] = list(source)  # type: ignore[arg-type]
        if not genomes:
            raise ValueError("genomes is empty; give at least one, or a Fasta")
        if len({genome.name for genome in genomes}) != len(genomes):
            raise ValueError(f"genomes have the names {[g.name for g in genomes]}; each must be different")
        plain: dict[str, list[Bytes]] = {}
        for genome in genomes:
            for name, letters in genome.records.items():
                self._records[f"{genome.name}/{name}"] = letters
                plain.setdefault(name, []).append(letters)
        self._records.update({name: found[0] for name, found in plain.items() if len(found) == 1})
        self._lengths = {name: len(letters) for name, letters in self._records.items()}

    def check(self, place: Interval) -> None:
        if place.record not in self._lengths:
            names = list(self._lengths)[:6]
            raise ValueError(
                f"tiles: {place} lies on no record; there are {names} … (genome/record for several)"
            )
        if place.end > self._lengths[place.record]:
            raise ValueError(f"tiles: {place} ends past its record, {self._lengths[place.record]} bp")

    def fetch(self, record: str, start: int, end: int) -> Bytes:
        if self._fasta is not None:
            return self._fasta.fetch(record, start, end)
        return self._records[record][start:end]
