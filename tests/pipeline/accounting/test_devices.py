"""Devices by the name that a driver gives them."""

from __future__ import annotations

import pytest
import torch

from model.device import device_memory_peaks, device_name
from pipeline.accounting.devices import ACCELERATORS, DRIVER_NAMES, known_as, sheet_flops_per_s


def test_names_of_drivers():
    assert known_as("NVIDIA H100 80GB HBM3") == "H100"
    assert known_as("NVIDIA H100 PCIe") == "H100-PCIE"
    assert known_as("NVIDIA A100-SXM4-80GB") == known_as("NVIDIA A100 80GB PCIe") == "A100-80"
    assert known_as("AMD Instinct MI300X") == "MI300X"
    assert set(DRIVER_NAMES.values()) == set(ACCELERATORS)


@pytest.mark.parametrize(
    "name",
    [
        *("NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA H200 NVL", "NVIDIA H20", "NVIDIA H800"),
        *("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090", "AMD Instinct MI300A", ""),
    ],
)
def test_a_device_that_is_not_in_the_table_is_not_guessed(name):
    """Some of these names hold that of a device that is."""
    assert known_as(name) is None and sheet_flops_per_s(name, "bf16", tf32=False) is None


def test_the_peak_is_that_of_the_precision():
    name = "NVIDIA H100 80GB HBM3"
    assert sheet_flops_per_s(name, "bf16", tf32=True) == 989.5e12
    assert sheet_flops_per_s(name, "fp32", tf32=True) == 494.5e12
    assert sheet_flops_per_s(name, "fp32", tf32=False) == sheet_flops_per_s(name, "fp64", tf32=True) == 67e12


def test_a_cpu_has_neither_name_nor_memory_of_its_own():

    assert device_name(torch.device("cpu")) is None and device_memory_peaks(torch.device("cpu")) == {}


def test_peaks_begin_anew_with_every_look(monkeypatch):
    """Of the process's own device."""

    asked = []
    for function, value in (
        ("max_memory_allocated", 5),
        ("max_memory_reserved", 7),
        ("reset_peak_memory_stats", None),
    ):
        monkeypatch.setattr(torch.cuda, function, lambda device, f=function, v=value: asked.append((f, device)) or v)
    device = torch.device("cuda", 3)
    assert device_memory_peaks(device) == {"allocated": 5, "reserved": 7}
    assert asked[-1] == ("reset_peak_memory_stats", device) and {where for _, where in asked} == {device}
