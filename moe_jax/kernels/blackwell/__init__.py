"""Kernels for Blackwell GPUs, in Pallas Mosaic GPU. Written without one: interpreted and lowered, not yet run on hardware."""
