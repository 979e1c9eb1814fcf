"""Kidney-stone identification by guided deep metric learning."""

from __future__ import annotations

from importlib.metadata import version as _version

__version__ = _version("stillhouse-kidney")
