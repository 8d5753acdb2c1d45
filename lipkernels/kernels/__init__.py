"""The operations as ``torch.library`` custom ops: schema, fake tensors, autograd, three-way call.

A weight op takes and returns a list of tensors, so that one call serves a layer (a list of one) or
a whole model (a ragged list). The backend is an argument, resolved once by
:mod:`lipkernels.functional`; the backward runs on the backend of its forward. Backwards of weight
ops are opaque ops of their own: a compiled model sees one node forward and one backward.

Annotations here are evaluated by ``torch.library``'s schema inference: no ``from __future__ import
annotations`` in these files.
"""
