"""Benchmarks against the alternatives: `make bench`, or `python -m bench`.

Everything that is compared runs in one process, in turns (see :mod:`bench.timing`), and beside each
time stands what it bought, from the same run: the error of the constrained weight, the error of its
gradient, the bytes kept for backward.
"""
