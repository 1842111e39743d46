"""S3: what a bucket's server does or fails to do, outlasted or said in one line; manifests and weights from there."""

import json
import os
import subprocess
import sys

import gcs_faults
import plain
import pytest
from conftest import GOLDEN
from test_manifest_files import ROWS, parquet
from test_storage import impatient, s3  # noqa: F401 (a fixture)

from fluxbatch.manifest.rows import read_rows
from fluxbatch.storage.base import NotFound, StorageError
from fluxbatch.storage.registry import open_store, open_stream, read_bytes
from fluxbatch.types import UserError
from fluxbatch.weights.source import Source


@pytest.fixture
def server(s3):  # noqa: F811
    chance = s3.random
    yield s3
    s3.rate, s3.random = 0.0, chance
    s3.faults.clear()


def test_long_lists_go_on_where_a_page_ended(server, monkeypatch):
    monkeypatch.setattr("fluxbatch.storage.s3._PAGE", 4)
    store = impatient("s3://bucket/lists")
    names = [f"d/{k:02}.png" for k in range(9)] + [f"é #%?{{{k}}}~.png" for k in range(8)]
    for name in names:
        store.write(name, name.encode())
    store.write("empty", b"")
    server.faults.extend(["none", "reset", "none", "503"])
    assert list(store.list()) == sorted([*names, "empty"])
    assert list(store.list("d/0")) == names[:9] and list(store.list("d/00.")) == names[:1]
    assert store.missing({"d/01.png", "empty", "no"}) == {"empty", "no"}
    assert store.read(names[-1]) == names[-1].encode()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "reset", "503"])
def test_a_large_object_is_whole_or_not_there(server, fault):
    server.stall = 1.5
    store, data = impatient("s3://bucket/faults", timeout=(5.0, 30.0)), os.urandom(70 << 20)
    server.faults.extend(["none", "none", fault])
    assert store.write("large", data) and store.read("large") == data
    with open_stream("s3://bucket/faults/large") as stream:
        stream.seek(50 << 20)
        assert stream.read(100) == data[50 << 20 :][:100]


def test_what_cannot_be_is_one_line(server, monkeypatch):
    for action in (lambda: open_store("s3://no-bucket/x"), lambda: impatient("s3://no-bucket/x").write("a", b"")):
        with pytest.raises(StorageError, match=r"^s3://no-bucket/x.*: the bucket does not exist$") as error:
            action()
        assert error.value.fatal
    for url in ("s3://", "s3:///x", "s3://Bucket/x"):
        with pytest.raises(UserError, match=r"expected s3://bucket"):
            open_store(url)
    with pytest.raises(UserError, match=r"expected s3://bucket/name"):
        read_bytes("s3://bucket")
    with pytest.raises(NotFound, match=r"^s3://bucket/m.jsonl: no such object$"):
        read_bytes("s3://bucket/m.jsonl")
    store = impatient("s3://bucket/faults")
    body = b"<Error><Code>X</Code><Message>in\njected</Message></Error>"
    for status, line in (
        (401, "credentials were refused"),
        (403, "permission denied: in jected"),
        (400, "x: in jected"),
    ):
        monkeypatch.setattr(gcs_faults._Handler, "_forward", lambda self, _, status=status: (status, {}, body))
        for action in (lambda: store.write("x", b"data"), lambda: store.read("x")):
            with pytest.raises(StorageError, match=line) as error:
                action()
            assert error.value.fatal and "\n" not in str(error.value)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Writes the files of a home directory, which is all that tells of AWS."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": tmp_path, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, str(value))
    (tmp_path / ".aws").mkdir()

    def write(**files):
        for name, text in files.items():
            (tmp_path / ".aws" / name).write_text(text)

    return write


def test_credentials_that_are_missing_are_asked_for(home, monkeypatch):
    monkeypatch.setattr("fluxbatch.storage.s3.obstore.list", no_role)
    with pytest.raises(StorageError, match="no usable AWS credentials; set AWS_PROFILE, or AWS_ACCESS_KEY_ID") as error:
        open_store("s3://bucket/x")
    assert error.value.fatal


PROCESS = """printf '{"Version": 1, "AccessKeyId": "theirs", "SecretAccessKey": "s", "SessionToken": "t"}'"""


def test_profiles_are_read(server, home, tmp_path, monkeypatch, capfd):
    """By outputs and by weights; keys of the environment come first."""
    endpoint = f"http://127.0.0.1:{server.server_port}"
    (tmp_path / "keys.sh").write_text(PROCESS)
    home(
        credentials="[default]\naws_access_key_id = mine\naws_secret_access_key = s\n[other]\n"
        "aws_access_key_id = others\naws_secret_access_key = s\n",
        config=f"[default]\nregion = eu-west-1\nendpoint_url = {endpoint}\n[profile other]\nregion = us-west-2\n"
        f"endpoint_url = {endpoint}\ns3 =\n  max_concurrent_requests = 3\n[profile theirs]\nendpoint_url = {endpoint}\n"
        f"region = us-east-1\ncredential_process = sh {tmp_path / 'keys.sh'}\n[profile bare]\nregion = us-east-1\n",
    )
    signed, forward = [], gcs_faults._Handler._forward

    def noted(self, body):
        signed.append(self.headers.get("Authorization", "").partition("Credential=")[2].split("/"))
        return forward(self, body)

    monkeypatch.setattr(gcs_faults._Handler, "_forward", noted)
    for profile, key, region in ((None, "mine", "eu-west-1"), ("other", "others", "us-west-2"),
                                 ("theirs", "theirs", "us-east-1"), ("other", "env", "us-west-2")):  # fmt: skip
        if profile:
            monkeypatch.setenv("AWS_PROFILE", profile)
        if key == "env":
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", "env")
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        open_store("s3://bucket/profiles").write(f"{key}.json", b"{}")
        assert Source("s3://bucket/profiles").read(f"{key}.json") == b"{}"
        assert {(each[0], each[2]) for each in signed if each[0]} == {(key, region)} and signed
        signed.clear()
    assert capfd.readouterr() == ("", "")


def test_a_profile_that_has_no_credentials_is_one_line(home, monkeypatch):
    home(
        config="[profile bare]\nregion = us-east-1\n[profile half]\naws_access_key_id = a\n[profile broken]\n"
        "credential_process = false\n[profile role]\nrole_arn = r\n"
    )
    monkeypatch.setattr("fluxbatch.storage.s3.obstore.list", no_role)
    for profile, reason in (
        ("no", "~/.aws: The config profile .no. could not be found"),
        ("half", "profile half in ~/.aws: Partial credentials found"),
        ("role", "profile role in ~/.aws: Partial credentials found"),
        ("broken", "profile broken in ~/.aws: Error when retrieving credentials from custom-process"),
        ("bare", "s3://bucket/x: no usable AWS credentials"),  # of the machine either
    ):
        monkeypatch.setenv("AWS_PROFILE", profile)
        with pytest.raises(StorageError, match=f"^{reason}") as error:
            open_store("s3://bucket/x")
        assert error.value.fatal and "\n" not in str(error.value)


def no_role(*_, **__):
    from obstore.exceptions import GenericError

    raise GenericError("Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 1s")


def test_the_library_is_named_with_its_extra():
    script = (
        "import sys\nsys.modules['obstore'] = None\nfrom fluxbatch.storage.registry import open_store\n"
        "try:\n    open_store('s3://bucket/x')\nexcept Exception as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == 's3://… needs obstore, which is not installed: pip install "fluxbatch[s3]"\n', done.stderr


def test_one_of_many_that_may_not_be_deleted_is_one_line_at_once(server, monkeypatch):
    store = impatient("s3://bucket/faults")
    error = b"<Error><Key>faults/b</Key><Code>AccessDenied</Code><Message>no\n</Message></Error>"
    body = b'<?xml version="1.0"?><DeleteResult>%s</DeleteResult>' % error
    monkeypatch.setattr(gcs_faults._Handler, "_forward", lambda self, _: (200, {"Content-Type": "text/xml"}, body))
    with pytest.raises(StorageError, match="^s3://bucket/faults/a: permission denied: it may not be deleted$") as found:
        store.delete("a", "b")
    assert found.value.fatal


def test_manifests_are_read_from_there(server, tmp_path):
    store = impatient("s3://bucket/manifests")
    store.write("a.parquet", parquet(tmp_path / "a.parquet", ROWS, row_group_size=7).read_bytes())
    store.write("b/c.jsonl", b'{"prompt": "c"}\n')
    rows, _ = read_rows(plain.job(manifest="s3://bucket/manifests/**/*"))
    assert [row.prompt for row in rows] == [row["prompt"] for row in ROWS] + ["c"]
    assert rows[-1].where == "s3://bucket/manifests/b/c.jsonl:1"


@pytest.mark.slow
def test_weights_are_read_from_there(server, cli, tmp_path):
    """A converted copy is written to the bucket and used from it: the pixels are those of the local checkpoint."""
    server.rate = 0.02
    given = [f"pretrained_model_name_or_path={GOLDEN / 'schnell'}", "max_sequence_length=24", "hardware=cpu"]
    assert cli(*given, "to=s3://bucket/weights", entry="convert")[0] == 0
    out = [f"output_dir={tmp_path}", "prompt=a fox", "resolution=16", "num_inference_steps=1", "seed=3"]
    assert cli(*given, *out, "run_name=local")[0] == 0
    assert cli(*given[1:], *out, "run_name=there", "pretrained_model_name_or_path=s3://bucket/weights")[0] == 0
    local, there = (json.loads((tmp_path / n / "metadata.jsonl").read_text()) for n in ("local", "there"))
    assert local["sha256"] == there["sha256"]
    source = Source("s3://bucket/weights")
    with pytest.raises(UserError, match="^s3://bucket/weights/nothing: not found$"):
        source.read("nothing")
