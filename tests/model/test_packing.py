"""Documents that share segments are each the document by itself: the stage against the dense model, piece by piece."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_upper_left

from model import decoder
from model.layers import block_attention as flex
from model.layers import packing
from model.layers.block_attention import block_attention
from model.layers.packed_attention import packed_attention
from model.layers.statistics import read_variation
from model.rules import RULES
from model.rules.state import LocalContext
from tests.model import naive
from tests.model.build import random_memory, random_tokens, small_config, small_stage

pytestmark = pytest.mark.usefixtures("one_process")

S, T = 6, 4
COMBINED = ("none+sliding", "delta+sliding", "gated_deltanet+sliding", "deltanet+convolution")
COMBINED += ("linear+convolution+sliding", "delta+convolution+sliding", "gated_deltanet+wide")
LANES = {
    "goes on, ends inside, one more inside": [8, 10],
    "at a segment's first token, and at its last": [0, 11, 12],
    "several in one segment, short last pieces": [7, 8, 10, 22, 23],
    "no start": [],
    "a border, then inside of the same segment": [6, 9],
}
"""Of every lane of the window, at which of its 24 tokens documents start."""


def window_starts() -> Tensor:
    starts = torch.zeros(len(LANES), T * S, dtype=torch.bool)
    for lane, places in enumerate(LANES.values()):
        starts[lane, places] = True
    return starts.view(-1, T, S)


def carried(stage, lanes: int, seen: bool) -> list:
    """A memory that was written to; with a previous segment of which every lane sees another part."""
    memory = random_memory(stage, lanes)
    for state in memory:
        if "local_seen" in getattr(state, "_fields", ()):
            state.local_seen.data.copy_((1 - torch.arange(lanes) / S if seen else torch.zeros(lanes)).view(-1, 1, 1))
    return memory


def of_lane(state, lane: int, length: int):
    """The state of one lane as the dense model has it: of the previous segment only what is seen."""
    if state is None:
        return None
    own = [x[lane] for x in state]
    if "local_seen" in state._fields:
        *own, key, value, seen = own
        count = round(seen[0, 0].item() * length)
        own += [key[:, length - count :], value[:, length - count :], torch.ceil(seen)]
    return own


class OneByOne:
    """Every document of a window by itself, in the pieces that the segments cut it into: losses `[b, t, s]`, those of
    the probes, and what the last one leaves, per lane and layer."""

    def __init__(self, stage, tokens, labels, starts, memory, probes=None, asked=None):
        weights, config = dict(stage.named_parameters()), stage.config
        empty = stage.empty_memory(1, torch.device("cpu"))
        self.losses, self.probe_losses, self.memory = torch.zeros(tokens.shape, dtype=torch.float64), [], []

        def run(tokens, labels, state, new: bool):
            state = [of_lane(x, 0, S) for x in empty] if new else state
            return naive.token_losses(config, weights, tokens[None], state, torch.tensor([new]), labels[None])

        rows = []
        for lane in range(len(tokens)):
            state = [of_lane(x, lane, S) for x in memory]
            row = []
            for i in range(tokens.shape[1]):
                if probes is not None:
                    for j in (probes[lane] == i).nonzero().flatten().tolist():
                        found, _ = run(*(x[lane, j] for x in asked), state, bool(starts[lane, i, 0]))
                        self.probe_losses.append((lane, j, found[0]))
                cuts = sorted({0, S, *starts[lane, i].nonzero().flatten().tolist()})
                for first, last in zip(cuts[:-1], cuts[1:], strict=True):
                    part = slice(first, last)
                    new = bool(starts[lane, i, first])
                    found, state = run(tokens[lane, i, part], labels[lane, i, part], state, new)
                    row.append(found[0])
            rows.append(torch.cat(row).view(-1, S))
            self.memory.append(state)
        self.losses = torch.stack(rows)


def assert_close(found, expected, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, msg=lambda text: f"{what}: {text}")


def compare(config, *, probes: bool = False, seen: bool = True, **options) -> None:
    """Losses, what is carried out, and gradients of all parameters and of what is carried in."""
    stage = small_stage(config, **options)
    starts, lanes = window_starts(), len(LANES)
    tokens, labels = (random_tokens(lanes, T, S, seed=seed) for seed in (0, 1))
    memory = carried(stage, lanes, seen)
    asked = place = None
    given = tokens, labels
    if probes:
        asked = [random_tokens(lanes, 2, S, seed=seed) for seed in (2, 3)]
        place = torch.tensor([[1, 2], [0, 3], [1, 2], [0, 3], [1, 2]])
        given = [torch.cat([x, y], dim=1) for x, y in zip(given, asked, strict=True)]
    output = stage(given[0], memory, starts[:, :, 0], given[1], probes=place, starts=starts)
    expected = OneByOne(stage, tokens, labels, starts, memory, place, asked)
    assert_close(output.token_loss[:, :T], expected.losses, "losses")
    weights = torch.randn(output.token_loss.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    of_found, of_expected = (output.token_loss * weights).sum(), (expected.losses * weights[:, :T]).sum()
    for lane, j, losses in expected.probe_losses:
        assert_close(output.token_loss[lane, T + j], losses, f"probe {j} of lane {lane}")
        of_expected = of_expected + (losses * weights[lane, T + j]).sum()
    generator = torch.Generator().manual_seed(10)
    for layer, state in enumerate(output.memory):
        for lane in range(lanes):
            found = of_lane(state, lane, S) or []
            for field, (x, y) in enumerate(zip(found, expected.memory[lane][layer] or [], strict=True)):
                assert_close(x, y, f"carried out of layer {layer}, lane {lane}: {field}")
                factors = torch.randn(x.shape, generator=generator, dtype=torch.float64)
                if x.requires_grad:
                    of_found = of_found + (x * factors).sum()
                    of_expected = of_expected + (y * factors).sum()
    names = dict(stage.named_parameters())
    names |= {
        f"carried into layer {i}: {field}": x
        for i, state in enumerate(memory)
        for field, x in ({} if state is None else state._asdict()).items()
        if field != "local_seen"
    }
    found, wanted = (
        torch.autograd.grad(loss, list(names.values()), allow_unused=True) for loss in (of_found, of_expected)
    )
    for name, x, y in zip(names, found, wanted, strict=True):
        zero = torch.zeros_like(names[name])
        assert_close(zero if x is None else x, zero if y is None else y, name)


@pytest.mark.parametrize("rule", [*RULES, *COMBINED])
def test_a_packed_window_is_its_documents_one_by_one(rule):
    compare(small_config(rule, "none" if rule.startswith("none") else "sigmoid"))


@pytest.mark.parametrize("rule", [*COMBINED, *(pytest.param(rule, marks=pytest.mark.slow) for rule in RULES)])
def test_where_the_host_knows_nothing_of_the_starts(rule, monkeypatch):
    """A mask for every segment, and probes; without a gate, and what an empty memory gives is mixed in."""
    monkeypatch.setattr(packing, "host_knows", lambda device: False)
    compare(small_config(rule, skip_empty=False, qkv_bias=True, qk_norm=True), probes=True)


@pytest.fixture
def flex_goes_back(monkeypatch):
    """FlexAttention as PyTorch writes it out, which has a backward pass on a CPU: it is refused for the compiler's."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("rule", ["none", "none+sliding", "delta+sliding"])
def test_by_flex_attention(rule, flex_goes_back):
    """With probes and query heads that share keys. The window of six tokens a segment is one block."""
    compare(replace(small_config(rule, skip_empty=False), packed_attention="flex"), probes=True)


@pytest.mark.parametrize("sliding", [False, True])
def test_blocks_are_the_mask(sliding, monkeypatch, flex_goes_back):
    """In segments of three blocks, the last one short: documents of some hundred tokens leave blocks out."""
    b, t, n, r, s, d = 1, 2, 2, 3, 300, 4
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    starts = torch.zeros(b, t, s, dtype=torch.bool)
    starts[0, 0, 140] = starts[0, 1, 280] = True
    state = LocalContext(random(b, n, s, d), random(b, n, s, d), torch.full((b, n, 1), 0.1)) if sliding else None
    heads = [random(b * (t + 1) * n, *rows, d) for rows in ((r, s), (1, 2 * s if sliding else s))]
    heads.append(random(*heads[1].shape))
    probes = torch.tensor([[1]])
    monkeypatch.setattr(packing, "host_knows", lambda device: False)
    arguments = starts, probes, state, torch.float64, None
    mask, blocks = (packing.packing_of(*arguments, attend).mask for attend in (None, block_attention))
    assert mask.blocks is None and blocks.bias is None
    assert_close(packed_attention(*heads, blocks), packed_attention(*heads, mask), "attention")
    keys = mask.bias.shape[-1]
    seen = F.pad(mask.bias == 0, (0, -keys % 128, 0, -s % 128)).unflatten(3, (-1, 128)).unflatten(2, (-1, 128))
    counted = blocks.blocks.mask.kv_num_blocks + blocks.blocks.mask.full_kv_num_blocks
    assert torch.equal(counted, seen.any(dim=(3, 5)).sum(dim=-1))


def test_a_block_mask_off_by_one_is_seen(monkeypatch, flex_goes_back):
    written = flex.create_block_mask

    def broken(sees, *sizes, **options):
        return written(lambda b, h, query, key: sees(b, h, query, key + (key < query)), *sizes, **options)

    monkeypatch.setattr(flex, "create_block_mask", broken)
    with pytest.raises(AssertionError, match="^losses: "):
        compare(replace(small_config("none+sliding", "none"), packed_attention="flex"))


def no(x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def off_by_one(mask):
    """In every segment with a start inside the first one a token later."""
    runs = []
    for segments, (first, *others) in mask.runs:
        if others and others[0].length > 1:
            others[0] = others[0]._replace(length=others[0].length - 1)
            first = first._replace(length=first.length + 1)
        runs.append(packing.Run(segments, (first, *others)))
    return mask._replace(runs=tuple(runs))


def one_more_seen(mask):
    """Where a part of the segment before is seen, one token more of it."""
    runs = [
        (segments, [x._replace(before=x.before + (0 < x.before < S)) for x in pieces]) for segments, pieces in mask.runs
    ]
    return mask._replace(runs=tuple(packing.Run(segments, tuple(pieces)) for segments, pieces in runs))


BROKEN = {
    "pieces off by one": lambda _, mask: {"mask": off_by_one(mask)},
    "one token more of the last segment is seen": lambda _, mask: {"mask": one_more_seen(mask)},
    "a start does not clear": lambda borders, _: {"borders": borders._replace(cut=no(borders.cut))},
    "a document that ends is written": lambda borders, _: {
        "borders": borders._replace(unwritten=no(borders.unwritten))
    },
    "a document that starts reads": lambda borders, _: {"borders": borders._replace(blind=no(borders.blind))},
    "convolutions look across a start": lambda borders, _: {"borders": borders._replace(piece=no(borders.piece))},
    "all of the last segment is seen": lambda _, mask: {"mask": mask._replace(seen=torch.ones_like(mask.seen))},
}


@pytest.mark.parametrize("how", BROKEN)
def test_what_is_broken_is_seen(how, monkeypatch):
    def broken(*arguments):
        found = packing.packing_of(*arguments)
        return found._replace(**BROKEN[how](found.borders, found.mask))

    monkeypatch.setattr(decoder, "packing_of", broken)
    with pytest.raises(AssertionError):
        compare(small_config("delta+convolution+sliding"))


def test_a_mask_off_by_one_is_seen(monkeypatch):
    def broken(*arguments):
        found = packing.packing_of(*arguments)
        return found._replace(mask=found.mask._replace(bias=found.mask.bias.roll(1, dims=-1)))

    monkeypatch.setattr(packing, "host_knows", lambda device: False)
    monkeypatch.setattr(decoder, "packing_of", broken)
    with pytest.raises(AssertionError):
        compare(small_config("none+sliding", "none"))


def test_a_piece_aligned_at_the_top_left_is_seen(monkeypatch):
    """With a segment before it, a piece's last token sees all of its keys, not its first token the first key alone."""
    monkeypatch.setattr("torch.nn.attention.bias.causal_lower_right", causal_upper_left)
    with pytest.raises(AssertionError):
        compare(small_config("none+sliding", "none"))


def test_segments_that_are_cut_alike_are_attended_to_at_once():
    starts = torch.zeros(1, 5, S, dtype=torch.bool)
    starts[0, 2:4, 4] = starts[0, 4, 0] = starts[0, 4, 1] = True
    whole, cut = (packing.Piece(S, 0),), (packing.Piece(4, 0), packing.Piece(2, 0))
    found = packing.packing_of(starts, None, None, torch.float64).mask.runs
    assert found == ((2, whole), (2, cut), (1, (packing.Piece(1, 0), packing.Piece(S - 1, 0))))


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_statistics_are_of_tokens_that_read(precision):
    stage = small_stage(small_config("delta+sliding", "sigmoid"), precision=precision)
    starts, tokens = window_starts(), random_tokens(len(LANES), T, S)
    memory = carried(stage, len(LANES), seen=True)
    found = stage(tokens, memory, starts[:, :, 0], tokens, starts=starts, statistics=True).statistics
    assert all(x.isfinite().all() for measured in found.values() for x in measured)
    read = torch.randn(2, 3, 4, S, 5, generator=torch.Generator().manual_seed(1))
    blind = torch.arange(S).expand(2, 3, S) > 2
    read[..., 3:, :] = 0
    torch.testing.assert_close(read_variation(read, blind), read_variation(read[..., :3, :]))
