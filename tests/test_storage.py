"""Storage: one behaviour on a local disk and on S3, whole files, whole folders, refusals by name."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from bitdistill_ray.errors import StorageError
from bitdistill_ray.storage import MANIFEST, Storage, storage_errors


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(tmp_path / "store")
    bucket = request.getfixturevalue("s3_bucket")
    return Storage(f"{bucket}/some/prefix", endpoint_url=request.getfixturevalue("s3_endpoint"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    (source / "a.txt").write_bytes(b"alpha")
    (source / "deep" / "er" / "b.bin").write_bytes(bytes(range(256)))
    (source / "empty").write_bytes(b"")
    return source


def test_a_file_comes_back_and_can_be_replaced(storage: Storage) -> None:
    assert not storage.exists("x/y.bin")
    storage.write_bytes("x/y.bin", b"one")
    storage.write_bytes("x/y.bin", b"two, longer")
    assert storage.exists("x/y.bin")
    assert storage.exists("x")
    assert storage.read_bytes("x/y.bin") == b"two, longer"
    assert storage.list() == ["x/y.bin"]
    assert storage.list("x") == ["x/y.bin"]
    assert storage.list("nothing") == []
    storage.delete("x/y.bin")
    storage.delete("x/y.bin")
    assert storage.list() == []


def test_one_file_is_downloaded_whole(storage: Storage, tmp_path: Path) -> None:
    storage.write_bytes("x/weights.bin", b"w" * 1000)
    storage.download_file("x/weights.bin", tmp_path / "cache" / "w.bin")
    assert (tmp_path / "cache" / "w.bin").read_bytes() == b"w" * 1000
    with pytest.raises(StorageError, match=r"x/gone\.bin: does not exist"):
        storage.download_file("x/gone.bin", tmp_path / "cache" / "gone.bin")
    assert os.listdir(tmp_path / "cache") == ["w.bin"]


def test_a_child_is_a_folder_of_its_parent_and_both_survive_pickling(storage: Storage) -> None:
    child = pickle.loads(pickle.dumps(storage)).child("runs")
    child.write_bytes("config.yaml", b"a: 1")
    assert pickle.loads(pickle.dumps(child)).read_bytes("config.yaml") == b"a: 1"
    assert storage.list() == ["runs/config.yaml"]


def test_a_stamp_changes_with_the_content(storage: Storage) -> None:
    storage.write_bytes("w", b"12345")
    before = storage.stamps()
    storage.write_bytes("w", b"123456")
    assert list(before) == ["w"]
    assert storage.stamps() != before


def test_a_folder_makes_the_round_trip(storage: Storage, folder: Path, tmp_path: Path) -> None:
    storage.upload_folder(folder, "up")
    assert storage.is_complete("up")
    assert storage.list("up") == ["up/a.txt", "up/deep/er/b.bin", "up/empty"]
    storage.download_folder("up", tmp_path / "down", complete=True)
    assert (tmp_path / "down" / "deep" / "er" / "b.bin").read_bytes() == bytes(range(256))
    assert (tmp_path / "down" / "empty").read_bytes() == b""
    assert sorted(os.listdir(tmp_path / "down")) == ["a.txt", "deep", "empty"]


def test_a_download_replaces_the_old_folder_whole(storage: Storage, folder: Path, tmp_path: Path) -> None:
    storage.upload_folder(folder)
    (tmp_path / "down").mkdir()
    (tmp_path / "down" / "stale").write_bytes(b"")
    storage.download_folder("", tmp_path / "down")
    assert not (tmp_path / "down" / "stale").exists()
    assert [name for name in os.listdir(tmp_path) if name.startswith(".")] == []


@pytest.mark.parametrize("damage", ["no manifest", "a file missing", "a file cut short"])
def test_half_an_upload_is_detected(storage: Storage, folder: Path, tmp_path: Path, damage: str) -> None:
    storage.upload_folder(folder, "up")
    if damage == "no manifest":
        storage.delete(f"up/{MANIFEST}")
    elif damage == "a file missing":
        storage.delete("up/a.txt")
    else:
        storage.write_bytes("up/a.txt", b"alp")
    assert not storage.is_complete("up")
    with pytest.raises(StorageError, match="never finished"):
        storage.download_folder("up", tmp_path / "down", complete=True)
    assert not (tmp_path / "down").exists()


def test_a_complete_download_leaves_what_an_older_upload_left_behind(
    storage: Storage, folder: Path, tmp_path: Path
) -> None:
    storage.write_bytes("up/older.bin", b"x")
    storage.upload_folder(folder, "up")
    storage.download_folder("up", tmp_path / "down", complete=True)
    assert not (tmp_path / "down" / "older.bin").exists()


def test_a_folder_that_is_not_there_is_named(storage: Storage, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no/where.*no such folder"):
        storage.download_folder("no/where", tmp_path / "down")
    with pytest.raises(StorageError, match=r"gone\.txt: does not exist"):
        storage.read_bytes("gone.txt")


def test_pyarrow_reads_the_same_place(storage: Storage, tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"]})
    pq.write_table(table, tmp_path / "t.parquet")
    storage.write_bytes("data/t.parquet", (tmp_path / "t.parquet").read_bytes())
    filesystem, root = storage.arrow_filesystem()
    assert pq.read_table(f"{root}/data/t.parquet", filesystem=filesystem) == table


def test_any_fsspec_url_works(folder: Path, tmp_path: Path) -> None:
    storage = Storage("memory://somewhere/deep")
    storage.upload_folder(folder)
    storage.download_folder("", tmp_path / "down", complete=True)
    assert (tmp_path / "down" / "a.txt").read_bytes() == b"alpha"
    filesystem, root = storage.arrow_filesystem()
    assert filesystem.open_input_file(f"{root}/a.txt").read() == b"alpha"
    storage.delete("")


def test_a_local_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    storage, versions = Storage(tmp_path), [bytes([v]) * 300_000 for v in range(2)]
    storage.write_bytes("f", versions[0])
    stop, seen = threading.Event(), set()

    def read() -> None:
        while not stop.is_set():
            seen.add((tmp_path / "f").read_bytes())

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(40):
        storage.write_bytes("f", versions[turn % 2])
    stop.set()
    reader.join()
    assert seen <= set(versions)
    assert os.listdir(tmp_path) == ["f"]


def test_a_missing_bucket_is_named_with_the_stores_words(s3_endpoint: str, tmp_path: Path) -> None:
    storage = Storage("s3://no-such-bucket-here/p", endpoint_url=s3_endpoint)
    for attempt in (
        lambda: storage.read_bytes("x"),
        lambda: storage.write_bytes("x", b"1"),
        lambda: storage.exists("x"),
        lambda: storage.download_folder("", tmp_path / "d"),
    ):
        with pytest.raises(StorageError, match=r"no-such-bucket-here/p.*no such bucket.*does not exist"):
            attempt()


def test_an_unreachable_endpoint_is_named(tmp_path: Path, s3_endpoint: str) -> None:
    with pytest.raises(StorageError, match=r"cannot reach the store.*127\.0\.0\.1:9.*AWS_ENDPOINT_URL"):
        Storage("s3://bucket/p", endpoint_url="http://127.0.0.1:9").read_bytes("x")


def test_denied_access_is_named(s3_endpoint: str, s3_bucket: str) -> None:
    """moto checks IAM only when told to, so the server of this test is a second one, with its checks on."""
    script = (
        "from moto.server import ThreadedMotoServer as S; import time\n"
        "s = S(ip_address='127.0.0.1', port=0, verbose=False); s.start(); print(s.get_host_and_port()[1], flush=True)\n"
        "time.sleep(120)"
    )
    environment = {**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "0"}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        try:
            assert server.stdout is not None
            endpoint = f"http://127.0.0.1:{int(server.stdout.readline())}"
            with pytest.raises(StorageError, match=r"access denied.*Check the credentials"):
                Storage("s3://bucket/p", endpoint_url=endpoint).write_bytes("x", b"1")
        finally:
            server.kill()


def test_a_full_disk_is_named() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(StorageError, match=r"no space left.*Free some space"), storage_errors("/dev/full"):
        Path("/dev/full").write_bytes(b"x")


def test_pyarrows_refusals_are_mapped_too(s3_endpoint: str) -> None:
    filesystem, root = Storage("s3://no-such-bucket-here/p", endpoint_url=s3_endpoint).arrow_filesystem()
    with pytest.raises(StorageError, match="no such bucket"), storage_errors("s3://no-such-bucket-here"):
        filesystem.get_file_info(fs.FileSelector(root))


def test_an_unknown_protocol_is_refused_by_name() -> None:
    with pytest.raises(StorageError, match="carrier-pigeon"):
        Storage("carrier-pigeon://coop").exists("x")


def test_an_object_that_would_escape_the_folder_is_refused(s3_endpoint: str, s3_bucket: str, tmp_path: Path) -> None:
    boto3.client("s3", endpoint_url=s3_endpoint).put_object(
        Bucket=s3_bucket.removeprefix("s3://"), Key="m/../../evil", Body=b"x"
    )
    with pytest.raises(StorageError, match="evil"):
        Storage(f"{s3_bucket}/m", endpoint_url=s3_endpoint).download_folder("", tmp_path / "a" / "b")
