"""`infini bench scaling` as it runs when nothing is said."""

import argparse

from launch.commands.bench_options import model_sizes
from launch.commands.bench_scaling import add_options
from pipeline.benchmarks.scaling import SINGLE, config_of
from pipeline.config.validate import validate


def test_the_default_sizes_fit_all_layouts():
    parser = argparse.ArgumentParser()
    add_options(parser)
    args = parser.parse_args([])
    for kind in (SINGLE, *args.kinds):
        count = 1 if kind == SINGLE else args.processes[0]
        validate(config_of(kind, count, model_sizes(args), args.rule, []), count, data_exists=False)
