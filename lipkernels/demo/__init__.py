"""Train, certify, attack, audit, draw and export, in a minute: `python -m lipkernels.demo`."""
