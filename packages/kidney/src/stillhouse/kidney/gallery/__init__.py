"""Reference embeddings with prototypes, an unknown threshold and confidence; classes can join later."""

from __future__ import annotations

from ._calibrate import Calibration as Calibration
from ._calibrate import hierarchical_quantile as hierarchical_quantile
from ._gallery import Gallery as Gallery
from ._gallery import HeldOut as HeldOut
from ._gallery import Matches as Matches
from ._gallery import class_name as class_name
from ._store import gallery_files as gallery_files
from ._store import load_gallery as load_gallery
from ._store import replace_gallery as replace_gallery
from ._store import save_gallery as save_gallery
