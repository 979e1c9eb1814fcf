"""Splice sites against decoys, from easy to hard."""

from __future__ import annotations

from collections import Counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..genome import Genome, introns
from ..intervals import Interval
from ..motif import PositionWeightMatrix
from ..sequence import Bytes
from ..sequences import Sequences
from ..shuffle import shuffle_columns
from ._places import block_size, enough, group_name, pick, stack, usable

_TO_PERMUTE = 16  # two columns of a decoy stem from one site by chance with 1/16
_MOTIF = {"donor": b"GT", "acceptor": b"AG"}
Decoys = Literal["random", "easy", "matched", "hard"]


def splice_sites(
    genome: Genome,
    kind: Literal["donor", "acceptor"] = "donor",
    *,
    length: int = 256,
    decoys: Decoys = "hard",
    core: int = 42,
    limit: int | None = None,
    block: int | None = None,
    seed: int = 0,
) -> Sequences:
    """Real splice sites against as many decoys.

    Sites are the ends of the introns of the gene models (`introns`), canonical ones only (GT…AG), on their
    own strand. The border between exon and intron lies before letter `length // 2` of the window, so that GT
    stands at `length // 2` of a donor, and AG right before it in an acceptor. Decoys have the same two
    letters at the same place. From easy to hard:

    - `random`: letters drawn one by one at the mean frequencies of the sites.
    - `easy`: a GT (AG) of the genome, on either strand, where no gene model, pseudogene or `intron` line of
      the annotation (RNA-seq junctions too) has an end of an intron.
    - `matched`: of those, the ones whose score under a position weight matrix is nearest to a true site's;
      the matrix stays a little above chance.
    - `hard`: each true window once more, with the `core` letters about the site drawn anew: each column is
      permuted by itself over the sites of its group. **A position weight matrix is at chance by
      construction**, a first-order model is not.

    In `hard` the letter frequencies of every column, core and flanks, equal those of the true sites exactly,
    in every group and so in every part of a grouped split; a decoy keeps the flanks, hence the genomic
    context, of the site that it was made of, and its group. Only what columns of the core say *together*
    tells the classes apart. (Permuting over all sites at once would not do: where train sites have too much
    of a letter, test sites then have too little, and a position weight matrix falls to 33 to 41 % on a
    thousand sites.) Neighbouring groups are united until each holds 16 sites. Source of the idea: n2/n3-like
    decoys of a published benchmark, on whose hardest class a position weight matrix scores 49 % and
    first-order models 67 to 76 % (KorfLab/genDL data/splice42/README.md); that its n3 decoys are made in this
    way is our reading.

    Args:
        genome: with gene models.
        kind: the end of the intron that the exon before (donor) or after (acceptor) it touches.
        length: letters of a window, at least 4.
        decoys: see the list.
        core: letters about the border that `hard` draws anew and `matched` scores, at most `length`.
        limit: most true sites; None takes all.
        block: length of the blocks that make the groups; 10,000 bp or 16 windows when None.
        seed: the same seed gives the same sequences.

    Returns:
        `Sequences` with the classes (`decoy`, kind); groups are blocks of coordinates. Windows that cross a
        block border, leave their record or hold N are left out, so that windows of different groups share no
        base.

    Raises:
        DataError: fewer than 10 usable sites, or fewer decoys than sites.
        ValueError: an argument out of range.
    """
    if kind not in _MOTIF:
        raise ValueError(f"kind is {kind!r}; it must be 'donor' or 'acceptor'")
    if decoys not in ("random", "easy", "matched", "hard"):
        raise ValueError(f"decoys is {decoys!r}; it must be 'random', 'easy', 'matched' or 'hard'")
    if length < 4 or not core >= 4:
        raise ValueError(f"length is {length} and core {core}; both must be at least 4")
    core = min(core, length)
    size = block_size(length, block)
    rng = np.random.default_rng(seed)
    windows = [_window(gap, kind, length) for gap in introns(genome)]
    places = usable(genome, [window for window in windows if window is not None], size)
    places = [place for place in places if _has_motif(genome.fetch(place), kind)]
    places = pick(places, len(places) if limit is None else limit, rng)
    enough(len(places), 10, f"usable canonical {kind} sites", genome)
    sites = stack(genome, places)
    groups = [group_name(genome, place, size) for place in places]
    if decoys == "hard":
        groups = _merged(places, groups)
        false, others = _recombined(sites, groups, core, rng), groups
    elif decoys == "random":
        false, others = _drawn(sites, kind, rng), groups
    else:
        most = 200_000 if decoys == "matched" else max(20_000, 20 * len(places))
        candidates = _unannotated(genome, kind, length, size, rng, most)
        enough(len(candidates), len(places), f"unannotated {_MOTIF[kind].decode()} sites", genome)
        chosen = (
            pick(candidates, len(places), rng)
            if decoys == "easy"
            else _nearest(genome, candidates, sites, _about(length, core))
        )
        false, others = stack(genome, chosen), [group_name(genome, place, size) for place in chosen]
    return Sequences(
        f"{genome.name} {kind} vs {decoys} decoys",
        np.concatenate([sites, false]),
        np.full(2 * len(sites), length, np.int64),
        np.repeat(np.array([1, 0], np.int64), len(sites)),
        ("decoy", kind),
        (*groups, *others),
    )


def _about(length: int, core: int) -> slice:
    start = min(max(length // 2 - core // 2, 0), length - core)
    return slice(start, start + core)


def _window(gap: Interval, kind: str, length: int) -> Interval | None:
    """The window about an end of an intron, the border before letter length // 2 on the intron's strand."""
    at_start = (kind == "donor") == (gap.strand == "+")  # the border lies at the lower coordinate
    border = gap.start if at_start else gap.end
    start = border - (length // 2 if gap.strand == "+" else length - length // 2)
    return Interval(gap.record, start, start + length, gap.strand, gap.name) if start >= 0 else None


def _has_motif(window: Bytes, kind: str) -> bool:
    at = len(window) // 2 - (2 if kind == "acceptor" else 0)
    return window[at : at + 2].tobytes() == _MOTIF[kind]


def _merged(places: list[Interval], groups: list[str]) -> list[str]:
    """Unite neighbouring groups, in order of coordinates, until each holds enough sites to permute."""
    sizes = Counter(groups)
    first = {
        group: (place.record, place.start) for place, group in zip(places[::-1], groups[::-1], strict=True)
    }
    names: dict[str, str] = {}
    name, count, before = "", 0, ""
    for group in sorted(sizes, key=lambda group: first[group]):
        if not name:
            name = group
        names[group], count = name, count + sizes[group]
        if count >= _TO_PERMUTE:
            name, count, before = "", 0, name
    if name and before:  # what is left over at the end
        names = {group: before if to == name else to for group, to in names.items()}
    return [names[group] for group in groups]


def _recombined(sites: Bytes, groups: list[str], core: int, rng: np.random.Generator) -> Bytes:
    false = sites.copy()
    about = _about(sites.shape[1], core)
    for group in dict.fromkeys(groups):
        rows = np.array([g == group for g in groups])
        false[rows, about] = shuffle_columns(sites[rows, about], rng)
    return false


def _drawn(sites: Bytes, kind: str, rng: np.random.Generator) -> Bytes:
    letters, counts = np.unique(sites, return_counts=True)
    false = rng.choice(letters, size=sites.shape, p=counts / counts.sum())
    at = sites.shape[1] // 2 - (2 if kind == "acceptor" else 0)
    false[:, at : at + 2] = np.frombuffer(_MOTIF[kind], np.uint8)
    return false


def _unannotated(
    genome: Genome, kind: str, length: int, block: int, rng: np.random.Generator, most: int
) -> list[Interval]:
    """Windows about GT (AG) on either strand where nothing says that an intron ends."""
    known: set[tuple[str, int, str]] = set()
    evidence = [f.interval for f in genome.features if f.type == "intron"]
    lone = [f.interval for f in genome.features if f.type == "intron" and f.strand == "."]
    evidence += [Interval(i.record, i.start, i.end, "-") for i in lone]
    for gap in [*introns(genome, pseudogenes=True), *evidence]:
        at_start = (kind == "donor") == (gap.strand == "+")
        known.add((gap.record, gap.start if at_start else gap.end, gap.strand))
    found: list[Interval] = []
    total = sum(map(len, genome.records.values()))
    for record, letters in genome.records.items():
        for strand in ("+", "-"):
            borders = _borders(letters, kind, strand)
            share = int(most * len(letters) / total / 2) + 1
            if len(borders) > share:
                borders = np.sort(rng.choice(borders, share, replace=False))
            for border in borders.tolist():
                if (record, border, strand) in known:
                    continue
                start = border - (length // 2 if strand == "+" else length - length // 2)
                if start >= 0:
                    found.append(Interval(record, start, start + length, strand))
    return usable(genome, found, block)


def _borders(letters: Bytes, kind: str, strand: str) -> NDArray[np.int64]:
    """Coordinates before which an exon–intron border would lie, for each occurrence of the two letters."""
    motif = _MOTIF[kind] if strand == "+" else {b"GT": b"AC", b"AG": b"CT"}[_MOTIF[kind]]
    at = np.flatnonzero((letters[:-1] == motif[0]) & (letters[1:] == motif[1]))
    before = (kind == "donor") == (strand == "+")  # the border lies before the two letters, or after them
    return at if before else at + 2


def _nearest(genome: Genome, candidates: list[Interval], sites: Bytes, about: slice) -> list[Interval]:
    """For each site the unused candidate whose score under the sites' weight matrix is nearest."""
    windows = stack(genome, candidates)[:, about]
    model = PositionWeightMatrix(sites[:, about], windows)
    scores, goals = model.score(windows), np.sort(model.score(sites[:, about]))[::-1]
    order = np.argsort(scores, kind="stable")
    ranked = scores[order]
    free = np.ones(len(order), bool)
    chosen: list[int] = []
    for goal in goals:  # from the top, where candidates are rare
        at = int(np.searchsorted(ranked, goal))
        right = at + int(np.argmax(free[at:])) if at < len(free) and free[at:].any() else None
        left = at - 1 - int(np.argmax(free[:at][::-1])) if at > 0 and free[:at].any() else None
        if right is None or (left is not None and goal - ranked[left] < ranked[right] - goal):
            right = left
        assert right is not None  # there are at least as many candidates as sites
        free[right] = False
        chosen.append(int(order[right]))
    return [candidates[i] for i in sorted(chosen)]
