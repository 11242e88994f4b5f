"""Kernels for GPUs, each beside its wrapper; what they are checked against is named there.

They are written in Triton, which is imported with them: ask :func:`lmcache.kernels.availability.kernels_for` first.
"""
