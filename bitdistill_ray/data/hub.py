"""Hugging Face data sets: `hub:` names to the folder of parquet files that the hub keeps of every public data set.

The hub converts each to parquet on the branch `refs/convert/parquet`, as `CONFIG/SPLIT/0000.parquet`; a split that it
converted in part only is called `partial-SPLIT`.  These files are read like those of any store (fsspec's `hf://`), so
units, the ledger and bounded memory are the same as anywhere, and no code of a data set is ever run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bitdistill_ray.data.sources import Source
from bitdistill_ray.errors import DataError, StorageError

BRANCH = "refs/convert/parquet"
DEFAULT_CONFIG, DEFAULT_SPLIT, PARTIAL = "default", "train", "partial-"
REMEDY = "Check the name, the network, HF_ENDPOINT and HF_TOKEN; or download the data set and give its folder"


def resolve_hub(source: Source) -> Source:
    """`source` with a `hub:` path replaced by the `hf://` folder of its split; others stay as they are.

    Raises StorageError (the hub cannot be reached, or has no such data set or no parquet of it) and DataError (no such
    config or split; it names those that there are).
    """
    hub = source.hub
    if hub is None:
        return source
    root = source.storage(f"hf://datasets/{hub.name}@{BRANCH}")
    try:
        paths = [path.split("/") for path in root.list() if path.endswith(".parquet")]
    except StorageError as error:
        raise StorageError(source.path, error.what, REMEDY) from error
    splits = {(parts[0], parts[1]) for parts in paths if len(parts) == 3}
    configs = {config for config, _ in splits}
    if not configs:
        raise StorageError(source.path, "the hub has no parquet of this data set", REMEDY)
    config = hub.config or (min(configs) if len(configs) == 1 else DEFAULT_CONFIG)
    if config not in configs:
        raise _unknown(source.path, f"config {config!r}", configs)
    split = hub.split or DEFAULT_SPLIT
    names = {name for owner, name in splits if owner == config}
    found = next((name for name in (split, PARTIAL + split) if name in names), None)
    if found is None:
        raise _unknown(source.path, f"split {split!r}", names)
    return replace(source, path=root.url_of(f"{config}/{found}"))


def _unknown(path: str, what: str, present: Iterable[str]) -> DataError:
    return DataError(path, f"no {what}; there are {', '.join(sorted(present))}", "Name one: hub:ORG/NAME:CONFIG:SPLIT")
