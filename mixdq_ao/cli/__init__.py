"""The mixdq-ao command: parses, calls the library, prints."""

import logging
import os
import sys

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from mixdq_ao.cli.evaluation import compare, evaluate
from mixdq_ao.cli.files import convert, inspect
from mixdq_ao.cli.measure import bench, demo, doctor
from mixdq_ao.cli.method import allocate, auto, calibrate, sensitivity
from mixdq_ao.errors import MixDQError

_GOES_ON = "the same command goes on where it was"
AFTER_A_STOP = {
    "calibrate": _GOES_ON,
    "sensitivity": _GOES_ON,
    "auto": _GOES_ON,
    "evaluate": f"{_GOES_ON} if it has --out",
    "bench": f"{_GOES_ON} if it has --out, with --resume added",
}


class _Commands(TyperGroup):
    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            after = AFTER_A_STOP.get(ctx.invoked_subcommand)
            print(f"stopped: {after}" if after else "stopped", file=sys.stderr)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Few-step text-to-image diffusion models, quantized: the same pictures in half or a quarter of the memory.",
    no_args_is_help=True,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


# In the order that help lists them.
for _command in (demo, auto, calibrate, sensitivity, allocate, evaluate, compare, convert, inspect, bench, doctor):
    app.command()(_command)


def main() -> None:
    """Run the command; an error of ours, or of the system, is one line on stderr and exit code 2, not a traceback."""
    # The libraries below print notes that a user of this command can do nothing about.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    logging.getLogger("torchao").setLevel(logging.ERROR)
    try:
        try:
            app(standalone_mode=True)
        finally:
            _flush()
    except BrokenPipeError:  # a reader such as head that has seen enough
        raise SystemExit(1) from None
    except MixDQError as error:
        text = str(error)
    except OSError as error:
        where = error.filename2 or error.filename
        text = f"{where}: {error.strerror}" if where else error.strerror or str(error)
    else:
        return
    Console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True, highlight=False)
    raise SystemExit(2)


def _flush() -> None:
    """A disk that is full is found here, and not by Python after the last line of the command."""
    try:
        if sys.stdout is not None:  # the shell's >&-
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python tries once more at its end
        raise
