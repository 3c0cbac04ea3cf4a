from __future__ import annotations

import pytest

from tests.distributed.pool import Pools


@pytest.fixture(scope="session")
def pools():
    """Process groups for the whole session: `pools.run(world_size, function, **arguments)`."""
    pools = Pools()
    yield pools
    pools.close()
