"""Shared by all tests."""

import os

import pytest

# Tests start many small processes on few cores: more than one thread each makes them wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TOGETHER = ("cluster",)
"""Folders whose tests share what is dear to start: a Slurm. Pools of processes are not, see tests/distributed/pool."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """What one of several test processes takes at a time (`make test`): a file, or one of those folders."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            path = nodeid.partition("::")[0]
            folder = path.removeprefix("tests/").partition("/")[0]
            return folder if folder in TOGETHER else path

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def remote_modules(tmp_path_factory):
    """Where transformers copies the code of exported models: one folder of the tests', not the user's. One, because a
    process imports its package of modules once."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="session")
def tracing_process():
    """`tracing_process(function, **arguments)` in a process of its own: PyTorch has a pretended device there for
    the rest of its life. A case that fails takes the process with it."""
    from tests.distributed.pool import Pool

    pools = []

    def run(function, **arguments):
        if not pools or pools[-1].broken:
            pools.append(Pool(1))
        return pools[-1].run(function, **arguments)[0]

    yield run
    for pool in pools:
        if not pool.broken:
            pool.close()
