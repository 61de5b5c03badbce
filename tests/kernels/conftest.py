"""The instruction sets of the compiled kernels, those that this machine lacks by emulation."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from filelock import FileLock

from tensorpress.kernels import cpu_linear

SOURCES = Path(cpu_linear.__file__).parent / "cpu"
EMULATED = ("avx512", "avx512vl", "avxvnni")
"""Instruction sets that SIMDe stands in for."""


@pytest.fixture(autouse=True)
def every_thread():
    """The small layers of tests are worth one thread: here they are spread over all that are asked for."""
    if cpu_linear.compiled() is None:
        yield
        return
    cpu_linear.limit_threads(0)
    yield
    cpu_linear.limit_threads()


@pytest.fixture(scope="session")
def emulation(tmp_path_factory):
    """The compiled code with SIMDe's functions in the place of instructions; built once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulated"
    built = folder / "libcpu.so.1"
    with FileLock(f"{folder}.lock"):
        if not built.exists():
            folder.mkdir(exist_ok=True)
            _build(folder, built)
    return built


def _build(folder: Path, target: Path) -> None:
    flags = ["-std=c++17", "-O1", "-march=native", "-fPIC", "-w"]
    compilers = []
    for source in SOURCES.glob("*.cpp"):
        emulate = ["-DTP_EMULATED"] if source.stem in (*EMULATED, "api") else []
        command = ["g++", *flags, *emulate, f"-I{SOURCES}", "-c", str(source), "-o", str(folder / f"{source.stem}.o")]
        compilers.append(subprocess.Popen(command))
    assert all(compiler.wait(timeout=400) == 0 for compiler in compilers)
    subprocess.run(["g++", "-shared", *map(str, folder.glob("*.o")), "-o", str(target)], check=True)


def _can_emulate() -> bool:
    there = shutil.which("g++") is not None and Path("/usr/include/simde").is_dir()
    assert there or not os.environ.get("TENSORPRESS_NEEDS_SIMDE"), "g++ and SIMDe (libsimde-dev) are wanted"
    return there


@pytest.fixture(params=cpu_linear.LEVELS[::-1])
def level(request, monkeypatch):
    """Each instruction set: this machine's own, and by emulation what it lacks."""
    name = request.param
    try:
        cpu_linear.limit_instructions(name)
        if cpu_linear.instructions() != name:
            if name not in EMULATED or not _can_emulate():
                pytest.skip(f"this processor has no {name}")
            monkeypatch.setattr(cpu_linear, "FILE", request.getfixturevalue("emulation"))
            cpu_linear.compiled.cache_clear()
            cpu_linear.limit_threads(0)
            cpu_linear.limit_instructions(name)
            assert cpu_linear.instructions() == name
        yield name
    finally:
        monkeypatch.undo()
        cpu_linear.compiled.cache_clear()
        cpu_linear.limit_instructions(cpu_linear.LEVELS[-1])
