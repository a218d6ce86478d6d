"""Serve the page: what it needs of this machine, and its address."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files

from c2r import InputError
from c2r.panel.model import Panel
from c2r.panel.page import build_page

#: Addresses that only this machine reaches.
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def require_gradio() -> None:
    """Raise InputError if gradio is not installed."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read at its import
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise InputError(f"c2r.app: needs gradio ({error}); pip install gradio==6.31.0") from None


def require_free_port(host: str, port: int) -> None:
    """Raise InputError if nothing can be served at an address."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"--port {port}: another program uses it; give another") from None
        raise InputError(f"--host {host}: nothing can be served there ({error.strerror}); give another") from None


@contextmanager
def served(panel: Panel) -> Iterator[str]:
    """Serve the page while the block runs; it gives the page's address. Nothing is loaded from the internet."""
    import gradio as gr

    page = build_page(panel)
    script = files("c2r.panel").joinpath("play_together.js").read_text("utf-8")
    _, address, _ = page.launch(
        server_name=panel.args.host,
        server_port=panel.args.port,
        max_file_size=panel.args.max_upload_mb * 10**6,
        css=".toast-wrap {top: auto !important; bottom: 1rem !important}",  # otherwise it covers the buttons
        head=f"<script>{script}</script>",
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        prevent_thread_lock=True,
        show_error=True,
        quiet=True,
        share=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
    )
    try:
        yield address
    finally:
        page.close(verbose=False)
