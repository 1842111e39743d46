"""Images a second that a writer takes, by what they lie in: on a local disk, and in a bucket that answers each request
after 50 ms. No device: it is what writing can keep up with.

    python jobs/bench/outputs.py                        # a local disk, GCS and S3 (both from their servers on loopback)
    python jobs/bench/outputs.py --places file --side 1024 --images 200

The ways take turns, and the median of the rounds counts. ``cpu`` is what the writing process computes for each image.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import statistics
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import gcs_faults  # noqa: E402
import plain  # noqa: E402
import s3_faults  # noqa: E402

from fluxbatch.config.schema import Container  # noqa: E402
from fluxbatch.results import packer  # noqa: E402
from fluxbatch.results.ledger import Ledger  # noqa: E402
from fluxbatch.results.writer import Writer  # noqa: E402
from fluxbatch.storage.registry import open_store  # noqa: E402

SERVERS = {"file": None, "gs": gcs_faults.serve, "s3": s3_faults.serve}
FACTS = {"model": "none"}


def write(url: str, container: Container, images: int, batch: int, pixels: np.ndarray, seconds: float) -> list[float]:
    """Images a second from the first batch to the last record, the same to the end of packing, and CPU milliseconds
    for each. ``seconds``: between batches, at the least, as a device takes them."""
    output = dataclasses.replace(plain.job().output, container=container, rows_per_shard=images // 4)
    rows = [plain.row(k) for k in range(images)]
    ledger = Ledger(open_store(url), FACTS, writer_id="bench", container=container)
    todo, names = ledger.assign(rows, template="flux_{i}", extension=".png")
    begun, cpu = time.perf_counter(), time.process_time()
    recorded: list[float] = []
    on_image = lambda row, ok: recorded.append(time.perf_counter() - begun)  # noqa: E731
    with Writer(ledger, plain.job(output=output), facts=FACTS, on_image=on_image) as writer:
        for first in range(0, images, batch):
            due = begun + first // batch * seconds
            time.sleep(max(0.0, due - time.perf_counter()))
            part = todo[first : first + batch]
            writer.put(part, names, pixels[: len(part)], np.ones(len(part), bool))
    packer.finish(ledger.images, ledger.records, output)
    ended, worked = time.perf_counter() - begun, time.process_time() - cpu
    return [images / recorded[-1], images / ended, 1000 * worked / images]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--places", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before a bucket answers")
    parser.add_argument("--device", type=float, default=0.0, help="seconds that a device takes for a batch")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    noise = np.random.default_rng(0).integers(0, 256, (given.batch, given.side // 8, given.side // 8, 3), np.uint8)
    pixels = np.repeat(np.repeat(noise, 8, 1), 8, 2)
    print("| place | images in | images/s recorded | to the end of packing | CPU ms an image |\n|---|---|---|---|---|")
    for place in given.places:
        found: dict[Container, list[list[float]]] = {container: [] for container in Container}
        for round in range(given.rounds):
            for container in Container:
                serve = SERVERS[place]
                with tempfile.TemporaryDirectory() as folder, serve() if serve else contextlib.nullcontext() as server:
                    if server:
                        server.delay = given.delay
                    url = f"{place}://bucket/run{round}" if serve else f"{folder}/run"
                    found[container].append(write(url, container, given.images, given.batch, pixels, given.device))
        for container, figures in found.items():
            recorded, ended, cpu = (statistics.median(each) for each in zip(*figures, strict=True))
            print(f"| {place} | {container.name} | {recorded:.1f} | {ended:.1f} | {cpu:.2f} |", flush=True)


if __name__ == "__main__":
    main()
