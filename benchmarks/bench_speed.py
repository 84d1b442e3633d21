"""Tokens a second of the elastic model beside eager and plain torch.compile: what `mobiquant bench` prints, recorded.

python benchmarks/bench_speed.py [--model smollm2] [--budgets 8 6 5 4 3]     # benchmarks/results/<device>/speed.json
"""

from __future__ import annotations

import argparse

import record
import result_files

from mobiquant_compiler.cli.bench import METHODS, Settings, measure


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--budgets", nargs="+", type=float, default=[8.0, 6.0, 5.0, 4.0, 3.0])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype")
    parser.add_argument("--out", type=result_files.output, metavar="FILE")
    args = parser.parse_args()
    settings = Settings(args.prompt, args.tokens, args.repeat)
    rows = measure(args.model, args.methods, args.budgets, settings, args.device, args.dtype)
    device = rows[0]["device"]
    out = args.out or record.folder(device) / "speed.json"
    protocol = (
        f"median step of {args.tokens} new tokens after a prompt of {args.prompt}, spread half the quartile distance; "
        f"prefill is the median of {args.repeat} forward passes of the prompt"
    )
    record.write(out, rows, device, protocol=protocol)


if __name__ == "__main__":
    main()
