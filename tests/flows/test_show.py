"""What a run shows in the Prefect UI."""

from __future__ import annotations

import httpx

from tensorpress.tasks import show


def test_a_server_that_is_gone_is_asked_once(monkeypatch):
    asked = []

    def gone(*rest, **more):
        asked.append(rest)
        raise httpx.ConnectError("gone")

    monkeypatch.setattr(show, "create_progress_artifact", gone)
    monkeypatch.setattr(show, "LONG", 0.0)
    progress = show._Progress("recipe: heal")
    for done in range(1, 50):
        progress("heal", "training", done, 100)
    assert len(asked) == 1


def test_keys_are_those_that_prefect_takes():
    assert show.key("tiny: quantize[quantize.bits=4] GPTQ") == "tiny-quantize-quantize-bits-4-gptq"


def test_rows_of_results():
    leaf = {
        "node": "q",
        "leaf": True,
        "error": None,
        "cached": True,
        "seconds": 1.0,
        "metrics": {"size_ratio": 0.37, "bytes": 5e6},
    }
    failed = {"node": "p", "leaf": True, "error": "no room", "cached": False, "seconds": None, "metrics": {}}
    headers, rows = show.results_rows({"original": {"bytes": 1.4e7}, "artifacts": [leaf, failed]})
    assert headers == ["branch", "made", "size", "size ratio"]
    assert rows == [
        ["original", "", "14.0 MB", "–"],
        ["q", "from the store", "5.00 MB", "0.370"],
        ["p", "no room", "–", "–"],
    ]
