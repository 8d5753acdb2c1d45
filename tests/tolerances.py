"""The tolerances of the tests, in one table. What was measured stands beside each."""

import torch

_EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float16, torch.bfloat16)}

# ---------------------------------------------------------------------- values of weight ops
# |result - oracle| per entry, for singular values of the result at most one (condition number 10).
# Half precision: a unit of rounding, for the rounding and for the factor that keeps the norm (0.6).
WEIGHT_VALUES = {
    "polar_factor": {torch.float64: 1e-12, torch.float32: 2e-6, **_EPS},  # 6e-14, 6e-7
    "bjorck": {torch.float64: 1e-12, torch.float32: 2e-6, **_EPS},  # 6e-14, 5e-7
    "spectral_normalize": {torch.float64: 1e-10, torch.float32: 2e-6, **_EPS},  # 5e-11, 5e-7
    "frobenius_normalize": {torch.float64: 1e-12, torch.float32: 2e-6, **_EPS},  # 6e-14, 5e-7
}
# The polar factor by condition number. The Gram matrix is float64 from 30 on.
POLAR_BY_CONDITION = {
    torch.float64: {1: 1e-12, 10: 1e-12, 29: 1e-12, 100: 1e-12, 1000: 2e-11, 100000: 1e-7},
    torch.float32: {1: 2e-6, 10: 2e-6, 29: 1e-5, 100: 2e-6, 1000: 2e-6, 100000: 2e-6},  # 2e-6 at 29
}
# Relative to sigma_max, after enough rounds.
POWER_ITERATION = {torch.float64: 1e-12, torch.float32: 1e-6, **_EPS}

# ------------------------------------------------------------------------ values of data ops
# Relative to the window's norm.
POOL_VALUES = {torch.float64: 1e-14, torch.float32: 1e-6, **_EPS}

# |U U^T - I|_2
ORTHOGONALITY = {
    torch.float64: 1e-12,  # 1e-13, the margin of the norm
    torch.float32: 3e-6,  # 1e-6, the same
    torch.float16: 3 * 2.0**-10,
    torch.bfloat16: 3 * 2.0**-7,
}

# --------------------------------------------------------------------------------- gradients
# Relative errors |got - expected| / |expected|, conditions 1 to 1000.
POLAR_GRADIENT = {
    torch.float64: 1e-9,  # 2e-10 at condition 1000
    torch.float32: 1e-4,  # 5e-5 at condition 29, the last in float32; 2e-6 elsewhere
    torch.float16: 2 * 2.0**-10,
    torch.bfloat16: 2 * 2.0**-7,
}
NORM_GRADIENT = {torch.float64: 1e-9, torch.float32: 2e-6, **_EPS}
BJORCK_GRADIENT = {torch.float64: 1e-9, torch.float32: 2e-6, **_EPS}
CENTRAL_DIFFERENCES = 1e-6
# |<dL/dW, W>| / (|dL/dW| |W|), zero in exact arithmetic; 1e-11 where sigma has its margin.
RADIAL_GRADIENT = {torch.float64: 1e-10, torch.float32: 1e-6}
# Bytes kept for backward over the weight's bytes: the result and the m x m eigenvectors.
SAVED_RATIO = {"square": 2.05, "other": 1.5}

# ------------------------------------------------------------------------------------ layers
# Of a layer's output, relative to its largest entry, against the layer in float64.
LAYER_BY_DTYPE = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 4 * 2.0**-10,
    torch.bfloat16: 4 * 2.0**-7,
}

# Condensing twice, and against the layer before, relative to the largest entry.
CONDENSE = 4e-6
EXPORT = 2e-6

# --------------------------------------------------------------------------------- soundness
# A weight's norm may not exceed its promise at all. This pays for the float64 SVD that measures it.
SVD = 1e-12  # relative
# How far below its promise a bound may stay that should be attained.
ATTAINED = {torch.float64: 1e-9, torch.float32: 4e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
# A layer's output against the product with its dense matrix, relative to the largest output.
LAYER_OUTPUT = {torch.float64: 1e-12, torch.float32: 1e-5}
# |f(x) - f(y)| <= k |x - y|, evaluated in float64, relative.
PAIRS = 1e-12
# A certificate's looseness: of float32 weights that are orthogonal to rounding, and of the others.
CERTIFIED = 1e-6
