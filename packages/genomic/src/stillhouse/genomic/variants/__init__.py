"""Variant effects: log p(ALT) − log p(REF) at masked positions, from a VCF and its reference."""

from __future__ import annotations

from ._score import check_options as check_options
from ._score import score_file as score_file
from ._score import score_variants as score_variants
from ._vcf import Variant as Variant
from ._vcf import read_vcf as read_vcf
from ._window import Site as Site
from ._window import site_of as site_of
