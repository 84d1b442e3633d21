"""Looking at an elastic model: outlier migration, precision of layers, quality against budget, bits of tokens.

Each analysis is a function that returns plain data; `figures`, `tables` and `token_page` turn it into files, and
`mobiquant analyze` does both. Models are run eagerly here: what is counted is what the linears really used (`watch`).
"""

from mobiquant_compiler.analysis.migration import Migration, outlier_migration
from mobiquant_compiler.analysis.precision import LinearBits, average_precision
from mobiquant_compiler.analysis.quality import QualityRow, elastic_rows, plain_rows
from mobiquant_compiler.analysis.token_bits import TokenBits, token_bits
from mobiquant_compiler.analysis.watch import watch_linears

__all__ = [
    "LinearBits",
    "Migration",
    "QualityRow",
    "TokenBits",
    "average_precision",
    "elastic_rows",
    "outlier_migration",
    "plain_rows",
    "token_bits",
    "watch_linears",
]
