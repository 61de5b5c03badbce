"""Files and leases on an address that machines share: exclusive creation, holders that die, and addresses that cannot be used."""

import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

import tensorpress.lease as lease_module
import tensorpress.remote as remote_module
from tensorpress.errors import InputError, StepError
from tensorpress.lease import Lease, lease_seconds
from tensorpress.remote import Remote, problem_of_record, remote_here


@pytest.fixture
def remote(address):
    return Remote(address).open()


# --- files


def test_files_come_back_and_go(remote):
    assert remote.read("a/b") is None and remote.names("a", "") == []
    remote.write("a/b", b"one")
    remote.write("a/b", b"two")
    remote.write("a/c", b"")
    assert remote.read("a/b") == b"two" and remote.read("a/c") == b""
    assert sorted(remote.names("a", "")) == ["b", "c"] and remote.names("a", "b") == ["b"]
    remote.remove("a/b")
    remote.remove("a/b")
    assert remote.names("a", "") == ["c"]


def test_of_eight_who_create_one_succeeds(address):
    remotes = [Remote(address).open() for _ in range(2)] * 4
    for turn in range(10):
        start = threading.Barrier(8)

        def create(index, turn=turn, start=start):
            start.wait()
            return remotes[index].create(f"locks/x/g{turn}", f"{index}".encode())

        with ThreadPoolExecutor(8) as pool:
            won = [index for index, created in enumerate(pool.map(create, range(8))) if created]
        assert len(won) == 1 and remotes[0].read(f"locks/x/g{turn}") == str(won[0]).encode()


def test_who_wrote_and_lost_the_answer_has_created_it(remote):
    assert remote.create("x", b"ours") and remote.create("x", b"ours")
    assert not remote.create("x", b"theirs") and remote.read("x") == b"ours"


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("memory://x", "memory of one process"),
        ("/mnt/share", "an address is"),
        ("file://share", "an address is"),
        ("s3://", "an address is"),
        ("simplecache::s3://bucket/x", "an address is"),
        ("nonsense://x", "Protocol not known"),
        ("http://127.0.0.1:1/x", "cannot be used"),
        ("zip:///tmp/x.zip", ""),
        ("file:///no/such/folder/share", "there is no folder /no/such/folder"),
        ("file:///proc/share", "cannot be used"),
    ],
)
def test_addresses_that_cannot_be_used(address, says, one_line):
    with pytest.raises(InputError) as caught:
        Remote(address).open()
    assert says in one_line(caught, "store: ")


def test_a_bucket_that_is_not_there(s3, one_line):
    with pytest.raises(InputError) as caught:
        Remote("s3://no-such-bucket-of-ours/x").open()
    one_line(caught, "store: s3://no-such-bucket-of-ours/x cannot be used: .*bucket does not exist")


def test_a_server_that_writes_over_what_was_to_be_created_once(s3, monkeypatch, one_line):
    from moto.s3.responses import S3Response

    put = S3Response.put_object

    def forgetful(self):
        self.headers = {name: value for name, value in self.headers.items() if name.lower() != "if-none-match"}
        return put(self)

    monkeypatch.setattr(S3Response, "put_object", forgetful)
    with pytest.raises(InputError) as caught:
        Remote(s3).open()
    one_line(caught, "conditional writes")


def test_a_server_that_never_answers(s3, monkeypatch, one_line):
    monkeypatch.setattr(remote_module, "ANSWER", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(InputError) as caught:
            Remote(s3).open()
        assert time.monotonic() - begun < 4.0
    one_line(caught, "does not answer within 1 s")


def test_no_password_is_shown():
    assert Remote("sftp://me:secret@host/x").shown == "sftp://host/x"


def test_the_environment_names_it(monkeypatch, one_line):
    monkeypatch.delenv("TENSORPRESS_REMOTE", raising=False)
    assert remote_here() is None
    monkeypatch.setenv("TENSORPRESS_REMOTE", " file:///x/y ")
    assert remote_here().address == "file:///x/y" and remote_here() is remote_here()
    for text in ("0", "nan", "-1", "soon", "1e9"):
        monkeypatch.setenv("TENSORPRESS_LEASE", text)
        with pytest.raises(InputError) as caught:
            lease_seconds()
        one_line(caught, "TENSORPRESS_LEASE: found")


FILE = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/passwd", "a/b", "..", ".", "", "a\\b", "a\nb", "a\0b", "tensorpress.json", "README.md", "x" * 300, "\ud800"],
)  # fmt: skip
def test_names_from_outside_stay_in_their_folder(name):
    record = {"digest": "d", "files": {"good": FILE, name: FILE}}
    assert problem_of_record(json.dumps(record).encode(), "d")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[]", b"{", b"null", b'{"digest": "d"}', b'{"digest": "d", "files": []}', b'{"digest": "e", "files": {}}',
        b'{"digest": "d", "files": "a"}', b"\xff\xfe", b"[" * 100000,
    ],
)  # fmt: skip
def test_records_from_outside_that_say_nothing(content):
    assert problem_of_record(content, "d")
    assert problem_of_record(json.dumps({"digest": "d", "files": {"a b.model": FILE}}).encode(), "d") is None


# --- leases


taken: list[Lease] = []


def lease(remote, place, seconds=1.0, name="x"):
    taken.append(Lease(remote, name, place, seconds))
    return taken[-1]


@pytest.fixture(autouse=True)
def nothing_held_afterwards():
    """A lease that is held is written anew for ever, also while later tests count requests."""
    yield
    while taken:
        taken.pop().release()


def test_a_second_one_waits_until_it_is_given_back(remote):
    first, second = lease(remote, "a", seconds=30), lease(remote, "b", seconds=30)
    assert first.hold() is False and first.hold() is True
    held = threading.Event()
    waiting = threading.Thread(target=lambda: (second.hold(), held.set()))
    waiting.start()
    assert not held.wait(1.0)
    lease(remote, "c", name="another").hold()
    begun = time.monotonic()
    first.release()
    assert held.wait(10) and time.monotonic() - begun < 4.0, "given back is told at once, not after the lease's time"
    waiting.join()
    assert second.hold() is True and remote.names("locks/x", "g") == ["g2"]
    second.release()


def test_who_lives_keeps_it_longer_than_its_time(remote):
    first, second = lease(remote, "a"), lease(remote, "b")
    first.hold()
    waiting = threading.Thread(target=second.hold)
    waiting.start()
    time.sleep(3.5)
    assert first.hold() is True and second.generation == 0
    first.release()
    waiting.join(10)
    assert second.generation == 2
    second.release()


HOLDER = """
import sys, time
from tensorpress.lease import Lease
from tensorpress.remote import Remote
Lease(Remote(sys.argv[1]), "x", "another machine", 1.0).hold()
print("held", flush=True)
time.sleep(600)
"""


def test_one_that_was_killed_is_followed_after_its_time(address, remote):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, address], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline().strip() == "held"
        follower = lease(remote, "ours")
        waiting = threading.Thread(target=follower.hold)
        waiting.start()
        time.sleep(2.0)
        assert waiting.is_alive(), "it is alive, and so is its lease"
        process.kill()
        killed = time.monotonic()
        waiting.join(15)
        assert not waiting.is_alive() and 0.5 < time.monotonic() - killed < 10
        follower.release()
    finally:
        process.kill()
        process.wait()


def test_two_who_wait_for_a_dead_one_do_not_both_follow(remote):
    remote.create("locks/x/g7", b"")  # died while it wrote
    followers = [lease(remote, str(i), seconds=0.5) for i in range(4)]
    holding, most = [], []

    def follow(one):
        one.hold()
        holding.append(one)
        most.append(len(holding))
        time.sleep(0.2)
        assert one.hold() is True
        holding.remove(one)
        one.release()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(follow, followers))
    assert most == [1, 1, 1, 1] and remote.names("locks/x", "g") == ["g11"]


def test_the_same_place_takes_at_once_what_its_dead_left(remote):
    lease(remote, "ours", seconds=600).hold()
    begun = time.monotonic()
    assert lease(remote, "ours", seconds=600).hold() is False
    assert time.monotonic() - begun < 3.0


def test_one_who_waits_grants_the_time_that_the_holder_asks_for(remote):
    remote.create("locks/x/g1", b'{"seconds": 3.0}')
    begun = time.monotonic()
    lease(remote, "b", seconds=0.2).hold()
    assert time.monotonic() - begun > 2.9


def test_one_who_slept_between_looking_and_creating_does_not_hold(remote, monkeypatch):
    """It saw generation 1 free; meanwhile others took and gave back 2 and 3, and 2 was removed."""
    first = lease(remote, "a", seconds=30)
    first.hold()
    first.release()
    sleeper, create = lease(remote, "b", seconds=30), Lease._create
    others = []

    def late(self, generation):
        if self is sleeper and not others:
            for place in "cd":
                other = lease(remote, place, seconds=30)
                others.append(other)
                other.hold()
                if place == "c":
                    other.release()
            assert generation == 2 and remote.names("locks/x", "g") == ["g3"]
            assert create(self, generation) is False, "its generation could be created, but is not the highest"
            assert remote.names("locks/x", "g") == ["g3"]
            raise KeyboardInterrupt
        return create(self, generation)

    monkeypatch.setattr(Lease, "_create", late)
    with pytest.raises(KeyboardInterrupt):
        sleeper.hold()
    assert others[1].hold() is True and sleeper.generation == 0
    others[1].release()


def test_one_taken_for_dead_finds_out_and_takes_its_turn(remote, monkeypatch):
    first, second = lease(remote, "a"), lease(remote, "b")
    monkeypatch.setattr(lease_module.Lease, "_beat", lambda *_: None)  # as if it were stopped
    first.hold()
    second.hold()
    threading.Timer(1.0, second.release).start()
    begun = time.monotonic()
    assert first.hold() is False and time.monotonic() - begun > 0.9
    assert remote.names("locks/x", "g") == ["g3"]
    first.release()


def test_a_remote_that_is_gone_is_said_in_one_line(tmp_path):
    remote = Remote(f"file://{tmp_path}/share").open()
    held = lease(remote, "a", seconds=600)
    held.hold()
    (tmp_path / "share").rename(tmp_path / "elsewhere")
    (tmp_path / "share").write_text("in the way")
    with pytest.raises(StepError, match="store: file://") as caught:
        remote.write("a", b"x")
    assert "\n" not in str(caught.value)
    held.release()
