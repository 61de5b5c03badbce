"""Which versions may meet: the ranges, the pinned set, what is installed, and the two libraries that stop Prefect."""

import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {extra: list(map(Requirement, needs)) for extra, needs in PROJECT["optional-dependencies"].items()}
NEEDS = list(map(Requirement, PROJECT["dependencies"]))
ALL_NEEDS = NEEDS + [need for needs in EXTRAS.values() for need in needs]
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
PINNED = {canonicalize_name(name): version for name, _, version in (line.partition("==") for line in PINS)}

by_make = pytest.mark.skipif(
    not Path(sys.prefix, ".installed").exists(), reason="an environment that `make install` did not make"
)


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("prefect", ["3.8.8"], ["3.8.7", "4.0.0"]),
        ("mlflow", ["3.17.2"], ["3.17.1", "4.0.0"]),
        ("fastapi", ["0.139.0", "0.150.0"], ["0.138.0", "0.151.0"]),
        ("sqlalchemy", ["2.0.58"], ["1.4.54", "2.1.0"]),
        ("torch", ["2.11.0", "2.13.0", "2.14.1", "3.0.0"], ["2.10.0"]),
        ("numpy", ["2.2.6"], ["1.26.4"]),
    ],
)
def test_ranges(name, inside, outside):
    """Open above for torch, as a machine with a GPU brings its own; numpy as gptqmodel 7.6.0 wants it."""
    (need,) = [need for need in NEEDS if need.name == name]
    assert [version in need.specifier for version in inside + outside] == [True] * len(inside) + [False] * len(outside)


def test_gptqmodel_is_an_extra_below_the_release_that_wants_another_torch():
    (need,) = [need for need in EXTRAS["gptq"] if need.name == "gptqmodel"]
    found = [version in need.specifier for version in ("6.9.0", "7.0.0", "7.6.0", "7.7.0", "8.0.0")]
    assert found == [False, True, True, False, False]
    elsewhere = NEEDS + [need for extra, needs in EXTRAS.items() if extra != "gptq" for need in needs]
    assert "gptqmodel" not in {need.name for need in elsewhere} | PINNED.keys()


def test_the_tests_of_gptqmodel_have_an_environment_that_works(make_prints):
    """With our torch, its numpy, and two workers, without which it fails on two cores."""
    *setup, tests = make_prints("test-gptq")
    assert "grep -v '^numpy==' constraints.txt > build/constraints-gptq.txt" in setup
    installs = [line for line in setup if "pip install" in line]
    assert installs and all("-c build/constraints-gptq.txt" in line for line in installs)
    words = " ".join(installs).split()
    assert {"gptqmodel==7.6.0", "numpy==2.2.6", "torch"} <= set(words)
    assert tests.startswith("GPTQMODEL_CPU_WORKERS=2 ") and "-m extra" in tests


def test_auto_gptq_is_nowhere():
    """Its last release does not import with transformers 5."""
    names = {canonicalize_name(need.name) for need in ALL_NEEDS} | PINNED.keys()
    assert not names & {"auto-gptq", "autogptq"}
    for folder in ("tensorpress", "compressors", "evaluators", "kernels", "tasks", "flows"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not re.search(r"(import|from) auto_gptq", file.read_text(encoding="utf-8")), file


def test_every_pin_is_exact_and_in_range():
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in PINS) and len(PINS) == len(PINNED)
    assert PINNED["torch"] == "2.13.0"
    assert not {name for name in PINNED if name.startswith(("nvidia-", "cuda-"))}
    assert {canonicalize_name(need.name) for need in [*NEEDS, *EXTRAS["dev"]]} <= PINNED.keys()
    pinned = [need for need in ALL_NEEDS if canonicalize_name(need.name) in PINNED]
    assert not [str(need) for need in pinned if PINNED[canonicalize_name(need.name)] not in need.specifier]


@pytest.mark.parametrize("target", ["install", "quickstart", "test"])
def test_a_fresh_machine_installs_the_pinned_set(make_prints, target):
    """Both commands of the README; an editable install in strict mode would hide new files."""
    assert re.search(r"^    make quickstart .*\n    make test ", (ROOT / "README.md").read_text(), re.MULTILINE)
    installs = [line for line in make_prints(target) if "pip install" in line and "--no-deps" not in line]
    (install,) = installs
    assert "-c constraints.txt" in install and '-e ".[dev]"' in install and "editable_mode" not in install


def needed():
    """Name -> version of everything installed that the library and its tools ask for here, step by step."""
    found, seen, waiting = {}, set(), [*NEEDS, *EXTRAS["dev"]]
    while waiting:
        need = waiting.pop()
        key = (canonicalize_name(need.name), frozenset(need.extras))
        if key in seen:
            continue
        seen.add(key)
        dist = importlib.metadata.distribution(need.name)
        found[key[0]] = Version(dist.version).public
        for inner in map(Requirement, dist.requires or []):
            if not inner.marker or any(inner.marker.evaluate({"extra": extra}) for extra in ("", *need.extras)):
                waiting.append(inner)
    return found


@by_make
def test_everything_that_is_needed_is_pinned_and_installed_so():
    installed = needed()
    installed.pop("pip", None)  # pip-audit needs it; the environment brings it along
    assert {"torch", "prefect", "starlette", "pytest", "mypy"} <= installed.keys()
    assert {name: version for name, version in installed.items() if PINNED.get(name) != version} == {}


@by_make
def test_no_cuda_wheel_is_pulled():
    names = {canonicalize_name(dist.name) for dist in importlib.metadata.distributions()}
    assert not {name for name in names if name.startswith(("nvidia-", "cuda-"))}


@pytest.mark.parametrize(("name", "first_broken"), [("fastapi", "0.151"), ("sqlalchemy", "2.1")])
def test_what_is_installed_keeps_prefect_alive(name, first_broken):
    assert Version(importlib.metadata.version(name)) < Version(first_broken)


SERVER = """
import asyncio
from prefect.server import models
from prefect.server.api.server import create_app
from prefect.server.database import provide_database_interface
from prefect.server.schemas.core import Deployment, DeploymentSchedule, Flow
from prefect.server.schemas.schedules import CronSchedule
from prefect.server.services.scheduler import schedule_deployments

async def main():
    database = provide_database_interface()
    await database.create_db()
    async with database.session_context(begin_transaction=True) as session:
        flow = await models.flows.create_flow(session=session, flow=Flow(name="nightly"))
        schedule = DeploymentSchedule(schedule=CronSchedule(cron="0 3 * * *"), active=True)
        nightly = Deployment(name="nightly", flow_id=flow.id, schedules=[schedule])
        await models.deployments.create_deployment(session=session, deployment=nightly)
    await schedule_deployments()
    async with database.session_context() as session:
        print(await models.flow_runs.count_flow_runs(session=session))

create_app()
asyncio.run(main())
"""


def test_prefect_serves_and_schedules(fresh):
    """fastapi 0.151 breaks the server where its routes are declared, SQLAlchemy 2.1 silently stops the scheduler."""
    assert fresh(SERVER).split() == ["3"]
