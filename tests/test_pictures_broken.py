"""A thousand rows, fifty of whose pictures are broken in ten ways: each is its own row's reject, and the job goes on."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from conftest import CACHE, GOLDEN, metadata, xla_flags
from PIL import Image

pytestmark = pytest.mark.slow

ROWS, OF_A_KIND = 1000, 5


def png(size=(32, 24), seed=0, mode="RGB"):
    rng = np.random.default_rng(seed)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode).save(out, "PNG")
    return out.getvalue()


def bomb():
    """A small file that says it has ten thousand million pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    )


def corrupt(data):
    """With another checksum of the compressed pixels."""
    at = data.index(b"IDAT")
    end = at + 4 + int.from_bytes(data[at - 4 : at], "big")
    return data[:end] + bytes([data[end] ^ 1]) + data[end + 1 :]


def float_tiff():
    out = io.BytesIO()
    Image.fromarray(np.full((24, 32), 0.5, np.float32)).save(out, "TIFF")
    return out.getvalue()


# Each with words of the reason. What is gone goes once the run has looked at all pictures.
BROKEN = {
    "truncated": (lambda path: path.write_bytes(png()[:900]), "not a whole picture"),
    "bomb": (lambda path: path.write_bytes(bomb()), "more than 268,435,456 pixels"),
    "text": (lambda path: path.write_bytes(b"<html>404</html>"), "its first bytes are not those of a picture"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "float": (lambda path: path.write_bytes(float_tiff()), "pixels of kind F"),
    "foreign": (lambda path: path.write_bytes(b"%PDF-1.7\n" + png()), "its first bytes are not those of a picture"),
    "folder": (lambda path: path.mkdir(), "is a directory"),
    "loop": (lambda path: path.symlink_to(path), "too many levels of symbolic links"),
    "corrupt": (lambda path: path.write_bytes(corrupt(png())), "not a whole picture"),
    "gone": (lambda path: path.write_bytes(png()), "not found"),
}


def resident(process):
    """MB of the process's memory; 0 once it has ended."""
    try:
        with open(f"/proc/{process.pid}/status") as status:
            return next((int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS")), 0)
    except (OSError, ProcessLookupError):
        return 0


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_fifty_broken_pictures_among_a_thousand(tmp_path):
    """950 images, 50 rejects that name their file and what is wrong, exit code 3, and no more memory at the end than
    after a quarter: the pictures decode to a gigabyte."""
    kinds = [kind for kind in BROKEN for _ in range(OF_A_KIND)]
    broken = {ROWS - 1 - 7 * i: kind for i, kind in enumerate(reversed(kinds))}  # those that go are the last ones
    good = []
    for seed in range(8):
        good.append(tmp_path / f"good-{seed}.jpg")
        small = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8))
        small.resize((640, 560)).save(good[-1], quality=80)
    rows, run = [], tmp_path / "run"
    for i in range(ROWS):
        path = tmp_path / f"{i}-{broken.get(i, 'good')}.png"
        if i in broken:
            BROKEN[broken[i]][0](path)
        else:
            path.hardlink_to(good[i % 8])
        rows.append({"id": f"r{i}", "prompt": f"prompt {i % 8}", "image": path.name, "strength": 0.5})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "pretrained_model_name_or_path": GOLDEN / "dev",
        "manifest": tmp_path / "rows.jsonl",
        "output_dir": tmp_path,
        "run_name": "run",
        "max_sequence_length": 24,
        "num_inference_steps": 2,
        "height": 16,
        "width": 16,
        "per_device_batch_size": 8,
        "hardware": "cpu",
        "text_cache_dir": "null",
        "jax_cache_dir": CACHE,
        "output.gallery": "false",
    }
    command = [sys.executable, "-m", "fluxbatch.run", *(f"{key}={value}" for key, value in flags.items())]
    with open(tmp_path / "said", "w+") as said:
        environment = os.environ | {"XLA_FLAGS": xla_flags(1)}
        process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        memory: dict[int, float] = {}  # by images made
        while process.poll() is None:
            made = len(list(run.glob("flux_*.png"))) if run.exists() else 0
            memory[made] = resident(process)
            if made:
                for i in (i for i, kind in broken.items() if kind == "gone"):
                    (tmp_path / f"{i}-gone.png").unlink(missing_ok=True)
            time.sleep(0.02)
        said.seek(0)
        text = said.read()
    assert process.returncode == 3 and "Traceback" not in text, text
    assert {record["id"] for record in metadata(run)} == {f"r{i}" for i in range(ROWS) if i not in broken}
    assert len(list(run.glob("flux_*.png"))) == 950
    rejects = {line["id"]: line["reason"] for line in map(json.loads, (run / "rejects.jsonl").open())}
    assert rejects.keys() == {f"r{i}" for i in broken}
    for i, kind in broken.items():
        reason = rejects[f"r{i}"]
        assert f"{i}-{kind}.png" in reason and BROKEN[kind][1] in reason and "\n" not in reason, reason
    early = [size for made, size in memory.items() if 250 <= made < 400]
    late = [size for made, size in memory.items() if 700 <= made < 950]
    assert max(late) - np.median(early) < 30, (early, late)
