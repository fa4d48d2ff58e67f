"""A corpus on a store that fails for a while in the middle of a unit: the same sequences, none twice, none left out."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import numpy as np
import pytest

from bitdistill_ray.data import blocks
from bitdistill_ray.data.blocks import UnitTask, read_unit, read_unit_patiently
from bitdistill_ray.data.encoder import Encoder
from bitdistill_ray.data.sources import CorpusSpec, Source
from bitdistill_ray.data.units import list_units
from bitdistill_ray.errors import StorageError
from tests.data.conftest import documents, to_jsonl
from tests.fault_proxy import Fault, fault_proxy

SIZE = 3 << 20  # several requests of the reader's


def corpus_on(url: str, endpoint_url: str, tokenizer: Path, *, patience_s: float) -> CorpusSpec:
    source = Source(url, name="c", endpoint_url=endpoint_url, timeout_s=1, patience_s=patience_s)
    return CorpusSpec(sources=(source,), tokenizer=str(tokenizer), sequence_length=64)


@pytest.mark.slow
def test_a_unit_is_read_on_after_an_outage_in_the_middle(
    s3_endpoint: str, s3_bucket: str, tokenizer_folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the listing, the first bytes and later ones fails for longer than the S3 client's own retries."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 1 << 18)
    here = Source(s3_bucket, endpoint_url=s3_endpoint).storage(s3_bucket)
    here.write_bytes("c.jsonl", to_jsonl(documents(SIZE // 300, 1)))
    alone = corpus_on(f"{s3_bucket}/c.jsonl", s3_endpoint, tokenizer_folder, patience_s=0)
    (unit,) = list_units(alone)
    task = UnitTask(epoch=0, ordinal=0, skip=3, unit=unit)
    expected = list(read_unit(task, alone, encoder))
    assert len(expected) > 3
    with fault_proxy(s3_endpoint) as proxy:
        away = corpus_on(f"{s3_bucket}/c.jsonl", proxy.url, tokenizer_folder, patience_s=60)
        proxy.fail_for(2, "503", "silence", "hang up")
        assert list_units(away) == (unit,)
        gets, since = count(), len(proxy.failed)

        def fault(method: str, path: str) -> Fault | None:
            """The first and the third GET, and what follows each, until four requests in a row failed."""
            if method == "GET" and next(gets) in (0, 3):
                started.append(len(proxy.failed))
            return "503" if started and len(proxy.failed) < started[-1] + 4 else None

        started: list[int] = []
        proxy.fault = fault
        found = list(read_unit_patiently(task, away, encoder))
        assert len(proxy.failed) > since
    for key in expected[0]:
        wanted = np.concatenate([block[key] for block in expected])
        np.testing.assert_array_equal(np.concatenate([block[key] for block in found]), wanted)


@pytest.mark.slow
def test_a_store_that_stays_away_ends_the_reading(
    s3_endpoint: str, s3_bucket: str, tokenizer_folder: Path, encoder: Encoder
) -> None:
    Source(s3_bucket, endpoint_url=s3_endpoint).storage(s3_bucket).write_bytes("c.jsonl", to_jsonl(documents(9, 1)))
    with fault_proxy(s3_endpoint) as proxy:
        corpus = corpus_on(f"{s3_bucket}/c.jsonl", proxy.url, tokenizer_folder, patience_s=1)
        (unit,) = list_units(corpus)
        proxy.fail_for(600, "503")
        with pytest.raises(StorageError, match=r"c\.jsonl: .*(?i:slow_down|reduce your request rate|503)"):
            list(read_unit_patiently(UnitTask(epoch=0, ordinal=0, skip=0, unit=unit), corpus, encoder))
