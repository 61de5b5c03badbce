"""Takes secrets out of what leaves the process: logs, tracking, cards, error lines. Digests are made of what came in, and stay."""

from __future__ import annotations

import html
import json
import logging
import os
import re
import traceback
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

MASK = "***"
SHORTEST = 6
"""Characters of the shortest value that is taken for a secret; `true` or `0` would take words out of every text."""
WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASSPHRASE", "APIKEY")
PAIRS = ("API_KEY", "ACCESS_KEY", "PRIVATE_KEY", "AUTH", "CREDENTIALS")
PLACES = ("PATH", "FILE", "DIR", "SOCK", "URL", "HOST", "NAME")
"""Ends of names of variables that say where a secret lies, or whose it is."""
SHAPES = re.compile(
    r"(?P<before>://[^\s/:@]*:)[^\s/@]+(?=@)"
    r"|(?P<word>\b(?:Bearer|Basic)\s+)[A-Za-z0-9._~+/=-]{16,}"
    r"|(?P<key>[?&](?:[\w-]*(?:token|key|secret|password|signature|credential))=)[^&\s\"'<>]+"
    r"|(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|xox[abprs]-[A-Za-z0-9-]{10,}|(?-i:(?:AKIA|ASIA)[0-9A-Z]{12,}))"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
    re.IGNORECASE | re.DOTALL,
)
"""What is a secret by its look: passwords in addresses, headers and queries, tokens of known services, private keys."""


def redact(text: str) -> str:
    """A text with `***` in place of every secret: values of the environment whose names say so, and known shapes."""
    return _without(_values(), text)


def redact_all(value: Any) -> Any:
    """A value for JSON with its texts redacted, those of keys too."""
    secrets = _values()

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return _without(secrets, value)
        if isinstance(value, Mapping):
            return {walk(key) if isinstance(key, str) else key: walk(item) for key, item in value.items()}
        return [walk(item) for item in value] if isinstance(value, (list, tuple)) else value

    return walk(value)


def _without(secrets: list[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    return SHAPES.sub(lambda m: (m["before"] or m["word"] or m["key"] or "") + MASK, text)


def redact_error(error: BaseException) -> None:
    """Take secrets out of what an exception says, and out of what it came from: others will log and keep it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.args = tuple(redact_all(argument) for argument in error.args)
        for name in ("strerror", "filename", "filename2", "problems"):
            value = getattr(error, name, None)
            if isinstance(value, (str, tuple)) and value:
                safe = redact(value) if isinstance(value, str) else tuple(redact_all(value))
                if safe != value:
                    setattr(error, name, safe)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]


def redact_logs() -> None:
    """Redact every log record of this process as it is made, tracebacks as well. Safe to call twice."""
    make = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def made(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        _redact_record(record)
        return record

    made.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(made)


def _redact_record(record: logging.LogRecord) -> None:
    try:
        said = record.getMessage()
    except Exception:  # arguments that do not fit: logging says so itself
        return
    safe = redact(said)
    if safe != said:
        record.msg, record.args = safe, ()
    if record.exc_info and record.exc_info[0] is not None:
        text = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        safe = redact(text)
        if safe != text:
            record.exc_info, record.exc_text = None, safe


def _values() -> list[str]:
    """Secrets of the environment in every form in which texts may hold them, the longest first."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if not _is_secret(name):
            continue
        for part in (value, value.partition(":")[2]):  # a user's name before the password
            part = part.strip()
            if len(part) >= SHORTEST:
                found |= {part, quote(part, safe=""), json.dumps(part)[1:-1], html.escape(part)}
    return sorted(found, key=len, reverse=True)


def _is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is secret: HF_TOKEN, DB_PASSWORD, PREFECT_API_AUTH_STRING."""
    name = name.upper()
    parts = name.split("_")
    if parts[-1] in PLACES:
        return False
    return any(part.endswith(WORDS) for part in parts) or any(f"_{pair}_" in f"_{name}_" for pair in PAIRS)
