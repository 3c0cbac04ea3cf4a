"""Whose parallel linear layers the model is made of. Transformer Engine itself cannot be imported without CUDA; what
oneDNN's products are under tensor parallelism and ZeRO 3 is in `tests/distributed/test_layouts.py`."""

from __future__ import annotations

import ast
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from model import backend, decoder
from model.backend import check_backend, onednn_mm, parallel_linears
from model.layers import attention, decoder_layer
from model.megatron import LocalSpecProvider
from tests.model.build import random_tokens, small_config, small_stage

pytestmark = pytest.mark.usefixtures("one_process")

MODEL = Path(decoder.__file__).parent
LARGE = {"attention.qkv", "attention.projection", "mlp.linear_fc1", "mlp.linear_fc2"}
"""What a backend makes, in every layer."""
PRODUCT = backend._product


def test_transformer_engine_that_is_not_there_is_refused(monkeypatch):
    if importlib.util.find_spec("transformer_engine") is None:
        with pytest.raises(
            ValueError, match=r"model\.backend = te: .*not installed.*pip install.*model\.backend=local"
        ):
            small_stage(small_config(backend="te"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "a spec")
    monkeypatch.setattr(transformer_engine, "HAVE_TE", False)
    with pytest.raises(ValueError, match=r"model\.backend = te: .*cannot be imported.*model\.backend=local"):
        parallel_linears("te")


def required_arguments(name: str) -> tuple[set[str], set[str]]:
    """The keyword arguments that a class of Megatron's wrappers for Transformer Engine must have, and may have. Read in
    its source: without Transformer Engine there are no such classes."""
    tree = ast.parse(Path(inspect.getfile(transformer_engine)).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name == name:
            init = next(x for x in node.body if isinstance(x, ast.FunctionDef) and x.name == "__init__")
            names, defaults = [x.arg for x in init.args.kwonlyargs], init.args.kw_defaults
            needed = {x for x, default in zip(names, defaults, strict=True) if default is None}
            return needed, set(names)
    raise AssertionError(f"Megatron has no {name}")


class Recorded:
    """A provider whose layers are Megatron's own, and that remembers what they were made with."""

    def __init__(self):
        self.made: list[tuple[str, torch.nn.Module, set[str]]] = []
        self.column_parallel_linear = lambda: self._recorder(ColumnParallelLinear, "TEColumnParallelLinear")
        self.row_parallel_linear = lambda: self._recorder(RowParallelLinear, "TERowParallelLinear")

    def _recorder(self, kind, name):
        recorded = self

        class Layer(kind):
            def __init__(self, input_size, output_size, **arguments):
                super().__init__(input_size, output_size, **arguments)
                recorded.made.append((name, self, set(arguments)))

        return Layer


@pytest.mark.parametrize("rule", ["delta", "gated_deltanet+sliding"])
def test_a_backend_makes_the_large_matrices_and_nothing_else(monkeypatch, rule):
    """With the arguments that Transformer Engine's layers want, and the parameters' names of every backend."""
    config = small_config(rule, "sigmoid", mix="token")
    usual = small_stage(config)
    provider = Recorded()
    for module in (decoder_layer, attention):
        monkeypatch.setattr(module, "parallel_linears", lambda backend: provider)
    stage = small_stage(config)
    made = {id(layer): name for name, layer, _ in provider.made}
    names = {name.partition(".")[2].partition(".")[2] for name, x in stage.named_modules() if id(x) in made}
    assert names == LARGE and len(made) == config.num_layers * len(LARGE)
    for name, _, arguments in provider.made:
        needed, known = required_arguments(name)
        assert needed <= arguments <= known, (name, needed - arguments, arguments - known)
    assert [name for name, _ in stage.global_parameters()] == [name for name, _ in usual.global_parameters()]
    tokens, reset = random_tokens(1, 2, config.segment_length), torch.zeros(1, 2, dtype=torch.bool)
    memory = stage.empty_memory(1, torch.device("cpu"))
    with torch.no_grad():
        losses = [x(tokens, memory, reset, tokens).token_loss for x in (stage, usual)]
    assert torch.equal(*losses)


@pytest.mark.parametrize(
    ("precision", "device", "problem"),
    [("fp32", "cuda", "computes on cuda"), ("fp64", "cpu", "precision=fp32.* is fp64"), ("bf16", "cpu", "is bf16")],
)
def test_onednn_that_would_change_nothing_is_refused(precision, device, problem):
    with pytest.raises(ValueError, match=rf"model\.backend = onednn: .*{problem}.*model\.backend=local"):
        check_backend("onednn", precision, device)
    check_backend("local", precision, device)
    check_backend("onednn", "fp32", "cpu")


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "qkv_bias": True}])
def test_onednn_is_megatron(monkeypatch, changes):
    """Losses and gradients are as near to those of float64 as with MKL's products. It makes three products of each
    large matrix and of the output."""
    made = []
    monkeypatch.setattr(backend, "_product", lambda *matrices: made.append(0) or PRODUCT(*matrices))

    def measured(backend: str, precision: str) -> dict[str, torch.Tensor]:
        stage = small_stage(small_config(backend=backend, **changes), precision=precision)
        tokens, labels = random_tokens(2, 3, 6), random_tokens(2, 3, 6, seed=1)
        memory = stage.empty_memory(2, torch.device("cpu"))
        loss = stage(tokens, memory, torch.zeros(2, 3, dtype=torch.bool), labels).token_loss
        loss.sum().backward()
        return {"loss": loss.detach()} | {name: x.grad for name, x in stage.named_parameters()}

    exact, usual = measured("local", "fp64"), measured("local", "fp32")
    assert not made
    found = measured("onednn", "fp32")
    assert len(made) == 3 * (len(LARGE) * small_config().num_layers + 1)
    for name, truth in exact.items():
        nearness = 1.25 * (usual[name] - truth).norm() + 1e-6 * truth.norm()
        assert (found[name] - truth).norm() <= nearness, name


def test_onednn_writes_where_it_is_told():
    """Of any strides, into part of a tensor."""
    a, b = torch.randn(5, 7).t(), torch.randn(3, 5).t()
    place = torch.zeros(9, 3)
    assert onednn_mm(a, b, out=place[1:8]).data_ptr() == place[1:].data_ptr()
    torch.testing.assert_close(place[1:8], a @ b)
    assert not place[0].any() and not place[8].any()


def test_one_place_knows_the_backends():
    assert isinstance(parallel_linears("local"), LocalSpecProvider)
    # The output matrix is Megatron's own whatever the backend, and one operation with softmax and loss.
    for path in set(MODEL.rglob("*.py")) - {MODEL / name for name in ("megatron.py", "backend.py", "layers/loss.py")}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            taken = {name for name in names if name.endswith(("LocalSpecProvider", "TESpecProvider", "ParallelLinear"))}
            assert not taken, f"{path} imports {taken}"
