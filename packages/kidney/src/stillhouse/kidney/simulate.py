"""Simulated stones under the name where one looks for them; see `stillhouse.kidney.data.simulate`."""

from __future__ import annotations

from .data.simulate import CLASSES as CLASSES
from .data.simulate import VIEWS as VIEWS
from .data.simulate import Fragment as Fragment
from .data.simulate import SimulateConfig as SimulateConfig
from .data.simulate import simulate as simulate
from .data.simulate import simulate_fragments as simulate_fragments
