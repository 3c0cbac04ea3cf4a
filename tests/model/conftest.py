import pytest
import torch.distributed as dist

from model.megatron import parallel_state


@pytest.fixture(scope="module")
def one_process():
    """Megatron's groups over this process alone, which the parallel layers ask for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
