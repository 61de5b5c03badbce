"""What the layout of the repository must keep to, so that it installs and does not break `import transformers`."""

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
PLACES = PROJECT["tool"]["setuptools"]["package-dir"]
MAPPED = {name.removeprefix("tensorpress.") for name in PLACES if "." in name}
DEMO = "config.json model.safetensors tokenizer.json tokenizer_config.json train.txt test.txt other.txt LICENSE-PSF"
CARRIED = ["py.typed", "recipes/quickstart.yaml", "pictures/report.html", *(f"demo/{name}" for name in DEMO.split())]


def folder_of(package):
    """Where a package of the list lies: `package-dir` maps the longest name that it has."""
    name, rest = package, []
    while name not in PLACES:
        name, _, last = name.rpartition(".")
        rest.insert(0, last)
    return Path(PLACES[name], *rest)


def sources(*folders):
    for folder in folders:
        yield from (ROOT / folder).rglob("*.py")


def test_the_list_of_packages_is_what_is_on_disk():
    listed = {folder_of(package).as_posix() for package in PACKAGES}
    found = {file.parent.relative_to(ROOT).as_posix() for file in sources("tensorpress", *MAPPED)}
    assert listed == found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_an_init(package):
    assert (ROOT / folder_of(package) / "__init__.py").is_file()


def test_kernels_init_is_empty():
    """transformers imports any importable `kernels`; from a folder with the root on the path that is ours."""
    assert (ROOT / "kernels" / "__init__.py").read_text().strip() == ""


@pytest.mark.parametrize(("target", "folder"), [("tests", None), ("test-gptq", "tests/extra")])
def test_nothing_puts_the_root_on_the_path(make_prints, target, folder):
    """`python -m pytest` would, as would a conftest.py at the root and packages of tests in the other import modes."""
    assert not (ROOT / "conftest.py").exists() and not (ROOT / "__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))
    assert "--import-mode=importlib" in PROJECT["tool"]["pytest"]["ini_options"]["addopts"]
    assert "pythonpath" not in PROJECT["tool"]["pytest"]["ini_options"]
    command = make_prints(target)[-1].split()
    assert any(word.endswith("/bin/pytest") for word in command) and (folder is None or folder == command[-1])


@pytest.mark.parametrize("path", [str(ROOT), ""])
def test_transformers_imports_with_the_root_on_the_path(fresh, path):
    code = "import transformers, torch; transformers.LlamaForCausalLM; print('fine')"
    assert fresh(code, cwd=None if path else ROOT, PYTHONPATH=path).strip() == "fine"


def can_build():
    """Whether what builds the wheel is installed here; else pip fetches it."""
    needs = map(Requirement, PROJECT["build-system"]["requires"])
    have = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    return all(need.name in have and have[need.name] in need.specifier for need in needs)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A copy of the repository, so that no build folder of another run gets in."""
    copy = tmp_path_factory.mktemp("tree")
    for folder in ("tensorpress", *MAPPED, "tests", "benchmarks", "scripts"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "libcpu.*"))
    for file in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="session")
def unpacked(tree, tmp_path_factory):
    """The files of a wheel that was built from the copy, as an install lays them out."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder)]
    command += ["--no-build-isolation"] * can_build()
    subprocess.run([*command, str(tree)], check=True)
    (wheel,) = folder.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize(
    "environment", [{"TENSORPRESS_NO_NATIVE": "1"}, {"CC": "/bin/false", "CXX": "/bin/false"}], ids=str
)
def test_without_a_compiler_the_package_installs(tree, tmp_path, environment):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path)]
    command += ["--no-build-isolation"] * can_build()
    copy = tmp_path / "tree"
    shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    subprocess.run([*command, str(copy)], check=True, env={**os.environ, **environment})
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "tensorpress/kernels/cpu_linear.py" in names and not [name for name in names if "libcpu" in name]


def files_of(folder):
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def test_the_wheel_holds_the_packages_and_nothing_else(tree, unpacked):
    """Every file beside the modules too: package data that is not declared is missing only once it is installed."""
    expected = {
        f"{name.replace('.', '/')}/{file}": size
        for name, place in PLACES.items()
        for file, size in files_of(tree / place).items()
    }
    expected = {file: size for file, size in expected.items() if not file.startswith("tensorpress/kernels/cpu/")}
    found = {file: size for file, size in files_of(unpacked).items() if ".dist-info/" not in file}
    compiled = [found.pop(file) for file in list(found) if file.startswith("tensorpress/kernels/libcpu.")]
    assert found == expected and len(compiled) == (shutil.which("c++") is not None)
    tops = {path.name.partition("-")[0] for path in unpacked.iterdir()}
    assert tops == {"tensorpress"}


@pytest.mark.parametrize("name", CARRIED)
def test_the_wheel_carries(unpacked, name):
    file = unpacked / "tensorpress" / name
    assert file.is_file() and (file.stat().st_size or name == "py.typed")


@pytest.fixture(params=["editable", "wheel"])
def installed(request):
    """The variables of a process that has tensorpress from there, and where a package lies."""
    if request.param == "editable":
        return {}, lambda package: ROOT / folder_of(package)
    site = request.getfixturevalue("unpacked")
    return {"PYTHONPATH": str(site)}, lambda package: site.joinpath(*package.split("."))


ELSEWHERE = """
import importlib, importlib.util, json, pickle, sys

files = {name: importlib.import_module(name).__file__ for name in json.loads(sys.argv[1])}
ours = {name: importlib.util.find_spec(name) for name in json.loads(sys.argv[2])}
from tensorpress.kernels.quantized_linear import QuantizedLinear
assert pickle.loads(pickle.dumps(QuantizedLinear)) is QuantizedLinear
from prefect.flows import load_flow_from_entrypoint
assert load_flow_from_entrypoint("tensorpress.flows.compress.compress").name == "compress"
print(json.dumps([files, {name: spec and spec.origin for name, spec in ours.items()}, sys.path]))
"""


def test_packages_resolve_in_any_folder(fresh, installed):
    """Under tensorpress only, the files themselves and no link to them, a flow by its module without the root's path."""
    variables, place = installed
    files, tops, path = json.loads(
        fresh(ELSEWHERE, json.dumps(PACKAGES), json.dumps(sorted(MAPPED)), **variables).splitlines()[-1]
    )
    assert files == {package: str(place(package) / "__init__.py") for package in PACKAGES}
    assert not {name for name, origin in tops.items() if origin and Path(origin).is_relative_to(ROOT)}
    assert not {str(ROOT), *(str(ROOT / folder) for folder in MAPPED)} & set(path)


def test_the_command_runs_in_any_folder(fresh):
    script = str(Path(sys.executable).parent / "tensorpress")
    recipe = ROOT / "recipes" / "quickstart.yaml"
    assert fresh([script, "recipes", "show", "quickstart"]) == recipe.read_text(encoding="utf-8")


def test_types_are_checked_in_an_installed_wheel(make_prints):
    """mypy cannot follow an editable install; a build folder of an earlier version would leave its files in the wheel."""
    wheel, check = make_prints("types")[-2:]
    assert "--no-deps --target build/types ." in wheel and check.startswith("cd build/types && ")
    assert "mypy" in check and check.endswith("-p tensorpress")
    assert "rm -rf build/types build/lib" in make_prints("types")


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


@pytest.mark.parametrize(("library", "allowed"), [("mlflow", ["tasks/tracking/"]), ("prefect", ["flows/", "tasks/"])])
def test_who_imports_what(library, allowed):
    found = {
        file.relative_to(ROOT).as_posix()
        for file in sources("tensorpress", *MAPPED)
        if any(name.split(".")[0] == library for name in imported(file))
    }
    assert found and {name for name in found if not name.startswith(tuple(allowed))} == set()


def test_the_library_names_nothing_of_the_workflow():
    """compressors/, evaluators/ and kernels/ run where nothing of the workflow is installed."""
    allowed = set(sys.stdlib_module_names)
    allowed |= {
        "torch",
        "transformers",
        "safetensors",
        "numpy",
        "tensorly",
        "pydantic",
        "yaml",
        "tensorpress",
        "scipy",
        "triton",
    }
    for file in sources("compressors", "evaluators", "kernels"):
        foreign = {name.split(".")[0] for name in imported(file)} - allowed
        assert not foreign, f"{file.relative_to(ROOT)}: {foreign}"


WITHOUT_WORKFLOW = """
import importlib, pkgutil, sys, types

absent = ("psutil", "prefect", "mlflow", "typer", "rich", "pandas", "matplotlib", "jinja2", "fastapi", "sqlalchemy")
sys.modules.update(dict.fromkeys(absent))
import tensorpress
for part in ("compressors", "evaluators", "kernels"):
    package = importlib.import_module(f"tensorpress.{part}")
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        importlib.import_module(module.name)

import torch, transformers
from tensorpress.compressors.decompose.mpo import MPO
from tensorpress.kernels.mpo_linear import MPOLinear
sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
MPO(metric="weights", keep=0.5).compress(model, types.SimpleNamespace(progress=lambda *_: None))
assert any(isinstance(module, MPOLinear) for module in model.modules())
print(model(torch.tensor([[1, 2, 3]])).logits.isfinite().all().item())
"""


def test_the_library_works_without_the_workflow(fresh):
    assert fresh(WITHOUT_WORKFLOW).split() == ["True"]


def test_no_pickle_and_no_remote_code():
    for file in sources("tensorpress", *MAPPED):
        names = {name.split(".")[0] for name in imported(file)}
        assert not names & {"pickle", "dill", "joblib", "cloudpickle"}, file
        text = file.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text and "torch.load(" not in text, file
