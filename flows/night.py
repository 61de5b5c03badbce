"""The work of the flow `nightly`: runs, decisions about champions, retention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.states import Completed, Failed, State

from tensorpress.artifact import Store
from tensorpress.errors import InputError, RunFailed, StepError
from tensorpress.flows.compress import compress
from tensorpress.flows.parameters import CompressParameters, NightlyParameters
from tensorpress.pictures.markdown import table
from tensorpress.tasks.contest import Decision
from tensorpress.tasks.retention import Rule, retain
from tensorpress.tasks.tracking import open_client
from tensorpress.tasks.tracking.champions import decide

DAY, GIGABYTE = 86_400, 1e9


class Night:
    """What came of the runs of a night."""

    def __init__(self) -> None:
        self.decisions: list[Decision] = []
        self.failed: list[str] = []

    def run(self, asked: CompressParameters, parameters: NightlyParameters, store: Path) -> None:
        """Run a recipe as a flow run below this one, and decide about its champion."""
        state = compress(asked, return_state=True)
        document: Any = state.result(raise_on_failure=False)
        if not isinstance(document, dict):
            self.fail(f"{asked.title}: {state.message}")
            return
        tolerances = parameters.tolerance, parameters.speed_tolerance
        try:
            decision = decide(open_client(store), Store(store), document, *tolerances, parameters.promote)
        except (InputError, StepError, OSError) as error:
            self.fail(f"{document['name']}: {error}")
            return
        for line in decision.says:
            get_run_logger().info(line)
        self.decisions.append(decision)

    def fail(self, line: str) -> None:
        get_run_logger().error(line)
        self.failed.append(line)

    @property
    def page(self) -> str:
        """All decisions as Markdown."""
        failed = [table(["failed"], [[line] for line in self.failed])] if self.failed else []
        return "\n\n".join([*(decision.markdown for decision in self.decisions), *failed])

    @property
    def state(self) -> State[dict[str, Any]]:
        decided = [{"line": d.line, "verdict": d.verdict, "says": d.says} for d in self.decisions]
        result = {"decisions": decided, "failed": self.failed}
        worse = [line for decision in self.decisions if decision.verdict == "worse" for line in decision.says]
        if self.failed:
            failed = RunFailed("; ".join(self.failed)[:1000], result)
            return Failed(message=str(failed), data=failed)
        if worse:
            return Completed(name="Worse", message="; ".join(worse)[:1000], data=result)
        return Completed(message="; ".join(d.says[0] for d in self.decisions)[:1000], data=result)


def clean(parameters: NightlyParameters, store: Path) -> None:
    """Remove what the retention rule of the form says, and tell what went."""
    if parameters.keep_days is None and parameters.keep_gigabytes is None:
        return
    seconds = None if parameters.keep_days is None else parameters.keep_days * DAY
    size = None if parameters.keep_gigabytes is None else parameters.keep_gigabytes * GIGABYTE
    get_run_logger().info(
        "%s", retain(Store(store), Rule(unused_seconds=seconds, store_bytes=size, run_seconds=seconds))
    )
