"""Whose parallel linear layers the model is made of (`model.backend`): the one place that knows.

| backend | layers | where |
| --- | --- | --- |
| `local` | Megatron's own `ColumnParallelLinear` and `RowParallelLinear` | anywhere |
| `te` | NVIDIA Transformer Engine's, through Megatron's wrappers | CUDA |

`te` carries the four large matrices of a layer: q, k, v, the attention's output, and the two of the MLP. What stays
Megatron's own, whatever the backend: the output matrix, which may be the embedding (`model.layers.loss`), and gates and
a rule's token inputs, a few float32 rows that Transformer Engine has nothing to offer for (`local_linears`).

The parameters are `weight` and `bias` with both, so checkpoints do not know the backend. Transformer Engine's modules
also have an `_extra_state` (scales of fp8, which is not used here): it is in their `state_dict`, which nothing here
reads; checkpoints are made of named parameters.

Not verified: no test has run with Transformer Engine, which needs CUDA to be imported at all. Written against
megatron-core 0.16.1 and, by reading it, Transformer Engine 2.20.
"""

from __future__ import annotations

import importlib.util

from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider

INSTALL = "pip install --no-build-isolation 'transformer-engine[pytorch]'"


def parallel_linears(backend: str) -> BackendSpecProvider:
    """The provider of the layers' large matrices, for one of `model.config.BACKENDS`.

    Raises:
        ValueError: `te` is asked for and not installed, or cannot be imported.
    """
    if backend == "local":
        return local_linears()
    if importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            f"model.backend = te: Transformer Engine is not installed: {INSTALL} (needs CUDA), or model.backend=local"
        )
    from megatron.core.extensions import transformer_engine

    if not transformer_engine.HAVE_TE:  # Megatron has tried, and keeps the reason to itself
        raise ValueError(
            "model.backend = te: Transformer Engine is installed, but cannot be imported; "
            "`python -c 'import transformer_engine.pytorch.fp8'` says why. Or model.backend=local"
        )
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

    return TESpecProvider()


def local_linears() -> BackendSpecProvider:
    """Megatron's own, for what no backend takes over."""
    return LocalSpecProvider()
