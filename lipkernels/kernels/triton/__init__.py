"""Ops in Triton, for CUDA devices: one family of kernels and their launchers in each file.

Triton is imported by the files here alone, and these when an op first runs on this backend (see
:mod:`lipkernels.kernels.lazy`): the package needs torch alone. With ``TRITON_INTERPRET=1`` set
before Triton is imported, the kernels run on CPU tensors, slowly, in Triton's interpreter.
"""
