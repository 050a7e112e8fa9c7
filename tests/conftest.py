"""Fixtures that all tests share."""

import http.server
import logging
import os
import signal
import ssl
import subprocess
import threading
import types

import pytest
import torch
import warm

import utils
from tools import bench, chaos, checkpoint_cost

os.environ["OMP_NUM_THREADS"] = "1"  # before a run in this process asks
torch.set_num_threads(1)  # for what is made before the first test
# What nohup and a shell's background jobs ignore, runs would ignore, too.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


# Files that take long, the longest first; a worker takes whole files.
LONGEST = ("slurm", "resume", "engine", "teachers", "main", "models", "distributed", "augment", "datasets", "export")


def pytest_collection_modifyitems(items):
    """Start the longest files first, so that no worker is left with one at the end."""
    order = {f"test_{name}": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: such small models take longer to synchronize threads than to compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def fresh_logger():
    """Undo `set_up_logging` before and after each test: its handler writes to a stream that ends with a test."""

    def reset():
        utils.logger.handlers[:], utils.logger.propagate = [], True
        utils.logger.setLevel(logging.NOTSET)

    reset()
    yield
    reset()


@pytest.fixture(autouse=True)
def warm_tools(monkeypatch):
    """Let tools that start many runs fork them from a warm process instead of a new interpreter."""
    for tool in (bench, chaos, checkpoint_cost):
        monkeypatch.setattr(tool, "subprocess", types.SimpleNamespace(**vars(subprocess) | {"Popen": warm.Popen}))


class _Web(http.server.BaseHTTPRequestHandler):
    """HTTP handler that serves the bytes in `files` by path; if an entry is a URL, it redirects there."""

    files: dict[str, bytes | str] = {}

    def do_GET(self):
        found = self.files.get(self.path)
        self.send_response(404 if found is None else 302 if isinstance(found, str) else 200)
        if isinstance(found, str):
            self.send_header("Location", found)
        self.end_headers()
        self.wfile.write(found if isinstance(found, bytes) else b"")

    def log_message(self, *_):
        pass


@pytest.fixture(scope="session")
def certificate(tmp_path_factory):
    """Return a file with a key and its self-signed certificate for 127.0.0.1."""
    path = tmp_path_factory.mktemp("certificate") / "both.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run([*command, "-keyout", path, "-out", path.with_suffix(".crt")], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("makes its certificate with openssl")
    path.write_bytes(path.read_bytes() + path.with_suffix(".crt").read_bytes())
    return path


@pytest.fixture
def web(tmp_path, monkeypatch, certificate):
    """Start an https server on this machine; yield its address and the dict of files that it serves."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))  # is trusted
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    handler = type("Handler", (_Web,), {"files": {}})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}", handler.files
        server.shutdown()
        thread.join()
