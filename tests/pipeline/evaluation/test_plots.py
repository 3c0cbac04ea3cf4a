"""Plots are whole PNG files that show the numbers they were given."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pipeline.evaluation.plots import (
    Score,
    binned_gate_histogram,
    gate_histogram,
    loss_by_segment,
    passkey_heatmap,
    score_curves,
)
from pipeline.evaluation.training_curves import training_curves


@pytest.fixture
def figures(monkeypatch):
    """Figures as they are saved, so that a test can look at what is in them."""
    seen = []
    original = Figure.savefig

    def savefig(self, *args, **kwargs):
        seen.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return seen


def check_file(path):
    with Image.open(path) as image:
        image.load()
        assert min(image.size) >= 200
        assert len(image.convert("RGB").getcolors(maxcolors=2**24)) > 10
    assert not any(file.name.startswith(".") for file in path.parent.iterdir())  # nothing unfinished


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_loss_by_segment(tmp_path, figures):
    path = tmp_path / "plots" / "loss.png"  # the folder is made
    curves = {
        "memory on": ([3.0, 2.5, None], [0.1, 0.2, None], [4, 4, 0]),
        "memory off": ([3.0, 2.9, 2.9], None, [4, 4, 1]),
    }
    loss_by_segment(path, curves, "held-out text")
    check_file(path)
    upper, lower = figures[0].axes
    on, off = upper.lines
    np.testing.assert_array_equal(on.get_ydata(), [3.0, 2.5, np.nan])
    np.testing.assert_array_equal(off.get_xdata(), [0, 1, 2])
    assert figures[0].get_suptitle() == "held-out text" and "95 %" in upper.get_ylabel()
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["memory on", "memory off"]
    assert len(upper.collections) == 1  # one band: the other curve has no interval
    assert [list(line.get_ydata()) for line in lower.lines] == [[4, 4, 0], [4, 4, 1]]


def test_no_band_is_named_where_one_document_has_none(tmp_path, figures):
    loss_by_segment(tmp_path / "loss.png", {"memory on": ([3.0, 2.5], [None, None], [1, 1])}, "")
    assert figures[0].axes[0].get_ylabel() == "loss (nats per token)"


def test_equal_document_counts_are_drawn_once(tmp_path, figures):
    curves = {name: ([1.0, 2.0], None, [3, 2]) for name in ("memory on", "memory off", "shuffled")}
    loss_by_segment(tmp_path / "loss.png", curves, "")
    assert len(figures[0].axes[1].lines) == 1


def test_score_curves_carry_intervals_and_marks(tmp_path, figures):
    curves = {"a": [Score(4, 1.0, 0.9, 1.0, 20), Score(64, 0.5, None, None, 20)]}
    marks = {32: "a head", 4096: "beyond the points"}
    score_curves(tmp_path / "scores.png", curves, "recall", xlabel="pairs", marks=marks)
    check_file(tmp_path / "scores.png")
    [axes] = figures[0].axes
    assert texts(axes) == ["a head"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["4\nn=20", "64\nn=20"]


def test_passkey_cells_carry_their_values(tmp_path, figures):
    path = tmp_path / "passkey.png"
    grid = [[1.0, 0.5, None], [0.25, float("nan"), 0.0]]
    passkey_heatmap(path, grid, [512, 4096, 1024**2], [0.05, 0.95], "passkey")
    check_file(path)
    axes = figures[0].axes[0]
    assert {text.get_position(): text.get_text() for text in axes.texts} == {
        (0, 0): "1.00",
        (1, 0): "0.50",
        (2, 0): "–",
        (0, 1): "0.25",
        (1, 1): "–",
        (2, 1): "0.00",
    }
    assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "4K", "1M"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["5 %", "95 %"]
    assert axes.images[0].get_clim() == (0.0, 1.0)


def test_passkey_grid_must_fit_its_axes(tmp_path):
    with pytest.raises(ValueError, match="depths x lengths, 1 x 2"):
        passkey_heatmap(tmp_path / "passkey.png", [[1.0], [0.5]], [1, 2], [0.5], "transposed")


@pytest.mark.parametrize("layers", [1, 4, 80])
def test_gate_histogram_sums_to_one_per_layer(tmp_path, figures, layers):
    path = tmp_path / "gates.png"
    gates = {layer: np.random.default_rng(layer).random((4, 8)) for layer in range(layers)}
    gates[0] = np.array([0.0, 0.0, 0.0, 1.0])
    gate_histogram(path, gates, "gates")
    check_file(path)
    axes = figures[0].axes[0]
    shares = axes.images[0].get_array()
    np.testing.assert_allclose(shares.sum(axis=1), 1.0)
    assert shares[0, 0] == 0.75 and shares[0, -1] == 0.25
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [gates[layer].mean() for layer in range(layers)])


def test_binned_gates_equal_gates(tmp_path, figures):
    centers = (np.arange(20) + 0.5) / 20
    counts = np.random.default_rng(0).integers(0, 9, 20)
    means = {3: np.repeat(centers, counts).mean(), 7: 0.0}  # the mean is given: bins do not know it
    binned_gate_histogram(tmp_path / "a.png", {3: counts, 7: [0] * 20}, means, "binned")
    gate_histogram(tmp_path / "b.png", {3: np.repeat(centers, counts)}, "plain")
    binned, plain = (figure.axes[0] for figure in figures)
    np.testing.assert_allclose(binned.images[0].get_array()[0], plain.images[0].get_array()[0])
    np.testing.assert_allclose(binned.lines[0].get_xdata(), [plain.lines[0].get_xdata()[0], 0.0])
    assert [label.get_text() for label in binned.get_yticklabels()] == ["3", "7"]


def write_metrics(path, steps, layers):
    with open(path, "w") as file:
        for step in range(steps):
            record = {
                "step": step,
                "time": 1.7e9 + step,
                "loss/train": None if step == 3 else 3.0 - step / steps,
                "loss_by_segment/16-31": 1.0,
                "loss_by_segment/2-3": 1.5,
                "loss_by_segment/0": 2.0,
                "optimizer/learning_rate": 1e-3,
                "optimizer/gradient_norm": 0.5,
                "speed/tokens_per_s": 1000.0,
                "nonfinite": ["loss/train"],
                "some_histogram": {"mean": None, "min": None, "max": None, "edges": [], "counts": []},
            }
            file.write(json.dumps(record) + "\n")
            # A run that began under the first version and goes on: one curve.
            name = "memory_layer_{:02d}/mix_gate" if step < steps // 2 else "mix_gate/layer_{:02d}"
            statistics = {name.format(i): 0.1 * i for i in range(layers)}
            statistics |= {"evaluation/text/loss_on": 2.0, "evaluation/text/loss_shuffled": 3.0}
            statistics |= {"evaluation/text/loss_by_segment_on/2-3": 2.0, "evaluation/seconds": 1.0}
            statistics |= {f"evaluation/task_on/recall length 1024, pairs {n}": 0.5 for n in range(layers)}
            file.write(json.dumps({"step": step, "time": 0, **statistics}) + "\n")


@pytest.mark.parametrize(("steps", "layers"), [(1, 1), (10, 4), (300, 32)])
def test_training_curves_show_every_kind_of_metric(tmp_path, figures, steps, layers):
    write_metrics(tmp_path / "metrics.jsonl", steps, layers)
    training_curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
    check_file(tmp_path / "curves.png")
    panels = {axes.get_title(): axes for axes in figures[0].axes if axes.get_title()}
    assert list(panels) == [
        "loss",
        "held-out loss",
        "questions answered right",
        "loss by segment of the document",
        "learning rate",
        "gradient norm",
        "throughput",
        "mixing gate, sigmoid(beta)",
    ]
    gates = panels["mixing gate, sigmoid(beta)"]
    assert [line.get_ydata()[-1] for line in gates.lines] == pytest.approx([0.1 * i for i in range(layers)])
    assert {len(line.get_xdata()) for line in gates.lines} == {steps}
    segments = panels["loss by segment of the document"]
    assert [line.get_label() for line in segments.lines] == ["segment 0", "segment 2-3", "segment 16-31"]
    assert panels["throughput"].get_ylim()[0] == 0
    assert [line.get_label() for line in panels["held-out loss"].lines] == ["text, on", "text, exchanged"]
    assert len(panels["questions answered right"].lines) == layers
    if steps == 10:
        loss = panels["loss"].lines[0].get_ydata()
        assert np.isnan(loss[3]) and loss[9] == pytest.approx(2.1)


def test_smoothing_keeps_the_mean_and_skips_what_is_not_finite(tmp_path, figures):
    path = tmp_path / "metrics.jsonl"
    values = [1.0, 3.0] * 50
    values[51] = None
    path.write_text("".join(json.dumps({"step": i, "loss/train": v}) + "\n" for i, v in enumerate(values)))
    training_curves(tmp_path / "curves.png", path)
    raw, smooth = figures[0].axes[0].lines
    assert len(raw.get_ydata()) == 100
    window = [3.0, 1.0, 1.0, 3.0]  # steps 49 to 53 without 51
    assert smooth.get_ydata()[51] == pytest.approx(np.mean(window))


def test_metrics_without_curves_draw_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 0}\n')
    assert not training_curves(tmp_path / "curves.png", path)
    assert not (tmp_path / "curves.png").exists()
