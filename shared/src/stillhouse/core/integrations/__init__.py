"""Ways to run a distiller inside other frameworks; each is a package of its own, imported by who needs it."""

from __future__ import annotations
