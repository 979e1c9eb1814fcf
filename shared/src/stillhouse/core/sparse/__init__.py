"""Sparse voxels in pure PyTorch: voxelisation, kernel maps, convolutions, norms, a UNet.

Equal to dense convolutions at the occupied voxels, deterministic, without global state: kernel maps live and
die with the `CoordinateSet` that they belong to.
"""

from __future__ import annotations

from .backend import Backend as Backend
from .backend import spconv_available as spconv_available
from .coordinates import CoordinateSet as CoordinateSet
from .functional import gather_rows as gather_rows
from .functional import sparse_conv as sparse_conv
from .functional import sum_rows as sum_rows
from .kernel_map import Bags as Bags
from .kernel_map import KernelMap as KernelMap
from .matching import nearest_voxels as nearest_voxels
from .modules import ConvBlock as ConvBlock
from .modules import Norm as Norm
from .modules import ResidualBlock as ResidualBlock
from .modules import SparseBatchNorm as SparseBatchNorm
from .modules import SparseLayerNorm as SparseLayerNorm
from .modules import SparseLinear as SparseLinear
from .modules import SparseReLU as SparseReLU
from .modules import StridedConv3d as StridedConv3d
from .modules import SubmanifoldConv3d as SubmanifoldConv3d
from .modules import TransposedConv3d as TransposedConv3d
from .modules import norm_layer as norm_layer
from .tensor import SparseTensor as SparseTensor
from .unet import DownStage as DownStage
from .unet import SparseEncoder as SparseEncoder
from .unet import SparseUNet as SparseUNet
from .unet import UpStage as UpStage
from .unet import level_sizes as level_sizes
from .unet import split_channels as split_channels
from .voxels import Voxels as Voxels
from .voxels import devoxelize as devoxelize
from .voxels import voxelize as voxelize
