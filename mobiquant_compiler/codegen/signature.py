"""Types of kernel parameters by name, to compile a kernel without tensors."""

from __future__ import annotations

from dataclasses import dataclass

from mobiquant_compiler.spec import Family


@dataclass(frozen=True, slots=True)
class Dtypes:
    """Triton names of the dtypes that a kernel's caller is free to choose.

    Attributes:
        x: Activations, output and bias.
        scale: Scale and zero point.
    """

    x: str = "bf16"
    scale: str = "fp16"


_FIXED = {
    "energy_ptr": "*fp32",
    "gain_ptr": "*fp32",
    "thresholds_ptr": "*fp32",
    "hist_ptr": "*i64",
    "mask_ptr": "*i32",
    "counts_ptr": "*i32",
    "rows_ptr": "*i64",
    "step_ptr": "*fp32",
    "total_ptr": "*i32",
    "slices_ptr": "*i32",
    "tokens": "i32",
    "columns": "i32",
    "capacity": "i32",
    "n_rows": "i32",
}


def parameter_type(name: str, family: Family, dtypes: Dtypes) -> str:
    """Return the Triton type of the parameter `name` of a kernel of `family`.

    Raises:
        KeyError: no template has such a parameter.
    """
    if name in ("x_ptr", "y_ptr", "bias_ptr"):
        return f"*{dtypes.x}"
    if name in ("scale_ptr", "zero_ptr"):
        return f"*{dtypes.scale}"
    if name in ("high_ptr", "low_ptr"):
        # The decode kernel reads quantized bytes four at a time.
        return "*i32" if family is Family.DECODE else "*i8"
    return _FIXED[name]
