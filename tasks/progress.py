"""Where long work reports how far it is: to whoever set a sink (the command line's progress bars), else to nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

MLFLOW_VARIABLE = "TENSORPRESS_MLFLOW_UI"
"""The address of MLflow's pages, which runs leave a link to."""

Sink = Callable[[str, str, int, int], None]
"""Called with the node, what is being done, how much of it is done, and how much there is."""

_sink: Sink | None = None
_task_sink: ContextVar[Sink | None] = ContextVar("task_sink", default=None)


def set_sink(sink: Sink | None) -> None:
    """Send reports to `sink`; None: nowhere."""
    global _sink
    _sink = sink


@contextmanager
def task_sink(sink: Sink) -> Iterator[None]:
    """Send what the task of this thread reports to `sink` as well."""
    token = _task_sink.set(sink)
    try:
        yield
    finally:
        _task_sink.reset(token)


def reporter(node: str) -> Callable[[str, int, int], None]:
    """A progress function for one node of the graph."""

    def report(what: str, done: int, total: int) -> None:
        for sink in (_sink, _task_sink.get()):
            if sink is not None:
                sink(node, what, done, total)

    return report
