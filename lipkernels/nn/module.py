"""LipschitzModule: what every layer with a promised Lipschitz constant offers."""

from __future__ import annotations

from torch import nn

from lipkernels.constraints import checked_constant


class LipschitzModule(nn.Module):
    r"""A module f with |f(x) - f(y)|_2 <= L |x - y|_2, L = :attr:`lipschitz_constant`.

    L is ``k_coef_lip``, but for layers that promise it for each output and say so.

    ``k_coef_lip`` may be set at any time, directly or by :meth:`set_klip_factor`; it takes effect
    in the next forward. It is a setting, not a parameter: a state_dict does not carry it.
    """

    _k_coef_lip = 1.0
    # Whether condense() and vanilla_export() take `strict`: where there are weights.
    has_strict_mode = False

    @property
    def k_coef_lip(self) -> float:
        """The promised constant."""
        return self._k_coef_lip

    @k_coef_lip.setter
    def k_coef_lip(self, k: float) -> None:
        previous, self._k_coef_lip = self._k_coef_lip, checked_constant(k)
        try:
            self._klip_factor_changed()
        except ValueError:
            self._k_coef_lip = previous
            raise

    def set_klip_factor(self, k: float) -> None:
        """Promise ``k`` from now on. Raises ValueError unless 0 < k < inf."""
        self.k_coef_lip = k

    def _klip_factor_changed(self) -> None:
        """What a container does about a new constant."""

    @property
    def lipschitz_constant(self) -> float:
        """The l2 constant of the module as a map between vectors; ``k_coef_lip`` unless noted."""
        return self.k_coef_lip

    def condense(self) -> None:
        """Write constrained weights over the raw ones, in place; nothing to do without weights."""

    def vanilla_export(self) -> nn.Module:
        """An independent module of plain torch that computes the same function."""
        raise TypeError(f"{type(self).__name__} does not define vanilla_export()")


class LipschitzFunction(LipschitzModule):
    """A LipschitzModule whose constant follows from its formula, whatever its parameters are."""

    def certified_lipschitz_constant(self) -> float:
        """The constant that :func:`lipkernels.certify.lipschitz_bound` counts."""
        return self.lipschitz_constant
