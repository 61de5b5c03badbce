"""Work in a process of its own: the same results, hard limits, and deaths that are told in one line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tensorpress.digest import of_file
from tensorpress.errors import InputError, StepError
from tensorpress.tasks import isolate
from tensorpress.tasks.isolate import run_isolated, stop_isolated
from tensorpress.tasks.making import make_artifact
from tensorpress.tasks.measuring import measure, measure_within
from tensorpress.tasks.progress import set_sink

FAULTY = """
import os, signal, subprocess, sys, time
from tensorpress.errors import InputError, StepError

def echo(clock, **given):
    from tensorpress.tasks.progress import reporter
    print("noise of a library")
    os.system("echo more noise")
    reporter("x")("walking", 1, 2)
    import torch
    return given | {"threads": torch.get_num_threads()}

def hang(clock, sleeper=None):
    if sleeper:
        open(sleeper, "w").write(str(subprocess.Popen(["sleep", "600"]).pid))
    with clock():
        time.sleep(600)

def wait(clock, seconds):
    time.sleep(seconds)  # for a lock, say
    return "done"

def hoard(clock, gib):
    with clock():
        held = [bytearray(b"x") * (1 << 26) for _ in range(int(gib * 16))]
        time.sleep(600)

def refuse(clock):
    raise InputError("one thing", "another")

def fail(clock):
    raise StepError("does not work")

def err(clock):
    raise ValueError("odd")

def lack(clock):
    raise MemoryError

def die(clock, number):
    print("last words", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)

def leave(clock):
    print("cannot go on", file=sys.stderr, flush=True)
    os._exit(7)
"""


@pytest.fixture
def faulty(tmp_path, monkeypatch):
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def call(name, limits=None, **arguments):
        return run_isolated(f"faulty:{name}", arguments, limits, "x")

    return call


def test_what_goes_in_and_comes_out(faulty):
    import torch

    heard = []
    set_sink(lambda *report: heard.append(report))
    try:
        answer = faulty("echo", text="größer", numbers=[1, 2.5, None], nested={"a": float("inf")})
    finally:
        set_sink(None)
    threads = torch.get_num_threads()
    assert answer == {"text": "größer", "numbers": [1, 2.5, None], "nested": {"a": float("inf")}, "threads": threads}
    assert heard == [("x", "walking", 1, 2)]


@pytest.mark.parametrize(
    ("name", "arguments", "limits", "line"),
    [
        ("fail", {}, None, "does not work"),
        ("err", {}, None, "ValueError: odd"),
        ("lack", {}, None, "there is not enough memory"),
        ("leave", {}, None, "its process ended (exit code 7): cannot go on"),
        ("die", {"number": 11}, None, "was killed by signal 11: last words"),
        ("hang", {}, {"seconds": 1}, "took longer than 1 s and was stopped (limits.seconds)"),
        ("hoard", {"gib": 3}, {"memory": 1}, "needed more than 1 GiB (limits.memory) and was stopped"),
    ],
)
def test_how_it_can_fail(faulty, name, arguments, limits, line):
    with pytest.raises(StepError) as caught:
        faulty(name, limits, **arguments)
    assert str(caught.value) == line
    assert not isolate._at_work


def test_killed_by_the_kernel(faulty):
    with pytest.raises(StepError, match=r"by signal 9, most likely for want of memory \(its peak was \d+\.\d GiB\)"):
        faulty("die", number=9)


def test_input_that_the_child_refuses_keeps_its_lines(faulty):
    with pytest.raises(InputError) as caught:
        faulty("refuse")
    assert caught.value.problems == ("one thing", "another")


def test_the_wait_for_a_lock_is_not_counted(faulty):
    assert faulty("wait", {"seconds": 1}, seconds=1.5) == "done"


def test_a_limit_ends_all_that_the_work_started(faulty, tmp_path):
    with pytest.raises(StepError):
        faulty("hang", {"seconds": 1}, sleeper=str(tmp_path / "pid"))
    sleeper = int((tmp_path / "pid").read_text())
    assert not psutil.pid_exists(sleeper) or psutil.Process(sleeper).status() == psutil.STATUS_ZOMBIE


def test_stopped_from_another_thread(faulty):
    caught = []

    def work():
        try:
            faulty("hang")
        except StepError as error:
            caught.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(1.0)
    begun = time.monotonic()
    stop_isolated()
    thread.join(5)
    assert caught == ["was stopped"] and time.monotonic() - begun < 1.0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_dies_with_its_parent(faulty, tmp_path, number):
    """The parent waits in a thread, as a flow does; the child is to be taken first when memory runs out."""
    source = (
        "import signal, threading; from tensorpress.tasks.isolate import run_isolated\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's job behind & is started without
        "threading.Thread(target=run_isolated, args=('faulty:hang', {'sleeper': 'pid'}, None, 'x'), daemon=True).start()\n"
        "import time; time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", source], cwd=tmp_path, stderr=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        time.sleep(0.05)
    (child,) = psutil.Process(parent.pid).children()
    assert Path(f"/proc/{child.pid}/oom_score_adj").read_text().strip() == "1000"
    parent.send_signal(number)
    parent.wait(10)
    _gone, alive = psutil.wait_procs([child], timeout=3)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert not alive


@pytest.fixture
def job(recipe, place):
    """The plan of a recipe of one step, and its job."""
    from tensorpress.flows.place import working_in
    from tensorpress.flows.request import prepare, written

    def make(store, **fields):
        with working_in(place / store, place):
            plan = prepare(written(recipe(**fields).read_text(), []))
        (made,) = plan.jobs.values()
        return plan, made

    return make


def test_a_step_makes_the_same_bytes_alone_and_here(job, monkeypatch):
    healing = {"heal": {"use": "distill", "after": "model", "tokens": 256, "batch_tokens": 128}}
    plan, here = job("here", steps=healing)
    _, apart = job("apart", steps=healing, limits={"seconds": 300, "memory": 16})
    assert apart.limits == {"seconds": 300, "memory": 16} and here.digest == apart.digest
    results = [make_artifact(work, Path(plan.root.path)) for work in (here, apart)]
    first, second = ({f.name: of_file(f) for f in Path(r["path"]).glob("*.safetensors")} for r in results)
    assert first == second and first
    assert {**results[0], "path": "", "seconds": 0, "report": ""} == {
        **results[1],
        "path": "",
        "seconds": 0,
        "report": "",
    }
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a cached step starts no process"))
    assert make_artifact(apart, Path(plan.root.path))["cached"]


def test_a_step_that_is_stopped_leaves_nothing(job, place):
    plan, work = job("store", limits={"memory": 0.1})
    with pytest.raises(StepError, match=r"needed more than 0\.1 GiB"):
        make_artifact(work, Path(plan.root.path))
    assert not list((place / "store/models").iterdir())
    made = make_artifact(replace(work, limits={}), Path(plan.root.path))
    assert not made["cached"]


def test_a_measurement_alone_is_the_same_as_here(job, place):
    plan, _ = job("here")
    spec = plan.recipe.data.evaluation.model_dump(mode="json")
    asked = {
        "measures": ["perplexity", "size"], "evaluation": spec, "root": {"path": plan.root.path, "digest": plan.root.digest},
        "dtype": "float32", "store": str(place / "here"), "demo": False, "kernels": "auto", "threads": 0,
    }  # fmt: skip
    subject = {"path": plan.root.path, "digest": plan.root.digest}
    here = measure(asked, subject, None, "original")
    apart = {**asked, "store": str(place / "apart"), "limits": {"seconds": 300, "memory": None}}
    results = [measure_within(apart, subject, None, "original") for _ in range(2)]
    assert [r["cached"] for r in results] == [False, True]
    for result in results:
        assert json.loads(json.dumps({**here, "seconds": 0, "cached": 0})) == {**result, "seconds": 0, "cached": 0}
    with pytest.raises(StepError, match=r"needed more than 0\.1 GiB"):
        measure_within({**apart, "store": str(place / "third"), "limits": {"memory": 0.1}}, subject, None, "original")
