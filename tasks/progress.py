"""Where long work reports how far it is: to whoever set a sink (the command line's progress bars), else to nobody."""

from __future__ import annotations

from collections.abc import Callable

Sink = Callable[[str, str, int, int], None]
"""Called with the node, what is being done, how much of it is done, and how much there is."""

_sink: Sink | None = None


def set_sink(sink: Sink | None) -> None:
    """Send reports to `sink`; None: nowhere."""
    global _sink
    _sink = sink


def reporter(node: str) -> Callable[[str, int, int], None]:
    """A progress function for one node of the graph."""

    def report(what: str, done: int, total: int) -> None:
        if _sink is not None:
            _sink(node, what, done, total)

    return report
