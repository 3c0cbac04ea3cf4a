"""Sets by their names in metrics and files."""

from pipeline.reporting.set_names import set_names


def test_names_of_sets_are_told_apart():
    assert set_names(["a/train", "s3://b/train/", "c/my set.v2", "/"]) == ["train", "train-2", "my-set-v2", "set"]
    assert set_names(["a/x", "b/x-2", "b/x", "c/x"]) == ["x", "x-2", "x-3", "x-4"]
