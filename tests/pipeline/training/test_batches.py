"""Batches on their way to a device: page-locked where they are read, and moved without the host's waiting."""

from __future__ import annotations

import threading

import pytest
import torch

from data.lanes.loader import LaneLoader, WeightedSet
from data.prepared.shards import PreparedSet
from pipeline.training import batches
from pipeline.training.batches import pinned_for, to_device
from tests.prepared import write_set

FIELDS = {"tokens", "labels", "loss_weight", "answer_mask", "reset", "position_in_document"}
DEVICE = torch.device("meta")
"""Stands for an accelerator: tensors can be moved there."""


@pytest.fixture
def loader(tmp_path, monkeypatch):
    """A loader that pins for an accelerator, and what it pinned: (thread, device)."""
    pinned = []

    def page_locked(tensor, device):
        pinned.append((threading.current_thread().name, device))
        tensor.was_pinned = True
        return tensor

    monkeypatch.setattr(batches, "page_locked", page_locked)
    source = WeightedSet(PreparedSet(write_set(tmp_path / "set", [60] * 4, questions=True)), 1.0, 1.0)
    shape = {"lanes": 2, "first_lane": 0, "last_lane": 2, "segments_per_window": 4, "segment_length": 8}
    loader = LaneLoader([source], **shape, seed=0, probes_per_window=2, finish=pinned_for(DEVICE))
    yield loader, pinned
    loader.close()


def test_windows_are_page_locked_in_the_thread_that_reads_them(loader):
    loader, pinned = loader
    batch = loader.next_batch()
    assert set(pinned) == {("prefetch", DEVICE)}
    assert {name for name, value in vars(batch).items() if getattr(value, "was_pinned", False)} == FIELDS
    assert all(getattr(value, "was_pinned", False) for value in vars(batch.probes).values())


def test_a_batch_moves_without_waiting_and_leaves_lane_numbers(loader, monkeypatch):
    waits = []
    move = torch.Tensor.to

    def watched(tensor, *arguments, **keywords):
        waits.append(keywords.get("non_blocking"))
        return move(tensor, *arguments, **keywords)

    batch = loader[0].next_batch()
    weight = float(batch.loss_weight.sum() + batch.probes.loss_weight.sum())
    monkeypatch.setattr(torch.Tensor, "to", watched)
    moved = to_device(batch, DEVICE)
    monkeypatch.undo()
    assert {getattr(moved, name).device for name in FIELDS} == {DEVICE}
    assert {value.device for value in vars(moved.probes).values()} == {DEVICE}
    assert waits == [True] * 10
    assert moved.lane_ids.tolist() == [0, 1]
    assert moved.weight == weight > 0  # known on the host, wherever the tensors are


def test_on_a_cpu_nothing_happens():
    batch = object()
    assert pinned_for(torch.device("cpu")) is None
    assert to_device(batch, torch.device("cpu")) is batch
