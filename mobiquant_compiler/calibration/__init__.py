"""Calibration: slices that are chosen on tokens, over all slice counts at once."""

from mobiquant_compiler.calibration.config import CalibrationConfig
from mobiquant_compiler.calibration.run import calibrate_

__all__ = ["CalibrationConfig", "calibrate_"]
