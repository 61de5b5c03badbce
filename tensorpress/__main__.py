"""`python -m tensorpress`: the command line."""

from tensorpress.cli import main

main()
