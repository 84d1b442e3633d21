"""The command line, `mobiquant`: one file a group of commands, and one place where errors become exit codes.

Heavy imports happen inside commands, so that help and completion answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import typer

from mobiquant_compiler.cli import analyze, bench, demo, emit, evaluate, generate, graphs, quantize, tune
from mobiquant_compiler.cli.console import user_error

app = typer.Typer(
    name="mobiquant",
    help="Elastic language models: residual 2-bit slices, and a budget that moves while the model runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (demo, quantize, evaluate, analyze, generate, bench, tune, graphs, emit):
    group.register(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake costs one line on stderr and exit code 2.

    Raises:
        SystemExit: always.
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="mobiquant")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = user_error(error)
        if message is None:
            raise
        print(f"mobiquant: {message}", file=sys.stderr)
        sys.exit(2)
