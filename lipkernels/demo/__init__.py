"""Train, certify, attack, audit, draw and export, in about a minute: `python -m lipkernels.demo`."""
