"""The text of a recipe: read, parsed as YAML within bounds, changed by overrides, and without secrets for the places that keep it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tensorpress.errors import InputError
from tensorpress.secrets import redact, redact_all

LARGEST = 1_000_000
"""Characters of a recipe."""
DEEPEST = 32
"""Keys in the path of an override."""
MOST_VALUES = 100_000
"""Values of a recipe with its anchors written out; a few lines of anchors on anchors can stand for billions."""


def read(path: str | Path) -> str:
    """The text of a recipe file. Raises InputError with one line."""
    path = Path(path)
    try:
        piped = str(path) == "/dev/stdin" or str(path).startswith("/dev/fd/")  # the shell's <(...)
        if path.exists() and not (path.is_file() or path.is_dir() or piped):
            raise InputError(f"{path}: is no plain file; a recipe is a YAML file")
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST + 1)
    except FileNotFoundError:
        raise InputError(f"{path}: no such recipe file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if len(text) > LARGEST:
        raise InputError(f"{path}: has more than {LARGEST:,} characters, which no recipe has")
    return text


def without_secrets(text: str, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """A recipe's text and overrides for the places that keep them: what only people read is redacted.

    Raises InputError where a value that does something holds a secret: it would be kept with every run. What is no recipe
    comes back as it is, for `parse_text` to say why.
    """
    try:
        data = overridden(text, overrides)
    except (ValueError, InputError):
        return text, [*overrides]
    if not isinstance(data, dict):
        return text, [*overrides]
    for key, value in data.items():
        if key != "description" and (redact_all(value) != value or redact(str(key)) != str(key)):
            raise InputError(
                f"{redact(str(key))}: holds a secret (a token, a password in an address, or the value of a variable such as "
                "HF_TOKEN), which would be kept with the run; name what it means in another way"
            )
    safe, safe_overrides = redact(text), [_redactoverride(override) for override in overrides]
    masked = {key: redact_all(value) for key, value in data.items()}
    try:
        same = overridden(safe, safe_overrides) == masked
    except (ValueError, InputError):  # `***` at the beginning of a value is an alias
        same = False
    return (safe, safe_overrides) if same else (yaml.safe_dump(masked, sort_keys=False, allow_unicode=True), [])


def _redactoverride(override: str) -> str:
    path, equals, value = override.partition("=")
    safe = redact(value)
    return override if safe == value else f"{path}{equals}{json.dumps(safe)}"


def overridden(text: str, overrides: Sequence[str]) -> Any:
    """The value of a recipe's text with its overrides in it. Raises ValueError, InputError."""
    data = load_yaml(text)
    for change in overrides if isinstance(data, dict) else ():
        override(data, change)
    return data


def resolved(text: str, overrides: Sequence[str]) -> str:
    """The YAML text of a recipe with its overrides in it; as it was written where there are none."""
    if not overrides:
        return text
    data = overridden(text, overrides)
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """The value of a YAML text. Raises ValueError that says what is wrong, and in which line where that is known."""
    try:
        value = yaml.load(text, Loader=_StrictLoader)
        size = _size(value, {})
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" line {where.line + 1}" if where else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ValueError(f"{line} is not YAML: {problem}") from None
    except RecursionError:
        raise ValueError(" is not YAML that can be read: it is nested too deeply") from None
    except Exception as error:  # PyYAML's constructors raise all sorts of things for values such as 2001-99-99
        raise ValueError(f" is not YAML: it has a value that cannot be read ({shown(str(error))})") from None
    if size > MOST_VALUES:
        raise ValueError(f" is not YAML that can be read: its anchors stand for more than {MOST_VALUES} values")
    return value


def _size(value: Any, known: dict[int, int]) -> int:
    """Number of values in a value; one that holds itself is endless."""
    if not isinstance(value, (dict, list, tuple)):
        return 1
    if id(value) not in known:
        known[id(value)] = MOST_VALUES + 1
        parts = [*value, *value.values()] if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def kind_of(value: Any) -> str:
    """What a value is, for an error line."""
    names = {dict: "a mapping", list: "a list", str: "text", type(None): "nothing", bool: "true or false"}
    return names.get(type(value), f"{type(value).__name__} {value!r}")


def override(data: dict[str, Any], change: str) -> None:
    """Set one value of a recipe, given as `steps.quantize.bits=3`. Raises InputError."""
    path, equals, value = change.partition("=")
    keys = path.split(".")
    if not equals or not all(keys) or len(keys) > DEEPEST:
        raise InputError(f"--set {change}: write it as steps.quantize.bits=3")
    target = data
    for key in keys[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise InputError(f"--set {path}: {key} is not a mapping")
    try:
        target[keys[-1]] = load_yaml(value)
    except ValueError:
        raise InputError(f"--set {path}: {value!r} is not a YAML value") from None


def shown(value: Any) -> str:
    """A value for an error line, cut at 80 characters."""
    text = repr(value) if isinstance(value, (str, int, float, bool)) else kind_of(value)
    return text if len(text) <= 80 else text[:77] + "..."
