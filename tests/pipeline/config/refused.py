"""What a configuration is refused for."""

from __future__ import annotations

import pytest

from pipeline.config.load import ConfigError, load_config


def problems(path, overrides=()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return caught.value.problems
