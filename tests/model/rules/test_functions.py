"""Operations of the memory rules whose backward pass is written out: against finite differences and plain forms, in
float64. What they add up to is compared with the token-by-token rules in test_memory.py."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from model.rules.base import Reads
from model.rules.borders import Borders
from model.rules.channel_blocks import decayed_products, solve_channel_blocks
from model.rules.convolution import _Convolution
from model.rules.delta_blocks import block_length, solve_blocks
from model.rules.feature_maps import phi, phi_of, plain_phi_of, plain_unit_length_of, unit_length_of
from model.rules.gated_deltanet import LogDecay
from model.rules.gdn2 import _Gated
from model.rules.normalized import _Read, _Stored
from model.rules.scan import Blocks, block_pairs, compose_neighbours, scan_blocks, scan_pairs, scan_sums

B, T, N, R, S, D = 2, 3, 2, 2, 4, 3
RESET = torch.tensor([[False, False, True], [True, False, False]])
BORDERS = Borders(RESET)


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def plain_scan(initial, pairs, reset):
    """X <- T X + C one by one."""
    before, state = [], initial
    for t in range(pairs.shape[1]):
        state = state.masked_fill(reset[:, t].view(-1, 1, 1, 1), 0)
        before.append(state)
        write, transition = pairs[:, t, ..., : initial.shape[-1]], pairs[:, t, ..., initial.shape[-1] :]
        state = transition @ state + write
    return torch.stack(before, dim=1), state


@pytest.mark.parametrize("columns", [D, D + 2])
def test_scan(columns):
    initial, pairs = draw(B, N, D, columns), draw(B, T, N, D, columns + D)
    for found, expected in zip(scan_pairs(initial, pairs, BORDERS), plain_scan(initial, pairs, RESET), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    assert gradcheck(lambda *x: scan_pairs(*x, BORDERS), (initial, pairs))
    assert gradcheck(lambda *x: scan_sums(*x, BORDERS), (draw(B, N, D), draw(B, T, N, D)))


def test_scan_clears_what_overflowed_inside_the_window():
    """Not only the state carried in: what was written before a reset is gone, finite or not."""
    initial, pairs = draw(B, N, D, D), draw(B, T, N, D, 2 * D).detach()
    pairs[0, 1, ..., :D] = torch.inf
    before, after = scan_pairs(initial, pairs.requires_grad_(), BORDERS)
    assert before[0, 2].eq(0).all() and after[0].isfinite().all() and before[1].isfinite().all()
    gradient, of_pairs = torch.autograd.grad(after[0].sum() + before[0, 2].sum(), (initial, pairs))
    assert gradient.eq(0).all() and of_pairs[0, :2, ..., :D].eq(0).all()


@pytest.mark.parametrize("count", [1, 2, 8])
def test_composed_pairs_do_what_their_parts_do(count):
    pairs, state = draw(2, count, D, D + D), draw(1, 1, D, D)
    composed = compose_neighbours(pairs)
    never = torch.zeros(1, count, dtype=torch.bool)
    for lane in range(2):
        _, expected = plain_scan(state, pairs[lane].unsqueeze(0).unsqueeze(2), never)
        found = composed[lane, :, D:] @ state + composed[lane, :, :D]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(compose_neighbours, pairs)


@pytest.mark.parametrize("decays", [0, 1, D], ids=["none", "one", "per row"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [1, 4])
def test_blocks_in_turn_do_what_their_pairs_do(m, gated, decays):
    """The form that a CPU takes, and the one for devices that work on many blocks at once."""
    shape = (B, T, N, m, 2)
    blocks = [draw(*shape, D), draw(*shape) if gated else None, draw(*shape, D + 2 + D)]
    blocks.append(draw(*shape[:-1], decays) if decays else None)
    leaves = [draw(B, N, D, D + 2), *(x for x in blocks if x is not None)]

    def scan(initial, *given):
        given = iter(given)
        return scan_blocks(initial, Blocks(*(None if x is None else next(given) for x in blocks)), BORDERS)

    expected = scan_pairs(leaves[0], compose_neighbours(block_pairs(Blocks(*blocks))), BORDERS)
    for found, one in zip(scan(*leaves), expected, strict=True):
        torch.testing.assert_close(found, one, rtol=1e-12, atol=1e-12)
    assert gradcheck(scan, leaves)


def test_blocks_in_turn_clear_what_overflowed():
    """As `scan_pairs` does, in either direction."""
    initial, left, right = draw(B, N, D, D), draw(B, T, N, 2, 2, D), draw(B, T, N, 2, 2, 2 * D).detach()
    right[0, 1, ..., :D] = torch.inf
    before, after = scan_blocks(initial, Blocks(left, None, right.requires_grad_(), None), BORDERS)
    assert before[0, 2].eq(0).all() and after[0].isfinite().all() and before[1].isfinite().all()
    gradient, of_right = torch.autograd.grad(after[0].sum() + before[0, 2].sum(), (initial, right))
    assert gradient.eq(0).all() and of_right[0, :2, ..., :D].eq(0).all()


@pytest.mark.parametrize("feature", [phi_of, unit_length_of])
@pytest.mark.parametrize("probes", [0, 1])
def test_feature_maps(feature, probes):
    """Together in one buffer and, with probes, apart; or queries alone."""
    q, k = draw(B, T + probes, N, R, S, D), draw(B, T, N, S, D)
    plain = phi if feature is phi_of else lambda x: F.normalize(x, dim=-1)
    for found, x in zip(feature(q, k, torch.float64), (q, k), strict=True):
        torch.testing.assert_close(found, plain(x), rtol=1e-15, atol=1e-15)
        assert found[0, 0, 0].is_contiguous()
    assert feature(q, None, torch.float64)[1] is None
    assert gradcheck(lambda *x: feature(*x, torch.float64), (q, k))
    assert gradcheck(lambda x: feature(x, None, torch.float64)[0], q)


@pytest.mark.parametrize(
    "feature, plain", [(phi_of, plain_phi_of), (unit_length_of, plain_unit_length_of)], ids=["phi", "length"]
)
@pytest.mark.parametrize("probes", [0, 1])
def test_features_of_absent_tokens_are_zero(feature, plain, probes):
    """In both forms, and without a gradient; those of the others are as ever."""
    q, k = draw(B, T + probes, N, R, S, D), draw(B, T, N, S, D)
    blind, unwritten = (draw(B, t, S).detach() > 0 for t in (T + probes, T))
    masks = blind[:, :, None, None, :, None], unwritten[:, :, None, :, None]
    found = feature(q, k, torch.float64, blind, unwritten)
    for x, one, whole, mask in zip(
        found,
        plain(q, k, torch.float64, blind, unwritten),
        feature(q, k, torch.float64),
        masks,
        strict=True,
    ):
        assert torch.equal(x, whole.masked_fill(mask, 0))
        torch.testing.assert_close(one, x, rtol=1e-15, atol=1e-15)
    assert gradcheck(lambda *x: feature(*x, torch.float64, blind, unwritten), (q, k))


@pytest.mark.parametrize("feature", [phi_of, unit_length_of])
def test_feature_maps_of_bfloat16(feature):
    """Mapped in the memory's precision; gradients go back in the one that came."""
    q, k = (x.detach().bfloat16().requires_grad_() for x in (draw(1, 1, 1, R, S, D), draw(1, 1, 1, S, D)))
    mapped = feature(q, k, torch.float32)
    exact = feature(*(x.detach().float().requires_grad_() for x in (q, k)), torch.float32)
    assert all(torch.equal(x, y) and x.dtype == torch.float32 for x, y in zip(mapped, exact, strict=True))
    assert all(x.dtype == torch.bfloat16 for x in torch.autograd.grad(sum(x.sum() for x in mapped), (q, k)))


def test_phi_is_exact_to_the_last_bits():
    """Where ELU + 1 loses all of them: phi(-30) is 1e-13, and has as many digits as any other."""
    x = torch.linspace(-600, 50, 1301, dtype=torch.float64).view(1, 1, 1, 1, 1, -1)
    expected = torch.where(x > 0, x + 1, x.clamp(max=0).exp())
    for found in (phi(x), phi_of(x, None, torch.float64)[0]):
        torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)


def positive(*shape):
    return draw(*shape).detach().abs().add(0.1).requires_grad_()


def test_read():
    z = positive(B, T, N, D).detach()
    z[0, 1] = 0  # nothing stored
    leaves = positive(B, T, N, R, S, D), draw(B, T, N, D, D), z.requires_grad_()
    numerator, normaliser = leaves[0] @ leaves[1].unsqueeze(3), leaves[0] @ leaves[2][:, :, :, None, :, None]
    expected = torch.where(normaliser > 1e-6, numerator / normaliser.clamp_min(1e-6), 0)
    torch.testing.assert_close(_Read.apply(*leaves, 1e-6), expected, rtol=1e-14, atol=1e-14)
    assert not _Read.apply(*leaves, 1e-6)[0, 1].any()
    assert gradcheck(lambda *x: _Read.apply(*x, 1e-6), (leaves[0], leaves[1], positive(B, T, N, D)))


def test_what_delta_takes_off():
    key, value, z = positive(B, T, N, S, D), draw(B, T, N, S, D), positive(B, T, N, D)
    empty = z.detach().clone()
    empty[0, 1] = 0  # nothing stored
    divisor = (key @ empty.unsqueeze(-1)).where(empty.any(dim=-1)[..., None, None], torch.inf)
    expected = torch.cat([value, -key / divisor], dim=-1)
    torch.testing.assert_close(_Stored.apply(key, value, empty, 1e-6), expected, rtol=1e-13, atol=1e-13)
    assert gradcheck(lambda *x: _Stored.apply(*x, 1e-6), (key, value, z))


@pytest.mark.parametrize("decay", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("block", [2, 4, 64])
def test_pairs_of_the_delta_rule(monkeypatch, block, gated, decay):
    """T and C by their definition: the products and sums of (a (I - g k k^T), g k v^T) over the tokens."""
    monkeypatch.setattr("model.rules.delta_blocks.WRITE_BLOCK", block)
    s = 8
    key, value = F.normalize(draw(1, 2, N, s, D), dim=-1).detach().requires_grad_(), draw(1, 2, N, s, D)
    gate = torch.sigmoid(draw(1, 2, N, s)).detach() if gated else None
    log_decay = -draw(1, 2, N, s, seed=5).detach().abs() if decay else None
    identity = torch.eye(D, dtype=torch.float64)
    transition, write = identity.expand(1, 2, N, D, D), torch.zeros(1, 2, N, D, D, dtype=torch.float64)
    for i in range(s):
        k, v = key[..., i, :], value[..., i, :]
        g = 1 if gate is None else gate[..., i, None, None]
        a = 1 if log_decay is None else log_decay[..., i, None, None].exp()
        step = a * (identity - g * k.unsqueeze(-1) * k.unsqueeze(-2))
        transition, write = step @ transition, step @ write + g * k.unsqueeze(-1) * v.unsqueeze(-2)
    found = compose_neighbours(block_pairs(solve_blocks(key, value, gate, log_decay)))
    torch.testing.assert_close(found, torch.cat([write, transition], dim=-1), rtol=1e-12, atol=1e-12)
    gates = {name: x.requires_grad_() for name, x in (("gate", gate), ("log_decay", log_decay)) if x is not None}

    def pairs(key, value, *more):
        given = {"gate": None, "log_decay": None} | dict(zip(gates, more, strict=True))
        return compose_neighbours(block_pairs(solve_blocks(key, value, **given)))

    assert gradcheck(pairs, (key, value, *gates.values()))


def test_segments_are_halved_into_blocks():
    """A power of two of blocks, each at most 64 tokens, or d where that is more; otherwise the segment is one."""
    lengths = {1: 1, 64: 64, 66: 33, 192: 48, 256: 64, 320: 40, 2048: 64, 8192: 64, 65: 65, 100: 50}
    assert {length: block_length(length, 32) for length in lengths} == lengths
    assert block_length(2048, 128) == 128


def plain_convolution(x, tails, taps):
    """Of `[b, t, s, d]` behind `[b, t, width - 1, d]` with taps `[d, width]`, token by token."""
    width, padded = taps.shape[-1], torch.cat([tails, x], dim=2)
    return torch.stack([(padded[:, :, i : i + width] * taps.T).sum(dim=2) for i in range(x.shape[2])], dim=2)


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("s", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("width", [4, 7])
@pytest.mark.parametrize("probes", [None, torch.tensor([[2], [1]])])
def test_convolutions_of_a_window(monkeypatch, s, probes, width, silu):
    monkeypatch.setattr("model.device.CACHE_BLOCK_BYTES", 1)  # 9 tokens: blocks of 4, 4 and 1, or of 7 and 2
    q = draw(B, T + (probes is not None), N, R, s, D)
    k, v, initial = draw(B, T, N, s, D), draw(B, T, N, s, D), draw(B, N, R + 2, width - 1, D)
    taps, reads = draw(N, R + 2, D, width), Reads(probes, detach=False)
    *found, tails, last = _Convolution.apply(q, k, v, initial, taps, BORDERS, reads, silu, None)
    for part, (x, y) in enumerate(((q[:, :T, :, 0], found[0][:, :T, :, 0]), (k, found[1]), (v, found[2]))):
        part = 0 if part == 0 else R + part - 1
        before = torch.stack([tails[:, :T, 1, part]], dim=0)[0]
        expected = plain_convolution(x[:, :, 1], before, taps[1, part])
        torch.testing.assert_close(y[:, :, 1], F.silu(expected) if silu else expected, rtol=1e-13, atol=1e-13)
    if probes is not None:
        before = torch.stack([tails[lane, i, 0, 0] for lane, i in enumerate(probes[:, 0])]).unsqueeze(1)
        expected = plain_convolution(q[:, T:, 0, 0], before, taps[0, 0])
        torch.testing.assert_close(
            found[0][:, T:, 0, 0], F.silu(expected) if silu else expected, rtol=1e-13, atol=1e-13
        )
    assert last.shape == initial.shape

    def outputs(q, k, v, initial, taps):
        *convolved, _, last = _Convolution.apply(q, k, v, initial, taps, BORDERS, reads, silu, None)
        return *convolved, last

    assert gradcheck(outputs, (q, k, v, initial, taps))


@pytest.mark.parametrize("channels", [(), (D,)])
def test_log_decay(channels):
    rate, x = draw(N), draw(B, T, N, S, *channels)
    expected = -rate.exp().view(N, 1, *(1 for _ in channels)) * (1 + x.exp()).log()
    torch.testing.assert_close(LogDecay.apply(rate, x), expected)
    assert gradcheck(LogDecay.apply, (rate, x))


def test_gated():
    x, v = draw(2, 3), draw(2, 3, seed=1)
    torch.testing.assert_close(_Gated.apply(x, v), v / (1 + (-x).exp()))
    assert gradcheck(_Gated.apply, (x, v))


@pytest.mark.parametrize(("gated", "erases"), [(False, True), (True, False)])
@pytest.mark.parametrize(("s", "block"), [(1, 64), (6, 64), (8, 2)])
def test_pairs_of_the_channel_rule(monkeypatch, s, block, gated, erases):
    """T and C by their definition: the products and sums of ((I - g k h^T) Diag(a), g k v^T) over the tokens."""
    monkeypatch.setattr("model.rules.delta_blocks.WRITE_BLOCK", block)
    key, value, log_decay = (draw(1, 1, 1, s, D, seed=seed) for seed in (0, 1, 2))
    log_decay = log_decay.detach().abs().neg_().requires_grad_()
    erase_key, gate = draw(1, 1, 1, s, D, seed=3) if erases else None, draw(1, 1, 1, s) if gated else None
    identity = torch.eye(D, dtype=torch.float64)
    transition, write = identity.expand(1, 1, 1, D, D), torch.zeros(1, 1, 1, D, D, dtype=torch.float64)
    for i in range(s):
        k, v = key[..., i, :], value[..., i, :]
        h = k if erase_key is None else erase_key[..., i, :]
        g = 1 if gate is None else gate[..., i, None, None]
        step = (identity - g * k.unsqueeze(-1) * h.unsqueeze(-2)) @ torch.diag_embed(log_decay[..., i, :].exp())
        transition, write = step @ transition, step @ write + g * k.unsqueeze(-1) * v.unsqueeze(-2)
    given = {"key": key, "erase_key": erase_key, "value": value, "gate": gate, "log_decay": log_decay}
    found = compose_neighbours(block_pairs(solve_channel_blocks(**given)))
    torch.testing.assert_close(found, torch.cat([write, transition], dim=-1), rtol=1e-11, atol=1e-11)
    leaves = {name: x for name, x in given.items() if x is not None}

    def pairs(*leaf):
        changed = given | dict(zip(leaves, leaf, strict=True))
        return compose_neighbours(block_pairs(solve_channel_blocks(**changed)))

    assert gradcheck(pairs, tuple(leaves.values()))


@pytest.mark.parametrize("per_token", [1e-4, 3.0, 200.0])
def test_decayed_products_keep_their_digits(per_token):
    """In float32 to rounding, whatever is forgotten: e^-t overflows for a block of 64 tokens from 1.4 per token on."""
    generator = torch.Generator().manual_seed(0)
    late, early = torch.randn(2, 3, 64, 8, generator=generator)
    total = (-per_token * torch.rand(3, 64, 8, generator=generator)).cumsum(dim=1)
    found = decayed_products(late, early, total)
    exponents = (total.double().unsqueeze(2) - total.double().unsqueeze(1)).clamp_max(0)
    expected = (late.double().unsqueeze(2) * early.double().unsqueeze(1) * exponents.exp()).sum(dim=-1).tril(-1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
