"""Triton kernels for packed and dense features on CUDA, and the plain way where they cannot run."""
