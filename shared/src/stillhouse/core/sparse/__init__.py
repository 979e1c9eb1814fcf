"""Sparse voxels in pure PyTorch: voxelisation, kernel maps, convolutions, norms, a UNet."""
