"""What the layout of the repository must keep to, so that it installs and does not break `import transformers`."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = {name.removeprefix("tensorpress.") for name in PROJECT["tool"]["setuptools"]["package-dir"] if "." in name}


def folder_of(package):
    """Where a package of the list lies: `package-dir` maps the longest name that it has."""
    places = PROJECT["tool"]["setuptools"]["package-dir"]
    name, rest = package, []
    while name not in places:
        name, _, last = name.rpartition(".")
        rest.insert(0, last)
    return Path(places[name], *rest)


def sources(*folders):
    for folder in folders:
        yield from (ROOT / folder).rglob("*.py")


def test_the_list_of_packages_is_what_is_on_disk():
    listed = {folder_of(package).as_posix() for package in PROJECT["tool"]["setuptools"]["packages"]}
    found = {file.parent.relative_to(ROOT).as_posix() for file in sources("tensorpress", *MAPPED)}
    assert listed == found


@pytest.mark.parametrize("package", PROJECT["tool"]["setuptools"]["packages"])
def test_every_package_has_an_init(package):
    assert (ROOT / folder_of(package) / "__init__.py").is_file()


def test_kernels_init_is_empty():
    """transformers imports any importable `kernels`; from a folder with the root on the path that is ours."""
    assert (ROOT / "kernels" / "__init__.py").read_text().strip() == ""


def test_nothing_puts_the_root_on_the_path():
    assert not (ROOT / "conftest.py").exists() and not (ROOT / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert "--import-mode=importlib" in PROJECT["tool"]["pytest"]["ini_options"]["addopts"]


@pytest.mark.parametrize("path", [str(ROOT), ""])
def test_transformers_imports_with_the_root_on_the_path(path, tmp_path):
    code = "import transformers, torch; transformers.LlamaForCausalLM; print('fine')"
    where = ROOT if path == "" else tmp_path
    environment = {**os.environ, "PYTHONPATH": path}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=where, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0 and run.stdout.strip() == "fine", run.stderr[-2000:]


def test_pins_that_keep_prefect_alive():
    """fastapi 0.151 breaks every flow of Prefect 3.8.8, SQLAlchemy 2.1 silently stops its scheduler."""
    needs = [re.sub(r"\s", "", need) for need in PROJECT["project"]["dependencies"]]
    (fastapi,) = [need for need in needs if need.startswith("fastapi")]
    (sqlalchemy,) = [need for need in needs if need.startswith("sqlalchemy")]
    assert "<0.151" in fastapi and "<2.1" in sqlalchemy
    pinned = dict(re.findall(r"^([A-Za-z0-9_.-]+)==([0-9.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    versions = {
        name.lower(): tuple(map(int, version.split(".")[:2])) for name, version in pinned.items() if "." in version
    }
    assert versions["fastapi"] < (0, 151) and versions["sqlalchemy"] < (2, 1)


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize(("library", "allowed"), [("mlflow", ["tasks/tracking.py"]), ("prefect", ["flows/", "tasks/"])])
def test_who_imports_what(library, allowed):
    found = {
        file.relative_to(ROOT).as_posix()
        for file in sources("tensorpress", *MAPPED)
        if any(name.split(".")[0] == library for name in imported(file))
    }
    assert found and {name for name in found if not name.startswith(tuple(allowed))} == set()


def test_the_library_works_with_torch_alone():
    """compressors/, evaluators/ and kernels/ run where nothing of the workflow is installed."""
    allowed = set(sys.stdlib_module_names)
    allowed |= {"torch", "transformers", "safetensors", "numpy", "tensorly", "pydantic", "yaml", "tensorpress", "scipy"}
    for file in sources("compressors", "evaluators", "kernels"):
        foreign = {name.split(".")[0] for name in imported(file)} - allowed
        assert not foreign, f"{file.relative_to(ROOT)}: {foreign}"


def test_no_pickle_and_no_remote_code():
    for file in sources("tensorpress", *MAPPED):
        names = {name.split(".")[0] for name in imported(file)}
        assert not names & {"pickle", "dill", "joblib", "cloudpickle"}, file
        text = file.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text and "torch.load(" not in text, file
