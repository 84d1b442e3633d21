"""Where the time of one case's kernel goes, by Nsight Compute: what warps wait for, and at which instructions.

    python benchmarks/profile_linear.py 14336x4096 8:2:mixed --kernel sliced_mma
    python benchmarks/profile_linear.py 4096x4096 1024:4:mixed --kernel sliced_wgmma --report /tmp/fused

Shapes and cases are those of compare_linear.py. Caches are cold and clocks are as they are, so the duration is not a
time to report. An instruction is charged with the wait for what it needs: look at what wrote its registers.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linear_cases import case, shape

SAMPLES = "Warp Stall Sampling (All Samples)"
FACTS = (
    *("Duration", "Registers Per Thread", "Shared Memory Configuration Size", "L1/TEX Hit Rate", "L2 Hit Rate"),
    *("DRAM Throughput", "Issue Slots Busy"),
)
WARM = 2  # launches of the kernel before the one that is looked at


class NoProfile(Exception):
    """Nothing could be profiled."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", type=shape, help="output rows x input columns")
    parser.add_argument("case", type=case, help="tokens:slices, or tokens:slices:mixed")
    parser.add_argument("--kernel", default="sliced_mma", help="family of the kernel to look at")
    parser.add_argument("--top", type=int, default=40, help="instructions to list, those with most samples")
    parser.add_argument("--report", type=Path, help="keep Nsight Compute's report here, for its own pages")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(given)


def run(size: tuple[int, int], what: tuple[int, int, str]) -> None:
    """Launch the case a few times: what is profiled."""
    import torch
    from linear_ours import Case, Weights, calls_of, counts_of

    device, (n, k), (tokens, slices, counts) = torch.device("cuda"), size, what
    weights, chosen = Weights(n, k, "slice_major", device, copies=2), Case(slices, counts)
    x = torch.randn(tokens, k, device=device, dtype=torch.bfloat16)
    alone, _, _ = calls_of(weights, chosen, x, counts_of(chosen, tokens, device))
    for number in range(WARM + 1):
        alone[number % len(alone)]()
    torch.cuda.synchronize()


def profile(args: argparse.Namespace, report: Path) -> tuple[str, str]:
    """Profile one launch into a report; returns its details, and its instructions as CSV.

    Raises:
        NoProfile: there is no ncu, it may not read the counters, or no kernel of that name ran.
    """
    ncu = shutil.which("ncu")
    if ncu is None:
        raise NoProfile("ncu is not on the PATH: Nsight Compute comes with the CUDA toolkit")
    size, what = "x".join(map(str, args.shape)), ":".join(map(str, args.case))
    command = [ncu, "--set", "full", "--import-source", "no", "--clock-control", "none", "--cache-control", "all"]
    command += ["-k", f"regex:{args.kernel}", "--launch-skip", str(WARM), "-c", "1", "-o", str(report), "-f"]
    command += [sys.executable, str(Path(__file__).resolve()), size, what, "--run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    file = report.with_name(f"{report.name}.ncu-rep")
    if done.returncode or not file.is_file():
        said = (done.stdout + done.stderr).strip()[-500:]
        raise NoProfile(f"ncu profiled no kernel {args.kernel} of {size} with {what}: {said}")
    pages = (
        [ncu, "-i", str(file), "--page", *page] for page in (["details"], ["source", "--csv", "--print-units", "base"])
    )
    read = [subprocess.run(page, capture_output=True, text=True, check=False) for page in pages]
    for page in read:
        if page.returncode:
            raise NoProfile(f"ncu cannot read its report {file}: {(page.stdout + page.stderr).strip()[-500:]}")
    return read[0].stdout, read[1].stdout


def facts_of(details: str) -> dict[str, str]:
    """Return a few figures of the details page, with their units."""
    found = {}
    for name in FACTS:
        line = re.search(rf"^\s+{re.escape(name)}\s+(\S+)\s+([\d,.]+)\s*$", details, re.MULTILINE)
        if line:
            found[name] = f"{line[2]} {line[1]}"
    return found


def stalls_of(source: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return what share of all samples each kind of stall has, and each instruction, with its three most frequent.

    Raises:
        NoProfile: the page has no samples.
    """
    start = source.find('"Address"')
    rows = list(csv.DictReader(io.StringIO(source[start:]))) if start >= 0 else []
    total = sum(float(row[SAMPLES] or 0) for row in rows)
    if not total:
        raise NoProfile("the report has no samples of warps: the kernel is too short, or the driver gives none")
    kinds = [name for name in rows[0] if name.startswith("stall_") and "(Not Issued)" not in name]

    def share(row: dict[str, str], name: str) -> float:
        return round(float(row[name] or 0) / total, 4)

    instructions = []
    for number, row in enumerate(rows):
        most = sorted(kinds, key=lambda kind: -share(row, kind))[:3]
        own = {kind.removeprefix("stall_"): share(row, kind) for kind in most if share(row, kind)}
        facts = {"number": number, "instruction": row["Source"].strip(), "executed": row["Instructions Executed"]}
        instructions.append(facts | {"samples": share(row, SAMPLES), "stalls": own})
    whole = {
        kind.removeprefix("stall_"): round(sum(float(row[kind] or 0) for row in rows) / total, 4) for kind in kinds
    }
    return dict(sorted(whole.items(), key=lambda item: -item[1])), instructions


def text_of(facts: dict[str, str], stalls: dict[str, float], instructions: Sequence[dict[str, Any]], top: int) -> str:
    """Return what to read: figures, stalls, and the instructions with most samples, in the order of the kernel."""
    lines = [f"{name}: {value}" for name, value in facts.items()]
    lines.append("stalls: " + ", ".join(f"{kind} {100 * part:.1f} %" for kind, part in stalls.items() if part >= 0.005))
    chosen = sorted(sorted(instructions, key=lambda row: -row["samples"])[:top], key=lambda row: row["number"])
    for row in chosen:
        own = ", ".join(f"{kind} {100 * part:.1f}" for kind, part in row["stalls"].items())
        lines.append(f"{row['number']:>6} {100 * row['samples']:>5.1f} % {row['instruction'][:64]:<64} {own}")
    return "\n".join(lines)


def main(given: Sequence[str] | None = None) -> int:
    """Profile a case and print where its time went."""
    args = arguments(given)
    if args.run:
        run(args.shape, args.case)
        return 0
    with tempfile.TemporaryDirectory(prefix="mobiquant-") as directory:
        try:
            details, source = profile(args, args.report or Path(directory) / "report")
            stalls, instructions = stalls_of(source)
        except NoProfile as error:
            print(error, file=sys.stderr)
            return 1
    facts = facts_of(details)
    found = {"facts": facts, "stalls": stalls, "instructions": instructions}
    print(json.dumps(found, indent=1) if args.json else text_of(facts, stalls, instructions, args.top))
    return 0


if __name__ == "__main__":
    sys.exit(main())
