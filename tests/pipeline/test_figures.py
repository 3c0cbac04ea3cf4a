"""Every text of every plot lies inside the picture and beside the others, however long the names are."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.evaluation import plots
from pipeline.evaluation.training_curves import training_curves
from pipeline.figures import DPI, Legend, break_lines, text_inches, titled_figure
from pipeline.schedule.draw import draw_timelines
from pipeline.schedule.operations import build_schedule
from pipeline.schedule.simulate import Costs, simulate

RUN = "_llama32_1b_continual_deltanet_hard_gate_books_and_passkey_2026_11_24_second_try_$5_and_$6"
FOLDER = "/mnt/shared/projects/long-context/prepared/project_gutenberg_english_books_2048_tokens_v3"
UNBROKEN = "x" * 300
SPEC = f"passkey:20,length=4K/16K/64K,depth=0/0.25/0.5/0.75/1,keys=16,filler={FOLDER}"
TITLES = {
    "short": "demo, step 4\npasskey exact match, memory of another document, n = 10 per cell",
    "long": f"{RUN}, step 12,000\n{SPEC}\n{UNBROKEN}",
}
WAYS = ["memory on", "memory off", "memory of another document"]
CURVES = {"short": WAYS, "long": [f"{FOLDER}/{RUN}_{i}" for i in range(5)] + [UNBROKEN, "_a"]}


@pytest.fixture
def figures(monkeypatch):
    """Figures in place of files."""
    seen = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: seen.append(self))
    return seen


def check_texts(figure):
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    everything = figure.get_tightbbox(renderer)  # in inches; what reaches past the axes included
    width, height = figure.get_size_inches()
    assert everything.x0 > -0.01 and everything.y0 > -0.01, everything
    assert everything.x1 < width + 0.01 and everything.y1 < height + 0.01, (everything, width, height)
    plots_ = [axes.get_tightbbox(renderer).padded(-1) for axes in figure.axes]
    others = [legend.get_window_extent(renderer) for legend in figure.legends]
    if figure.get_suptitle():
        others.append(figure._suptitle.get_window_extent(renderer))
    for one, other in itertools.combinations(others, 2):
        assert not one.overlaps(other)
    for other, plot in itertools.product(others, plots_):
        assert not other.overlaps(plot), (other, plot)
    for axes in figure.axes:
        low, high = sorted(axes.get_xlim())
        labels = [text for text in axes.get_xticklabels() if text.get_text() and text.get_visible()]
        boxes = [x.get_window_extent(renderer) for x in labels if low <= x.get_position()[0] <= high]
        for one, other in itertools.pairwise(boxes):
            assert not one.overlaps(other)


def loss_by_segment(path, title, names):
    curves = {name: (list(3 - np.arange(30) / 30), [0.1] * 30, [8] * 30) for name in names}
    plots.loss_by_segment(path, curves, title)


def heatmap(columns):
    def draw(path, title, names):
        plots.passkey_heatmap(path, [[0.5] * columns] * 5, range(1000, 1000 + columns), np.linspace(0, 1, 5), title)

    return draw


def score_curves(points, **options):
    def draw(path, title, names):
        curves = {name: [plots.Score(2.0**k, 0.5, 0.3, 0.7, 100) for k in range(points)] for name in names}
        marks = {1.0: "d = 1: one head's rank", 8.0: f"8 heads x d: {title}"}
        plots.score_curves(path, curves, title, xlabel=names[0], marks=marks, **options)

    return draw


def gates(layers):
    def draw(path, title, names):
        plots.gate_histogram(path, {i: np.random.default_rng(i).random(8) for i in range(layers)}, title)

    return draw


def timelines(path, title, names):
    shape = {"stages": 2, "microbatches": 2, "chunks": 2, "replay": False}
    programs = [build_schedule(stage=stage, **shape) for stage in range(2)]
    kinds = {operation.kind for program in programs for operation in program}
    timeline = simulate(programs, Costs([dict.fromkeys(kinds, 0.1)] * 2))
    draw_timelines(path, [(title.replace("\n", " "), timeline), (names[0], timeline)])


DRAWN = {
    "loss by segment": loss_by_segment,
    "heat map, 1 length": heatmap(1),
    "heat map, 12 lengths": heatmap(12),
    "heat map, 60 lengths": heatmap(60),
    "scores, 1 point": score_curves(1, logarithmic=False),
    "scores, 24 points": score_curves(24, sizes=True),
    "gates, 1 layer": gates(1),
    "gates, 50 layers": gates(50),
    "timelines": timelines,
}


@pytest.mark.parametrize("names", TITLES)
@pytest.mark.parametrize("kind", DRAWN)
def test_texts_fit(tmp_path, figures, kind, names):
    DRAWN[kind](tmp_path / "plot.png", TITLES[names], CURVES[names])
    check_texts(figures[0])


@pytest.mark.parametrize("layers", [8, 60])
def test_training_curves_hide_nothing(tmp_path, figures, layers):
    quantities = ("mix_gate", "share_of_output", "write_gate", "norm_M")
    buckets = ("0", "1", *(f"{2**i}-{2 ** (i + 1) - 1}" for i in range(1, 18)), "262144+")
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for step in range(1, 4):
            record = {"step": step * 10**6, "loss/train": 3.0, "loss/answer": 2.0, "speed/tokens_per_s": 1e9}
            record |= {f"optimizer/learning_rate{name}": 1e-3 for name in ("", "_beta", "_write_gate")}
            record |= {f"loss_by_segment/{name}": 2.0 for name in buckets}
            record |= {f"{quantity}/layer_{layer:02d}": 0.1 for quantity in quantities for layer in range(layers)}
            file.write(json.dumps(record) + "\n")
    training_curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
    check_texts(figures[0])
    renderer = FigureCanvasAgg(figures[0]).get_renderer()
    for axes in figures[0].axes:
        if axes.get_legend() is not None:
            inside = axes.get_window_extent(renderer).padded(-1)
            assert not inside.overlaps(axes.get_legend().get_window_extent(renderer))


def test_names_are_whole_or_lose_their_middle():
    for inches in (2.0, 5.0):
        broken = break_lines(SPEC, inches, 12, most=99)
        assert broken.replace("\n", "") == SPEC
        assert all(text_inches(line, 12) <= inches for line in broken.split("\n"))
    cut = break_lines(UNBROKEN + "the end", 3.0, 12, most=3).split("\n")
    assert len(cut) == 3 and cut[1].endswith("…") and cut[2].endswith("the end")
    assert break_lines("", 3.0, 12, most=3) == ""
    assert break_lines("one\ntwo", 3.0, 12, most=1) == "one\ntwo"


@pytest.mark.parametrize("count", [5, 7, 10, 12])
@pytest.mark.parametrize("name", ["{0}", "a run {0}", "deltanet, gate {0}, of 1K tokens", f"{RUN}_{{0}}"])
def test_a_legend_of_many_names_fits(count, name):
    labels = [name.format(i * i) for i in range(count)]
    legend = Legend(labels, 8)
    figure = titled_figure(8, 2, "title", legend)
    axes = figure.subplots()
    legend.draw(figure, [axes.plot([0, i])[0] for i in range(count)])
    check_texts(figure)
    drawn = figure.legends[0].get_window_extent(FigureCanvasAgg(figure).get_renderer())
    assert drawn.height / DPI < legend.inches + 0.05


def test_a_legend_uses_the_room_it_has():
    assert Legend(WAYS, 8).columns == 3
    assert Legend(CURVES["long"], 8).columns == 1
    assert Legend(["_hidden by matplotlib"], 8).labels == [" _hidden by matplotlib"]
