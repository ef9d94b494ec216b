"""Validation losses, sampling, grids, `ip-adapter generate` and `ip-adapter evaluate`."""
