"""Files of LiDAR data: sweeps, labels, poses, clouds, sequence folders; read with care, written atomically.

Reading `.bin` and `.label` files and writing any format needs NumPy alone; `.ply` and `.pcd` files are read
by Open3D, which is imported when the first of them is.
"""

from __future__ import annotations

from ._kitti import nonfinite_rows as nonfinite_rows
from ._kitti import read_bin as read_bin
from ._kitti import read_calib as read_calib
from ._kitti import read_labels as read_labels
from ._kitti import read_poses as read_poses
from ._open3d import import_open3d as import_open3d
from ._read import SUFFIXES as SUFFIXES
from ._read import read_scan as read_scan
from ._scan import Scan as Scan
from ._sequence import ScanSource as ScanSource
from ._sequence import Sequence as Sequence
from ._sequence import read_sequence as read_sequence
from ._write import atomic_file as atomic_file
from ._write import write_cloud as write_cloud
from ._write import write_labels as write_labels
from ._write import write_poses as write_poses
