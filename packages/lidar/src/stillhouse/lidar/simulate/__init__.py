"""Simulated drives through streets: ray-cast sweeps with labels, poses, the exact map of what stands still.

A street has a bending road with kerbs, pavements, houses with windows, front gardens with fences and hedges,
trees, lamp posts, signs, parked cars, and cars and people that move between the sweeps. Ray casting is
Open3D's. Simulated streets are for trying and testing; they are no road data.
"""

from __future__ import annotations

from ._config import LABELS as LABELS
from ._config import SimulateConfig as SimulateConfig
from ._drive import SimulatedSequence as SimulatedSequence
from ._drive import simulate_sequence as simulate_sequence
from ._write import write_kitti as write_kitti
