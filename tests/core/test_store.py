"""A store that machines share: each of them has a folder, what one makes the others take, and nothing is made twice."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import tensorpress.remote as remote_module
from tensorpress import digest
from tensorpress.artifact import Artifact, Store
from tensorpress.errors import InputError, StepError
from tensorpress.remote import Remote

NAME = "0123456789abcdef0123456789abcdef"
MEASURED = {"metrics": {"perplexity": 3.5}, "conditions": {}, "general": {}, "texts": {}, "subject": NAME}


def write(store, name=NAME, weights=b"weights" * 1000, **more):
    """An artifact in a store's folder, as a writer leaves it; the caller holds its lock."""
    part = store.part(name)
    part.mkdir(parents=True)
    for file, content in {"model.safetensors": weights, "config.json": b"{}", "vocab.txt": b""}.items():
        (part / file).write_bytes(content)
    files = {p.name: {"bytes": p.stat().st_size, "sha256": digest.of_file(p)} for p in sorted(part.iterdir())}
    (part / "tensorpress.json").write_text(json.dumps({"digest": name, "files": files, **more}, indent=1))
    (part / "README.md").write_text("# a card")
    return store.put_in_place(name)


def make(store, name=NAME, weights=b"weights" * 1000):
    """What a step does; returns whether it was made here."""
    with store.lock(name):
        if store.artifact(name) is not None:
            store.publish(name)
            return False
        write(store, name, weights)
        store.publish(name, made=True)
        return True


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def machine(address, tmp_path, monkeypatch):
    """`machine("a")`: the store of a machine with a folder of its own, all of them with the same remote and short leases."""
    monkeypatch.setenv("TENSORPRESS_REMOTE", address)
    monkeypatch.setenv("TENSORPRESS_LEASE", "1")
    return lambda name: Store(tmp_path / name).open()


def test_what_one_makes_the_other_takes(machine):
    a, b = machine("a"), machine("b")
    assert b.artifact(NAME) is None
    assert make(a) is True and make(a) is False
    assert make(b) is False
    assert contents(b.folder(NAME)) == contents(a.folder(NAME)) and b.artifact(NAME).problem() is None
    assert sorted(path.name for path in (b.root / "models").iterdir()) == [NAME]
    c = machine("c")
    assert c.artifact(NAME).folder == c.folder(NAME), "without its lock as well, as a step takes its parent"
    with c.lock(NAME):
        c.note(NAME, {**c.artifact(NAME).record, "metrics": {"bytes": 7}}, "# measured")
    d = machine("d")
    assert d.artifact(NAME).record["metrics"] == {"bytes": 7} and d.artifact(NAME).problem() is None
    assert (d.folder(NAME) / "README.md").read_text() == "# measured"


def test_without_a_remote_nothing_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("TENSORPRESS_REMOTE", raising=False)
    store = Store(tmp_path / "a").open()
    assert store.remote is None and make(store) is True and make(store) is False
    store.remember("evaluations", NAME, MEASURED)
    assert store.evaluation(NAME) == MEASURED and store.evaluation("other") is None
    assert sorted(path.name for path in (store.root / "locks").iterdir()) == [f"{NAME}.lock"]


def test_a_hit_is_published_where_it_is_missing(machine, monkeypatch):
    with monkeypatch.context() as alone:
        alone.delenv("TENSORPRESS_REMOTE")
        assert make(machine("a")) is True
    assert machine("b").artifact(NAME) is None
    assert make(machine("a")) is False
    assert machine("b").artifact(NAME) is not None


def test_two_folders_of_one_artifact_do_not_mix(machine, monkeypatch):
    """Made twice while one machine was alone: what was published first stays, and a note does not touch it."""
    with monkeypatch.context() as alone:
        alone.delenv("TENSORPRESS_REMOTE")
        make(machine("a"), weights=b"other bytes")
    make(machine("b"))
    a = machine("a")
    assert make(a) is False
    with a.lock(NAME):
        a.note(NAME, {**a.artifact(NAME).record, "metrics": {}}, "# of other bytes")
    assert contents(machine("c").artifact(NAME).folder) == contents(machine("b").folder(NAME))


def test_measurements_are_shared_and_nonsense_is_not_taken(machine):
    a, b = machine("a"), machine("b")
    a.remember("evaluations", "x", MEASURED)
    a.remember("sources", "x", {"path": "of this machine"})
    assert b.evaluation("x") == MEASURED and (b.root / "evaluations/x.json").is_file()
    assert b.remote.read("sources/x.json") is None
    for content in (b"", b"[]", b'{"metrics": {}}', json.dumps({**MEASURED, "texts": "x"}).encode(), b"\xff"):
        b.remote.write("evaluations/y.json", content)
        assert b.evaluation("y") is None and not (b.root / "evaluations/y.json").exists()
    with a.lock("evaluation-z"):
        assert a.evaluation("z") is None
        taken = threading.Thread(target=measured_by, args=(b, found := []))
        taken.start()
        time.sleep(1.0)
        assert not found, "the other machine measures it"
        a.remember("evaluations", "z", MEASURED)
    taken.join(10)
    assert found == [MEASURED]


def measured_by(store, found):
    with store.lock("evaluation-z"):
        found.append(store.evaluation("z"))


# --- damage and death


def file_of(store, name):
    """The key of an artifact's file in the remote."""
    record = store.remote.record(NAME)
    return f"models/{NAME}/{digest.of_json(record['files'])[:16]}/{name}"


DAMAGES = ["byte", "cut", "gone", "record cut", "another's record", "a path", "no length", "record gone"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_bytes_are_not_used_and_published_over(machine, damage, tmp_path):
    a = machine("a")
    make(a)
    weights, record = file_of(a, "model.safetensors"), f"models/{NAME}/tensorpress.json"
    content, said = a.remote.read(weights), json.loads(a.remote.read(record))
    if damage in ("byte", "cut"):
        a.remote.write(weights, b"X" + content[1:] if damage == "byte" else content[:-1])
    elif damage in ("gone", "record gone"):
        a.remote.remove(weights if damage == "gone" else record)
    elif damage == "record cut":
        a.remote.write(record, a.remote.read(record)[:-5])
    elif damage == "another's record":
        a.remote.write(record, json.dumps({**said, "digest": "f" * 32}).encode())
    elif damage == "no length":
        a.remote.write(record, json.dumps({**said, "files": dict.fromkeys(said["files"], 3)}).encode())
    else:
        said["files"]["../../outside"] = said["files"]["config.json"]
        a.remote.write(record, json.dumps(said).encode())
    b = machine("b")
    assert b.artifact(NAME) is None and list((b.root / "models").iterdir()) == []
    assert not list(tmp_path.rglob("outside"))
    assert make(b) is True
    assert contents(machine("c").artifact(NAME).folder) == contents(b.folder(NAME))


def test_a_damaged_folder_is_fetched_again(machine):
    a, b = machine("a"), machine("b")
    make(a)
    make(b)
    (b.folder(NAME) / "model.safetensors").write_bytes(b"damaged")
    (b.folder(NAME) / "rubbish").write_text("x")
    assert make(b) is False and contents(b.folder(NAME)) == contents(a.folder(NAME))


MACHINE = """
import sys, time
sys.path.insert(0, sys.argv[1])
import test_store
from tensorpress.artifact import Store
from tensorpress.remote import Remote

def write(store, *rest, write=test_store.write):
    print("makes", flush=True)
    time.sleep(1.0)
    return write(store, *rest)

def commit(self, *rest, commit=Remote.commit):
    print("sent", flush=True)
    if sys.argv[3] == "stay":
        time.sleep(600)
    return commit(self, *rest)

test_store.write, Remote.commit = write, commit
store = Store(sys.argv[2]).open()
print("ready", flush=True)
sys.stdin.readline()
print("made" if test_store.make(store) else "found", flush=True)
"""


def start(tmp_path, name, mode="go"):
    """Another machine: a process with a folder of its own, at work when it gets a line."""
    command = [sys.executable, "-c", MACHINE, str(Path(__file__).parent), str(tmp_path / name), mode]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def let_go(process):
    assert process.stdout.readline().strip() == "ready"
    process.stdin.write("\n")
    process.stdin.flush()


def test_of_two_machines_that_want_it_one_makes_it(machine, tmp_path):
    processes = [start(tmp_path, name) for name in "ab"]
    try:
        for process in processes:
            let_go(process)
        said = sorted(process.communicate(timeout=60)[0].split() for process in processes)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert said == [["found"], ["makes", "sent", "made"]]
    assert contents(machine("a").folder(NAME)) == contents(machine("b").folder(NAME))


def test_a_machine_that_dies_while_it_sends(machine, tmp_path):
    process = start(tmp_path, "a", "stay")
    try:
        let_go(process)
        assert [process.stdout.readline().strip() for _ in range(2)] == ["makes", "sent"]
        b = machine("b")
        assert b.remote.names(f"models/{NAME}", "") and b.artifact(NAME) is None, "all is there but the record"
        process.send_signal(signal.SIGKILL)
        begun = time.monotonic()
        assert make(b) is True and time.monotonic() - begun > 0.5
        assert machine("c").artifact(NAME).problem() is None
        a = machine("a")  # where it died, it is whole: it was made before it was sent
        assert make(a) is False
    finally:
        process.kill()
        process.wait()


def test_one_taken_for_dead_does_not_publish_over_the_other(machine, monkeypatch):
    import tensorpress.lease as lease_module

    monkeypatch.setattr(lease_module.Lease, "_beat", lambda *_: None)  # as if it were stopped for a while
    a, b = machine("a"), machine("b")
    with a.lock(NAME):
        assert a.artifact(NAME) is None
        assert make(b, weights=b"of b") is True
        write(a, NAME, b"of a")
        a.publish(NAME, made=True)
    assert contents(machine("c").artifact(NAME).folder) == contents(b.folder(NAME))
    assert a.artifact(NAME) is not None, "what it made is whole, and stays"


def test_a_remote_that_goes_away_in_the_middle(tmp_path, s3, monkeypatch):
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)  # of the same buckets
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("TENSORPRESS_REMOTE", s3)
    store = Store(tmp_path / "a").open()
    remote = store.remote
    with pytest.raises(StepError, match=r"store: s3://.*connect") as caught, store.lock(NAME):
        assert store.artifact(NAME) is None
        write(store)
        server.stop()
        server._server.server_close()
        store.publish(NAME, made=True)
    assert "\n" not in str(caught.value)
    assert Artifact(store.folder(NAME)).problem() is None
    monkeypatch.setattr(remote_module, "remote_here", lambda: remote)
    with pytest.raises(StepError, match="connect"):
        store.remember("evaluations", "x", MEASURED)
    assert store.evaluation("x") == MEASURED
    monkeypatch.setattr(store, "remote", Remote(s3))
    begun = time.monotonic()
    with pytest.raises(InputError, match="store: s3://"):
        store.open()
    assert time.monotonic() - begun < 10


# --- what it costs


def test_requests_of_a_lock_and_of_an_artifact(tmp_path, s3, monkeypatch):
    """The figures of docs/scaling.md."""
    import s3fs

    calls, ask = [], s3fs.S3FileSystem._call_s3

    async def counted(self, method, *rest, **named):
        calls.append(method)
        return await ask(self, method, *rest, **named)

    def requests():
        kinds = {"get_object": "GET", "put_object": "PUT", "list_objects_v2": "LIST", "delete_object": "DELETE"}
        made = [kinds[call] for call in calls]
        calls.clear()
        return {kind: made.count(kind) for kind in sorted(set(made))}

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", counted)
    monkeypatch.setenv("TENSORPRESS_REMOTE", s3)
    a, b = (Store(tmp_path / name).open() for name in "ab")
    files = 3
    assert requests() == {"GET": 1, "PUT": 2}, "to try exclusive creation, once for each process"
    with a.lock(NAME):
        pass
    assert requests() == {}, "a lock that makes nothing"
    with a.lock(NAME):
        a._lease(NAME).hold()
    assert requests() == {"LIST": 2, "PUT": 2}, "the first lease of a name"
    with a.lock(NAME):
        a._lease(NAME).hold()
    assert requests() == {"DELETE": 1, "GET": 1, "LIST": 2, "PUT": 2}, "a later one"
    make(a, "f" * 32)
    assert requests() == {"GET": 2, "LIST": 3, "PUT": 4 + files}, "made: lease, files, card, record"
    make(a, "f" * 32)
    assert requests() == {"GET": 1}, "had"
    make(b, "f" * 32)
    assert requests() == {"GET": 3 + files}, "fetched: record, files, card, and that it need not be published"
    with a.lock("f" * 32):
        for _ in range(2):
            a.note("f" * 32, {**Artifact(a.folder("f" * 32)).record, "metrics": {"bytes": 1}}, "# a card")
    assert requests() == {"GET": 2, "PUT": 2}, "noted, and noted again"
    with a.lock("evaluation-x"):
        assert a.evaluation("x") is None
        a.remember("evaluations", "x", MEASURED)
    assert requests() == {"GET": 2, "LIST": 2, "PUT": 3}, "a measurement that is made"
    with b.lock("evaluation-x"):
        assert b.evaluation("x") == b.evaluation("x") == MEASURED
    assert requests() == {"GET": 1}, "and one that is taken"
