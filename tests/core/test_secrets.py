"""Secrets become `***` in every form that texts may hold them in; what only looks like one stays."""

from __future__ import annotations

import json
import logging
import os
from urllib.parse import quote

import pytest
import yaml

from tensorpress.errors import InputError
from tensorpress.recipe_text import overridden, without_secrets
from tensorpress.secrets import redact, redact_all, redact_error, redact_logs

SECRET = 'pa&ss"wörd<1>'


@pytest.fixture
def secret(monkeypatch):
    monkeypatch.setenv("OUR_TOKEN", SECRET)
    return SECRET


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "db_password", "MYSQL_PASSWD", "OPENAI_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "PGPASSWORD",
     "GITHUBTOKEN", "PREFECT_API_AUTH_STRING", "AUTH", "SECRET_1", "GOOGLE_CREDENTIALS", "SSH_PRIVATE_KEY"],
)  # fmt: skip
def test_variables_whose_names_say_so(monkeypatch, name):
    monkeypatch.setenv(name, "correct-horse")
    assert redact("a correct-horse here") == "a *** here"


@pytest.mark.parametrize(
    "name",
    ["TOKENIZERS_PARALLELISM", "GIT_AUTHOR_NAME", "HF_TOKEN_PATH", "SSH_AUTH_SOCK", "KEYBOARD", "XAUTHORITY", "PATH", "AUTH_URL"],
)  # fmt: skip
def test_variables_that_only_sound_like_it(monkeypatch, name):
    monkeypatch.setenv(name, "correct-horse")
    assert redact("a correct-horse here") == "a correct-horse here"


def test_short_values_are_words(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "true")
    monkeypatch.setenv("EMPTY_SECRET", "")
    assert redact("it is true, and nothing") == "it is true, and nothing"


def test_the_password_of_a_pair(monkeypatch):
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "tensorpress:correct-horse")
    assert redact("tensorpress:correct-horse and correct-horse of tensorpress") == "*** and *** of tensorpress"


def test_every_form_of_a_value(secret):
    import html

    for form in (secret, quote(secret, safe=""), html.escape(secret), json.dumps(secret)):
        assert "ss" not in redact(f"<{form}>") and "***" in redact(form)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("https://user:hunter22@host/x", "https://user:***@host/x"),
        ("postgresql://:hunter22@host", "postgresql://:***@host"),
        ("Authorization: Bearer abcdefghijklmnop.qrst", "Authorization: Bearer ***"),
        ("authorization: basic dXNlcjpwYXNzd29yZA==", "authorization: basic ***"),
        ("https://h/x?token=abc&y=1", "https://h/x?token=***&y=1"),
        ("?X-Amz-Signature=00ff&a=1", "?X-Amz-Signature=***&a=1"),
        ("hf_abcdefghijklmnopqrstuvwx", "***"),
        ("x sk-proj-abcdefghijklmnopqrstuv.", "x ***."),
        ("ghp_abcdefghijklmnopqrstuvwxyz0123456789", "***"),
        ("github_pat_11AAAAAAA0abcdefghijkl", "***"),
        ("AKIAIOSFODNN7EXAMPLE", "***"),
        ("a\n-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----\nb", "a\n***\nb"),
    ],
)
def test_shapes(text, safe):
    assert redact(text) == safe


@pytest.mark.parametrize(
    "text",
    ["http://127.0.0.1:4200/api", "s3://bucket/prefix", "task-abcdefghijklmnopqrstuv", "3f2a91bc" * 8, "tokens=1000", "a@b.c",
     "sqlite:////work/mlruns/mlflow.db", "https://h/?page=3", "the Asianinfrastructurebank", "basic tokens", "user: you@host"],
)  # fmt: skip
def test_what_stays(text):
    assert redact(text) == text


def test_values_of_json(secret):
    value = {"a": [secret, {secret: 1.5}], "b": None, "c": (True, "plain")}
    assert redact_all(value) == {"a": ["***", {"***": 1.5}], "b": None, "c": [True, "plain"]}


def test_errors_and_what_they_came_from(secret):
    try:
        try:
            open(f"/no/{secret}")  # noqa: SIM115, PTH123
        except OSError as cause:
            raise InputError(f"bad {secret}") from cause
    except InputError as caught:
        error = caught
    redact_error(error)
    assert str(error) == "bad ***" and error.problems == ("bad ***",)
    assert secret not in str(error.__cause__) and "***" in str(error.__cause__)


def test_logs_and_their_tracebacks(secret, caplog, monkeypatch):
    monkeypatch.setattr(logging, "_logRecordFactory", logging.getLogRecordFactory())
    redact_logs()
    redact_logs()
    with caplog.at_level("INFO"):
        logging.getLogger("some.where").info("token %s of %d", secret, 3)
        try:
            raise ValueError(secret)
        except ValueError:
            logging.getLogger("some.where").exception("it failed")
    assert caplog.messages == ["token *** of 3", "it failed"]
    assert secret not in caplog.text and "ValueError: ***" in caplog.text and "Traceback" in caplog.text


def test_the_environment_is_as_it_was(secret):
    redact("x")
    assert os.environ["OUR_TOKEN"] == secret


@pytest.mark.parametrize(
    "description", ["hf_abcdefghijklmnopqrstuvwx", "of hf_abcdefghijklmnopqrstuvwx", "[hf_abcdefghijklmnopqrstuvwx]"]
)
def test_a_recipe_for_the_places_that_keep_it(description, secret):
    text = yaml.safe_dump({"name": "a", "description": description, "steps": {}}) + "# hf_abcdefghijklmnopqrstuvwx\n"
    safe, overrides = without_secrets(text, ["seed=3", f"description={description}"])
    assert "hf_" not in safe + "".join(overrides)
    found = overridden(safe, overrides)
    assert "***" in str(found.pop("description")) and found == {"name": "a", "steps": {}, "seed": 3}


def test_a_recipe_without_secrets_is_left_as_it_is(secret):
    for text in ("name: a  # as it was\nseed: .nan\n", "name: [", "- 1", ""):
        assert without_secrets(text, ["seed=3", "x"]) == (text, ["seed=3", "x"])


@pytest.mark.parametrize("where", ["name", "steps", "{}"])
def test_a_value_that_works_may_not_hold_one(where, secret):
    data = {"name": "a", where.format(SECRET): {"x": ["hf_abcdefghijklmnopqrstuvwx"]}}
    with pytest.raises(InputError) as caught:
        without_secrets(yaml.safe_dump(data), [])
    assert "holds a secret" in str(caught.value) and "hf_a" not in str(caught.value) and SECRET not in str(caught.value)
