"""The mixture's metrics, against numbers by hand."""

from __future__ import annotations

import pytest

from data.lanes.loader import SetShare
from pipeline.training.mixture import mixture_metrics


def test_shares_and_epochs():
    shares = [SetShare("prepared/books", 0.75, 400), SetShare("s3://bucket/code/", 0.25, 100)]
    assert mixture_metrics(shares, [600.0, 300.0]) == pytest.approx(
        {
            "data/share/books": 2 / 3,
            "data/asked_share/books": 0.75,
            "data/epochs/books": 1.5,
            "data/share/code": 1 / 3,
            "data/asked_share/code": 0.25,
            "data/epochs/code": 3.0,
        }
    )
    assert mixture_metrics(shares, [0.0, 0.0])["data/share/code"] == 0.0
