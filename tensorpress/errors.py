"""The two ways in which work stops: the user's input is wrong, or a step failed."""

from collections.abc import Iterable
from typing import Any


class InputError(Exception):
    """Input that cannot be used: one clear line for each problem. The command line prints it and exits with 2."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class StepError(Exception):
    """A step of a recipe failed; what earlier steps made is kept. The command line exits with 1."""


class RunFailed(StepError):
    """A run of which a part failed; `result` has what all parts came to."""

    def __init__(self, problem: str, result: dict[str, Any]):
        super().__init__(problem)
        self.result = result

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, Any]]]:
        return type(self), (str(self), self.result)


def nearest(name: str, known: Iterable[object]) -> str:
    """Return ` (did you mean X?)` for the known name nearest to `name`, or an empty string."""
    import difflib

    matches = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.5)
    return f" (did you mean {matches[0]}?)" if matches else ""
