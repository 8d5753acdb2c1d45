"""Differentiable functions: arguments are validated once here, then the backend's op is called.

Weight functions take one matrix (..., rows, cols) or a list of them, of any shapes, and answer in
kind: one call for a list costs far less than a call for each. ``scale`` is the Lipschitz constant
of the result (one number, or one for each matrix), ``dtype`` the format it is rounded to; the bound
holds after the rounding. ``check=True`` raises on NaN or infinite weights, which otherwise give NaN.
``backend`` is None (the current default), "auto", "reference", "triton" or "cuda".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lipkernels import backends
from lipkernels.kernels import bjorck as _bjorck
from lipkernels.kernels import frobenius as _frobenius
from lipkernels.kernels import polar as _polar
from lipkernels.kernels import pooling as _pooling
from lipkernels.kernels import sampling as _sampling
from lipkernels.kernels import sorting as _sorting
from lipkernels.kernels import spectral as _spectral
from lipkernels.reference import activation as _activation
from lipkernels.reference import padding as _padding

Weights = Tensor | Sequence[Tensor]
Scales = float | Sequence[float]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


# ---------------------------------------------------------------------------------- validation
def _checked_weights(weight: Weights, check: bool) -> list[Tensor]:
    weights = [weight] if isinstance(weight, Tensor) else list(weight)
    for i, w in enumerate(weights):
        if not isinstance(w, Tensor):
            raise TypeError(f"weight {i}: expected a Tensor, got {type(w).__name__}")
        if w.dtype not in _FLOATS:
            raise TypeError(f"weight {i}: expected a floating-point dtype, got {w.dtype}")
        if w.dim() < 2:
            raise ValueError(
                f"weight {i}: expected a matrix (..., rows, cols), got shape {tuple(w.shape)}"
            )
        if check and w.device.type != "meta" and not bool(torch.isfinite(w).all()):
            n_bad = int((~torch.isfinite(w)).sum())
            raise ValueError(
                f"weight {i}: expected finite entries, got {n_bad} NaN or infinite of {w.numel()}"
            )
    if len({w.device for w in weights}) > 1:
        raise ValueError(
            f"weights: expected one device, got {sorted({str(w.device) for w in weights})}"
        )
    return weights


def _checked_scales(scale: Scales, n: int, dtype: torch.dtype) -> list[float]:
    scales = [float(scale)] * n if isinstance(scale, (int, float)) else [float(s) for s in scale]
    if len(scales) != n:
        raise ValueError(f"scale: expected one number or {n} of them, got {len(scales)}")
    limit = torch.finfo(dtype).max
    for s in scales:
        if not 0 < s < math.inf:
            raise ValueError(f"scale: expected a positive finite number, got {s}")
        if s > limit:
            raise ValueError(f"scale: expected at most {limit} (the largest {dtype}), got {s}")
    return scales


def _checked_iteration(n_iter: int, tol: float) -> None:
    if not isinstance(n_iter, int) or n_iter < 0:
        raise ValueError(f"n_iter: expected an integer >= 0, got {n_iter!r}")
    if not tol >= 0:
        raise ValueError(f"tol: expected a number >= 0, got {tol!r}")


def _checked_vectors(u: Tensor | Sequence[Tensor] | None, weights: list[Tensor]) -> list[Tensor]:
    if u is None:
        return [initial_vector(w) for w in weights]
    us = [u] if isinstance(u, Tensor) else list(u)
    if len(us) != len(weights):
        raise ValueError(f"u: expected {len(weights)} vectors, got {len(us)}")
    for i, (vector, w) in enumerate(zip(us, weights, strict=True)):
        if vector.shape != w.shape[:-1]:
            raise ValueError(
                f"u {i}: expected shape {tuple(w.shape[:-1])}, got {tuple(vector.shape)}"
            )
    return us


def _by_dtype(
    weights: list[Tensor],
    scale: Scales,
    dtype: torch.dtype | None,
    call: Callable[[list[int], list[float], torch.dtype], list[Tensor]],
) -> list[Tensor]:
    """One call of the op for each result dtype (one, unless a list mixes formats).

    ``call(members, scales, dtype)`` gets the indices of the weights that it is to constrain. A
    weight without elements is its own constrained weight.
    """
    if dtype is not None and dtype not in _FLOATS:
        raise TypeError(f"dtype: expected a floating-point dtype, got {dtype}")
    wanted = [dtype or w.dtype for w in weights]
    results = [w.to(kind, copy=True) if w.numel() == 0 else w for w, kind in zip(weights, wanted)]
    for kind in dict.fromkeys(wanted):
        scales = _checked_scales(scale, len(weights), kind)
        members = [i for i, w in enumerate(weights) if wanted[i] == kind and w.numel() > 0]
        if members:
            outs = call(members, [scales[i] for i in members], kind)
            for i, out in zip(members, outs, strict=True):
                results[i] = out
    return results


def _one_or_list(weight: Weights, results: list[Tensor]):
    return results[0] if isinstance(weight, Tensor) else results


def initial_vector(weight: Tensor) -> Tensor:
    """A deterministic start (..., rows) for power iteration, with no entry at zero.

    >>> initial_vector(torch.empty(3, 5)).shape
    torch.Size([3])
    """
    rows = weight.shape[-2]
    kind = torch.promote_types(weight.dtype, torch.float32)
    # Irrational steps: no structured matrix is likely to have its top vector orthogonal to it.
    i = torch.arange(rows, dtype=torch.float64, device=weight.device)
    u = 1.0 + torch.frac(i * 0.6180339887498949)
    return (u / torch.linalg.vector_norm(u)).to(kind).expand(weight.shape[:-1]).clone()


# ------------------------------------------------------------------------------------- weights
def polar_factor(
    weight: Weights,
    scale: Scales = 1.0,
    *,
    dtype: torch.dtype | None = None,
    check: bool = False,
    backend: str | None = None,
):
    r"""The orthogonal matrix closest to each weight: ``scale * U`` with W = P U, P = (W W^T)^(1/2).

    For ``rows <= cols`` U has orthonormal rows, otherwise orthonormal columns. The gradient is the
    exact one of the polar factor (implicit, no loop is unrolled). Singular values below 3e-7 of the
    largest stay below one, zero ones zero; the norm never exceeds ``scale``.

    Shapes: (..., rows, cols) to the same. Raises TypeError / ValueError on anything but matrices of
    a floating-point dtype. Source: Higham, SIAM J. Sci. Stat. Comput. 7 (1986).

    >>> u = polar_factor(torch.randn(3, 5))
    >>> torch.allclose(u @ u.mT, torch.eye(3), atol=1e-5)
    True
    """
    weights = _checked_weights(weight, check)

    def call(members: list[int], scales: list[float], kind: torch.dtype) -> list[Tensor]:
        chosen = [weights[i] for i in members]
        name = backends.resolve("polar_factor", _polar.FORWARD, chosen[0].device, backend)
        return _polar.polar_factor(chosen, scales, kind, name)[0]

    return _one_or_list(weight, _by_dtype(weights, scale, dtype, call))


def bjorck(
    weight: Weights,
    scale: Scales = 1.0,
    *,
    u: Tensor | Sequence[Tensor] | None = None,
    beta: float = 0.5,
    n_iter: int = 15,
    tol: float = 0.0,
    n_iter_spectral: int = 10,
    tol_spectral: float = 1e-3,
    dtype: torch.dtype | None = None,
    check: bool = False,
    backend: str | None = None,
):
    r"""``(scale * X_n, u)``: the Bjorck iteration from X_0 = W / sigma_max(W), with its exact gradient.

    X_{k+1} = (1 + beta) X_k - beta X_k X_k^T X_k, at most ``n_iter`` steps, fewer once
    |X_{k+1} - X_k|_F <= ``tol``. beta in (0, 1/2] keeps every singular value at most one. ``u``
    (..., rows) warm-starts the power iteration inside (see :func:`spectral_normalize`); the vector
    for the next call comes back. Few steps leave singular values below one: see
    :func:`polar_factor` for the limit. Source: Anil, Lucas and Grosse, arXiv 1811.05381.

    >>> x, _ = bjorck(torch.eye(3) * 4, n_iter=3)
    >>> torch.allclose(x, torch.eye(3), atol=1e-5)
    True
    """
    weights = _checked_weights(weight, check)
    _checked_iteration(n_iter, tol)
    _checked_iteration(n_iter_spectral, tol_spectral)
    if not 0 < beta <= 0.5:
        raise ValueError(f"beta: expected a number in (0, 0.5], got {beta!r}")
    us = _checked_vectors(u, weights)
    limits = (n_iter_spectral, tol_spectral, beta, n_iter, tol)

    def call(members: list[int], scales: list[float], kind: torch.dtype) -> list[Tensor]:
        chosen, starts = [weights[i] for i in members], [us[i] for i in members]
        name = backends.resolve("bjorck", _bjorck.FORWARD, chosen[0].device, backend)
        results, vectors, _ = _bjorck.bjorck(chosen, starts, scales, kind, *limits, name)
        for i, vector in zip(members, vectors, strict=True):
            us[i] = vector
        return results

    results = _by_dtype(weights, scale, dtype, call)
    return _one_or_list(weight, results), _one_or_list(weight, us)


def spectral_normalize(
    weight: Weights,
    scale: Scales = 1.0,
    *,
    u: Tensor | Sequence[Tensor] | None = None,
    n_iter: int = 10,
    tol: float = 1e-3,
    dtype: torch.dtype | None = None,
    check: bool = False,
    backend: str | None = None,
):
    r"""``(scale * W / sigma_max(W), u)``, with sigma_max exact and never under-estimated.

    Power iteration from ``u`` (..., rows), at most ``n_iter`` rounds or until its relative residual
    is at most ``tol``, starts the search for sigma_max; what it finds is refined and verified, so
    that both numbers change the time and not the result. Gradient: Gamma/sigma -
    <Gamma, W>/sigma^2 u v^T. Source of the layer: Miyato et al., arXiv 1802.05957.

    >>> w, u = spectral_normalize(torch.randn(4, 3), 2.0)
    >>> round(torch.linalg.matrix_norm(w, 2).item(), 4)
    2.0
    """
    weights = _checked_weights(weight, check)
    _checked_iteration(n_iter, tol)
    us = _checked_vectors(u, weights)

    def call(members: list[int], scales: list[float], kind: torch.dtype) -> list[Tensor]:
        chosen, starts = [weights[i] for i in members], [us[i] for i in members]
        op, device = _spectral.spectral_normalize, chosen[0].device
        name = backends.resolve("spectral_normalize", _spectral.FORWARD, device, backend)
        results, vectors, _ = op(chosen, starts, scales, kind, n_iter, tol, name)
        for i, vector in zip(members, vectors, strict=True):
            us[i] = vector
        return results

    results = _by_dtype(weights, scale, dtype, call)
    return _one_or_list(weight, results), _one_or_list(weight, us)


def power_iteration(
    weight: Weights,
    u: Tensor | Sequence[Tensor] | None = None,
    *,
    n_iter: int = 10,
    check: bool = False,
    backend: str | None = None,
):
    r"""``(sigma, u, v)`` after ``n_iter`` rounds of v <- W^T u / |W^T u|, u <- W v / |W v|.

    sigma (...) = u^T W v is a *lower* bound of the largest singular value: an estimate, never a
    certificate. Nothing here is differentiable. u (..., rows), v (..., cols).

    >>> sigma, u, v = power_iteration(torch.diag(torch.tensor([3.0, 1.0])))
    >>> round(sigma.item(), 4)
    3.0
    """
    weights = [w.detach() for w in _checked_weights(weight, check)]
    _checked_iteration(n_iter, 0.0)
    us = _checked_vectors(u, weights)
    for i, w in enumerate(weights):
        if w.numel() == 0:
            raise ValueError(f"weight {i}: expected at least one entry, got {tuple(w.shape)}")
    if not weights:
        return [], [], []
    implemented = _spectral.POWER_ITERATION
    name = backends.resolve("power_iteration", implemented, weights[0].device, backend)
    sigmas, lefts, rights = _spectral.power_iteration(weights, us, n_iter, name)
    return tuple(_one_or_list(weight, part) for part in (sigmas, lefts, rights))


def frobenius_normalize(
    weight: Weights,
    scale: Scales = 1.0,
    *,
    per_row: bool = False,
    dtype: torch.dtype | None = None,
    check: bool = False,
    backend: str | None = None,
):
    r"""``scale * W / |W|_F``; with ``per_row`` each row is divided by its own norm.

    The spectral norm is at most ``scale`` (``scale * sqrt(rows)`` with ``per_row``, where the bound
    ``scale`` is each row's). Gradient: (Gamma - <Gamma, Wbar> Wbar) / |W|_F. A zero matrix stays
    zero.

    >>> w = frobenius_normalize(torch.ones(2, 2))
    >>> round(torch.linalg.matrix_norm(w).item(), 5)
    1.0
    """
    weights = _checked_weights(weight, check)

    def call(members: list[int], scales: list[float], kind: torch.dtype) -> list[Tensor]:
        chosen = [weights[i] for i in members]
        device = chosen[0].device
        name = backends.resolve("frobenius_normalize", _frobenius.FORWARD, device, backend)
        return _frobenius.frobenius_normalize(chosen, scales, kind, per_row, name)

    return _one_or_list(weight, _by_dtype(weights, scale, dtype, call))


# ------------------------------------------------------------------------------------ sampling
def _checked_block(block: int | Sequence[int]) -> tuple[int, int]:
    pair = (block, block) if isinstance(block, int) else tuple(block)
    if len(pair) != 2 or not all(isinstance(p, int) and p > 0 for p in pair):
        raise ValueError(f"block: expected a positive integer or a pair of them, got {block!r}")
    return pair


def _checked_image(x: Tensor, mode: str, data_format: str) -> tuple[bool, tuple[int, int, int]]:
    if mode not in ("CRD", "DCR"):
        raise ValueError(f"mode: expected 'CRD' or 'DCR', got {mode!r}")
    if data_format not in ("channels_first", "channels_last"):
        raise ValueError(
            f"data_format: expected 'channels_first' or 'channels_last', got {data_format!r}"
        )
    if x.dim() != 4:
        raise ValueError(f"input: expected 4 dimensions (a batch of images), got {tuple(x.shape)}")
    last = data_format == "channels_last"
    c, h, w = x.shape[3 if last else 1], x.shape[1 if last else 2], x.shape[2 if last else 3]
    return last, (c, h, w)


def space_to_depth(
    x: Tensor,
    block: int | Sequence[int],
    *,
    mode: str = "CRD",
    data_format: str = "channels_first",
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""Each ph x pw block of pixels to ph pw channels: invertible, and an isometry times ``scale``.

    (N, C, H, W) -> (N, C ph pw, H/ph, W/pw), or channels last. The output channel of input channel
    c at (a, d) in the block is c ph pw + a pw + d in mode "CRD" (torch's PixelUnshuffle) and
    (a pw + d) C + c in mode "DCR" (deel-lip up to 1.5.0). Raises ValueError where the block does
    not divide the image. Any dtype with ``scale`` 1.

    >>> space_to_depth(torch.zeros(1, 3, 4, 6), (2, 3)).shape
    torch.Size([1, 18, 2, 2])
    """
    ph, pw = _checked_block(block)
    last, (_, h, w) = _checked_image(x, mode, data_format)
    if h % ph or w % pw:
        raise ValueError(
            f"input: expected a height and width divisible by {ph} x {pw}, got {h} x {w}"
        )
    name = backends.resolve("space_to_depth", _sampling.SPACE_TO_DEPTH, x.device, backend)
    return _sampling.space_to_depth(x, ph, pw, mode, last, float(scale), name)


def depth_to_space(
    x: Tensor,
    block: int | Sequence[int],
    *,
    mode: str = "CRD",
    data_format: str = "channels_first",
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    r"""The inverse of :func:`space_to_depth` (up to ``scale``).

    (N, C ph pw, H, W) -> (N, C, H ph, W pw). Raises ValueError where ph pw does not divide the
    number of channels.

    >>> x = torch.randn(1, 2, 4, 4)
    >>> torch.equal(depth_to_space(space_to_depth(x, 2), 2), x)
    True
    """
    ph, pw = _checked_block(block)
    last, (c, _, _) = _checked_image(x, mode, data_format)
    if c % (ph * pw):
        raise ValueError(f"input: expected a number of channels divisible by {ph * pw}, got {c}")
    name = backends.resolve("depth_to_space", _sampling.DEPTH_TO_SPACE, x.device, backend)
    return _sampling.depth_to_space(x, ph, pw, mode, last, float(scale), name)


# --------------------------------------------------------------------------------- activations
def _checked_dim(x: Tensor, dim: int) -> int:
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: expected one of the input's {x.dim()} dimensions, got {dim}")
    return dim % x.dim()


def group_sort(
    x: Tensor, group_size: int | None = None, dim: int = 1, *, backend: str | None = None
) -> Tensor:
    r"""Sort each group of ``group_size`` neighbours along ``dim`` in ascending order.

    None: the whole dimension (FullSort). 1-Lipschitz in every l_p norm; the Jacobian is a
    permutation. Raises ValueError where the size does not divide the dimension. Source: Anil, Lucas
    and Grosse, arXiv 1811.05381.

    >>> group_sort(torch.tensor([[3.0, 1.0, 2.0, 5.0]]), 2)
    tensor([[1., 3., 2., 5.]])
    """
    dim = _checked_dim(x, dim)
    size = x.shape[dim] if group_size is None else group_size
    if not isinstance(size, int) or (size < 1 and x.shape[dim] > 0):
        raise ValueError(f"group_size: expected a positive integer or None, got {group_size!r}")
    if x.numel() == 0:
        return x.clone()
    if x.shape[dim] % size:
        raise ValueError(
            f"input: expected a size along dimension {dim} that groups of {size} divide,"
            f" got {x.shape[dim]}"
        )
    name = backends.resolve("group_sort", _sorting.FORWARD, x.device, backend)
    return _sorting.group_sort(x, size, dim, name)[0]


def max_min(x: Tensor, dim: int = 1) -> Tensor:
    r"""cat(relu(x), relu(-x)) along ``dim``, which doubles. 1-Lipschitz.

    >>> max_min(torch.tensor([[1.0, -2.0]])).abs()
    tensor([[1., 0., 0., 2.]])
    """
    return _activation.max_min(x, _checked_dim(x, dim))


def householder(x: Tensor, theta: Tensor, dim: int = 1) -> Tensor:
    r"""Reflect each pair (x_i, x_{i+c}) that lies beyond its mirror line at angle ``theta_i`` / 2.

    ``x`` has 2 c entries along ``dim``, ``theta`` (c,), in radians. pi/2 sorts the pair. An isometry
    on either side and continuous across: 1-Lipschitz. Source: Singla, Singla and Feizi, arXiv
    2108.04062.

    >>> householder(torch.tensor([[2.0, 1.0]]), torch.tensor([torch.pi / 2]))
    tensor([[1., 2.]])
    """
    dim = _checked_dim(x, dim)
    if theta.dim() != 1 or x.shape[dim] != 2 * theta.shape[0]:
        raise ValueError(
            f"input: expected twice as many entries along dimension {dim} as there are angles"
            f" ({tuple(theta.shape)}), got {x.shape[dim]}"
        )
    kind = torch.promote_types(torch.promote_types(x.dtype, theta.dtype), torch.float32)
    return _activation.householder(x, theta, dim, kind)


def lprelu(x: Tensor, slope: Tensor) -> Tensor:
    r"""x where x >= 0, a x below, a = clamp(``slope``, -1, 1): one, or one for each channel (dim 1).

    >>> lprelu(torch.tensor([[-2.0, 1.0]]), torch.tensor([4.0]))
    tensor([[-2.,  1.]])
    """
    channels = x.shape[1] if x.dim() > 1 else 1
    if slope.dim() != 1 or slope.shape[0] not in (1, channels):
        raise ValueError(f"slope: expected shape (1,) or ({channels},), got {tuple(slope.shape)}")
    return _activation.lprelu(x, slope)


# ------------------------------------------------------------------------------------- pooling
def l2_norm_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    r"""The Euclidean norm of each window: y_o = sqrt(sum_{i in o} x_i^2).

    (N, C, H, W) or (C, H, W). ``eps`` guards the gradient alone: dL/dx_i = x_i sum_o Gamma_o / (y_o +
    eps), so that an all-zero window has gradient zero. 1-Lipschitz where windows do not overlap.

    >>> l2_norm_pool2d(torch.ones(1, 1, 2, 2), 2)
    tensor([[[[2.]]]])
    """
    if x.dim() not in (3, 4):
        raise ValueError(f"input: expected 3 or 4 dimensions, got {tuple(x.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    kernel = list(_checked_block(kernel_size))
    step = kernel if stride is None else list(_checked_block(stride))
    pad = [padding, padding] if isinstance(padding, int) else list(padding)
    name = backends.resolve("l2_norm_pool2d", _pooling.FORWARD, x.device, backend)
    return _pooling.l2_norm_pool2d(x, kernel, step, pad, ceil_mode, float(eps), name)


# ------------------------------------------------------------------------------------- padding
def symmetric_pad(x: Tensor, pad: Sequence[int]) -> Tensor:
    r"""Pad with the mirror image, edge included: (a b c) by (2, 1) becomes (b a a b c c).

    ``pad`` as in :func:`torch.nn.functional.pad`: (left, right) of the last dimension first. Raises
    ValueError where a width exceeds the size of its dimension.

    >>> symmetric_pad(torch.tensor([[1, 2, 3]]), (2, 1))
    tensor([[2, 1, 1, 2, 3, 3]])
    """
    if len(pad) % 2 or len(pad) // 2 > x.dim():
        raise ValueError(f"pad: expected (left, right) for up to {x.dim()} dimensions, got {pad}")
    for i, width in enumerate(pad):
        if not 0 <= width <= x.shape[-1 - i // 2]:
            raise ValueError(
                f"pad: expected a width from 0 to the size {x.shape[-1 - i // 2]}, got {width}"
            )
    return _padding.symmetric_pad(x, pad)
