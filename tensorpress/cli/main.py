"""The application: verbs from the files beside this one, and the way errors leave."""

from __future__ import annotations

import errno
import os
import sys
import warnings
from functools import cache

import typer

from tensorpress.cli.common import BAD_INPUT, FAILED, say_problem
from tensorpress.errors import InputError, StepError
from tensorpress.secrets import redact_logs

app = typer.Typer(
    name="tensorpress",
    help="Compress language models by recipes: decompose, prune, heal, quantize, measure, track.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@cache
def _add_verbs() -> None:
    """Once in a process, whatever number of times its `main` is called: typer would keep every one."""
    from tensorpress.cli import clean, doctor, models, recipes, run, runs, schedule, serve

    for module in (run, serve, schedule, recipes, models, runs, clean, doctor):
        module.add_to(app)


def quiet() -> None:
    """No warnings, bars or reports of libraries between our lines."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")  # what it calls errors is raised as well
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if "transformers" in sys.modules:  # it has read the environment already
        from transformers.utils import logging

        logging.set_verbosity(logging.CRITICAL)
        logging.disable_progress_bar()


def main() -> None:
    """Run the command line and exit with its code; an error of the user's is one line, without a traceback."""
    quiet()
    redact_logs()
    _add_verbs()
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except InputError as error:
        say_problem("\n".join(" ".join(problem.splitlines()) for problem in error.problems))
        sys.exit(BAD_INPUT)
    except StepError as error:
        say_problem(str(error))
        sys.exit(FAILED)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        say_problem("stopped; what was finished is kept, run the same command again to go on")
        sys.exit(130)
    except Exception as error:
        _usage_or_crash(error)


def _usage_or_crash(error: Exception) -> None:
    if isinstance(error, MemoryError):
        say_problem("there is not enough memory for this; a smaller model, fewer samples, or dtype bfloat16 need less")
        sys.exit(FAILED)
    shown = getattr(error, "format_message", None)  # click's usage errors, whichever click typer carries
    if shown is not None:
        say_problem(shown())
        sys.exit(getattr(error, "exit_code", BAD_INPUT))
    if isinstance(error, OSError) and error.filename is not None:
        say_problem(f"{error.filename}: {error.strerror}")
        sys.exit(BAD_INPUT if error.errno == errno.ENAMETOOLONG else FAILED)
    if os.environ.get("TENSORPRESS_DEBUG"):
        raise error
    say_problem(f"{type(error).__name__}: {error} (set TENSORPRESS_DEBUG=1 for the traceback)")
    sys.exit(FAILED)
