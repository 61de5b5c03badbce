"""Verb: what this machine can do, and what on it would make a run fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

from tensorpress.cli.common import (
    DEFAULT_STORE,
    FAILED,
    JsonOption,
    StoreOption,
    check_json_target,
    console,
    write_json,
)

KNOWN_BAD = {
    "fastapi": ((0, 151), "breaks every Prefect flow"),
    "sqlalchemy": ((2, 1), "stops Prefect's scheduler silently"),
}
"""Packages and the version from which on they break runs."""
EXTRAS = {"gptq": ("gptqmodel", "optimum"), "eval": ("lm_eval",), "dask": ("prefect_dask",), "ray": ("prefect_ray",)}
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "asimd")
PORTS = {4200: "Prefect", 5000: "MLflow"}
HUB_SECONDS = 2.0
LITTLE_DISK = 2_000_000_000
"""Free bytes below which a run may not find room for its artifacts."""


def add_to(app: typer.Typer) -> None:
    """Add the verb of this file."""
    app.command("doctor")(doctor)


def doctor(store: StoreOption = DEFAULT_STORE, json_file: JsonOption = None) -> int | None:
    """Say what this machine can do: kernels, memory, ports, versions, and what would make a run fail."""
    check_json_target(json_file)
    found = examine(store)
    _show(found)
    write_json(json_file, found)
    return FAILED if found["problems"] else None


def examine(store: Path) -> dict[str, Any]:
    """All that is worth knowing, and `problems` (runs fail) and `warnings` (something is missing). Writes nothing."""
    from tensorpress.versions import versions

    place = _store(store.absolute())
    bad = known_bad(installed(KNOWN_BAD))
    problems = [*bad, *([] if place["writable"] else [f"store: {place['path']} cannot be written"])]
    problems += [f"{name} is not installed" for name in ("prefect", "mlflow") if name not in versions()]
    gpu, compiler, hub = _gpu(), _compiler(), hub_answer()
    warnings = []
    if place["free_bytes"] < LITTLE_DISK:
        warnings.append(f"store: only {place['free_bytes'] / 1e9:.1f} GB of disk are free")
    if compiler is None:
        warnings.append("no C++ compiler: kernels that are built on this machine fall back to plain PyTorch")
    if not _compiled():
        warnings.append("the compiled kernels were not built: quantized layers are computed by plain PyTorch, slowly")
    return {
        "usable": not problems,
        "problems": problems,
        "warnings": warnings,
        "versions": {**versions(), **installed(KNOWN_BAD)},
        "processor": _processor(),
        "gpu": gpu,
        "compiler": compiler,
        "kernels": _kernels(),
        "extras": {extra: all(_importable(name) for name in names) for extra, names in EXTRAS.items()},
        "ports": {str(port): port_answer(port) for port in PORTS},
        "store": place,
        "hub": hub,
    }


def installed(names: Any) -> dict[str, str]:
    """Version of each package that is installed."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def known_bad(found: dict[str, str]) -> list[str]:
    """A line for every package whose version is known to break runs."""
    lines = []
    for name, version in found.items():
        first, why = KNOWN_BAD[name]
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= first:
            bound = ".".join(map(str, first))
            lines.append(f"{name} {version} {why}: pip install '{name}<{bound}'")
    return lines


def port_answer(port: int) -> str:
    """Who answers at a port of this machine: `free`, `Prefect 3.8.8`, `MLflow 3.17.2`, or `something else`."""
    import socket

    import httpx

    try:
        with socket.create_connection(("127.0.0.1", port), timeout=0.5):
            pass
    except OSError:
        return "free"
    asks = (("Prefect", "/api/admin/version"), ("MLflow", "/version"))
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=1.0, trust_env=False) as client:
        for name, path in asks:
            try:
                answer = client.get(path)
            except httpx.HTTPError:
                continue
            if answer.status_code == 200 and re.fullmatch(r'"?\d+\.\d+[\w.+]*"?', answer.text.strip()):
                return f"{name} {answer.text.strip().strip(chr(34))}"
    return "something else"


def hub_answer() -> str:
    """Whether a model hub answers within two seconds, name service included."""
    from tensorpress.source import answers

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    return f"{endpoint} answers" if answers(endpoint, HUB_SECONDS) else "no hub answers; local models work"


def _processor() -> dict[str, Any]:
    import psutil
    import torch

    from tensorpress.kernels.measured import device_name

    memory = psutil.virtual_memory()
    limit = _first_int(Path("/sys/fs/cgroup/memory.max"))
    info = _text(Path("/proc/cpuinfo"))
    known = set(
        re.findall(r"\w+", next((line for line in info.splitlines() if line.startswith(("flags", "Features"))), ""))
    )
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "name": device_name(torch.device("cpu")),
        "cores": usable,
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": min(memory.total, limit or memory.total),
        "available_bytes": min(memory.available, limit or memory.available),
        "flags": [flag for flag in FLAGS if flag in known],
    }


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    capability = f"{properties.major}.{properties.minor}"
    count = torch.cuda.device_count()
    return {"name": properties.name, "count": count, "memory_bytes": properties.total_memory, "capability": capability}


def _compiler() -> str | None:
    """First line of `--version` of the C++ compiler that builds would use."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path is None:
            continue
        try:
            answer = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        return (answer.stdout.strip().splitlines() or [path])[0]
    return None


def _compiled() -> bool:
    from tensorpress.kernels import cpu_linear

    return cpu_linear.compiled() is not None


def _kernels() -> dict[str, list[str]]:
    import tensorpress.loading  # noqa: F401 - brings the kernels
    from tensorpress.kernels import registry

    return {operation: list(registry.backends(operation)) for operation in registry.operations()}


def _importable(name: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _store(root: Path) -> dict[str, Any]:
    place = root
    while not place.exists() and place != place.parent:
        place = place.parent
    sizes: list[int] = []
    for folder, _, names in os.walk(root):
        for name in names:
            try:
                sizes.append(Path(folder, name).lstat().st_size)
            except OSError:
                continue
    mode, others = _openness(root)
    models = root / "models"
    artifacts = sum(1 for p in models.iterdir() if not p.name.startswith(".")) if models.is_dir() else 0
    return {
        "path": str(root),
        "exists": root.is_dir(),
        "writable": place.is_dir() and os.access(place, os.W_OK),
        "mode": mode,
        "others_can_read": others,
        "bytes": sum(sizes),
        "artifacts": artifacts,
        "free_bytes": shutil.disk_usage(place).free,
    }


def _openness(root: Path) -> tuple[str | None, bool]:
    """The mode of the store's folder, as 0755, and whether other users of this machine can read what lies in it.

    They can where every folder on the way lets them through and the store itself lets them look. None where there is no store.
    """
    if not root.is_dir():
        return None, False
    modes = [folder.stat().st_mode for folder in (root.resolve(), *root.resolve().parents)]
    return f"{modes[0] & 0o7777:04o}", bool(modes[0] & 0o004) and all(mode & 0o001 for mode in modes)


def _first_int(path: Path) -> int | None:
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _privacy(place: dict[str, Any]) -> str:
    """One line: who can read the store."""
    if place["mode"] is None:
        return "no store yet; the umask will decide who can read it"
    if place["others_can_read"]:
        return f"other users of this machine can read the store (mode {place['mode']}): chmod 700 {place['path']} keeps them out"
    return f"other users of this machine cannot read the store (mode {place['mode']}, or a folder above it)"


def _show(found: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from tensorpress.pictures.tables import human_bytes

    processor, gpu, place = found["processor"], found["gpu"], found["store"]
    flags = ", ".join(processor["flags"]) or "no vector extensions known"
    kernels = "; ".join(f"{operation}: {', '.join(names)}" for operation, names in found["kernels"].items())
    size = human_bytes(place["bytes"])
    state = f"{place['artifacts']} artifacts, {size}" if place["exists"] else "not there yet"
    rows: list[tuple[str, str]] = [
        ("python", f"{found['versions']['python']} ({sys.executable})"),
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name != "python")),
        (
            "processor",
            f"{processor['name']}: {processor['cores']} cores, torch uses {processor['torch_threads']} threads; {flags}",
        ),
        ("memory", f"{human_bytes(processor['memory_bytes'])}, {human_bytes(processor['available_bytes'])} of it free"),
        ("GPU", f"{gpu['count']} x {gpu['name']}, {human_bytes(gpu['memory_bytes'])}" if gpu else "none"),
        ("compiler", found["compiler"] or "none"),
        ("kernels", kernels),
        (
            "extras",
            ", ".join(f"{name} {'installed' if there else 'not installed'}" for name, there in found["extras"].items()),
        ),
        ("ports", ", ".join(f"{port} ({PORTS[int(port)]}): {answer}" for port, answer in found["ports"].items())),
        ("store", f"{place['path']}: {state}, {human_bytes(place['free_bytes'])} of disk free"),
        ("privacy", _privacy(place)),
        ("hub", found["hub"]),
    ]
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, escape(text))
    console.print(table)
    for line in found["warnings"]:
        console.print(f"[yellow]warning:[/] {escape(line)}", soft_wrap=True)
    for line in found["problems"]:
        console.print(f"[bold red]problem:[/] {escape(line)}", soft_wrap=True)
    console.print("[bold red]runs will fail[/]" if found["problems"] else "[green]usable[/]")
