"""Types of kernel parameters by name, to compile a kernel without tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mobiquant_compiler.spec import Family


@dataclass(frozen=True, slots=True)
class Dtypes:
    """Triton names of the dtypes that a kernel's caller is free to choose.

    Attributes:
        x: Activations, output, bias and the workspace of dequantized weights.
        scale: Scale and zero point.
    """

    x: str = "bf16"
    scale: str = "fp16"

    @classmethod
    def of(cls, x: object, scale: object) -> Dtypes:
        """Return the names of torch's dtypes."""
        return cls(_TRITON_NAMES[str(x)], _TRITON_NAMES[str(scale)])


_TRITON_NAMES = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}

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
    "offsets_ptr": "*i32",
    "rows_ptr": "*i32",
    "slices_ptr": "*i32",
    "sums_ptr": "*i32",
    "tokens": "i32",
    "columns": "i32",
    "capacity": "i32",
    "n_rows": "i32",
    "first_row": "i32",
    "rows": "i32",
    "row_units": "i32",
}


def parameter_type(name: str, family: Family, dtypes: Dtypes) -> str:
    """Return the Triton type of the parameter `name` of a kernel of `family`.

    Raises:
        KeyError: no template has such a parameter.
    """
    name = re.sub(r"\d", "", name)  # slices1_ptr: the same of another weight
    if name in ("x_ptr", "y_ptr", "bias_ptr", "workspace_ptr", "gathered_ptr"):
        return f"*{dtypes.x}"
    if name in ("scale_ptr", "zero_ptr"):
        return f"*{dtypes.scale}"
    if name in ("high_ptr", "low_ptr", "affine_ptr"):
        # Bytes are written and read in words, and what is read is read as words, floats too.
        return "*fp32" if name == "affine_ptr" and family is Family.ROUTE_QUANTIZE else "*i32"
    return _FIXED[name]
