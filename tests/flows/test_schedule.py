"""`schedule`: runs ahead are made by the running server, a due one starts, a champion is chosen; pause, resume, remove."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime
from typing import Any

import pytest


def listed(served: Any) -> dict[str, dict[str, Any]]:
    shown = served.command("schedule", "--list", "--json", "list.json")
    assert shown.returncode == 0, shown.stderr
    found = json.loads((served.folder / "list.json").read_text())["schedules"]
    assert all(item["slug"] in shown.stdout for item in found)
    return {item["slug"]: item for item in found}


def until(served: Any, slug: str, state: str, count: int, seconds: float) -> None:
    """Wait until so many runs of a schedule are in a state; none may have failed. Prefect is asked, which takes less than our command."""
    end = time.monotonic() + seconds
    while True:
        runs = served.api("POST", "/flow_runs/filter", deployments={"name": {"any_": [slug]}}).json()
        states = [run["state_name"] for run in runs]
        if states.count(state) >= count:
            return
        assert time.monotonic() < end and not {"Failed", "Crashed"} & set(states), states
        time.sleep(1.0)


@pytest.mark.timeout(900)
def test_a_night(served, recipe_text):
    (served.folder / "night.yaml").write_text(recipe_text(name="night"))
    made = served.command(
        "schedule", "night.yaml", "--cron", "* * * * *", "--timezone", "Europe/Zurich", "--slug", "night"
    )
    assert made.returncode == 0, made.stderr
    made = served.command("schedule", "fourbit", "--cron", "0 2 * * *", "--timezone", "Asia/Kolkata")
    assert made.returncode == 0, made.stderr

    until(served, "fourbit", "Scheduled", 3, 90)
    ahead = listed(served)["fourbit"]["next_runs"]
    assert len(ahead) == 3 and {run["state"] for run in ahead} == {"Scheduled"}
    starts = [datetime.fromisoformat(run["start"]) for run in ahead]
    assert all(start.astimezone(UTC).strftime("%H:%M") == "20:30" for start in starts), "02:00 in Kolkata"
    assert all(start > datetime.now(UTC) for start in starts)

    until(served, "night", "Completed", 1, 240)
    assert "Completed" in [run["state"] for run in listed(served)["night"]["last_runs"]]
    (champion,) = (served.store / "champions").glob("night on llama *.json")
    digest = json.loads(champion.read_text())["digest"]
    assert (served.store / "models" / digest / "model.safetensors").is_file()

    assert served.command("schedule", "--pause", "night").returncode == 0
    paused = listed(served)["night"]
    assert not paused["active"] and not paused["next_runs"]
    assert served.command("schedule", "--resume", "night").returncode == 0
    assert listed(served)["night"]["active"]
    for slug in ("night", "fourbit"):
        assert served.command("schedule", "--remove", slug).returncode == 0
    assert not listed(served)
    _the_same_again(served, recipe_text, digest)


def _the_same_again(served: Any, recipe_text: Any, digest: str) -> None:
    """A night with what is champion already, and a recipe that fails: the first is unchanged, the second said."""
    good = {"recipe": "the text below", "text": recipe_text(name="night")}
    bad = {"recipe": "the text below", "text": recipe_text(name="bad", model={"source": "nowhere"})}
    answer = served.start("nightly/nightly", runs=[good, bad])
    assert answer.status_code == 201, answer.text
    run = served.ended(answer.json()["id"])
    assert run["state_type"] == "FAILED" and "nowhere" in run["state"]["message"]
    found = served.api("POST", "/artifacts/filter", flow_runs={"id": {"any_": [run["id"]]}}).json()
    (page,) = [artifact["data"] for artifact in found if artifact["key"] == "nightly"]
    assert "is the champion already" in page and digest[:12] in page and "nowhere" in page
    larger = {"recipe": "the text below", "text": good["text"], "overrides": ["steps.quantize.bits=8"]}
    run = served.ended(served.started("nightly/nightly", runs=[larger]))
    assert (run["state_type"], run["state_name"]) == ("COMPLETED", "Worse"), run["state"]
    assert "size: " in run["state"]["message"] and "worse" in run["state"]["message"]


def test_what_cannot_be_scheduled(served, tensorpress_run, monkeypatch):
    refused = served.command("schedule", "fourbit")
    assert refused.returncode == 2 and "--cron: is missing" in refused.stderr and "Traceback" not in refused.stderr
    monkeypatch.chdir(served.folder)
    for name in [name for name in os.environ if name.startswith(("PREFECT", "MLFLOW"))]:
        monkeypatch.delenv(name)
    for arguments, part in (
        (["fourbit"], "--cron: is missing"),
        (["fourbit", "--cron", "0 2 * *"], "five fields"),
        (["fourbit", "--cron", "0 25 * * *"], "five fields"),
        (["fourbit", "--cron", "* * * * * *"], "five fields"),
        (["fourbit", "--cron", "0 0 30 2 *"], "never comes"),
        (["fourbit", "--cron", "0 2 * * *", "--slug", "nightly"], "choose another"),
        (["fourbit", "--cron", "0 2 * * *", "--timezone", "Mars/Base"], "Europe/Zurich"),
        (["fourbit", "--cron", "0 2 * * *", "--slug", "a b"], "--slug"),
        (["forbit", "--cron", "0 2 * * *"], "did you mean fourbit"),
        (["--pause", "nothing"], "no schedule of that name"),
        (["--remove", "compress"], "no schedule of that name"),
        (["--list", "--pause", "x"], "or one of --list"),
        ([], "or one of --list"),
    ):
        result = tensorpress_run("schedule", *arguments)
        assert result.code == 2 and part in result.err and "Traceback" not in result.err, result.err


def test_without_a_server(tmp_path, tensorpress_run, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    monkeypatch.setattr("tensorpress.flows.server.DEFAULT_ADDRESS", "http://127.0.0.1:9/api")
    result = tensorpress_run("schedule", "--list", "--store", tmp_path / "store")
    assert result.code == 2 and "tensorpress serve" in result.err and not (tmp_path / "store").exists()
