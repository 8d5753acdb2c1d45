"""The mathematics, in pure torch: one op a file, forward and vector-Jacobian product.

Everything here is stateless, mutates nothing, and works on any float dtype and device. It is the
specification that every kernel is tested against, and the backend that runs where no kernel can.
Matrices may carry leading batch dimensions. Half-precision inputs are computed in float32.
"""
