"""Only the libraries' known noise is silenced."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import logging, warnings
from launch.processes.quiet import quiet_libraries
quiet_libraries()
logging.basicConfig()
logging.getLogger("DeepSpeed").warning("Setting accelerator to CPU. If you have GPU ...")
logging.getLogger("DeepSpeed").warning("something else")
warnings.warn_explicit("no Apex", UserWarning, "x.py", 1, module="megatron.core.optimizer")
warnings.warn_explicit("about our own code", UserWarning, "x.py", 1, module="pipeline.training.trainer")
"""


def test_known_noise_is_silenced_and_nothing_else():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
    )
    assert "something else" in done.stderr and "about our own code" in done.stderr
    assert "accelerator" not in done.stderr and "Apex" not in done.stderr
