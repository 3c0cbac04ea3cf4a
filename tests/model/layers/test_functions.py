"""The hand-written autograd functions of a layer against their naive forms: values, gradients, what is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from model.layers.heads import join_heads, split_heads
from model.layers.mixing import mix
from model.layers.mlp import silu_product
from model.layers.norm import rms_norm
from model.layers.rotary import RotaryTables, rotary_table, rotate


def draw(*shape, seed=0, dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def naive_norm(x, weight, epsilon):
    return x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt() * weight


def naive_rotate(x, table):
    cos, sin = (part[..., part.shape[-1] // 2 :] for part in table)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def naive_heads(qkv, table):
    q, k, v = qkv.permute(1, 2, 3, 0, 4).split((qkv.shape[3] - 2, 1, 1), dim=2)
    local = [x.flatten(0, 1) for x in (naive_rotate(q, table), naive_rotate(k, table), v)]
    return *local, q, k.squeeze(2), v.squeeze(2)


def naive_mix(share, read, local):
    mixed = share * read + (1 - share) * local.view(read.shape)
    return mixed.permute(4, 0, 1, 2, 3, 5).flatten(3).flatten(1, 2)


TABLE = rotary_table(torch.arange(3), 4, 100.0, dtype=torch.float64)
QKV = (3, 2, 2, 4, 4)  # s, B, n, r + 2, d
SHARES = {"head": (1, 1, 2, 2, 1, 1), "present": (1, 2, 2, 2, 1, 1), "token": (1, 2, 2, 2, 3, 1)}


def functions():
    yield "norm", lambda x, w: rms_norm(x, w, 1e-3), lambda x, w: naive_norm(x, w, 1e-3), [(2, 3, 4), (4,)]
    strided = (3, 2, 4), (2, 4)
    yield (
        "norm of heads",
        lambda x, w: rms_norm(x.transpose(0, 1), w[:, None, :].expand(2, 3, 4), 1e-3),
        lambda x, w: naive_norm(x.transpose(0, 1), w[:, None, :], 1e-3),
        strided,
    )
    yield "rotate", lambda x: rotate(x, TABLE), lambda x: naive_rotate(x, TABLE), [(2, 3, 4)]
    yield "silu", silu_product, lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1], [(2, 3, 8)]
    yield "heads", lambda x: split_heads(x, TABLE, memory=True), lambda x: naive_heads(x, TABLE), [QKV]
    yield "local heads", lambda x: split_heads(x, TABLE, memory=False)[:3], lambda x: naive_heads(x, TABLE)[:3], [QKV]
    for name, shape in SHARES.items():
        yield f"mix {name}", mix, naive_mix, [shape, (1, 2, 2, 2, 3, 4), (4, 2, 3, 4)]


@pytest.mark.parametrize(("function", "naive", "shapes"), [pytest.param(*f[1:], id=f[0]) for f in functions()])
def test_function_is_the_naive_form(function, naive, shapes):
    inputs = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    as_tuple = lambda found: found if isinstance(found, tuple) else (found,)  # noqa: E731
    found, expected = as_tuple(function(*inputs)), as_tuple(naive(*inputs))
    assert len(found) == len(expected)
    tangents = [draw(*x.shape, seed=9 + i).detach() for i, x in enumerate(expected)]
    gradients = [
        torch.autograd.grad(sum((x * g).sum() for x, g in zip(outputs, tangents, strict=True)), inputs)
        for outputs in (found, expected)
    ]
    torch.testing.assert_close(list(found), list(expected), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(list(gradients[0]), list(gradients[1]), rtol=1e-12, atol=1e-12)
    assert gradcheck(lambda *x: tuple(as_tuple(function(*x))), inputs)


@pytest.mark.parametrize("name", ["norm", "norm of heads", "silu", "heads", "local heads"])
def test_a_function_in_blocks_is_the_function_at_once(name, monkeypatch):
    """As a CPU computes what is larger than its cache: here row by row."""
    _, function, _, shapes = next(f for f in functions() if f[0] == name)
    inputs, results = [draw(*shape, seed=i) for i, shape in enumerate(shapes)], []
    for size in (2**19, 1):
        monkeypatch.setattr("model.device.CACHE_BLOCK_BYTES", size)
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results.append([*outputs, *torch.autograd.grad(sum(x.square().sum() for x in outputs), inputs)])
    torch.testing.assert_close(*results, rtol=1e-13, atol=1e-13)


def test_only_what_reaches_the_loss_has_a_gradient():
    """A head whose output nobody reads, or which the memory alone reads."""
    for wanted in range(6):
        qkv = draw(*QKV)
        outputs = split_heads(qkv, TABLE, memory=True), naive_heads(qkv, TABLE)
        found, expected = (torch.autograd.grad(x[wanted].square().sum(), qkv)[0] for x in outputs)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_heads_are_joined_in_their_order():
    x = torch.arange(2 * 3 * 2 * 5 * 4).view(2, 3, 2, 5, 4)  # [B, n, r, s, d]
    assert torch.equal(join_heads(x.flatten(0, 1), 2), x.permute(3, 0, 1, 2, 4).reshape(5, 2, -1))


def test_a_share_of_zero_is_exactly_local():
    share = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1, 1)
    read, local = draw(1, 2, 1, 2, 3, 4, dtype=torch.float32), draw(2, 2, 3, 4, seed=1, dtype=torch.bfloat16)
    mixed = mix(share, read, local)
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed[:, 0], join_heads(local[:1], 1)[:, 0])
    torch.testing.assert_close(mixed[:, 1].float(), join_heads(read[0, 1], 1)[:, 0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["norm", "rotate", "heads", "mix"])
def test_bfloat16_is_computed_in_float32_and_rounded_once(name):
    table = rotary_table(torch.arange(3), 4, 100.0, dtype=torch.float32)
    read, share = draw(1, 2, 2, 2, 3, 4, dtype=torch.float32), torch.rand(1, 1, 2, 2, 1, 1)
    run = {
        "norm": ((2, 3, 4), lambda x: rms_norm(x, torch.full((4,), 1.7), 1e-3)),
        "rotate": ((2, 3, 4), lambda x: rotate(x, table)),
        "heads": (QKV, lambda x: split_heads(x, table, memory=False)[1]),
        "mix": ((4, 2, 3, 4), lambda x: mix(share, read.detach(), x)),
    }
    shape, function = run[name]
    x = draw(*shape, dtype=torch.bfloat16)
    wide = x.detach().float().requires_grad_()
    low, high = function(x), function(wide)
    assert low.dtype == torch.bfloat16 and torch.equal(low, high.bfloat16())
    tangent = draw(*high.shape, seed=3, dtype=torch.bfloat16).detach()
    (found,), (expected,) = torch.autograd.grad(low, x, tangent), torch.autograd.grad(high, wide, tangent.float())
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.bfloat16())


def test_rotary_tables_are_computed_once_and_usable_after_inference():
    tables = RotaryTables(3, 4, 100.0)
    cpu = torch.device("cpu")
    with torch.inference_mode():
        first = tables.own(cpu, torch.float64)
    assert tables.own(cpu, torch.float64) is first and not first[0].is_inference()
    torch.testing.assert_close(list(first), list(TABLE), rtol=0, atol=0)
    before = rotary_table(torch.arange(-3, 0), 4, 100.0, dtype=torch.float64)
    torch.testing.assert_close(list(tables.before(cpu, torch.float64)), list(before), rtol=0, atol=0)
    assert tables.own(torch.device("meta"), torch.float32)[0].is_meta
