"""Make a small model elastic, compile it once, and move its budget: the smallest whole use of the package.

python examples/move_the_budget.py
"""

from __future__ import annotations

import torch
from torch import nn

import mobiquant_compiler as mq


def main() -> None:
    """Print achieved bits and the distance to the original outputs at several budgets."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()
    x = torch.randn(64, 256) * torch.linspace(0.2, 3, 64).unsqueeze(1)  # some tokens matter more than others
    with torch.no_grad():
        wanted = model(x)
        print(mq.quantize_(model))
        compiled = torch.compile(model, backend="mobiquant")
        for bits in (8, 6, 4, 2):
            mq.set_budget(model, bits)
            mq.reset_telemetry(model)
            error = (compiled(x) - wanted).norm() / wanted.norm()
            print(f"budget {bits}: {mq.achieved_bits(model):.2f} bits, relative error {error:.4f}")


if __name__ == "__main__":
    main()
