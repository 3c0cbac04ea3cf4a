"""Shared by all tests."""

import os

# Tests start many small processes on few cores: more than one thread each makes them wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
