"""The numbers behind the two sizes of the demo.

Chosen with --validate, on images that the demo neither trains on nor reports on. A lower
temperature or a smaller offset trades certified accuracy at large radii for clean accuracy.
"""

from dataclasses import dataclass

from lipkernels.demo.autoattack import Budget

# Adam's peak learning rate and second beta, by how the constraint is held. A held weight keeps its
# length, where a raw one grows and so slows itself down: it wants smaller steps.
ADAM = {"retract": (8e-3, 0.98), "reparametrize": (1e-2, 0.99)}


@dataclass(frozen=True)
class Preset:
    """Training (passes over the images by how the constraint is held), the l2 radii (pixels in
    [0, 1]) of the table, the plot and the example, and what --audit spends: AutoAttack's budget,
    and how many groups, of how many images with neighbouring radii, it attacks at these."""

    epochs: dict[str, int]
    batch: int
    shift: int
    temperature: float
    offset: float
    table_radii: tuple[float, ...]
    plot_radii: tuple[float, ...]
    example_radii: tuple[float, ...]
    headline_radius: float
    twin_epochs: int = 50
    twin_peak: float = 4e-3
    autoattack: Budget = Budget()  # noqa: RUF009 (frozen)
    audit_groups: int = 10
    audit_group_size: int = 20


FULL = Preset(
    # A part of what a held net's steps save is spent on more of them.
    epochs={"retract": 80, "reparametrize": 50},
    batch=256,
    shift=1,
    temperature=0.4,
    offset=1.0,
    table_radii=(0.25, 0.5, 1.0, 1.5),
    plot_radii=(0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0),
    example_radii=(0.0, 0.5, 1.0, 1.5, 2.0),
    headline_radius=1.0,
)

# 8x8 images: shorter vectors, shorter distances, and a pixel is too far to shift.
QUICK = Preset(
    epochs={"retract": 30, "reparametrize": 30},
    batch=128,
    shift=0,
    temperature=0.25,
    offset=0.5,
    table_radii=(0.125, 0.25, 0.5, 0.75),
    plot_radii=(0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 1.0),
    example_radii=(0.0, 0.25, 0.5, 0.75, 1.0),
    headline_radius=0.5,
    autoattack=Budget(targets=2, queries=100),
    twin_epochs=30,
    audit_groups=2,
    audit_group_size=20,
)
