"""DNA from files to windows: readers, random access, splits, simulated genomes, labelled tasks."""

from __future__ import annotations

from .access import Fasta as Fasta
from .fasta import read_fasta as read_fasta
from .fasta import write_fasta as write_fasta
from .genbank import read_genbank as read_genbank
from .genome import Genome as Genome
from .genome import genome_lengths as genome_lengths
from .genome import genome_records as genome_records
from .genome import introns as introns
from .genome import read_genome as read_genome
from .genome import region_map as region_map
from .genome import transcripts as transcripts
from .gff import Feature as Feature
from .gff import read_gff3 as read_gff3
from .gff import write_gff3 as write_gff3
from .intervals import Interval as Interval
from .intervals import read_bed as read_bed
from .intervals import write_bed as write_bed
from .motif import PositionWeightMatrix as PositionWeightMatrix
from .motif import WeightArrayModel as WeightArrayModel
from .sequence import Record as Record
from .sequence import normalise as normalise
from .sequence import reverse_complement as reverse_complement
from .sequences import Sequences as Sequences
from .sequences import copy_groups as copy_groups
from .sequences import overlap_groups as overlap_groups
from .sequences import pack as pack
from .shuffle import shuffle_columns as shuffle_columns
from .shuffle import shuffle_dinucleotides as shuffle_dinucleotides
from .tasks import promoters as promoters
from .tasks import regions as regions
from .tasks import species as species
from .tasks import splice_sites as splice_sites
from .tiles import check_disjoint as check_disjoint
from .tiles import split_records as split_records
from .tiles import tile as tile
from .windows import WindowDataset as WindowDataset
from .windows import iterate_windows as iterate_windows
from .windows import known_tiles as known_tiles
