"""Round to nearest: every weight to the nearest point of its group's min-max grid."""

from __future__ import annotations

from torch import Tensor

from mobiquant_compiler.baselines.grids import join_groups, min_max_grid, rounded, split_groups


def round_to_nearest(weight: Tensor, bits: int, group: int) -> Tensor:
    """Return the weight [N, K] rounded to nearest: asymmetric, integer zero point, no clipping; float32."""
    x = split_groups(weight.float(), group)
    return join_groups(rounded(x, *min_max_grid(x, bits), bits), *weight.shape)
