"""Rows with pictures: found, inspected, prepared ahead, encoded, recorded."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import http.server
import io
import json
import os
import threading
import time

import numpy as np
import plain
import pytest
from conftest import images, metadata
from PIL import Image

from fluxbatch.manifest import pictures
from fluxbatch.manifest.digests import Digests
from fluxbatch.storage import picture as files
from fluxbatch.storage import versions
from fluxbatch.storage.picture import located
from fluxbatch.storage.registry import open_store
from fluxbatch.types import Picture, UserError
from fluxbatch.weights import checkpoint
from fluxbatch.weights.headers import read_headers
from fluxbatch.weights.source import Source


def saved(path, seed=0, size=(40, 56), mode="RGB", **options):
    rng = np.random.default_rng(seed)
    shape = (*size, 3) if mode == "RGB" else size
    Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path, **options)
    return path


def seen(path):
    (row,), rejects = pictures.inspect([plain.row(0, image=(Picture(str(path), str(path)),))], [], False)
    assert not rejects
    return row.image[0]


@pytest.mark.parametrize(
    ("path", "folder", "expected"),
    [
        ("a.png", "gs://b/m", "gs://b/m/a.png"),
        ("gs://c/a.png", "gs://b/m", "gs://c/a.png"),
        ("/x/a.png", "gs://b/m", "/x/a.png"),
        ("../a.png", "/m/n", "/m/a.png"),
    ],
)
def test_a_relative_path_begins_at_the_manifest(path, folder, expected):
    assert located(path, folder) == expected


def test_a_picture_is_read_as_it_is_seen(tmp_path):
    """Turned as EXIF says, over white where it is transparent, with 16 bits as with 8."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = seen(saved(tmp_path / "turned.jpg", exif=exif))
    assert (turned.height, turned.width) == (56, 40) and files.read(turned).size == (40, 56)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert np.asarray(files.read(seen(tmp_path / "clear.png"))).min() == 255
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(tmp_path / "deep.png")
    assert np.unique(np.asarray(files.read(seen(tmp_path / "deep.png")))).tolist() == [127]
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    assert files.read(seen(tmp_path / "print.jpg")).mode == "RGB"
    assert files.read(seen(saved(tmp_path / "grey.png", mode="L"))).mode == "L"


def test_a_picture_that_changed_meanwhile_is_not_read(tmp_path):
    picture = seen(saved(tmp_path / "a.png"))
    saved(tmp_path / "a.png", seed=1)
    with pytest.raises(ValueError, match="changed since the job was opened"):
        files.read(picture)


def test_a_picture_of_a_record_is_the_one_of_its_digest(tmp_path):
    """As manifests in several folders have pictures of one name."""
    for seed, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        saved(tmp_path / folder / "x.png", seed=seed)
    folders = [str(tmp_path / folder) for folder in ("none", "a", "b", "none")]
    told = dataclasses.replace(seen(tmp_path / "b" / "x.png"), path="x.png", url="")
    assert files.found(told, folders).url == str(tmp_path / "b" / "x.png")
    assert files.found(dataclasses.replace(told, sha256="0"), folders).url == str(tmp_path / "b" / "x.png")


def test_a_picture_comes_from_a_server(tmp_path):
    saved(tmp_path / "a.png")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        picture = dataclasses.replace(seen(tmp_path / "a.png"), url=f"{address}/a.png")
        assert files.read(picture).size == (56, 40)
        with pytest.raises(files.Missing, match="the server answers 404"):
            files.read(dataclasses.replace(picture, url=f"{address}/b.png"))
        server.shutdown()


class Cut(http.server.SimpleHTTPRequestHandler):
    """A server that goes away before its answer is whole."""

    def copyfile(self, source, outputfile):
        outputfile.write(source.read()[:-5])


def test_a_picture_that_is_cut_off_or_too_long_is_not_read(tmp_path, monkeypatch):
    picture = seen(saved(tmp_path / "a.png"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Cut, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match="IncompleteRead.* 5 more expected"):
            files.look(dataclasses.replace(picture, url=f"http://127.0.0.1:{server.server_port}/a.png"))
        server.shutdown()
    size = (tmp_path / "a.png").stat().st_size
    monkeypatch.setattr(files, "MAX_BYTES", size)
    assert files.look(picture).sha256 == picture.sha256
    monkeypatch.setattr(files, "MAX_BYTES", size - 1)
    with pytest.raises(ValueError, match="a file of more than"):
        files.look(picture)


class Served(http.server.BaseHTTPRequestHandler):
    """Pictures that say of themselves what their names say: a tag, a weak one, a date, one of just now, nothing."""

    def answer(self, send):
        self.server.asked.append(f"{self.command} {self.path}")
        data, changed = self.server.files[self.path]
        refused = self.command == "HEAD" and "refused" in self.path
        self.send_response_only(403 if refused else 200)
        now = time.time()
        self.send_header("Date", self.date_time_string(now))
        self.send_header("Content-Length", str(len(data)))
        digest = hashlib.md5(data).hexdigest()
        for name, key, value in (
            ("tag", "ETag", f'"{digest}"'),
            ("weak", "ETag", f'W/"{digest}"'),
            ("date", "Last-Modified", self.date_time_string(changed)),
            ("fresh", "Last-Modified", self.date_time_string(now)),
        ):
            if name in self.path:
                self.send_header(key, value)
        self.end_headers()
        if send:
            self.wfile.write(data)

    def do_GET(self):
        self.answer(True)

    def do_HEAD(self):
        self.answer(False)

    def log_message(self, *_):
        pass


def test_a_server_is_asked_for_what_is_known_and_not_sent_for_it(tmp_path):
    """Unless it does not say of which version a picture is."""
    data = [saved(tmp_path / f"{i}.png", seed=i, size=(8, 8)).read_bytes() for i in range(2)]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Served) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        names = ["/tag", "/weak-date", "/date", "/weak", "/fresh", "/none", "/tag-refused"]
        server.files, server.asked = dict.fromkeys(names, (data[0], 1e9)), []
        address = f"http://127.0.0.1:{server.server_port}"
        rows = [plain.row(i, image=(Picture(f"{address}{n}", f"{address}{n}"),)) for i, n in enumerate(names)]

        def start():
            server.asked.clear()
            digests = Digests(open_store(str(tmp_path)), "memory")
            good, rejects = pictures.inspect(rows, [], False, digests)
            digests.save()
            served = [hashlib.sha256(server.files[name][0]).hexdigest() for name in names]
            assert not rejects and [row.image[0].sha256 for row in good] == served
            return sorted(each for each in server.asked if each.startswith("GET"))

        everything = sorted(f"GET {name}" for name in names)
        sent = sorted(f"GET /{name}" for name in ("weak", "fresh", "none", "tag-refused"))
        assert start() == everything and not [each for each in server.asked if each.startswith("HEAD")]
        assert start() == sent and len(server.asked) == len(sent) + 4
        server.files |= {"/tag": (data[1], 1e9), "/date": (data[1], 1e9 + 1)}
        assert start() == sorted([*sent, "GET /tag", "GET /date"]) and start() == sent
        server.shutdown()


BROKEN = {
    "empty": lambda good: b"",
    "text": lambda good: b"no picture at all",
    "cut in its header": lambda good: good[:20],
    "foreign": lambda good: b"%PDF-1.7 " + good,
}


def test_what_is_no_picture_is_a_reject_and_what_is_missing_an_error(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    rows = []
    for i, (name, broken) in enumerate(BROKEN.items()):
        (tmp_path / name).write_bytes(broken(buffer.getvalue()))
        rows.append(plain.row(i, image=(Picture(name, str(tmp_path / name)),)))
    good, rejects = pictures.inspect(rows, [], False)
    assert not good and [reject.reason.partition(":")[2].strip().partition(":")[0] for reject in rejects] == [*BROKEN]
    os.mkfifo(tmp_path / "pipe")
    piped = plain.row(8, image=(Picture("pipe", str(tmp_path / "pipe")),))
    assert pictures.inspect([piped], [], False)[1][0].reason == "image: pipe: a pipe or a device, expected a file"
    lost = plain.row(9, where="m.jsonl:9", mask_image=Picture("x.png", str(tmp_path / "x.png")))
    with pytest.raises(UserError, match=r"^m.jsonl:9: mask_image: x.png: not found$"):
        pictures.inspect([*rows, lost], [], False)
    assert len(pictures.inspect([*rows, lost], [], True)[1]) == len(BROKEN) + 1


def test_a_start_reads_only_pictures_that_may_have_changed(tmp_path, monkeypatch):
    """Also one of the same size and times as before, or that is another file under its name."""
    rows = []
    for i in range(5):
        saved(tmp_path / f"{i}.png", seed=i, size=(8, 8))
        rows.append(plain.row(i, image=(Picture(f"{i}.png", str(tmp_path / f"{i}.png")),)))
    (tmp_path / "bad.png").write_bytes(b"")
    rows.append(plain.row(5, image=(Picture("bad.png", str(tmp_path / "bad.png")),)))
    looked = []
    monkeypatch.setattr(pictures, "look", lambda picture: looked.append(picture.path) or files.look(picture))

    def start():
        looked.clear()
        digests = Digests(open_store(str(tmp_path)), "memory")
        good, rejects = pictures.inspect(rows, [], False, digests)
        digests.save()
        assert [row.image[0].sha256 for row in good] == [
            hashlib.sha256((tmp_path / f"{i}.png").read_bytes()).hexdigest() for i in range(5)
        ]
        assert [reject.id for reject in rejects] == ["5"] and all(row.image[0].height == 8 for row in good)
        return sorted(looked)

    everything = ["0.png", "1.png", "2.png", "3.png", "4.png", "bad.png"]
    assert start() == everything and start() == everything  # they have only just been written
    monkeypatch.setattr(versions, "_SETTLED", 0.0)
    assert start() == everything and start() == ["bad.png"]

    data, times = (tmp_path / "1.png").read_bytes(), os.stat(tmp_path / "1.png")
    (tmp_path / "1.png").write_bytes(data[:-8] + b"\0" * 8)
    os.utime(tmp_path / "1.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    saved(tmp_path / "new.png", seed=9, size=(8, 8))
    (tmp_path / "new.png").rename(tmp_path / "3.png")
    assert start() == ["1.png", "3.png", "bad.png"] and start() == ["bad.png"]
    (tmp_path / "memory").write_bytes((tmp_path / "memory").read_bytes()[:-9])
    assert start() == everything and start() == ["bad.png"]


@pytest.mark.parametrize(("scheme", "server"), [("gs", "gcs_faults"), ("s3", "s3_faults")])
def test_objects_have_other_versions_once_they_are_written_again(scheme, server):
    with pytest.importorskip(server).serve(rate=0):
        store, root = open_store(f"{scheme}://bucket/in"), f"{scheme}://bucket"
        for name in ("x/a", "x/b", "y/c"):
            store.write(name, name.encode())
        urls = [f"{root}/in/{name}" for name in ("x/a", "x/b", "y/c", "y/none")] + ["https://a.b/c"]
        before = versions.versions(urls)
        assert list(before) == urls[:3] and len(set(before.values())) == 3 and versions.versions(urls) == before
        store.write("x/b", b"another")
        after = versions.versions(urls)
        assert {url for url in after if after[url] != before[url]} == {f"{root}/in/x/b"}
        assert versions.versions([f"{root}/in/x/a"]) == {f"{root}/in/x/a": before[f"{root}/in/x/a"]}


def test_pictures_in_a_run(cli, golden, tmp_path):
    """Rows of every mode at any batch size; a truncated picture costs its row; only a changed one is made again."""
    saved(tmp_path / "a.png")
    saved(tmp_path / "b.png", seed=1)
    saved(tmp_path / "mask.png", mode="L")
    data = saved(tmp_path / "cut.png", seed=2).read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    base = dict(prompt="a fox", num_inference_steps=3, seed=1)
    rows = [
        dict(base, id="start", image="a.png", strength=0.5),
        dict(
            base,
            id="mask",
            image="a.png",
            mask_image="mask.png",
            strength=0.5,
            padding_mask_crop=4,
            height=16,
            width=16,
        ),
        dict(base, id="other", image="b.png", strength=0.5),
        dict(base, id="cut", image="cut.png"),
        dict(base, id="away", negative_prompt="hens", true_cfg_scale=3.0, height=32, width=32),
        dict(base, id="plain", negative_prompt="hens", height=32, width=32),
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(name, *words, entry="run"):
        given = f"pretrained_model_name_or_path={golden / 'dev'}", f"manifest={tmp_path / 'm.jsonl'}", *words
        return cli(
            *given, f"output_dir={tmp_path}", f"run_name={name}", "max_sequence_length=24", "hardware=cpu", entry=entry
        )

    code, err = run("one")
    assert code == 3, err
    first = images(tmp_path / "one")
    assert set(first) == {"start", "mask", "other", "away", "plain"} and first["start"].shape == (40, 56, 3)
    (reject,) = (json.loads(line) for line in (tmp_path / "one" / "rejects.jsonl").read_text().splitlines())
    assert reject["id"] == "cut" and "cut.png: not a whole picture" in reject["reason"]
    records = {record["id"]: record for record in metadata(tmp_path / "one")}
    (told,) = json.loads(records["start"]["inputs"])["image"]
    assert told["path"] == "a.png" and (told["height"], told["width"]) == (40, 56) and len(told["sha256"]) == 64
    assert first["mask"].shape == (40, 56, 3) and records["mask"]["height"] == 16
    assert records["mask"]["padding_mask_crop"] == 4 and records["start"]["padding_mask_crop"] == -1
    assert records["plain"]["negative_prompt"] == "" and records["away"]["true_cfg_scale"] == 3.0
    assert run("three", "per_device_batch_size=3")[0] == 3
    assert all(np.abs(first[key].astype(int) - x).max() <= 1 for key, x in images(tmp_path / "three").items())

    moved = tmp_path / "elsewhere.png"
    (tmp_path / "a.png").rename(moved)
    saved(tmp_path / "b.png", seed=5)
    text = (tmp_path / "m.jsonl").read_text().replace('"a.png"', '"elsewhere.png"')
    (tmp_path / "m.jsonl").write_text(text)
    code, err = run("one")
    assert code == 2 and "m.jsonl:3: inputs" in err and "m.jsonl:1" not in err
    assert run("one", "overwrite=true")[0] == 3
    again = images(tmp_path / "one")
    assert {key for key in first if (again[key] != first[key]).any()} == {"other"}
    words = f"output_dir={tmp_path}", "run_name=one", "id=mask"
    code, said = cli(*words, entry="replay")
    assert code == 0, said
    assert cli(f"output_dir={tmp_path}", "run_name=one", entry="verify")[0] == 0


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        (dict(image=["a.png", "a.png"]), "image: got 2, expected one"),
        (dict(mask_image="a.png"), "mask_image: expected an image that it is the mask of"),
        (dict(control_image="a.png"), "control_image: expected none"),
        (dict(image=3), "image: got 3 (number), expected a path or address, or a list of them"),
        (dict(image="a.png", strength=1.5), "strength: got 1.5, expected a number from 0 to 1"),
        (dict(image="a.png", strength=0.0), "strength: got 0, expected a number above 0"),
        (dict(image="b.png"), "image: b.png: not found"),
        (dict(image="a.png", padding_mask_crop=4), "padding_mask_crop: expected a model that keeps what lies outside"),
        (
            dict(image="a.png", mask_image="m.png", padding_mask_crop=4),
            "mask_image: got 9×9, expected the image's 56×40",
        ),
    ],
)
def test_what_a_row_cannot_have_is_one_line(cli, golden, tmp_path, row, wanted):
    saved(tmp_path / "a.png")
    saved(tmp_path / "m.png", mode="L", size=(9, 9))
    (tmp_path / "m.jsonl").write_text(json.dumps({"prompt": "x"} | row))
    given = f"pretrained_model_name_or_path={golden / 'dev'}", f"manifest={tmp_path / 'm.jsonl'}"
    code, err = cli(*given, f"output_dir={tmp_path}", "hardware=cpu")
    assert code == 2 and f"m.jsonl:1: {wanted}" in err, err


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("flux1-dev.safetensors", "flux1"),
        ("flux1-kontext-dev.safetensors", "flux1-kontext"),
        ("FLUX.1-Fill.safetensors", "flux1-fill"),
        ("flux1-canny-dev.safetensors", "flux1-control"),
    ],
)
def test_a_single_file_says_by_its_name_what_it_reads(golden, tmp_path, file, name):
    whole = read_headers(Source(str(golden / "dev" / "transformer")), ("diffusion_pytorch_model",))
    assert checkpoint._family_of(Source(str(tmp_path)), None, file, whole).name == name


MESHES = {
    "ddp": ["ici_data_parallelism=2", "per_device_batch_size=2"],
    "fsdp": ["sharding=fsdp", "ici_fsdp_parallelism=2"],
    "tensor": ["ici_tensor_parallelism=2", "per_device_batch_size=2"],
    "context": ["ici_context_parallelism=2"],
    "streamed": ["stream_blocks=true"],
}


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["dev", "flux2-klein"])
def test_every_mode_is_the_same_on_every_mesh(cli, golden, tmp_path, folder):
    saved(tmp_path / "a.png", size=(64, 64))
    saved(tmp_path / "b.png", seed=1, size=(64, 96))
    saved(tmp_path / "mask.png", mode="L", size=(64, 64))
    base = dict(prompt="a fox", num_inference_steps=3, height=32, width=32)
    if folder == "dev":
        common = dict(base, image="a.png", strength=0.7, negative_prompt="hens")
        rows = [dict(common), dict(common, mask_image="mask.png"), dict(common, true_cfg_scale=2.0), dict(base)]
    else:
        rows = [dict(base, image=["a.png", "b.png"]), dict(base, image="b.png"), dict(base)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row | {"seed": i}) + "\n" for row in rows for i in range(2)))

    def run(name, *words):
        given = f"pretrained_model_name_or_path={golden / folder}", f"manifest={tmp_path / 'm.jsonl'}", *words
        code, err = cli(*given, f"output_dir={tmp_path}", f"run_name={name}", "max_sequence_length=64", "hardware=cpu")
        assert code == 0, err
        return images(tmp_path / name)

    expected = run("one")
    assert len(expected) == 2 * len(rows)
    for name, words in MESHES.items():
        found = run(name, *words)
        worst = {key: np.abs(found[key].astype(int) - image).max() for key, image in expected.items()}
        assert found.keys() == expected.keys() and max(worst.values()) <= 1, (name, worst)
