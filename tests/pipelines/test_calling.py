"""A batch that does not fit is halved, a row that breaks it is found, and every row comes back in its place."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pytest

from x2i.base.errors import X2IError
from x2i.pipelines.annotators.base import Annotator, AnnotatorConfig, Batch, Item
from x2i.pipelines.calling import call, out_of_memory
from x2i.pipelines.engine.ahead import ahead, in_threads


class Cramped(Annotator):
    """Holds `room` rows at once, dislikes some, and keeps the sizes of its batches."""

    name = "cramped"
    columns = pa.schema({"text": pa.string()})

    def __init__(self, room: int = 99, dislikes: Sequence[str] = (), batch_size: int = 16) -> None:
        super().__init__(AnnotatorConfig(batch_size=batch_size))
        self.room, self.dislikes, self.sizes = room, dislikes, list[int]()

    def __call__(self, batch: Sequence[Item]) -> pa.Table:
        assert isinstance(batch, Batch)
        assert batch.columns["n"].to_pylist() == [int(i.text or "") for i in batch]
        self.sizes.append(len(batch))
        if len(batch) > self.room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3.00 GiB")
        if any(i.text in self.dislikes for i in batch):
            raise ValueError("not that one")
        return pa.table({"text": [i.text for i in batch]})


def items(count: int) -> tuple[list[Item], pa.Table]:
    return [Item("", str(i)) for i in range(count)], pa.table({"n": list(range(count))})


def test_a_full_gpu_halves_the_batch_and_loses_nothing() -> None:
    annotator = Cramped(room=5)
    called = call(annotator, *items(40))
    assert called.values["text"].to_pylist() == [str(i) for i in range(40)]
    assert called.problems == [None] * 40
    assert annotator.sizes[:3] == [16, 8, 4]
    assert max(annotator.sizes[3:]) <= 8, "what did not fit is not tried again"
    assert annotator.sizes[-3:] == [4, 4, 4]


def test_a_row_that_does_not_fit_alone_is_one_row_with_its_reason() -> None:
    called = call(Cramped(room=0), *items(3))
    assert [p.reason for p in called.problems if p] == ["out_of_memory"] * 3
    assert called.values["text"].to_pylist() == [None] * 3


def test_a_row_that_breaks_its_batch_is_found_and_the_rest_kept() -> None:
    annotator = Cramped(dislikes=["11", "17"])
    called = call(annotator, *items(20))
    assert [i for i, p in enumerate(called.problems) if p] == [11, 17]
    assert [i for i, v in enumerate(called.values["text"].to_pylist()) if v is None] == [11, 17]
    assert len(annotator.sizes) < 20, "by halves, not one by one"
    assert annotator.fits is None, "it was not for want of memory"


def test_what_an_annotator_says_of_itself_stops_the_run() -> None:
    class Broken(Cramped):
        def __call__(self, batch: Sequence[Item]) -> pa.Table:
            raise X2IError("the server is gone")

    with pytest.raises(X2IError, match="server is gone"):
        call(Broken(), *items(3))


@pytest.mark.parametrize("rows", [1, 5])
def test_a_broken_contract_is_not_taken_for_bad_data(rows: int) -> None:
    class Short(Cramped):
        def __call__(self, batch: Sequence[Item]) -> pa.Table:
            return pa.table({"text": [""] * (len(batch) + 1)})

    with pytest.raises(TypeError, match="rows"):
        call(Short(), *items(rows))


def test_no_rows_make_no_call() -> None:
    annotator = Cramped()
    assert call(annotator, *items(0)).values.num_rows == 0
    assert annotator.sizes == []


def test_what_is_out_of_memory() -> None:
    torch = pytest.importorskip("torch")
    assert out_of_memory(torch.cuda.OutOfMemoryError("x"))
    assert out_of_memory(MemoryError())
    assert out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"))
    assert not out_of_memory(RuntimeError("shapes do not match"))


def test_threads_keep_the_order_and_hold_few() -> None:
    held: list[int] = []
    most = 0
    lock = threading.Lock()

    def slow(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i

    def source() -> Iterator[int]:
        nonlocal most
        for i in range(50):
            with lock:
                held.append(i)
                most = max(most, len(held))
            yield i

    for i, got in enumerate(in_threads(slow, source(), 3)):
        assert got == i
        held.remove(got)
    assert most <= 7


def test_ahead_works_while_the_caller_does_and_passes_errors_on() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for i in range(5):
            made.append(i)
            yield i
        raise OSError("disk")

    it = ahead(source())
    assert next(it) == 0
    time.sleep(0.2)
    assert 2 <= len(made) <= 3, "the next is there before it is asked for, and no more than that"
    with pytest.raises(OSError, match="disk"):
        list(it)


def test_ahead_that_is_left_early_ends_its_thread() -> None:
    before = threading.active_count()
    it = ahead(iter(range(10**9)))
    assert next(it) == 0
    it.close()
    assert threading.active_count() == before
