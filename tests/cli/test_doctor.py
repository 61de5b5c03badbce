"""`doctor`: what the machine has, and what hinders."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import time

import httpx

import tensorpress.cli.doctor as doctor


def test_doctor(call, monkeypatch, work, tmp_path):
    monkeypatch.setattr(doctor, "hub_answer", lambda: "no hub answers; local models work")
    monkeypatch.setattr(doctor, "installed", lambda names: {"fastapi": "0.139.2", "sqlalchemy": "2.0.44"})
    code, out, err = call("doctor", "--json", "d.json")
    assert (code, err) == (0, "")
    found = json.loads((work / "d.json").read_text())
    assert "usable" in out and found["usable"]
    assert found["kernels"]["mpo_linear"] and found["processor"]["cores"] >= 1
    assert found["ports"].keys() == {"4200", "5000"} and found["extras"].keys() == {"gptq", "eval", "dask", "ray"}
    assert found["store"]["writable"] and not found["store"]["exists"]
    assert not (work / "mlruns").exists()
    monkeypatch.setattr(doctor, "installed", lambda names: {"fastapi": "0.151.0", "sqlalchemy": "2.1.0b1"})
    code, out, _ = call("doctor")
    assert code == 1 and "fastapi<0.151" in out and "sqlalchemy<2.1" in out
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(doctor, "installed", lambda names: {})
    code, out, _ = call("doctor", "--store", tmp_path / "file" / "store")
    assert code == 1 and "cannot be written" in " ".join(out.split())


def test_doctor_refuses_a_json_file_that_cannot_be_written(refused):
    assert "--json" in refused("doctor", "--json", "no/such/folder.json")


def test_who_can_read_the_store(call, work, tmp_path):
    store = work / "store"
    store.mkdir()
    for folder in (work, *work.parents):  # pytest's own folders let nobody else through
        if not folder.stat().st_mode & 0o001:
            assert not doctor._openness(store)[1]
    assert doctor._openness(work / "none") == (None, False)
    store.chmod(0o700)
    assert doctor._openness(store) == ("0700", False)
    out = " ".join(call("doctor", "--store", store)[1].split())
    assert "other users of this machine cannot read the store (mode 0700" in out


def test_known_bad_versions():
    assert doctor.known_bad({"fastapi": "0.150.9", "sqlalchemy": "2.0.99"}) == []
    assert len(doctor.known_bad({"fastapi": "1.0", "sqlalchemy": "2.1"})) == 2


def test_who_answers_at_a_port():
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = b"3.17.2" if self.path == "/version" else b"<html>"
            self.send_response(200 if self.path == "/version" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert doctor.port_answer(server.server_port) == "MLflow 3.17.2"
    server.shutdown()
    server.server_close()
    assert doctor.port_answer(server.server_port) == "free"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert doctor.port_answer(silent.getsockname()[1]) == "something else"


def test_the_hub_has_two_seconds(monkeypatch):
    monkeypatch.setattr(doctor, "HUB_SECONDS", 0.1)
    monkeypatch.setattr(httpx, "head", lambda *a, **k: time.sleep(5))
    start = time.monotonic()
    assert "no hub answers" in doctor.hub_answer()
    assert time.monotonic() - start < 2
