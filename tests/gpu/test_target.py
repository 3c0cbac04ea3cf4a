"""What says where the tests run, and why they do not."""

import torch

from tests.gpu import target


def test_without_a_device_there_is_a_reason(monkeypatch):
    monkeypatch.setattr(target, "NAME", "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert target.obstacle() == f"no CUDA device: torch {torch.__version__} finds none"
    monkeypatch.setattr(target, "NAME", "tpu")
    assert "must be cuda or cpu" in target.obstacle()


def test_one_process_and_as_many_as_there_are_devices(monkeypatch):
    monkeypatch.setattr(target, "NAME", "cuda")
    for count, worlds in ((0, [1]), (1, [1]), (8, [1, 8])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        assert target.processes() == worlds


def test_what_it_ran_on_is_said():
    described = target.described()
    assert described["torch"] == torch.__version__ and "fla-core" in described and "transformer-engine" in described
