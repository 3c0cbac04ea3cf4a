"""Keeps what the libraries say about optional packages off the terminal, where it would bury what the run says."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Call before the libraries are imported. INFINI_DEBUG=1 leaves everything as it is."""
    if os.environ.get("INFINI_DEBUG") == "1":
        return
    # Some ten warnings per process about Transformer Engine and Apex, which are optional.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    # DeepSpeed calls collectives by the names they had before torch 2.13.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")
    # A filter outlives the level that DeepSpeed gives its logger when it is imported.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
