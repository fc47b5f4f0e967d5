"""Packing, mixing, loading."""

from __future__ import annotations

import itertools
import json
import os
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internlm import storage
from internlm.data.batch import Batch
from internlm.data.loader import DataConfig, Loader, Mixture, SourceConfig
from internlm.data.pack import PackedRow, Packing, best_fit, shuffled
from internlm.data.shards import Shards, ShardWriter
from internlm.errors import ConfigError, DataError, StorageError

HEALTH = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def numbered(lengths: list[int]) -> list[list[int]]:
    """Return documents whose ids are all different, so that a row says where each token came from."""
    ids = itertools.count(1)
    return [[next(ids) for _ in range(n)] for n in lengths]


class InMemory:
    """Documents with the interface that packing reads, for many small cases without files."""

    def __init__(self, documents: list[list[int]], masks: list[list[bool]] | None = None) -> None:
        self.documents = [np.array(d) for d in documents]
        self.masks = [None] * len(documents) if masks is None else [np.array(m, np.uint8) for m in masks]
        self.lengths = np.array([len(d) for d in documents])

    def document(self, index: int) -> tuple[np.ndarray, np.ndarray | None]:
        return self.documents[index], self.masks[index]


def pack(documents: list[list[int]], length: int, kind: Any, masks: list[list[bool]] | None = None) -> list[PackedRow]:
    packing = Packing(InMemory(documents, masks), length, kind, np.arange(len(documents)))  # type: ignore[arg-type]
    return [packing.row(i) for i in range(packing.num_rows)]


@HEALTH
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(2, 9))
def test_splitting_trains_every_token_but_each_documents_first_exactly_once(lengths: list[int], length: int) -> None:
    documents = numbered(lengths)
    rows = pack(documents, length, "split")
    labels = Counter(int(t) for row in rows for t in row.labels[row.weights > 0])
    assert labels == Counter(t for d in documents for t in d[1:])


@HEALTH
@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(2, 9), st.sampled_from(["split", "whole"]))
def test_packing_never_mixes_documents(lengths: list[int], length: int, kind: str) -> None:
    documents = numbered(lengths)
    home = {token: i for i, d in enumerate(documents) for token in d}
    for row in pack(documents, length, kind):
        assert (np.diff(row.documents[row.documents >= 0]) >= 0).all()
        padding = row.documents < 0
        assert not row.weights[padding].any()
        assert not padding[: int((~padding).sum())].any()  # only at the end
        for number in set(row.documents[~padding].tolist()):
            where = np.flatnonzero(row.documents == number)
            assert len({home[int(t)] for t in row.tokens[where]}) == 1
            assert row.positions[where].tolist() == list(range(len(where)))
            assert (np.diff(row.tokens[where]) == 1).all()
            trained = where[row.weights[where] > 0]
            assert (row.labels[trained] == row.tokens[trained] + 1).all()
            assert all(home[int(t)] == home[int(row.tokens[where[0]])] for t in row.labels[trained])


@HEALTH
@given(st.lists(st.integers(2, 20), min_size=1, max_size=20), st.integers(4, 9))
def test_whole_packing_keeps_documents_whole_and_cuts_only_what_is_too_long(lengths: list[int], length: int) -> None:
    documents = numbered(lengths)
    rows = pack(documents, length, "whole")
    labels = Counter(int(t) for row in rows for t in row.labels[row.weights > 0])
    assert labels == Counter(t for d in documents for t in d[1 : length + 1])
    pieces = sum(len(set(row.documents[row.documents >= 0].tolist())) for row in rows)
    assert pieces == len(documents)


@pytest.mark.parametrize("kind", ["split", "whole"])
def test_documents_without_a_token_take_part_in_nothing(kind: str) -> None:
    rows = pack([[], [1, 2, 3], [], [4, 5], []], 8, kind)
    assert Counter(int(t) for row in rows for t in row.labels[row.weights > 0]) == Counter([2, 3, 5])


def test_what_is_cut_off_is_counted() -> None:
    packing = Packing(InMemory(numbered([5, 20, 30])), 9, "whole", np.arange(3))  # type: ignore[arg-type]
    assert packing.truncated_tokens == 10 + 20


def test_masks_decide_what_is_trained() -> None:
    documents, masks = [[1, 2, 3, 4], [5, 6, 7]], [[False, False, True, True], [False, True, False]]
    (row,) = pack(documents, 8, "whole", masks)
    assert row.tokens.tolist() == [1, 2, 3, 5, 6, 0, 0, 0]
    assert row.labels.tolist() == [2, 3, 4, 6, 7, 0, 0, 0]
    assert row.weights.tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    assert row.documents.tolist() == [0, 0, 0, 1, 1, -1, -1, -1]
    split = pack(documents, 3, "split", masks)
    assert [r.weights.tolist() for r in split] == [[0, 1, 1], [0, 1, 0]]


@HEALTH
@given(st.lists(st.integers(1, 16), min_size=1, max_size=60))
def test_best_fit_never_overfills_and_never_opens_a_row_without_need(sizes: list[int]) -> None:
    rows = best_fit(np.array(sizes), 16)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 16 for row in rows)
    for later, row in enumerate(rows):
        opener = row[0]  # when it was opened no earlier row had room for it
        for earlier in rows[:later]:
            assert sum(sizes[i] for i in earlier if i < opener) + sizes[opener] > 16


def test_a_document_goes_into_the_fullest_row_with_room_for_it() -> None:
    assert best_fit(np.array([10, 14, 2]), 16) == [[0], [1, 2]]
    assert best_fit(np.array([10, 13, 9, 3, 6, 7]), 16) == [[0, 4], [1, 3], [2, 5]]


def test_a_hundred_thousand_documents_are_packed_in_seconds() -> None:
    sizes = np.random.default_rng(0).integers(1, 2049, 100_000)
    started = time.monotonic()
    rows = best_fit(sizes, 2048)
    assert time.monotonic() - started < 3
    assert sizes.sum() / (len(rows) * 2048) > 0.98  # almost no padding


def test_the_order_depends_on_seed_source_and_epoch() -> None:
    orders = [shuffled(50, *key).tolist() for key in ((1, "a", 0), (2, "a", 0), (1, "b", 0), (1, "a", 1))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert shuffled(50, 1, "a", 0).tolist() == orders[0]


@pytest.mark.parametrize("weights", [[1.0], [3.0, 1.0], [0.7, 0.2, 0.1], [5, 1, 1, 1]])
def test_a_mixture_keeps_its_shares_at_every_row(weights: list[float]) -> None:
    mixture = Mixture(weights)
    counts = [0] * len(weights)
    for rows in range(1, 1001):
        source, before = mixture.draw()
        assert before == counts[source]
        counts[source] += 1
        for share, count in zip(mixture.shares, counts, strict=True):
            assert abs(share * rows - count) < 1.5
    assert counts == pytest.approx([1000 * share for share in mixture.shares], abs=1)


def test_the_next_row_is_of_the_source_that_will_be_furthest_behind() -> None:
    mixture = Mixture([1, 3])
    assert [mixture.draw() for _ in range(4)] == [(1, 0), (0, 0), (1, 1), (1, 2)]


def config(sources: dict[str, tuple[Shards, float]], **changes: Any) -> DataConfig:
    train = {name: SourceConfig(path=str(s.path), weight=w) for name, (s, w) in sources.items()}
    return DataConfig(**{"train": train, "seq_len": 8, "seed": 3} | changes)


@pytest.fixture
def two(make_shards: Any) -> dict[str, tuple[Shards, float]]:
    lengths = np.random.default_rng(1).integers(2, 30, 40).tolist()
    documents = numbered(lengths)
    return {"a": (make_shards(documents[:25], name="a"), 2.0), "b": (make_shards(documents[25:], name="b"), 1.0)}


def equal(a: Batch, b: Batch) -> bool:
    names = ("tokens", "labels", "positions", "documents", "weights", "source")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names)


@pytest.mark.parametrize("pack", ["split", "whole"])
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_ranks_sees_the_same_rows_in_the_same_order(two: Any, world: int, pack: str) -> None:
    alone = Loader(config(two, pack=pack))
    ranks = [Loader(config(two, pack=pack), rank, world) for rank in range(world)]
    for _ in range(40):  # several epochs
        whole = alone.next_batch(4)
        parts = [loader.next_batch(4) for loader in ranks]
        for rank, part in enumerate(parts):
            assert torch.equal(part.tokens, whole.tokens[rank::world])
            assert torch.equal(part.source, whole.source[rank::world])
    assert len({str(loader.state_dict()) for loader in [alone, *ranks]}) == 1


@pytest.mark.parametrize("after", [0, 1, 7, 60])
def test_a_loader_goes_on_exactly_where_its_state_says(two: Any, after: int) -> None:
    first = Loader(config(two))
    for _ in range(after):
        first.next_batch(4)
    second = Loader(config(two), rank=1, world_size=2)  # another layout, and already moved
    second.next_batch(8)
    second.load_state_dict(first.state_dict())
    wanted, got = first.next_batch(4), second.next_batch(4)
    assert torch.equal(wanted.tokens[1::2], got.tokens)


def test_a_loader_goes_back_over_the_end_of_an_epoch(two: Any) -> None:
    loader = Loader(config(two))
    start, first = loader.state_dict(), loader.next_batch(4)
    for _ in range(60):
        loader.next_batch(4)
    assert all(source.epoch for source in loader._sources)
    loader.load_state_dict(start)
    assert torch.equal(loader.next_batch(4).tokens, first.tokens)


def test_an_epoch_shows_every_token_once_and_the_next_in_another_order(make_shards: Any) -> None:
    documents = numbered([7, 9, 16, 3, 5])
    loader = Loader(config({"a": (make_shards(documents), 1.0)}))
    rows = -(-39 // 8)
    epochs = [torch.cat([loader.next_batch(1).labels for _ in range(rows)]).flatten().tolist() for _ in range(2)]
    for labels in epochs:
        assert sorted(t for t in labels if t) == sorted(t for d in documents for t in d[1:])
    assert epochs[0] != epochs[1]


def test_a_state_of_other_data_is_refused(two: Any, make_shards: Any) -> None:
    state = Loader(config(two)).state_dict()
    other = make_shards(numbered([4, 4]), name="other")
    with pytest.raises(DataError, match=r"sources\.b was"):
        Loader(config({"a": two["a"], "b": (other, 1.0)})).load_state_dict(state)
    with pytest.raises(DataError, match="seq_len was 8, is 16"):
        Loader(config(two, seq_len=16)).load_state_dict(state)


def test_sources_of_different_tokenizers_are_refused(two: Any, make_shards: Any) -> None:
    other = make_shards(numbered([4, 4]), name="other", fingerprint="g")
    with pytest.raises(DataError, match="'a' and 'c' were tokenized with different tokenizers"):
        Loader(config(two | {"c": (other, 1.0)}))
    with pytest.raises(DataError, match="'a' and 'v'"):
        Loader(config(two, validation={"v": SourceConfig(path=str(other.path))}))


def test_changed_weights_are_refused_and_not_made_up_for(two: Any) -> None:
    state = Loader(config(two)).state_dict()
    with pytest.raises(DataError, match=r"shares\.a was"):
        Loader(config({"a": (two["a"][0], 1.0), "b": two["b"]})).load_state_dict(state)
    Loader(config({name: (shards, weight * 5) for name, (shards, weight) in two.items()})).load_state_dict(state)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_that_are_no_share_are_refused(weight: float) -> None:
    with pytest.raises(ConfigError, match="must be a positive number"):
        SourceConfig(path="x", weight=weight)


def test_a_negative_seed_is_refused(two: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.seed"):
        config(two, seed=-1)


def test_sources_of_different_templates_are_told(two: Any, caplog: pytest.LogCaptureFixture) -> None:
    for name, template in (("a", "chatml"), ("b", "internlm")):
        manifest = two[name][0].path / storage.MANIFEST
        content = json.loads(manifest.read_text())
        content["meta"]["template"] = template
        content.pop("digest")  # as before there were any: it would tell of this
        manifest.write_text(json.dumps(content))
    assert Loader(config(two)).template == "chatml"
    assert "chat templates differ between sources" in caplog.text


def test_what_validation_cuts_off_is_told(make_shards: Any, caplog: pytest.LogCaptureFixture) -> None:
    shards = make_shards(numbered([7, 30]))
    source = {"cut_off": SourceConfig(path=str(shards.path))}
    list(Loader(config({"a": (shards, 1.0)}, validation=source, pack="whole")).validation_batches("cut_off", rows=2))
    assert "source cut_off: 21 tokens beyond data.seq_len 8 are cut off" in caplog.text


def test_weights_default_to_the_number_of_tokens(two: Any) -> None:
    train = {name: SourceConfig(path=str(s.path)) for name, (s, _) in two.items()}
    loader = Loader(DataConfig(train=train, seq_len=8))
    batch = loader.next_batch(300)
    share = (batch.source == 0).float().mean().item()
    tokens = {name: s.num_tokens for name, (s, _) in two.items()}
    assert share == pytest.approx(tokens["a"] / sum(tokens.values()), abs=0.01)
    with pytest.raises(ConfigError, match="every source a weight, or none"):
        DataConfig(train=train | {"c": SourceConfig(path="x", weight=1.0)}, seq_len=8)


def test_validation_scores_every_token_once_in_order(make_shards: Any) -> None:
    documents = numbered([7, 9, 16, 3, 5])
    shards = make_shards(documents)
    data = Loader(config({"a": (shards, 1.0)}, validation={"v": SourceConfig(path=str(shards.path))}))
    batches = list(data.validation_batches("v", rows=2))
    labels = [int(t) for b in batches for t in b.labels[b.weights > 0]]
    assert labels == [t for d in documents for t in d[1:]]
    limited = list(data.validation_batches("v", rows=2, limit_rows=3))
    assert sum(len(b.tokens) for b in limited) == 3
    spread = torch.cat([b.tokens for b in batches])[[0, 1, 3]]  # of five rows
    assert torch.equal(torch.cat([b.tokens for b in limited]), spread)


def test_ranks_share_a_validation_and_score_every_token_once(make_shards: Any) -> None:
    documents = numbered([7, 9, 16, 3, 5])
    shards = make_shards(documents)
    data = Loader(config({"a": (shards, 1.0)}, validation={"v": SourceConfig(path=str(shards.path))}))
    batches = [list(data.validation_batches("v", rows=2, share=(rank, 2))) for rank in range(2)]
    assert [[len(batch.tokens) for batch in part] for part in batches] == [[2, 2], [2, 2]]
    labels = [int(t) for part in batches for batch in part for t in batch.labels[batch.weights > 0]]
    assert sorted(labels) == [t for d in documents for t in d[1:]]


def test_padding_is_what_no_document_fills(make_shards: Any) -> None:
    batch = Loader(config({"a": (make_shards(numbered([5, 3])), 1.0)}, pack="whole")).next_batch(1)
    assert batch.documents[0].tolist() in ([0] * 4 + [1] * 2 + [-1] * 2, [0] * 2 + [1] * 4 + [-1] * 2)
    assert (batch.num_padding, batch.num_tokens) == (2, 6)


def test_micro_batches_are_cuts_along_the_rows(two: Any) -> None:
    batch = Loader(config(two)).next_batch(5)
    parts = batch.micro_batches(2)
    assert [len(p.tokens) for p in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([p.labels for p in parts]), batch.labels)
    assert sum(p.num_tokens for p in parts) == batch.num_tokens


def test_shards_give_documents_and_masks_back(make_shards: Any) -> None:
    documents = [[5], [6, 7], [999, 0, 3, 4], [8] * 50]
    masks = [[True], [False, True], [True] * 4, [False] * 50]
    shards = make_shards(documents, masks, per_shard=2)
    assert shards.num_documents == 4
    assert shards.lengths.tolist() == [1, 2, 4, 50]
    for i, (wanted, mask) in enumerate(zip(documents, masks, strict=True)):
        ids, found = shards.document(i)
        assert ids.tolist() == wanted
        assert found is not None
        assert found.astype(bool).tolist() == mask


def test_every_id_of_a_vocabulary_has_room(tmp_path: Path) -> None:
    for size, width in ((1 << 16, 2), ((1 << 16) + 1, 4)):
        writer = ShardWriter(tmp_path, str(size), size)
        writer.add([0, size - 1], None, 1)
        writer.close()
        stored = (tmp_path / f"{size}.tokens").read_bytes()
        assert stored == bytes(width) + (size - 1).to_bytes(width, "little")


def test_a_corpus_of_more_shards_than_a_process_may_open_is_read(make_shards: Any) -> None:
    shards = make_shards([[i + 1, 2] for i in range(300)], [[False, True]] * 300, per_shard=1)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 200, before[1]))
    try:
        assert [int(shards.document(i)[0][0]) for i in range(300)] == list(range(1, 301))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_truncated_shards_are_refused(make_shards: Any) -> None:
    shards = make_shards(numbered([9, 9]))
    path = shards.path / "00000.tokens"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(StorageError, match="has 34 bytes, not 36"):
        Shards.open(shards.path)


def test_empty_shards_are_refused(make_shards: Any) -> None:
    with pytest.raises(DataError, match="holds no tokens"):
        make_shards([])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no such folder"):
        Loader(DataConfig(train={"a": SourceConfig(path=str(tmp_path / "none"))}, seq_len=8))
