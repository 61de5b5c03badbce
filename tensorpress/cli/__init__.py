"""The command line: `tensorpress VERB`. Exit codes: 0 done, 1 a step failed, 2 bad input, 3 a gate did not hold."""

from tensorpress.cli.main import main

__all__ = ["main"]
