"""Graph passes: each one file, one frozen dataclass; README.md has what every pass may assume and must keep."""

from mobiquant_compiler.passes.base import Binding, GraphPass, PassContext, PassResult
from mobiquant_compiler.passes.manager import PassManager, PassReport
from mobiquant_compiler.passes.registry import DEFAULT_PIPELINE, PASSES, load_pass, pass_names

__all__ = [
    "DEFAULT_PIPELINE",
    "PASSES",
    "Binding",
    "GraphPass",
    "PassContext",
    "PassManager",
    "PassReport",
    "PassResult",
    "load_pass",
    "pass_names",
]
