"""Leases: locks between machines, on files that can be created exclusively. No wall clock is asked: clocks may be set back.

`locks/<name>/g<n>` are the generations of a lock; the highest holds it, and is never removed. Its holder writes it anew every third
of its time. It is free when it says so, or when the one who waits saw no change in it for that time by its own monotonic clock;
then the next generation is created, exclusively, so that one alone succeeds. A holder that finds a higher generation has lost it.
"""

from __future__ import annotations

import json
import math
import os
import platform
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

from tensorpress.errors import InputError, StepError
from tensorpress.remote import Remote

VARIABLE = "TENSORPRESS_LEASE"
SECONDS = 60.0
"""Time after which a holder that gives no sign of life is taken for dead."""
LONGEST = 3600.0
"""What the file of a holder may ask at most of those who wait, in seconds."""
PAUSE = 0.05, 2.0
"""Shortest and longest time between two looks, in seconds."""


def lease_seconds() -> float:
    """The time of a lease from the environment. Raises InputError."""
    text = os.environ.get(VARIABLE, "").strip()
    with suppress(ValueError):
        seconds = float(text or SECONDS)
        if math.isfinite(seconds) and 0 < seconds <= LONGEST:
            return seconds
    raise InputError(f"{VARIABLE}: found {text!r}; a lease is a number of seconds, above 0 and at most {LONGEST:.0f}")


class Lease:
    """The right to make one thing, for one machine at a time.

    `place` names the folder whose local lock the caller holds: a lease that the same place took before was left by one who died.
    """

    def __init__(self, remote: Remote, name: str, place: str, seconds: float):
        self.remote, self.name, self.place, self.seconds = remote, name, place, seconds
        self.generation = 0
        """That which we took, 0 for none."""
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._beats: threading.Thread | None = None

    def hold(self) -> bool:
        """Take it, waiting as long as another one has it; True if we had it all the time. Raises StepError when the remote fails."""
        if self.generation and self._highest() == self.generation:
            return True
        self._end_beats()
        self.generation = 0
        self._take()
        self._stop = threading.Event()
        self._beats = threading.Thread(target=self._beat, args=(self.generation, self._stop), daemon=True)
        self._beats.start()
        return False

    def release(self) -> None:
        """Give it back if we have it; where that cannot be written, others wait until its time is over."""
        self._end_beats()
        if self.generation:
            with suppress(StepError):
                self.remote.write(self._key(self.generation), self._state(released=True))
        self.generation = 0

    def _take(self) -> None:
        seen: tuple[int, bytes | None] | None = None
        since, pause = 0.0, PAUSE[0]
        while True:
            last = self._highest()
            state = self.remote.read(self._key(last)) if last else None
            if (last, state) != seen:
                seen, since = (last, state), time.monotonic()
            told = _told(state)
            free = not last or told.get("released") is True or told.get("place") == self.place
            if (free or time.monotonic() - since > self._patience(told)) and self._create(last + 1):
                return
            time.sleep(pause)
            pause = min(1.5 * pause, PAUSE[1], self.seconds / 10)

    def _create(self, generation: int) -> bool:
        if not self.remote.create(self._key(generation), self._state(generation=generation)):
            return False
        others = self._generations()
        if max(others, default=0) > generation:  # we slept: it had been taken, given back and removed since we looked
            self.remote.remove(self._key(generation))
            return False
        self.generation = generation
        for old in others:
            if old < generation:
                self.remote.remove(self._key(old))
        return True

    def _patience(self, told: dict[str, Any]) -> float:
        asked = told.get("seconds")
        return max(self.seconds, min(asked, LONGEST)) if isinstance(asked, (int, float)) else self.seconds

    def _beat(self, generation: int, stop: threading.Event) -> None:
        count = 0
        while not stop.wait(self.seconds / 3):
            count += 1
            with suppress(StepError):  # others may take it meanwhile: whoever publishes asks first
                if self._highest() != generation:
                    return
                self.remote.write(self._key(generation), self._state(beat=count))

    def _end_beats(self) -> None:
        self._stop.set()
        if self._beats is not None:
            self._beats.join()
            self._beats = None

    def _generations(self) -> list[int]:
        names = self.remote.names(f"locks/{self.name}", "g")
        return [int(name[1:]) for name in names if name[1:].isdecimal() and name.isascii()]

    def _highest(self) -> int:
        return max(self._generations(), default=0)

    def _key(self, generation: int) -> str:
        return f"locks/{self.name}/g{generation}"

    def _state(self, **more: Any) -> bytes:
        who = f"{platform.node()} {os.getpid()}"
        return json.dumps(
            {"token": self._token, "place": self.place, "who": who, "seconds": self.seconds, **more}
        ).encode()


def _told(state: bytes | None) -> dict[str, Any]:
    """What a holder's file says; nothing where it is being written just now or is nonsense."""
    try:
        told = json.loads(state or b"{}")
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}
