"""An S3 server (moto's) on loopback, behind the proxy of ``gcs_faults`` that makes it fail on request.

``with serve(rate=0.1): …`` sets AWS's environment variables; the bucket is ``bucket``.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from gcs_faults import Proxy

from fluxbatch.distributed.replica import hold_port


@contextlib.contextmanager
def serve(bucket: str = "bucket", *, rate: float = 0.0) -> Iterator[Proxy]:
    """Server and proxy; with the environment variables set, and an empty bucket."""
    held = hold_port()
    upstream = held.getsockname()[1]
    proxy = Proxy(upstream)
    command = [sys.executable, "-c", "import sys; from moto.server import main; main(sys.argv[1:])"]
    server = subprocess.Popen(
        [*command, "-H", "127.0.0.1", "-p", str(upstream)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    given = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.server_port}",
        "AWS_ACCESS_KEY_ID": "a-key",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
        "AWS_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        _make_bucket(upstream, bucket)
        proxy.rate = rate
        yield proxy
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        proxy.shutdown()
        proxy.server_close()
        server.kill()
        server.wait()
        held.close()


def _make_bucket(port: int, bucket: str) -> None:
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("PUT", f"/{bucket}")
            assert connection.getresponse().status == 200
            return
        except ConnectionError:
            time.sleep(0.05)
    raise RuntimeError("moto's server did not start")
