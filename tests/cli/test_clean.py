"""`clean`: what goes by age and size, what stays whatever the bounds, what dead processes left."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from tensorpress.artifact import RECORD, Store

DAY = 86_400.0


def name(letter):
    return letter * 32


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    from tensorpress.tasks.tracking import open_client

    made = tmp_path_factory.mktemp("database")
    open_client(made)
    return made / "mlflow.db"


class Place:
    """A store with artifacts that no run made."""

    def __init__(self, root: Path):
        self.store = Store(root).open()
        self.root = root

    def artifact(self, letter, days, size=1000, parent="", **record):
        folder = self.store.folder(name(letter))
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(size))
        parent = name(parent) if parent else "f" * 64
        content = {"digest": name(letter), "parent": parent, "title": f"demo, {letter}", "chain": [], **record}
        (folder / RECORD).write_text(json.dumps(content))
        self.used(letter, days)
        return folder

    def used(self, letter, days):
        when = time.time() - days * DAY
        os.utime(self.store.folder(name(letter)) / RECORD, (when, when))

    def champion(self, letter, line="quick on demo 12345678", run_id="r"):
        content = {"line": line, "node": "q", "digest": name(letter), "path": "/p", "metrics": {}, "version": "1"}
        (self.root / "champions" / f"{line}.json").write_text(json.dumps({**content, "run_id": run_id}))

    def run(self, *letters, status="FINISHED", days=0.0, model="demo", pid=None):
        from mlflow import MlflowClient

        client = MlflowClient(f"sqlite:///{self.root / 'mlflow.db'}")
        import platform

        tags = {"tensorpress.recipe": "quick", "tensorpress.model": model}
        tags |= {"tensorpress.host": platform.node(), "tensorpress.pid": str(pid or os.getpid())}
        start = int((time.time() - days * DAY) * 1000)
        parent = client.create_run("0", start_time=start, tags=tags)
        for letter in letters:
            more = {"mlflow.parentRunId": parent.info.run_id, "tensorpress.digest": name(letter)}
            child = client.create_run("0", start_time=start, tags=more)
            client.set_terminated(child.info.run_id)
        if status != "RUNNING":
            client.set_terminated(parent.info.run_id, status)
        return parent.info.run_id, client

    @property
    def there(self):
        return "".join(sorted(path.name[0] for path in (self.root / "models").glob("[0-9a-f]*")))


@pytest.fixture
def place(tmp_path, database):
    made = Place(tmp_path / "store")
    shutil.copyfile(database, made.root / "mlflow.db")
    return made


@pytest.fixture
def clean(call, place, work):
    """`clean("--older-than", "1d")`: what `--json` says of a run that really removes."""

    def run(*arguments, remove=True):
        code, out, err = call(
            "clean", *arguments, "--store", place.root, "--json", "c.json", *(["--yes"] if remove else [])
        )
        assert (code, err) == (0, ""), err
        answer = json.loads((work / "c.json").read_text())
        answer["out"] = " ".join(out.split())
        answer["artifacts"] = "".join(sorted(i["name"][0] for i in answer["goes"] if i["kind"] == "artifact"))
        return answer

    return run


def test_nothing_is_removed_without_yes(clean, place):
    place.artifact("a", days=40)
    place.artifact("b", days=1)
    (place.root / "locks/x.lock").touch()
    (place.root / "models/.trash-x").mkdir()
    before = sorted(place.root.rglob("*"))
    answer = clean("--older-than", "30d", remove=False)
    assert answer["artifacts"] == "a" and not answer["removed"] and "would be freed" in answer["out"]
    assert "40 days ago" in answer["out"] and "within the bounds" in answer["out"] and "demo, a" in answer["out"]
    assert sorted(p for p in place.root.rglob("*") if p.name != "mlflow.lock") == before


def test_by_age(clean, place):
    for letter, days in (("a", 31), ("b", 29), ("c", -400)):  # c: written when the clock was ahead
        place.artifact(letter, days)
    answer = clean("--older-than", "30d")
    assert answer["artifacts"] == "a" and place.there == "bc"
    assert answer["bytes_before"] - answer["bytes_after"] >= 1000
    assert clean("--older-than", "30d")["goes"] == []


def test_a_clock_that_was_set_back_removes_nothing(clean, place, monkeypatch):
    for letter in "abc":
        place.artifact(letter, days=0)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3650 * DAY)
    assert clean("--older-than", "1d")["artifacts"] == "" and place.there == "abc"


def test_by_size_the_longest_unused_first(clean, place):
    for letter, days in (("a", 1), ("b", 3), ("c", 2)):
        place.artifact(letter, days, size=2_000_000)
    rest = clean("--larger-than", "1TB")["bytes_after"] - 6_000_000
    answer = clean("--larger-than", f"{(rest + 4_500_000) / 1e6}MB")
    assert answer["artifacts"] == "b" and place.there == "ac"
    answer = clean("--larger-than", "1kB")
    assert place.there == "" and "still larger" in answer["out"]


def test_both_bounds(clean, place):
    for letter, days in (("a", 40), ("b", 3), ("c", 2)):
        place.artifact(letter, days, size=2_000_000)
    rest = clean()["bytes_after"] - 6_000_000
    assert place.there == "abc"
    clean("--older-than", "30d", "--larger-than", f"{(rest + 2_500_000) / 1e6}MB")
    assert place.there == "c"


def test_champions_and_what_they_come_from_stay(clean, place):
    place.artifact("a", 90)
    place.artifact("b", 90, parent="a")
    place.artifact("c", 90, parent="b", chain=[{"digest": name("b")}, {"digest": name("c")}])
    place.artifact("d", 90, parent="b")
    place.artifact("e", 90, base=name("c"))  # a model that was an artifact itself
    place.champion("e")
    answer = clean("--older-than", "1d", "--larger-than", "1B")
    assert answer["artifacts"] == "d" and place.there == "abce"
    assert {i["why"] for i in answer["stays"]} == {
        "champion of quick on demo 12345678", "the champion of quick on demo 12345678 comes from it"
    }  # fmt: skip


def test_a_champions_file_that_cannot_be_read_removes_nothing(call, place):
    place.artifact("a", 90)
    (place.root / "champions/x.json").write_text("{")
    code, _, err = call("clean", "--older-than", "1d", "--store", place.root, "--yes")
    assert code == 2 and "cannot be read as a champion" in err and place.there == "a"


def test_what_somebody_works_on_stays(clean, place):
    place.artifact("a", 90)
    place.artifact("b", 90)
    scratch = place.store.scratch(name("a"))
    scratch.mkdir()
    part = place.root / "models" / f".part-{name('a')}"
    part.mkdir()
    with place.store.lock(name("a")):
        answer = clean("--older-than", "1d")
        assert place.there == "a" and scratch.is_dir() and part.is_dir()
        assert (place.root / "locks" / f"{name('a')}.lock").is_file()
        assert answer["stays"][0]["why"] == "somebody works on it"
    clean("--older-than", "1d")
    assert place.there == "" and not scratch.exists() and not part.exists()


def test_what_was_taken_up_after_the_look_stays(place):
    from tensorpress.tasks.retention import Rule, clean, survey

    for letter in "abc":
        place.artifact(letter, 90)
    found = survey(place.store, Rule(unused_seconds=DAY))
    place.champion("a")
    run_id, client = place.run("b", status="RUNNING")
    with place.store.lock(name("c")):
        assert clean(place.store, found) == [] and place.there == "abc"
    client.set_terminated(run_id)
    clean(place.store, found)
    assert place.there == "a"


def test_what_a_running_run_uses_stays(clean, place):
    for letter in "abcd":
        place.artifact(letter, 90)
    place.run("a", status="RUNNING", model=str(place.store.folder(name("b"))))
    place.run("c", status="RUNNING", pid=2**22 + 5)  # its process is gone
    place.run("d")
    answer = clean("--older-than", "1d")
    assert place.there == "ab" and "running run" in answer["stays"][0]["why"]


def test_the_last_runs(clean, place):
    for letter, days in (("a", 3), ("b", 2), ("c", 1)):
        place.artifact(letter, 90)
        place.run(letter, days=days)
    clean("--older-than", "1d", "--keep-last", 2)
    assert place.there == "bc"
    clean("--older-than", "1d", "--keep-last", 0)
    assert place.there == ""


def test_mlflow_is_told_and_evaluations_go_with_their_artifact(clean, place):
    place.artifact("a", 90)
    place.artifact("b", 0)
    _, client = place.run("a", "b")
    client.create_registered_model("line")
    client.create_model_version("line", source="file:///p", tags={"digest": name("a")})
    for letter in "ab":
        place.store.remember("evaluations", f"e{letter}", {"metrics": {}, "subject": name(letter)})
    clean("--older-than", "30d")
    tags = {r.data.tags.get("tensorpress.digest"): r.data.tags for r in client.search_runs(["0"])}
    assert "tensorpress.removed" in tags[name("a")] and "tensorpress.removed" not in tags[name("b")]
    assert "removed" in client.get_model_version("line", "1").tags
    assert [path.name for path in (place.root / "evaluations").iterdir()] == ["eb.json"]


def test_litter_goes_and_what_is_fresh_stays(clean, place):
    root = place.root
    old = time.time() - 60 * DAY
    place.artifact("a", 0)
    gone = [
        root / "models" / f".part-{name('e')}",
        root / "models" / f".part-{name('e')}.probe",
        root / "models/.trash-x",
        root / "evaluations/.part-x",
        root / "scratch" / name("a"),
        root / "scratch" / name("e"),
        root / "locks" / f"{name('e')}.lock",
        root / "locks/evaluation-x.lock",
        root / "prefect/server.log",
    ]
    stays = [root / "evaluations/.part-y", root / "scratch" / name("f"), root / "prefect/prefect.db"]
    for path in (*gone, *stays):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    for path in gone:
        os.utime(path, (old, old))
    answer = clean()
    assert not [path for path in gone if path.exists()] and all(path.exists() for path in stays)
    assert place.there == "a" and "half-written files: 3" in answer["out"]
    (root / "prefect/server.log").write_text("x")
    os.utime(root / "prefect/server.log", (old, old))
    with FileLock(root / "prefect/server.lock"):
        clean()
        assert (root / "prefect/server.log").exists()


def test_old_runs_are_deleted_for_good_but_not_a_champions(clean, place, call):
    for letter in "abc":
        place.artifact(letter, 0)
    old, client = place.run("a", days=400)
    kept, _ = place.run("b", days=400)
    fresh, _ = place.run("c", days=1)
    place.champion("b", run_id=kept)
    folder = place.root / "artifacts" / old / "artifacts"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    answer = clean("--runs-older-than", "365d")
    assert len(answer["goes"]) == 2 and not folder.parent.exists() and place.there == "abc"
    from mlflow.entities import ViewType

    left = {run.info.run_id for run in client.search_runs(["0"], run_view_type=ViewType.ALL)}
    assert {kept, fresh} <= left and old not in left and len(left) == 4


def test_readers_never_see_half_an_artifact(place):
    """A reader that looks all the time sees the whole folder or none, while it is removed."""
    from tensorpress.tasks.retention import Rule, retain

    folder = place.artifact("a", 90)
    for number in range(200):
        (folder / f"model-{number}.safetensors").write_bytes(b"x")
    counts, stop = set(), threading.Event()

    def read():
        while not stop.is_set():
            try:
                counts.add(len(list(folder.iterdir())))
            except FileNotFoundError:
                counts.add(0)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.05)
    gone = retain(place.store, Rule(unused_seconds=DAY))
    stop.set()
    reader.join()
    assert gone.startswith("removed 1 artifacts, 0 runs and 0 other files: ") and counts <= {0, 202} and 202 in counts


def test_a_lock_file_that_goes_is_still_a_lock(place):
    """While lock files are removed all the time, two never hold one lock."""
    from tensorpress.tasks.litter import litter, remove_litter

    inside, worst, stop = [0], [0], threading.Event()

    def work():
        while not stop.is_set():
            with place.store.lock("x"):
                inside[0] += 1
                worst[0] = max(worst[0], inside[0])
                time.sleep(0.0005)
                inside[0] -= 1

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    removed = 0
    end = time.monotonic() + 2
    while time.monotonic() < end or (not removed and time.monotonic() < end + 30):
        removed += sum(remove_litter(place.store, item) for item in litter(place.store, time.time()))
    stop.set()
    for worker in workers:
        worker.join()
    assert worst[0] == 1 and removed > 0


def test_refusals(refused, place, tmp_path):
    for bad in ("30", "d", "-1d", "1 year", "1e3d", "9" * 30 + "d", ""):
        assert "--older-than" in refused("clean", "--older-than", bad, "--store", place.root)
    assert "units: B, kB" in refused("clean", "--larger-than", "20", "--store", place.root)
    assert "is no store" in refused("clean", "--store", tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "is no store" in refused("clean", "--yes", "--store", tmp_path / "empty")
    assert "--json" in refused("clean", "--store", place.root, "--json", tmp_path)


def test_units(clean, place):
    place.artifact("a", 3)
    for age in ("4d", "1w", "100h", "0.5 w"):
        assert clean("--older-than", age)["artifacts"] == ""
    assert clean("--older-than", "2.5D")["artifacts"] == "a"


def test_an_artifact_that_is_found_again_is_young(place):
    place.artifact("a", 90)
    place.store.touch(name("a"))
    from tensorpress.tasks.retention import Rule, survey

    assert survey(place.store, Rule(unused_seconds=DAY)).goes == []
