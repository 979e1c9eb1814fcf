"""Images of stones: readers, checks, patches, splits, augmentation and the data set that a trainer reads."""

from __future__ import annotations

from .augment import Augment as Augment
from .dataset import PatchDataset as PatchDataset
from .dataset import collate as collate
from .dataset import resize_square as resize_square
from .images import load_image as load_image
from .images import load_mask as load_mask
from .images import standardise_channels as standardise_channels
from .items import UNLABELLED as UNLABELLED
from .items import Collection as Collection
from .items import Item as Item
from .items import validate as validate
from .leakage import Duplicate as Duplicate
from .leakage import LeakageReport as LeakageReport
from .leakage import check_leakage as check_leakage
from .manifest import read_manifest as read_manifest
from .patches import Patch as Patch
from .patches import balance as balance
from .patches import extract_folder as extract_folder
from .patches import extract_patches as extract_patches
from .readers import read_collection as read_collection
from .readers import read_folder as read_folder
from .readers import read_kth_tips as read_kth_tips
from .simulate import Fragment as Fragment
from .simulate import SimulateConfig as SimulateConfig
from .simulate import simulate as simulate
from .simulate import simulate_fragments as simulate_fragments
from .split import LeakageWarning as LeakageWarning
from .split import split_collection as split_collection
