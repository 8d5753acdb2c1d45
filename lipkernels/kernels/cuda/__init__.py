"""Ops by the library built from csrc/cuda, for CUDA devices: a family's launchers in each file.

The library knows nothing of torch or Python: `library` finds it, and every launcher gives it
addresses and sizes. A launcher takes and returns what its twin in :mod:`lipkernels.kernels.triton`
does. What a family's kernels take is its ``fits``; `split` gives the rest to others.
"""
