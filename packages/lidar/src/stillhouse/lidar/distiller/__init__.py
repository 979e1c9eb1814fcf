"""Distillers of scene completion: teacher, refinement, preference, few-step and single-pass students."""

from __future__ import annotations

from ._preference import TeacherPreferenceDistiller as TeacherPreferenceDistiller
from ._refine import RefineDistiller as RefineDistiller
from ._score import ScoreConfig as ScoreConfig
from ._score import ScoreDistiller as ScoreDistiller
from ._single import SinglePassConfig as SinglePassConfig
from ._single import SinglePassDistiller as SinglePassDistiller
from ._teacher import TeacherDistiller as TeacherDistiller
