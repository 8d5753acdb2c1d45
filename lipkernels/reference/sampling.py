"""Invertible down- and upsampling: a permutation of the elements, hence an isometry.

A block of ph x pw pixels goes to ph * pw channels. With input channel c and position (a, d) in the
block, the output channel is

    CRD:  c ph pw + a pw + d        (torch's PixelUnshuffle)
    DCR:  (a pw + d) C + c          (deel-lip up to 1.5.0; depth first, as in ONNX)

The gradient of each map is the other map.
"""

from __future__ import annotations

from torch import Tensor


def space_to_depth(x: Tensor, ph: int, pw: int, mode: str, channels_last: bool) -> Tensor:
    """(N, C, H, W) -> (N, C ph pw, H / ph, W / pw), or the same with the channels last."""
    if channels_last:
        x = x.movedim(-1, 1)
    n, c, h, w = x.shape
    blocks = x.reshape(n, c, h // ph, ph, w // pw, pw)
    order = (0, 1, 3, 5, 2, 4) if mode == "CRD" else (0, 3, 5, 1, 2, 4)
    out = blocks.permute(order).reshape(n, c * ph * pw, h // ph, w // pw)
    return (out.movedim(1, -1) if channels_last else out).contiguous()


def depth_to_space(x: Tensor, ph: int, pw: int, mode: str, channels_last: bool) -> Tensor:
    """(N, C ph pw, H, W) -> (N, C, H ph, W pw): the inverse of :func:`space_to_depth`."""
    if channels_last:
        x = x.movedim(-1, 1)
    n, channels, h, w = x.shape
    c = channels // (ph * pw)
    if mode == "CRD":
        blocks = x.reshape(n, c, ph, pw, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        blocks = x.reshape(n, ph, pw, c, h, w).permute(0, 3, 4, 1, 5, 2)
    out = blocks.reshape(n, c, h * ph, w * pw)
    return (out.movedim(1, -1) if channels_last else out).contiguous()
