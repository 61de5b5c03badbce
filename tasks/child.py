"""The process that `tensorpress.tasks.isolate` starts: calls one function and says what it returns.

Reads one JSON request from standard input: {"entry": "module:function", "arguments", "parent"}. Says lines of JSON on standard
output: {"progress": [what, done, total]}, {"clock": true | false}, and at the end {"result"}, {"refused": [problems]} or {"failed": reason}.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from tensorpress.starting import starting
from tensorpress.tasks.alive import die_with_parent


def main() -> None:
    """Answer one request."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever else is printed is no answer

    def say(**line: Any) -> None:
        out.write(json.dumps(line) + "\n")
        out.flush()

    request = json.loads(sys.stdin.buffer.read())
    _die_with(request["parent"])
    _be_taken_first()
    say(**_answer(request, say))
    out.close()


def _answer(request: dict[str, Any], say: Any) -> dict[str, Any]:
    from tensorpress.errors import InputError, StepError

    @contextlib.contextmanager
    def clock() -> Iterator[None]:
        say(clock=True)
        try:
            yield
        finally:
            say(clock=False)

    try:
        with starting():
            from tensorpress.tasks.progress import set_sink

            module, name = request["entry"].split(":")
            function = getattr(import_module(module), name)
        set_sink(lambda node, what, done, total: say(progress=[what, done, total]))
        return {"result": function(**request["arguments"], clock=clock)}
    except InputError as error:
        return {"refused": list(error.problems)}
    except StepError as error:
        return {"failed": str(error)}
    except MemoryError:
        return {"failed": "there is not enough memory"}
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"}


def _die_with(parent: int) -> None:
    """Be killed when the thread that waits for the answer is gone, also when it went before this was asked for."""
    die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _be_taken_first() -> None:
    """Linux: let the kernel take this process, not the flow, when memory runs out."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


if __name__ == "__main__":
    main()
