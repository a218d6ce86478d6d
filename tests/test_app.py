"""python -m c2r.app: bad input is refused before a model is loaded."""

import socket
import sys

import pytest

from c2r import InputError, app
from tests.helpers.trained import save_trained_models

pytest.importorskip("gradio")


def test_the_command_refuses_early_in_one_line(monkeypatch, tmp_path):
    models = save_trained_models(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        free_port = free.getsockname()[1]
    monkeypatch.setattr(app, "load_panel", lambda *values: pytest.fail("loads a model"))
    with pytest.raises(InputError, match="--model: missing"):
        app.main([])
    with pytest.raises(InputError, match="absent: no such model folder; check the path"):
        app.main([str(tmp_path / "absent"), f"--port={free_port}"])
    with pytest.raises(InputError, match=r"has no c2r\.json"):
        app.main([str(models / "base"), f"--port={free_port}"])
    with pytest.raises(InputError, match=r"base/config\.json: no such file"):
        app.main([str(models / "phase2/best"), f"--port={free_port}", f"--dinov3={models}/base"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: another program uses it; give another"):
            app.main([str(models / "phase2/best"), f"--port={port}"])
    with pytest.raises(InputError, match=r"--host 192\.0\.2\.1: nothing can be served there"):
        app.main([str(models / "phase2/best"), "--host=192.0.2.1", f"--port={free_port}"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"needs gradio \(.*\); pip install gradio=="):
        app.main([str(models / "phase2/best")])
