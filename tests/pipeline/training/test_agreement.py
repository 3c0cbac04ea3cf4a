"""What is said about windows that differ; the comparison itself runs in tests/distributed/test_failures.py."""

from __future__ import annotations

from pipeline.training.agreement import RankWindow, different_windows


def windows(*changes: tuple[int, int, int, list[str]]) -> list[RankWindow]:
    """Four ranks with lanes 0 and 1, four with lanes 2 and 3; changes are (rank, row, digest, documents)."""
    found = [
        RankWindow(rank, 0, [2 * (rank // 4), 2 * (rank // 4) + 1], [5, 6], [7, 8], [["a:0", "a:1"], ["b:0"]])
        for rank in range(8)
    ]
    for rank, row, digest, documents in changes:
        found[rank].digests[row] = digest
        found[rank].outlines[row] = hash(tuple(documents))
        found[rank].documents[row] = documents
    return found


def test_rank_lane_and_documents_are_named():
    message = different_windows(windows((5, 1, 9, ["b:0", "b:1"])))
    assert "lane 3: ranks 4, 6, 7 read b:0, rank 5 read b:0, b:1. Is" in message
    assert "lane 0" not in message and "lane 2" not in message


def test_equal_names_with_other_contents():
    assert "lane 0: ranks 0, 1, 3 read a:0, a:1, rank 2 read a:0, a:1 with other contents." in different_windows(
        windows((2, 0, 1, ["a:0", "a:1"]))
    )


def test_a_long_list_is_cut_with_a_count():
    many = [
        RankWindow(rank, 0, list(range(9)), [0] * 9, [rank // 10] * 9, [[f"{rank // 10}:{i}" for i in range(7)]] * 9)
        for rank in range(11)
    ]
    message = different_windows(many)
    assert (
        "lane 0: ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more read 0:0, 0:1, 0:2, 0:3 and 3 more, rank 10 read 1:0"
        in message
    )
    assert "lane 3" in message and "lane 4" not in message and "; and 5 more lanes" in message


def test_parts_of_one_window_are_different_and_agree():
    """Four context ranks, two tensor-parallel ranks each: parts are compared with their copies, documents with all."""

    def shared(part_of: dict[int, int] | None = None, outlines: dict[int, int] | None = None) -> str:
        digest = {rank: 100 + rank // 2 for rank in range(8)} | (part_of or {})
        outline = dict.fromkeys(range(8), 5) | (outlines or {})
        return different_windows(
            [
                RankWindow(
                    rank, rank // 2, [3], [outline[rank]], [digest[rank]], [["a:0"] if outline[rank] == 5 else ["a:1"]]
                )
                for rank in range(8)
            ]
        )

    assert "lane" not in shared().split("of it. ")[1].split(". Is")[0]
    assert "lane 3: rank 4 read a:0, rank 5 read a:0 with other contents. Is" in shared({5: 7})
    # Who has read other documents is named once, though its part differs as well.
    assert "lane 3: ranks 0, 1, 2, 3, 4, 5, 7 read a:0, rank 6 read a:1. Is" in shared({6: 8}, {6: 9})
