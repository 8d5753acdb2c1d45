"""Ops for the CPU in C++ (csrc/cpu): the same results as the reference, in less time."""
