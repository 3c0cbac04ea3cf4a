"""`model.compile`: the same numbers as the reference, compiled once, refused where there is no compiler."""

import pytest
import torch
from torch._dynamo.utils import counters

from model.compiling import Piece, check_compiler, compile_block_attention, compile_pieces
from model.layers.mixing import plain_mix
from model.rules.feature_maps import phi_of, plain_phi_of
from model.rules.state import memory_tensors
from tests.model.build import VOCAB, random_memory, small_config, small_stage

pytestmark = pytest.mark.usefixtures("one_process")
CPU = torch.device("cpu")
MODELS = {
    "none": small_config("none"),
    "linear": small_config("linear", "hard"),
    "delta": small_config("delta", qk_norm=True),
    "deltanet": small_config("deltanet+sliding", "sigmoid"),
    "gated_deltanet": small_config("gated_deltanet", mix="token"),
    "linear+convolution": small_config("linear+convolution"),
}


@pytest.fixture(autouse=True, scope="module")
def in_a_folder_of_its_own(tmp_path_factory):
    """What other tests and programs compiled is not to be found, and nothing is left behind. All pieces are compiled,
    those of CUDA devices, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.compiling.WHERE_ALSO", ("cpu", "cuda"))
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield
    torch.compiler.reset()


def one_pass(stage, *, probes=True):
    """Loss and all gradients, those of the memory carried in included, and the memory carried out."""
    generator = torch.Generator().manual_seed(5)
    tokens, labels = torch.randint(0, VOCAB, (2, 2, 4 if probes else 3, 6), generator=generator)
    memory = random_memory(stage, 2)
    reset = torch.tensor([[False, True, False], [True, False, False]])
    chosen = torch.tensor([[1], [2]]) if probes else None
    out = stage(tokens, memory, reset, labels, probes=chosen)
    carried = [x for x in memory_tensors(out.memory) if x.requires_grad]
    leaves = [*stage.parameters(), *(x for x in memory_tensors(memory) if x.requires_grad)]
    loss = out.token_loss.square().sum() + out.gate_sum + sum(x.square().sum() for x in carried)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    found = [out.token_loss, *carried, *(x for x in gradients if x is not None)]
    return [x.detach().double() for x in found]


def both(config, **options):
    """A pass as written and compiled."""
    stages = [small_stage(config, **options) for _ in range(2)]
    compile_pieces(stages[1], CPU)
    return [one_pass(stage) for stage in stages], stages[1]


@pytest.mark.parametrize("name", MODELS)
def test_compiled_is_the_reference(name):
    (written, compiled), _ = both(MODELS[name])
    torch.testing.assert_close(compiled, written, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lower_precisions_lose_no_more_than_the_reference(precision):
    """Every loss and gradient is as near to float64's as what it is compared with."""
    (written, compiled), _ = both(MODELS["delta"], precision=precision)
    exact = one_pass(small_stage(MODELS["delta"]))
    rounding = {"fp32": 1e-6, "bf16": 1e-2}[precision]
    for reference, found, truth in zip(written, compiled, exact, strict=True):
        assert (found - truth).norm() <= 1.25 * (reference - truth).norm() + rounding * truth.norm()


@pytest.mark.parametrize("recompute", ["selective", "layer"])
def test_recomputed(recompute):
    """A recomputation goes through the compiled pieces as well: it must keep what the first pass kept."""
    (written, compiled), _ = both(MODELS["gated_deltanet"], recompute=recompute)
    torch.testing.assert_close(compiled, written, rtol=1e-10, atol=1e-11)


def test_nothing_is_compiled_again():
    """Nor for a pass without a graph, whatever its shape."""
    _, stage = both(MODELS["delta"])
    before = counters["stats"]["unique_graphs"]
    for _ in range(3):
        one_pass(stage)
    assert before and counters["stats"]["unique_graphs"] == before
    with torch.no_grad():
        for lanes in range(1, 4):
            tokens = torch.zeros(lanes, 1, 6, dtype=torch.int64)
            stage(tokens, stage.empty_memory(lanes, CPU), torch.zeros(lanes, 1, dtype=torch.bool), tokens)
    assert counters["stats"]["unique_graphs"] == before
    one_pass(stage, probes=False)  # shapes that are new, with a graph
    assert counters["stats"]["unique_graphs"] > before


def test_damage_to_a_plain_form_would_show(monkeypatch):
    def damaged(q, k, dtype, blind, unwritten):
        return tuple(1.001 * x for x in plain_phi_of(q, k, dtype, blind, unwritten))

    monkeypatch.setattr("model.compiling.plain_phi_of", damaged)
    (written, compiled), _ = both(MODELS["delta"])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(compiled, written, rtol=1e-10, atol=1e-11)


def test_damage_to_a_piece_of_cuda_would_show(monkeypatch):
    def damaged(share, read, local):
        return plain_mix(1.001 * share, read, local)

    monkeypatch.setattr("model.compiling.plain_mix", damaged)
    (written, compiled), _ = both(MODELS["delta"])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(compiled, written, rtol=1e-10, atol=1e-11)


def test_phi_goes_back_through_zero_as_elu_does():
    x = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64).view(1, 1, 1, 1, 1, 3).requires_grad_()
    found, expected = (torch.autograd.grad(f(x, None, x.dtype)[0].sum(), x) for f in (plain_phi_of, phi_of))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_without_a_graph_a_piece_is_what_was_written():
    piece = Piece(lambda x: x + 2, plain_for_test)
    x = torch.zeros(1, requires_grad=True)
    with torch.no_grad():
        assert piece(x) == 2
    assert piece(x) == 1


def plain_for_test(x):
    return x + 1


def test_a_compiler_that_is_missing_is_refused(monkeypatch):
    torch.compiler.reset()
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    monkeypatch.setattr("torch._inductor.config.force_disable_caches", True)
    with pytest.raises(ValueError, match=r"model\.compile = true: .*on cpu.*model\.compile=false"):
        check_compiler(CPU)


def test_flex_attention_is_for_cuda():
    stage = small_stage(small_config("none"))
    with pytest.raises(ValueError, match=r"model\.packed_attention = flex: .*on cpu, or model\.packed_attention=auto"):
        compile_block_attention(stage, CPU)
