from __future__ import annotations

import pytest

from tests.cluster.jobs import Job
from tests.cluster.lab import Lab, why_not
from tests.distributed.pool import Pools
from tests.distributed.runs import Run
from tests.prepared import write_set

LONG = ("train.steps=200", "checkpoint.interval=10", "metrics.interval=1")
"""Steps enough for something to happen on the way, some ten seconds on an idle machine."""


@pytest.fixture(scope="session")
def lab():
    """The Slurm, for all tests that need it."""
    if reason := why_not():
        pytest.skip(f"no Slurm here: {reason}")
    lab = Lab()
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_set(tmp_path_factory.mktemp("cluster") / "set", [37, 500, 130, 64, 250, 90, 17, 400])


@pytest.fixture(scope="session")
def calm(lab, data, tmp_path_factory) -> Run:
    """The run that nobody disturbs, in two processes of this machine."""
    run = Run(tmp_path_factory.mktemp("calm") / "run", data, *LONG)
    pools = Pools(timeout_s=700)  # a whole run, on a machine that may have much else to do
    run.train_in(pools)
    pools.close()
    return run


@pytest.fixture
def job(lab, data, tmp_path):
    """Makes jobs; those that are still there in the end are cancelled."""
    made = []

    def make(name: str = "job", *overrides: str) -> Job:
        made.append(Job(lab, tmp_path / name, data, *LONG, *overrides))
        return made[-1]

    yield make
    for each in made:
        if each.id:
            each.cancel()
