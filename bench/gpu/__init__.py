"""What a CUDA device makes of the library: `make gpu PYTHON=python3 OUT=dir`, one offline command.

Correctness first (the tests marked ``gpu``, then compute-sanitizer), then times, each beside its
floor, the alternatives and its accuracy. ``python -m bench.gpu --dry-run`` runs all of it with tiny
shapes on the CPU: it shows that the measurements work, and measures nothing.
"""
