"""Score the variants of a VCF with a student and the decoder of its pre-training."""

from __future__ import annotations

import csv
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from stillhouse.core.errors import ConfigError, DataError
from stillhouse.core.files import replacing

from ..heads import CharacterCoder, other_strand, padded_ids, real_letters
from ._vcf import Variant, is_bases, read_vcf
from ._window import Site, site_of, windows_of

SUFFIXES = (".tsv", ".parquet")
STRANDS = ("both", "forward")
_LETTERS = "ACGT"
_COMPLEMENT = dict(zip("ACGT", "TGCA", strict=True))


class MaskedModel(Protocol):
    """What scores: a student's encoder, the decoder of its pre-training and its tokenizer (`Loaded`)."""

    @property
    def encoder(self) -> nn.Module:
        """ids int64 [B, L], `attend=` bool [B, L] → [B, L, d]."""
        ...

    @property
    def decoder(self) -> nn.Module | None:
        """features [B, L, d], visible, queries bool [B, L] → logits [B, L, 4]."""
        ...

    @property
    def tokenizer(self) -> Any:
        """`CharacterTokenizer`."""
        ...


class Reference(Protocol):
    """What the windows come from; `Fasta` is one."""

    @property
    def names(self) -> tuple[str, ...] | list[str]:
        """Names of the records."""
        ...

    def length(self, name: str) -> int:
        """Length of a record."""
        ...

    def fetch(self, name: str, start: int, end: int) -> npt.NDArray[np.uint8]:
        """Letters of a record, 0-based, half-open."""
        ...


@dataclass(slots=True)
class Scored:
    """One alternative allele.

    Attributes:
        record: CHROM.
        position: POS, 1-based, as in the VCF.
        identifier, ref, alt: as in the VCF.
        status: "scored", or why there is no score: "indel", "symbolic", "ambiguous" (not A, C, G, T),
            "too long", "same", "mismatch", "past the end", "unknown record".
        score: log p(ALT) − log p(REF), natural logarithm; NaN where not scored. Above 0 the student expects
            ALT more than REF.
        forward, reverse: the same on each strand; `score` is their mean. NaN where not computed.
        log_ref, log_alt: log p of each, mean over the strands.
    """

    record: str
    position: int
    identifier: str
    ref: str
    alt: str
    status: str = "scored"
    score: float = float("nan")
    forward: float = float("nan")
    reverse: float = float("nan")
    log_ref: float = float("nan")
    log_alt: float = float("nan")


_COLUMNS = {
    "record": "CHROM",
    "position": "POS",
    "identifier": "ID",
    "ref": "REF",
    "alt": "ALT",
    "score": "score",
    "forward": "score_forward",
    "reverse": "score_reverse",
    "log_ref": "log_p_ref",
    "log_alt": "log_p_alt",
    "status": "status",
}


@dataclass(frozen=True, slots=True)
class ScoredFile:
    """What was written.

    Attributes:
        counts: status → number of alternatives.
        seconds: wall time.
    """

    counts: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def summary(self) -> str:
        """One line for people."""
        scored = self.counts.get("scored", 0)
        left = ", ".join(f"{count} {status}" for status, count in self.counts.items() if status != "scored")
        rate = scored / max(self.seconds, 1e-9)
        return f"{scored} alternatives scored ({rate:.3g}/s)" + (f"; without a score: {left}" if left else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers."""
        skipped = {status: count for status, count in self.counts.items() if status != "scored"}
        return {"scored": self.counts.get("scored", 0), "skipped": skipped, "seconds": self.seconds}


def check_options(out: Path, *, window: int, group: int, strands: str) -> None:
    """Refuse options that cannot work before anything is read.

    Raises:
        ConfigError: naming the option.
    """
    if out.suffix not in SUFFIXES:
        raise ConfigError(f"--out {out}: the name must end in {' or '.join(SUFFIXES)}")
    _check(window, group, strands, 1)


def _check(window: int, group: int, strands: str, batch: int) -> None:
    if group < 1 or 2 * group > window:
        raise ConfigError(f"--group {group}: must be at least 1 and at most half of --window {window}")
    if strands not in STRANDS:
        raise ConfigError(f"--strands {strands}: allowed are {', '.join(STRANDS)}")
    if batch < 1:
        raise ConfigError(f"--batch {batch}: must be at least 1")


def score_variants(
    student: MaskedModel,
    vcf: str | os.PathLike[str],
    fasta: str | os.PathLike[str] | Reference,
    *,
    window: int = 512,
    group: int = 6,
    batch: int = 32,
    strands: str = "both",
    skip_mismatches: bool = False,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Scored]:
    """Score every alternative of a VCF, in its order.

    The window around the variant is encoded with a group of bases, the variant in its middle, replaced by
    the mask token; the decoder of the pre-training then says how likely each letter is there. Neither allele
    is seen, so that exchanging REF and ALT changes the sign and nothing else. Substitutions of several bases
    are summed over the bases that differ, all of them hidden at once. On the other strand the same bases are
    hidden, and the letters are complements. A window that would reach over the end of its record is moved
    inside.

    Args:
        student: encoder, decoder and tokenizer, for example of `load_student`.
        vcf: variants, plain or gz.
        fasta: their reference.
        window: bases of context.
        group: bases to hide, at most half of the window.
        batch: windows at a time.
        strands: "both" (the mean) or "forward".
        skip_mismatches: go on where REF is not what the reference has, where a position lies past the end of
            its record, or where the record is unknown.
        device: where to compute; None leaves the student where it is.
        progress: called with the number of alternatives done since the last call.

    Yields:
        One `Scored` for each alternative.

    Raises:
        ConfigError: options out of range.
        DataError: the student has no decoder, a file cannot be read, or VCF and reference disagree.
    """
    _check(window, group, strands, batch)
    if student.decoder is None:
        raise DataError(
            "this student was saved without the decoder of its pre-training, which scores variants; use the "
            "student of a pre-training run"
        )
    reference = _reference(fasta)
    sizes = {name: reference.length(name) for name in reference.names}
    scorer = _Scorer(student, strands, device)
    waiting: list[Scored] = []
    jobs: list[tuple[Scored, Site, npt.NDArray[np.uint8]]] = []
    for variant in read_vcf(vcf):
        for row, site in _sites(variant, reference, sizes, vcf, window, group, skip_mismatches):
            waiting.append(row)
            if site is not None:
                jobs.append((row, site, reference.fetch(row.record, site.start, site.end)))
        if len(jobs) >= batch or len(waiting) >= 64 * batch:
            scorer.score(jobs)
            if progress is not None:
                progress(len(waiting))
            yield from waiting
            waiting, jobs = [], []
    scorer.score(jobs)
    if progress is not None and waiting:
        progress(len(waiting))
    yield from waiting


def score_file(
    student: MaskedModel,
    vcf: str | os.PathLike[str],
    fasta: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    window: int = 512,
    group: int = 6,
    batch: int = 32,
    strands: str = "both",
    skip_mismatches: bool = False,
    device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> ScoredFile:
    """Score a VCF into a TSV or Parquet table, which appears whole or not at all; see `score_variants`.

    Raises:
        ConfigError: options out of range.
        DataError: a file cannot be used, VCF and reference disagree, or no variant fits the reference.
    """
    target = Path(out)
    check_options(target, window=window, group=group, strands=strands)
    begun = time.perf_counter()
    rows = score_variants(
        student,
        vcf,
        fasta,
        window=window,
        group=group,
        batch=batch,
        strands=strands,
        skip_mismatches=skip_mismatches,
        device=device,
        progress=progress,
    )
    counts: Counter[str] = Counter()
    with replacing(target) as work:
        (_write_parquet if target.suffix == ".parquet" else _write_tsv)(work, _counted(rows, counts))
        if counts and not counts.keys() - {"mismatch", "past the end", "unknown record"}:
            raise DataError(f"{vcf}: not one of its variants fits {fasta}; is this the right reference?")
    return ScoredFile(dict(counts), time.perf_counter() - begun)


# ---- parts


def _counted(rows: Iterator[Scored], counts: Counter[str]) -> Iterator[Scored]:
    for row in rows:
        counts[row.status] += 1
        yield row


def _reference(fasta: str | os.PathLike[str] | Reference) -> Reference:
    if not isinstance(fasta, str | os.PathLike):
        return fasta
    from ..data import Fasta

    found: Reference = Fasta(Path(fasta))
    return found


def _sites(
    variant: Variant,
    reference: Reference,
    sizes: Mapping[str, int],
    vcf: object,
    window: int,
    group: int,
    skip_mismatches: bool,
) -> Iterator[tuple[Scored, Site | None]]:
    """One row for each alternative, with its site where it can be scored."""
    disagreement = _disagreement(variant, reference, sizes)
    if disagreement is not None and not skip_mismatches:
        raise DataError(
            f"{vcf}: line {variant.line}: {disagreement[1]}; --skip-mismatches goes on without it"
        )
    for alt in variant.alts:
        row = Scored(variant.record, variant.position + 1, variant.identifier, variant.ref, alt)
        if disagreement is not None:
            row.status = disagreement[0]
            yield row, None
        elif not is_bases(alt):
            row.status = "symbolic"
            yield row, None
        else:
            length = sizes[variant.record]
            site = site_of(variant.position, variant.ref, alt, length=length, window=window, group=group)
            if isinstance(site, str):
                row.status = site
                yield row, None
            else:
                yield row, site


def _disagreement(variant: Variant, reference: Reference, sizes: Mapping[str, int]) -> tuple[str, str] | None:
    """What is wrong between a variant and the reference: a status and a sentence; None where they agree."""
    place = f"{variant.record}:{variant.position + 1}"
    if variant.record not in sizes:
        have = ", ".join(list(sizes)[:4])
        return "unknown record", f"{variant.record!r} is not in the reference, which has {have}"
    length = sizes[variant.record]
    end = variant.position + len(variant.ref)
    if end > length:
        return (
            "past the end",
            f"{place} {variant.ref[:20]} lies past the end of {variant.record} ({length} bp)",
        )
    there = reference.fetch(variant.record, variant.position, end).tobytes().decode("ascii")
    pairs = zip(variant.ref, there, strict=True)
    if any(mine != theirs and "N" not in (mine, theirs) for mine, theirs in pairs):
        return "mismatch", f"REF at {place} is {variant.ref[:20]} and the reference has {there[:20]}"
    return None


class _Scorer:
    """Runs windows through encoder and decoder."""

    def __init__(self, student: MaskedModel, strands: str, device: torch.device | str | None) -> None:
        assert student.decoder is not None
        self._encoder, self._decoder = student.encoder.eval(), student.decoder.eval()
        self._tokenizer: CharacterCoder = student.tokenizer
        self._mask_id: int = student.tokenizer.mask_id
        self._both = strands == "both"
        first = next(self._encoder.parameters(), None)
        place = first.device if device is None and first is not None else (device or "cpu")
        self._device = torch.device(place)
        self._encoder.to(self._device)
        self._decoder.to(self._device)

    def score(self, jobs: list[tuple[Scored, Site, npt.NDArray[np.uint8]]]) -> None:
        """Fill in the rows."""
        if not jobs:
            return
        sites = [site for _, site, _ in jobs]
        windows, lengths, hidden = windows_of(sites, [letters for _, _, letters in jobs])
        forward = self._log_probs(windows, lengths, hidden)
        reverse = None
        if self._both:
            mirror = _mirrored(hidden, lengths)
            reverse = self._log_probs(other_strand(windows, lengths), lengths, mirror)
        for at, (row, site, _) in enumerate(jobs):
            ref, alt = _sums(forward[at], site.places, site.ref, site.alt)
            row.forward, row.score, row.log_ref, row.log_alt = alt - ref, alt - ref, ref, alt
            if reverse is not None:
                places = tuple(int(lengths[at]) - 1 - place for place in site.places)
                turned = [
                    "".join(_COMPLEMENT[letter] for letter in allele) for allele in (site.ref, site.alt)
                ]
                other_ref, other_alt = _sums(reverse[at], places, *turned)
                row.reverse = other_alt - other_ref
                row.score = (row.forward + row.reverse) / 2
                row.log_ref, row.log_alt = (ref + other_ref) / 2, (alt + other_alt) / 2

    @torch.no_grad()
    def _log_probs(
        self, windows: npt.NDArray[np.uint8], lengths: npt.NDArray[Any], hidden: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64]:
        """Log-probabilities [B, L, 4] of A, C, G, T at hidden positions."""
        attend = real_letters(windows, lengths)
        ids, attend = padded_ids(self._tokenizer, windows, attend, self._device)
        masked = torch.from_numpy(hidden).to(self._device)
        ids = ids.masked_fill(masked, self._mask_id)
        features = self._encoder(ids, attend=attend)
        logits: Tensor = self._decoder(features, attend & ~masked, masked)
        table: npt.NDArray[np.float64] = logits.double().log_softmax(dim=-1).cpu().numpy()
        return table


def _mirrored(hidden: npt.NDArray[np.bool_], lengths: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    out = np.zeros_like(hidden)
    for at, length in enumerate(lengths):
        out[at, :length] = hidden[at, :length][::-1]
    return out


def _sums(table: npt.NDArray[np.float64], places: tuple[int, ...], ref: str, alt: str) -> tuple[float, float]:
    """Sum of the log-probabilities of two alleles over the places where they differ."""
    each = [
        (table[place, _LETTERS.index(mine)], table[place, _LETTERS.index(theirs)])
        for place, mine, theirs in zip(places, ref, alt, strict=True)
    ]
    return float(sum(pair[0] for pair in each)), float(sum(pair[1] for pair in each))


def _write_tsv(path: Path, rows: Iterator[Scored]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(_COLUMNS.values())
        for row in rows:
            values = [getattr(row, name) for name in _COLUMNS]
            table.writerow([_cell(value) for value in values])


def _cell(value: object) -> object:
    if isinstance(value, float):
        return "" if value != value else f"{value:.6g}"
    return value


def _write_parquet(path: Path, rows: Iterator[Scored]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = {"position": pa.int64()}
    numbers = ("score", "forward", "reverse", "log_ref", "log_alt")
    schema = pa.schema(
        [
            (heading, pa.float64() if name in numbers else kinds.get(name, pa.string()))
            for name, heading in _COLUMNS.items()
        ]
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        block: list[Scored] = []

        def flush() -> None:
            columns = [
                pa.array([_number(getattr(row, name)) for row in block], schema.field(heading).type)
                for name, heading in _COLUMNS.items()
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
            block.clear()

        for row in rows:
            block.append(row)
            if len(block) == 8192:
                flush()
        flush()


def _number(value: object) -> object:
    return None if isinstance(value, float) and value != value else value
