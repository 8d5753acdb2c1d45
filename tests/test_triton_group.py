"""Tables of a ragged list of weights: what they say, and that they are made once."""

import pytest
import torch

pytest.importorskip("triton")

from lipkernels.kernels.triton import group as tables
from lipkernels.kernels.triton.group import Group, group, offsets

SHAPES = [(3, 7), (2, 9, 4), (1, 1), (2, 2, 5, 5)]


def weights(shapes=SHAPES):
    return [torch.randn(shape) for shape in shapes]


def test_matrices_in_order():
    found = group(weights()).matrices
    assert [(m.weight, m.index) for m in found] == [
        (0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1), (3, 2), (3, 3),
    ]  # fmt: skip
    assert [(m.rows, m.cols, m.small, m.large, m.tall) for m in found[:3]] == [
        (3, 7, 3, 7, False),
        (9, 4, 4, 9, True),
        (9, 4, 4, 9, True),
    ]


def test_one_group_for_each_set_of_shapes():
    assert group(weights()) is group(weights())
    assert group(weights()) is not group(weights([(3, 7)]))


@pytest.mark.parametrize("sizes", [[], [1], [8, 1, 0, 17], [3, 3, 3]])
def test_offsets_are_aligned_and_disjoint(sizes):
    starts, end = offsets(sizes)
    assert all(start % tables.ALIGNMENT == 0 for start in starts)
    borders = [*starts, end]
    for size, start, following in zip(sizes, borders, borders[1:], strict=False):
        assert start + size <= following < start + size + tables.ALIGNMENT


def addresses(places, lists, step_of):
    """Where the table says that every matrix of every list is."""
    return [
        [tensors[0].data_ptr() + int(row[k]) * step_of(tensors[0]) for row in places]
        for k, tensors in enumerate(lists)
    ]


def expected_addresses(tensors):
    return [
        part.data_ptr()
        for t in tensors
        for part in t.view(-1, *t.shape[-2:]).unbind()  # a view of each matrix
    ]


def test_places_in_steps_of_16_bytes():
    shapes = [(4, 8), (3, 2, 8), (16, 4)]
    lists = [weights(shapes), [w.bfloat16() for w in weights(shapes)]]
    places, aligned = group(lists[0]).places(*lists)
    assert aligned and places.dtype == torch.int64 and places.shape == (5, 2)
    assert addresses(places, lists, lambda t: 16) == [expected_addresses(x) for x in lists]


def test_places_in_steps_of_an_element():
    storage = torch.randn(100)
    lists = [[storage[1:22].view(3, 7), storage[30:72].view(2, 3, 7)], weights([(3, 7), (2, 3, 7)])]
    places, aligned = group(lists[0]).places(*lists)
    assert not aligned
    assert addresses(places, lists, lambda t: t.element_size()) == [
        expected_addresses(x) for x in lists
    ]


def test_a_matrix_in_the_middle_of_a_batch_counts_for_alignment():
    batch = [torch.randn(2, 3, 3)]
    assert batch[0].data_ptr() % 16 == 0
    assert not group(batch).places(batch)[1]


def test_numbers_are_each_weights():
    rows = group(weights()).numbers([1.0, 2.0, 3.0, 4.0], [0.5, 0.25, 0.125, 2.0])
    assert rows.dtype == torch.float64
    assert rows.tolist() == [[1.0, 0.5], *[[2.0, 0.25]] * 2, [3.0, 0.125], *[[4.0, 2.0]] * 4]


def test_tiles_of_every_matrix():
    tiles = group(weights()).tiles("test", lambda m: [(i, m.cols) for i in range(m.rows // 3)])
    assert tiles.dtype == torch.int32
    assert tiles[:7].tolist() == [
        [0, 0, 7], [1, 0, 4], [1, 1, 4], [1, 2, 4], [2, 0, 4], [2, 1, 4], [2, 2, 4],
    ]  # fmt: skip


def test_tables_are_made_once():
    made = []

    def rows(*_):
        made.append(1)
        return [(1, 2)]

    one = Group(((3, 7),), torch.device("cpu"))
    assert one.table("key", torch.int64, rows) is one.table("key", torch.int64, rows)
    assert one.plan("key", rows) is one.plan("key", rows)
    assert len(made) == 2  # once for each of the two
    ws = weights()
    assert group(ws).places(ws)[0] is group(ws).places(ws)[0]
    assert group(ws).numbers([1.0] * 4) is group(ws).numbers([1.0] * 4)
    assert group(ws).numbers([1.0] * 4) is not group(ws).numbers([2.0] * 4)


def test_cached_tables_are_bounded():
    for i in range(tables._UPLOADS + 10):
        tables.uploaded(((float(i),),), torch.float64, torch.device("cpu"))
    assert tables._cached_upload.cache_info().currsize == tables._UPLOADS
    for i in range(tables._SETS_OF_SHAPES + 10):
        group([torch.empty(1, i + 1)])
    assert tables._group.cache_info().currsize == tables._SETS_OF_SHAPES


def test_a_capture_keeps_what_it_uses_and_leaves_nothing_to_others(monkeypatch):
    one = Group(((3, 7),), torch.device("cpu"))
    before = one.table("old", torch.int64, lambda: [(1,)])
    monkeypatch.setattr(tables, "_capturing", lambda device: True)
    monkeypatch.setattr(tables, "_captured", [])
    assert one.table("old", torch.int64, lambda: [(2,)]) is before
    assert any(kept is before for kept in tables._captured)
    captured = one.table("new", torch.int64, lambda: [(3,)])
    assert one.table("new", torch.int64, lambda: [(3,)]) is not captured
    numbers = one.numbers([4.0])
    assert one.numbers([4.0]) is not numbers
    monkeypatch.undo()
    assert one.table("new", torch.int64, lambda: [(5,)]).tolist() == [[5]]
