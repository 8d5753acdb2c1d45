"""Pools of whole images, both ways: of norms and of means."""

from __future__ import annotations

import torch

from triton_builds.pool_tiles import NARROW, WIDE, builds

BUILDS = [
    *builds(torch.float16, (64, 512, 32, 32), 32, narrow=8, **WIDE),  # a number for each row
    *builds(torch.float32, (64, 512, 7, 7), 7, **NARROW),
]
