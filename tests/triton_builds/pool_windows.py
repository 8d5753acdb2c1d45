"""Pools of any other geometry, both ways: of norms and of means."""

from __future__ import annotations

import torch

from triton_builds.pool_tiles import IMAGES, NARROW, WIDE, builds

BUILDS = [
    *builds(torch.float16, IMAGES, 2, last=True, **WIDE),
    *builds(torch.float32, IMAGES, 3, 2, 1, last=True, **WIDE),
    *builds(torch.float32, IMAGES, 3, 2, 1, **NARROW),
]
