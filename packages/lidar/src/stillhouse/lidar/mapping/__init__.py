"""Maps: static points of many sweeps in one frame, thinned as they come; poses refined by ICP where asked."""

from __future__ import annotations

from ._aggregate import aggregate as aggregate
from ._aggregate import static_mask as static_mask
from ._icp import IcpConfig as IcpConfig
from ._icp import PoseRefiner as PoseRefiner
from ._icp import refine_poses as refine_poses
from ._voxels import VoxelMap as VoxelMap
from ._voxels import thin as thin
from ._voxels import voxel_keys as voxel_keys
