from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from kvservice.errors import InternalError
from kvservice.store.manifests import Chunk, FrameTable, Manifest, pack_manifest, unpack_manifest
from kvservice.types import FrameRef, SessionId, TenantId

S, P = SessionId("s"), SessionId("parent")


def ref(group: int, start: int, size: int, name: int = 1, role: str = "value") -> FrameRef:
    return FrameRef(group, role, start, start + 64, bytes([name]) * 16, size)


def manifest(table: FrameTable) -> Manifest:
    return Manifest(S, TenantId("ann"), b"t" * 16, b"f" * 16, 7, 3, 500, 208, table, "int8", None, P)


def test_table_keeps_each_frame_with_its_home_and_chunks_in_order():
    given = [(S, ref(1, 80, 30)), (P, ref(0, 16, 10)), (P, ref(1, 16, 20)), (S, ref(0, 80, 40, role="shared_key"))]
    table = FrameTable.of(given)
    assert table.columns == ((0, "shared_key"), (0, "value"), (1, "value"))
    assert [chunk.stored_bytes for chunk in table.chunks] == [(0, 10, 20), (40, 0, 30)]
    assert sorted(table.frames(), key=str) == sorted(given, key=str)
    assert (table.num_frames, table.homes) == (4, {S, P})


def test_new_tokens_take_the_place_of_a_chunk_and_the_rest_stays():
    table = FrameTable.of([(P, ref(0, 16, 10)), (P, ref(0, 80, 10)), (P, ref(0, 144, 10))])
    changed = table.with_frames([(S, ref(0, 80, 11, name=2)), (S, ref(0, 208, 11))])
    assert [(chunk.start, chunk.home, chunk.chunk_hash[0]) for chunk in changed.chunks] == [
        (16, P, 1), (80, S, 2), (144, P, 1), (208, S, 1),
    ]  # fmt: skip
    assert table.with_frames([]) == table


def test_frames_of_a_chunk_that_is_there_are_added_to_it():
    table = FrameTable.of([(S, ref(0, 16, 10))]).with_frames([(S, ref(1, 16, 20))])
    assert table.chunks == (Chunk(16, 80, b"\1" * 16, S, (10, 20)),)


def test_until_keeps_whole_chunks_only():
    table = FrameTable.of([(S, ref(0, 16, 10)), (S, ref(0, 80, 10))])
    assert [chunk.stop for chunk in table.until(143).chunks] == [80]


def test_packed_manifest_comes_back():
    table = FrameTable.of([(P, ref(0, 16, 10)), (S, ref(0, 80, 10)), (S, ref(3, 80, 2**32 - 1))])
    for each in (manifest(table), manifest(FrameTable()), replace(manifest(table), document_id=P, parent=None)):
        assert unpack_manifest(pack_manifest(each)) == each


def test_window_is_packed_with_its_manifest_and_named_with_its_frames():
    window = Chunk(208, 499, b"\2" * 16, P, (70, 0, 90))
    held = replace(manifest(FrameTable.of([(S, ref(0, 16, 10))])), window=window)
    assert unpack_manifest(pack_manifest(held)) == held
    assert held.homes == {S, P}
    assert list(held.named())[1:] == [
        (P, FrameRef(layer, "window", 208, 499, b"\2" * 16, size)) for layer, size in ((0, 70), (2, 90))
    ]


def test_manifest_of_before_there_were_windows_is_read():
    packed, left_out = pack_manifest(manifest(FrameTable())), b',"window":null'
    assert left_out in packed
    (length,) = struct.unpack("<I", packed[:4])
    before = struct.pack("<I", length - len(left_out)) + packed[4:].replace(left_out, b"")
    assert unpack_manifest(before) == manifest(FrameTable())


def test_manifest_of_a_long_session_is_small():
    table = FrameTable.of(
        (S, FrameRef(group, "kv", 16 + 64 * i, 80 + 64 * i, i.to_bytes(16, "little"), 262_500 + (group > 9)))
        for i in range(2000)
        for group in range(32)
    )
    packed = pack_manifest(manifest(table))
    assert len(packed) < 70_000
    assert unpack_manifest(packed).frames == table


@pytest.mark.parametrize("cut", [0, 3, 50, -1])
def test_cut_manifest_is_an_error_not_another_manifest(cut):
    packed = pack_manifest(manifest(FrameTable.of([(S, ref(0, 16, 10))])))
    with pytest.raises(InternalError, match="illegible"):
        unpack_manifest(packed[:cut])


def test_manifest_of_a_later_format_is_refused_by_name():
    packed = pack_manifest(manifest(FrameTable())).replace(b'"format":1', b'"format":9')
    with pytest.raises(InternalError, match="format 9, known is 1"):
        unpack_manifest(packed)
