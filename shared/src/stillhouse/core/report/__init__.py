"""The distillation report: student against teacher in quality, size and speed, as HTML and JSON."""

from __future__ import annotations

from .profile import Comparison as Comparison
from .profile import Latency as Latency
from .profile import ModelProfile as ModelProfile
from .profile import compare_profiles as compare_profiles
from .profile import profile as profile
from .profile import profile_rows as profile_rows
from .report import Report as Report
from .report import Section as Section
from .report import compression_headline as compression_headline
from .results import read_results as read_results
from .results import write_results as write_results
