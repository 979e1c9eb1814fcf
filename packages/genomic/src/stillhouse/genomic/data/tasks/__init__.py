"""Labelled tasks from an annotated genome, with groups that keep neighbouring windows together."""

from __future__ import annotations

from .promoters import promoters as promoters
from .promoters import read_promoters as read_promoters
from .regions import regions as regions
from .regions import species as species
from .splice import splice_sites as splice_sites
