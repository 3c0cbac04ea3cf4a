"""What a run writes about itself can be read back, survives a crash, and does not double after a resume."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.reporting.metrics import MetricsWriter, layer_metric, layer_name, read_metrics
from pipeline.reporting.throughput import ThroughputMeter


def strict_records(path):
    """Every line parsed by the letter of JSON: NaN and Infinity are errors."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def events(run_dir):
    accumulator = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    return accumulator.Reload()


def tensorboard_scalars(run_dir):
    accumulator = events(run_dir)
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def test_same_numbers_in_jsonl_and_tensorboard(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=None)
    writer.scalars(1, {"loss/train": torch.tensor(2.5), "progress/tokens": 2**40 + 1})
    writer.scalars(2, {"loss/train": np.float32(2.25)})
    writer.vector(2, "ranks/own_s", [3.0, None, 1.5])
    writer.close()

    first, second, third = strict_records(writer.path)
    assert first["step"] == 1 and first["loss/train"] == 2.5 and first["progress/tokens"] == 2**40 + 1
    assert second["loss/train"] == 2.25 and second["time"] >= first["time"] > 1.6e9
    assert third["ranks/own_s"] == [3.0, None, 1.5] and "nonfinite" not in third
    assert read_metrics(writer.path) == [first, second, third]

    scalars = tensorboard_scalars(tmp_path)
    assert scalars == {"1_loss/train": [(1, 2.5), (2, 2.25)], "8_progress/tokens": [(1, 2**40)]}  # float32


def test_resume_drops_later_steps_everywhere(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=None)
    for step in range(1, 7):
        writer.scalars(step, {"loss/train": float(step)})
    writer.close()
    resumed = MetricsWriter(tmp_path, tensorboard=True, resume_step=4)
    for step in range(5, 8):
        resumed.scalars(step, {"loss/train": 10.0 * step})
    resumed.close()

    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0), (5, 50.0), (6, 60.0), (7, 70.0)]
    assert [(record["step"], record["loss/train"]) for record in strict_records(resumed.path)] == expected
    assert tensorboard_scalars(tmp_path)["1_loss/train"] == expected
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_resume_drops_what_a_crash_left_broken(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": 1}\n\0\0\0\n{"step": 2, "a": 2}\n{"step": 2, "b"')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2"):
        read_metrics(path)
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=2)
    writer.scalars(3, {"a": 3.0})
    writer.close()
    assert [record["step"] for record in strict_records(path)] == [1, 2, 3]
    assert "2 broken line(s)" in caplog.text


def test_running_file_is_readable_after_every_call(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=None)
    writer.scalars(1, {"a": 1.0})
    assert [record["a"] for record in read_metrics(writer.path)] == [1.0]
    with open(writer.path, "a") as file:
        file.write('{"step": 2, "a"')
    assert len(read_metrics(writer.path)) == 1
    writer.close()


def test_new_run_refuses_the_folder_of_an_old_one(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=None)
    writer.scalars(1, {"a": 1.0})
    writer.close()
    with pytest.raises(ValueError, match="metrics.jsonl.*run_dir"):
        MetricsWriter(tmp_path, tensorboard=False, resume_step=None)


def test_nonfinite_values_stay_valid_json_and_are_named(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=None)
    writer.scalars(1, {"loss/train": math.nan, "optimizer/gradient_norm": math.inf, "optimizer/learning_rate": 0.1})
    writer.vector(1, "v", [1.0, -math.inf])
    writer.histogram(1, "h", [1.0, math.nan])
    writer.histogram(1, "all", [math.nan])
    writer.close()
    scalars, vector, histogram, empty = strict_records(writer.path)
    assert scalars["loss/train"] is None and scalars["optimizer/learning_rate"] == 0.1
    assert scalars["nonfinite"] == ["loss/train", "optimizer/gradient_norm"]
    assert vector["v"] == [1.0, None] and vector["nonfinite"] == ["v/1"]
    assert sum(histogram["h"]["counts"]) == 1 and histogram["nonfinite"] == ["h"]
    assert empty["all"]["mean"] is None and empty["nonfinite"] == ["all"]
    assert math.isnan(tensorboard_scalars(tmp_path)["1_loss/train"][0][1])


def test_histogram_images_and_text(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=None)
    values = torch.linspace(0, 1, 100, dtype=torch.bfloat16, requires_grad=True)
    writer.histogram(3, "gate/histogram", values.reshape(4, 25))
    from PIL import Image

    Image.new("RGBA", (8, 6), (255, 0, 0, 255)).save(tmp_path / "red.png")
    writer.image(3, "from_file", tmp_path / "red.png")
    writer.image(3, "from_array", np.zeros((5, 7, 3), dtype=np.uint8))
    writer.text(3, "note", "hello")
    writer.close()

    summary = strict_records(writer.path)[0]["gate/histogram"]
    assert summary["min"] == 0 and summary["max"] == 1 and summary["mean"] == pytest.approx(0.5, abs=0.01)
    assert sum(summary["counts"]) == 100 and len(summary["edges"]) == len(summary["counts"]) + 1
    accumulator = events(tmp_path)
    assert accumulator.Histograms("gate/histogram")[0].histogram_value.num == 100
    image = accumulator.Images("from_file")[0]
    assert (image.width, image.height) == (8, 6)
    assert accumulator.Images("from_array")[0].width == 7
    assert accumulator.Tensors("note/text_summary")[0].tensor_proto.string_val[0] == b"hello"


def test_binned_histogram_is_the_histogram_of_its_bins(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=None)
    writer.binned_histogram(5, "write_gate", torch.tensor([0.0, 6.0, 2.0, 0.0]), 0.0, 1.0)
    writer.binned_histogram(5, "empty", [0, 0], 0.0, 1.0)
    writer.close()
    first, empty = strict_records(writer.path)
    assert first["write_gate"] == {
        "mean": (6 * 0.375 + 2 * 0.625) / 8,
        "min": 0.25,
        "max": 0.75,
        "edges": [0.0, 0.25, 0.5, 0.75, 1.0],
        "counts": [0.0, 6.0, 2.0, 0.0],
    }
    assert empty["empty"]["mean"] is None
    (event,) = events(tmp_path).Histograms("write_gate")
    assert event.step == 5 and event.histogram_value.num == 8 and event.histogram_value.sum == 3.5


def test_closing_twice_does_no_harm(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=True, resume_step=None)
    writer.scalars(1, {"a": 1.0})
    writer.close()
    writer.close()
    assert len(read_metrics(writer.path)) == 1


def test_without_tensorboard_there_are_no_event_files(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False, resume_step=None)
    writer.histogram(1, "h", [1.0])
    writer.text(1, "note", "hello")
    writer.image(1, "image", np.zeros((2, 2, 3)))
    writer.close()
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_layers_are_found_under_both_names():
    assert layer_metric(layer_name("mix_gate", 7)) == layer_metric("memory_layer_07/mix_gate") == ("mix_gate", 7)
    assert layer_metric(layer_name("norm_M", 123)) == layer_metric("memory_layer_123/norm_M") == ("norm_M", 123)
    for other in (
        "loss/train",
        "memory/write_gate",
        "loss_by_segment/7",
        "mix_gate/layer_",
        "layer_07",
        "x/layer_\u0663",
    ):
        assert layer_metric(other) is None, other


class FakeClock:
    """Starts at a time stamp, as a clock in an epoch would, so that dividing by it is seen."""

    def __init__(self):
        self.now = 1.7e9

    def __call__(self):
        return self.now


def test_throughput_is_tokens_over_elapsed_time():
    clock = FakeClock()
    meter = ThroughputMeter(clock)
    for _ in range(4):
        with meter.phase("data"):
            clock.now += 0.5
        with meter.phase("forward_backward"):
            clock.now += 1.0
        with meter.phase("forward_backward"):
            clock.now += 0.25
        clock.now += 0.25
        meter.count_step(tokens=1000)
    report = meter.report()
    phases = {"speed/data_s": 0.5, "speed/forward_backward_s": 1.25}
    assert report == {"speed/tokens_per_s": 500.0, "speed/step_s": 2.0} | phases

    # The second interval knows nothing of the first.
    clock.now += 2.0
    meter.count_step(tokens=100)
    assert meter.report() == {"speed/tokens_per_s": 50.0, "speed/step_s": 2.0}


def test_what_is_done_while_paused_takes_no_time():
    clock = FakeClock()
    meter = ThroughputMeter(clock)
    clock.now += 2.0
    meter.count_step(100)
    with pytest.raises(KeyError), meter.paused():
        clock.now += 50.0
        raise KeyError
    clock.now += 2.0
    assert meter.report()["speed/tokens_per_s"] == 25.0


def test_a_pause_may_last_over_a_report():
    """As a profile's does: steps 2 and 3 are left out, and an interval of such steps says nothing."""
    clock = FakeClock()
    meter = ThroughputMeter(clock)
    for step in range(1, 6):
        if step == 2:
            meter.pause()
        if step == 4:
            meter.go_on()
        with meter.phase("data"), meter.paused() if step == 3 else nullcontext():
            clock.now += 10.0 if step in (2, 3) else 2.0
        meter.count_step(100)
        if step == 2:
            assert meter.report() == {"speed/tokens_per_s": 50.0, "speed/step_s": 2.0, "speed/data_s": 2.0}
        if step == 3:
            assert meter.report() == {}
    assert meter.report() == {"speed/tokens_per_s": 50.0, "speed/step_s": 2.0, "speed/data_s": 2.0}


def test_phase_is_counted_when_its_block_raises():
    clock = FakeClock()
    meter = ThroughputMeter(clock)
    with pytest.raises(RuntimeError), meter.phase("optimizer"):
        clock.now += 3.0
        raise RuntimeError
    meter.count_step(tokens=1)
    assert meter.report()["speed/optimizer_s"] == 3.0


@pytest.mark.parametrize(
    "line",
    [
        b"[1]",
        b'{"time": 1.0}',
        b'{"step": -1}',
        b'{"step": true}',
        b'{"step": 1e300}',
        b'{"step": 1, "a": NaN}',
        b'{"step": 1, "a": "text"}',
        b'{"step": 1, "a": ["text"]}',
        b'{"step": 1, "a": {"mean": 1}}',
        b'{"step": 1, "a": {"mean": 1, "min": 0, "max": 1, "edges": [0], "counts": [1]}}',
        b'{"step": 1, "nonfinite": [5]}',
        b'{"step": 1, "a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"step": ' + b"9" * 5000 + b"}",
    ],
    ids=range(14),
)
def test_a_line_of_another_kind_is_named_and_left_out_where_that_is_asked(tmp_path, line, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "a": 1}\n' + line + b"\n")
    with pytest.raises(ValueError) as error:
        read_metrics(path)
    assert f"{path}, line 2" in str(error.value) and len(str(error.value)) < 500
    MetricsWriter(tmp_path, tensorboard=False, resume_step=1).close()
    assert read_metrics(path) == [{"step": 1, "a": 1}] and "1 broken line(s)" in caplog.text


def test_a_line_without_end_is_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.reporting.metrics.LINE_LIMIT", 1000)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b" " * 5000)
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2: more than 1,000 bytes"):
        read_metrics(path)
