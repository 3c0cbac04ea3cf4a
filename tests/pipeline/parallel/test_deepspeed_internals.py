"""What DeepSpeed does not promise is known to one module, and was read in the version that is installed."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest
from deepspeed.runtime.base_optimizer import ZeROOptimizer
from deepspeed.runtime.engine import DeepSpeedEngine

from pipeline.parallel import deepspeed_internals

ROOT = Path(__file__).parents[3]
HOME = ROOT / "pipeline" / "parallel" / "deepspeed_internals.py"
MODULES = [path for top in ("data", "model", "pipeline", "launch") for path in sorted((ROOT / top).rglob("*.py"))]

PRIVATE = re.compile(
    r"ds_(id|numel|shape|status|tensor|pipe_replicated)|_?[hl]p_(mapping|fragment_address)|averaged_gradients|"
    r"grad_position|get_param_id|(fp16|fp32_partitioned|single_partition_of_fp32)_groups(_flat)?|params_in_partition|"
    r"_get_norm_groups|scaled_global_norm|update_lp_params|coalesce_grad_reduction|_flush_coalesced_\w+|"
    r"get_data_types|communication_data_type|_configure_master_weights|_zero_padding|__compatible_ops__"
)
PROMISED = {"initialize", "step", "was_step_applied", "get_global_grad_norm", "optimizer", "param_groups"}


def names_of(tree: ast.AST) -> set[str]:
    """Attributes, and texts that may be given to getattr."""
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return attributes | {
        node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def after(tree: ast.AST, owner: str) -> set[str]:
    """What is taken from `deepspeed`, `engine` or `engine.optimizer`, directly."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and re.search(rf"\b{owner}\Z", ast.unparse(node.value))
    }


def test_every_name_that_is_not_promised_is_in_one_module():
    found = {}
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        private = {name for name in names_of(tree) if PRIVATE.fullmatch(name)}
        if "deepspeed" in path.read_text(encoding="utf-8"):
            for owner in ("deepspeed", "engine", r"engine\.optimizer"):
                private |= after(tree, owner) - PROMISED
        if private:
            found[path.relative_to(ROOT)] = private
    assert found.pop(HOME.relative_to(ROOT)), "the pattern finds none where they are"
    assert not found


def test_nobody_else_reaches_into_its_modules():
    for path in MODULES:
        if path != HOME:
            assert not re.search(r"^\s*(from|import) deepspeed\.", path.read_text(encoding="utf-8"), re.MULTILINE), path


def test_they_were_read_in_the_installed_version():
    assert importlib.metadata.version("deepspeed") == deepspeed_internals.READ_IN


@pytest.mark.parametrize("name", [*deepspeed_internals._REDUCTIONS, "get_data_types", "communication_data_type"])
def test_what_is_replaced_in_the_engine_is_there(name):
    """A replacement under a name that nobody calls would do nothing, silently."""
    assert hasattr(DeepSpeedEngine, name)


def test_what_is_replaced_in_the_optimizer_is_there():
    assert hasattr(ZeROOptimizer, "_configure_master_weights")
