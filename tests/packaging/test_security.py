"""What the code never does: run what it reads, open a shell, take remote code. Read from its syntax, every module of it."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("tensorpress", "flows", "tasks", "compressors", "evaluators", "kernels", "benchmarks", "scripts")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
PICKLES = (
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "torch.load",
    "numpy.load",
)
CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
ATTRIBUTES = {"os.system", "os.popen", "os.execv", "os.spawnv", "torch.load", "torch.save", "yaml.load_all", "yaml.unsafe_load",
              "yaml.full_load", "np.load", "numpy.load", "torch.hub.load", "tarfile.open", "shutil.unpack_archive"}  # fmt: skip


def dotted(node):
    """`a.b.c` of an expression; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def findings(tree):
    """What a module must not do, with its line."""
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        for name in names:
            if name.split(".")[0] in PICKLES or name in PICKLES:
                yield node.lineno, f"imports {name}"
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in CALLS or name in ATTRIBUTES:
            yield node.lineno, f"calls {name}"
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        if name == "yaml.load" and not (dotted(given.get("Loader", ast.Constant(0)))).endswith("_StrictLoader"):
            yield node.lineno, "yaml.load without the strict loader"
        for option, safe in (
            ("shell", False),
            ("trust_remote_code", False),
            ("weights_only", True),
            ("allow_pickle", False),
            ("verify", True),
        ):
            value = given.get(option)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is safe):
                yield node.lineno, f"{option} is not {safe}"
        if name.endswith("extractall"):
            yield node.lineno, "unpacks an archive"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_runs_what_it_reads(path):
    assert not [f"{path.name}:{line}: {what}" for line, what in findings(ast.parse(path.read_text(encoding="utf-8")))]


@pytest.mark.parametrize(
    "code",
    ["import pickle", "from torch import load", "import torch\ntorch.load('x')", "eval('1')", "subprocess.run('x', shell=True)",
     "AutoModel.from_pretrained('x', trust_remote_code=True)", "f(trust_remote_code=flag)", "os.system('x')", "yaml.load(x, Loader=yaml.Loader)",
     "np.load('x', allow_pickle=True)", "zipfile.ZipFile('x').extractall()", "httpx.get(x, verify=False)"],
)  # fmt: skip
def test_the_reader_sees_it(code):
    assert list(findings(ast.parse(code)))


def test_models_are_opened_without_remote_code():
    """`trust_remote_code` is off by default in transformers; where configs and tokenizers are opened it is said."""
    for name in ("checks.py", "source.py"):
        assert "trust_remote_code=False" in (ROOT / "tensorpress" / name).read_text()
    assert "use_safetensors=True" in (ROOT / "tensorpress/loading.py").read_text()


def audit(*arguments, folder):
    return subprocess.run(
        [sys.executable, ROOT / "scripts/audit.py", *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def project(tmp_path):
    """A folder with a constraints file and a list of what was looked up, of one installed package."""
    there = version("pyyaml")
    (tmp_path / "docs").mkdir()

    def write(pin=there, known=there, **fields):
        (tmp_path / "constraints.txt").write_text(f"# a comment\nPyYAML=={pin}\n")
        entry = {
            "name": "pyyaml",
            "version": known,
            "checked": "2026-11-21",
            "source": "OSV",
            "vulnerable": [],
            **fields,
        }
        (tmp_path / "docs/audited.json").write_text(json.dumps([entry]))
        return tmp_path

    return write


def test_audit_says_which_of_the_two_was_done(project):
    ended = audit("--offline", "--only", "pyyaml", folder=project())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "compared with docs/audited.json" in ended.stdout and "not looked up now" in ended.stdout


def test_audit_fails_for_what_is_not_pinned_or_vulnerable(project):
    ended = audit("--offline", "--only", "pyyaml,rich", folder=project())
    assert ended.returncode == 1 and re.search(r"rich .* is not pinned", ended.stdout)
    ended = audit("--offline", "--only", "pyyaml", folder=project(pin="1.0"))
    assert ended.returncode == 1 and "constraints.txt has 1.0" in ended.stdout
    ended = audit("--offline", "--only", "pyyaml", folder=project(vulnerable=["CVE-2020-14343"]))
    assert ended.returncode == 1 and "CVE-2020-14343" in ended.stdout
    ended = audit("--offline", "--only", "pyyaml", folder=project(known="1.0"))
    assert ended.returncode == 1 and "not in docs/audited.json" in ended.stdout


def test_the_list_names_what_is_pinned():
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts/audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    pins = module.read_pins(ROOT / "constraints.txt")
    known = {(entry["name"], entry["version"]) for entry in json.loads((ROOT / "docs/audited.json").read_text())}
    assert len(pins) > 50 and set(pins.items()) == known
