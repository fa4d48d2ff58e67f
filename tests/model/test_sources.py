"""Every form of a model source ends at a local path or a hub id, and each failure says which form went wrong."""

from __future__ import annotations

import functools
import os
import zipfile
from pathlib import Path

import boto3
import pytest

from bitdistill_ray.errors import ModelError, StorageError
from bitdistill_ray.model.sources import resolve
from bitdistill_ray.storage import Storage


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BITDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_wheel(folder: Path) -> None:
    folder.mkdir()
    with zipfile.ZipFile(folder / "tiny_weights-1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_weights/model.gguf", b"GGUF" * 100)
        wheel.writestr("tiny_weights/__init__.py", b"")
        wheel.writestr(
            "tiny_weights-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.2\n"
        )
        wheel.writestr(
            "tiny_weights-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("tiny_weights-1.2.dist-info/RECORD", "")


@pytest.fixture
def package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels instead of the package index."""
    make_wheel(tmp_path / "wheels")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


def test_ids_and_local_paths_stay_what_they_are(tmp_path: Path) -> None:
    assert resolve("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert resolve("gpt2") == "gpt2"
    assert resolve(str(tmp_path)) == str(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert resolve(str(tmp_path / "m.gguf")) == str(tmp_path / "m.gguf")


@pytest.mark.parametrize("source", ["/no/such/folder", "./here", "models/a/b", "gone.gguf", "~/no-such-model/x", ""])
def test_a_missing_path_is_refused_by_name(source: str) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        resolve(source)


def test_a_bucket_is_copied_once_and_again_when_it_changed(s3_endpoint: str, s3_bucket: str, cache: Path) -> None:
    client, bucket = boto3.client("s3", endpoint_url=s3_endpoint), s3_bucket.removeprefix("s3://")
    for name in ("config.json", "sub/weights.bin"):
        client.put_object(Bucket=bucket, Key=f"models/tiny/{name}", Body=name.encode())
    storage = functools.partial(Storage, endpoint_url=s3_endpoint)
    folder = Path(resolve(f"{s3_bucket}/models/tiny", storage=storage))
    assert folder.is_relative_to(cache)
    assert (folder / "sub" / "weights.bin").read_bytes() == b"sub/weights.bin"

    inode = (folder / "config.json").stat().st_ino
    assert resolve(f"{s3_bucket}/models/tiny/", storage=storage) == str(folder)
    assert (folder / "config.json").stat().st_ino == inode, "downloaded again although nothing changed"

    client.put_object(Bucket=bucket, Key="models/tiny/config.json", Body=b"CONFIG.JSON")  # as many bytes, another ETag
    assert Path(resolve(f"{s3_bucket}/models/tiny", storage=storage), "config.json").read_bytes() == b"CONFIG.JSON"


def test_one_gguf_object_is_copied_alone(s3_endpoint: str, s3_bucket: str) -> None:
    client, bucket = boto3.client("s3", endpoint_url=s3_endpoint), s3_bucket.removeprefix("s3://")
    client.put_object(Bucket=bucket, Key="m/a.gguf", Body=b"GGUF a")
    client.put_object(Bucket=bucket, Key="m/b.gguf", Body=b"GGUF b")
    storage = functools.partial(Storage, endpoint_url=s3_endpoint)
    path = Path(resolve(f"{s3_bucket}/m/a.gguf", storage=storage))
    assert path.name == "a.gguf"
    assert path.read_bytes() == b"GGUF a"
    assert not any(path.parent.glob("b*"))
    with pytest.raises(ModelError, match=r"m/c\.gguf: no such model"):
        resolve(f"{s3_bucket}/m/c.gguf", storage=storage)


def test_an_object_store_that_refuses_is_named(s3_endpoint: str) -> None:
    with pytest.raises(StorageError, match="no such bucket"):
        resolve("s3://no-such-bucket-here/m", storage=functools.partial(Storage, endpoint_url=s3_endpoint))


def test_a_file_comes_out_of_a_wheel_and_stays_in_the_cache(package_index: Path) -> None:
    path = Path(resolve("wheel:tiny-weights==1.2/tiny_weights/model.gguf"))
    assert path.read_bytes() == b"GGUF" * 100
    assert sorted(os.listdir(path.parent)) == ["lock", "model.gguf"]
    for wheel in package_index.iterdir():
        wheel.unlink()
    assert resolve("wheel:tiny-weights==1.2/tiny_weights/model.gguf") == str(path)


def test_a_file_that_a_wheel_lacks_is_named_with_what_it_has(package_index: Path) -> None:
    with pytest.raises(
        ModelError, match=r"tiny_weights/other\.gguf: no such file in the wheel.*tiny_weights/model\.gguf"
    ):
        resolve("wheel:tiny-weights==1.2/tiny_weights/other.gguf")


@pytest.mark.usefixtures("package_index")
def test_a_wheel_that_pip_cannot_find_carries_pips_words() -> None:
    with pytest.raises(ModelError, match=r"wheel:tiny-weights==9\.9: pip could not download it.*No matching"):
        resolve("wheel:tiny-weights==9.9/model.gguf")


def test_a_malformed_wheel_source_is_refused() -> None:
    with pytest.raises(ModelError, match="not of the form"):
        resolve("wheel:tiny-weights/model.gguf")
