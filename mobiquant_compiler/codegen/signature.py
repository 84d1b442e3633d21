"""Types of kernel parameters by name, to compile a kernel without tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mobiquant_compiler.spec import Family

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Dtypes:
    """Triton names of the dtypes that a kernel's caller is free to choose.

    Attributes:
        x: Activations, output and the workspace of dequantized weights.
        scale: Scale and zero point.
        bias: Bias; None is that of the activations.
    """

    x: str = "bf16"
    scale: str = "fp16"
    bias: str | None = None

    @classmethod
    def of(cls, x: torch.dtype, scale: torch.dtype, bias: torch.dtype | None = None) -> Dtypes:
        """Return the names of torch's dtypes.

        Args:
            x: A dtype of floating point, as the others.
            scale: Of scale and zero point.
            bias: None is that of x.

        Raises:
            KeyError: another dtype.
        """
        own = None if bias in (None, x) else _TRITON_NAMES[str(bias)]
        return cls(_TRITON_NAMES[str(x)], _TRITON_NAMES[str(scale)], own)


_TRITON_NAMES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float64": "fp64"}

_FIXED = {
    "energy_ptr": "*fp32",
    "gain_ptr": "*fp32",
    "hidden_ptr": "*fp16",
    "hidden_bias_ptr": "*fp16",
    "out_ptr": "*fp16",
    "out_bias_ptr": "*fp16",
    "thresholds_ptr": "*fp32",
    "hist_ptr": "*i64",
    "mask_ptr": "*i32",
    "counts_ptr": "*i32",
    "placed_ptr": "*i32",
    "offsets_ptr": "*i32",
    "rows_ptr": "*i32",
    "slices_ptr": "*i32",
    "sums_ptr": "*i32",
    "marks_ptr": "*i32",
    "partial_ptr": "*fp32",
    "tokens": "i32",
    "columns": "i32",
    "capacity": "i32",
    "n_rows": "i32",
    "first_row": "i32",
    "rows": "i32",
    "row_units": "i32",
    "tiles": "i32",
    "marks": "i32",
    "at_once": "i32",
}


def parameter_type(name: str, family: Family, dtypes: Dtypes) -> str:
    """Return the Triton type of the parameter `name` of a kernel of `family`.

    Raises:
        KeyError: no template has such a parameter.
    """
    name = re.sub(r"\d", "", name)  # slices1_ptr: the same of another weight
    if name == "bias_ptr":
        return f"*{dtypes.bias or dtypes.x}"
    if name in ("x_ptr", "y_ptr", "workspace_ptr", "gathered_ptr"):
        return f"*{dtypes.x}"
    if name in ("scale_ptr", "zero_ptr"):
        return f"*{dtypes.scale}"
    if name in ("high_ptr", "low_ptr", "affine_ptr"):
        # Bytes are written and read in words, and what is read is read as words, floats too.
        return "*fp32" if name == "affine_ptr" and family is Family.ROUTE_QUANTIZE else "*i32"
    return _FIXED[name]
