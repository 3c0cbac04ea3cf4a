"""Choosing tokens: greedy, and the distribution after temperature, top-k and top-p."""

import pytest
import torch

from pipeline.inference.sampling import NO_TOKEN, Sampling, choose, distribution

LOGITS = torch.tensor([0.5, 3.0, -1.0, 2.0, 2.5])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one(sampling: Sampling, g: torch.Generator) -> int:
    """What a lane alone gets."""
    return choose(LOGITS[None], sampling, [g]).item()


def test_greedy_is_the_largest_and_draws_nothing():
    g = generator()
    assert one(Sampling(), g) == 1
    assert torch.rand((), generator=g) == torch.rand((), generator=generator())


def test_temperature_only_is_the_softmax():
    probabilities, tokens = distribution(LOGITS, Sampling(temperature=0.7))
    expected = torch.softmax(LOGITS.double() / 0.7, dim=0)
    torch.testing.assert_close(probabilities, expected[tokens])
    assert sorted(tokens.tolist()) == list(range(5))


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(1.0, top_k=2), [1, 4]),
        (Sampling(1.0, top_k=99), [1, 4, 3, 0, 2]),
        # softmax: token 1 has 0.48, 4 has 0.29, 3 has 0.18
        (Sampling(1.0, top_p=0.48), [1]),
        (Sampling(1.0, top_p=0.5), [1, 4]),
        (Sampling(1.0, top_p=0.9), [1, 4, 3]),
        (Sampling(1.0, top_p=1e-9), [1]),
        # of the two that top-k leaves, the first has 0.62
        (Sampling(1.0, top_k=2, top_p=0.6), [1]),
        # flatter: the nucleus grows
        (Sampling(1.0, top_p=0.6), [1, 4]),
        (Sampling(5.0, top_p=0.6), [1, 4, 3]),
    ],
)
def test_what_top_k_and_top_p_keep(sampling, kept):
    probabilities, tokens = distribution(LOGITS, sampling)
    assert tokens.tolist() == kept
    assert float(probabilities.sum()) == pytest.approx(1)
    expected = torch.softmax(LOGITS.double() / sampling.temperature, dim=0)[kept]
    torch.testing.assert_close(probabilities, expected / expected.sum())


@pytest.mark.parametrize("temperature", [1e-310, 1e-300, 5e-324, 1e-9])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    probabilities, tokens = distribution(LOGITS, Sampling(temperature))
    assert tokens[0] == 1 and float(probabilities[0]) == 1.0
    assert one(Sampling(temperature), generator()) == 1


@pytest.mark.parametrize("temperature", [1e12, 1e308])
def test_a_very_large_temperature_draws_evenly(temperature):
    probabilities, _ = distribution(LOGITS, Sampling(temperature))
    torch.testing.assert_close(probabilities, torch.full((5,), 0.2, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"top_k": 5}, {"top_p": 0.9}, {"top_k": 1, "top_p": 0.5}])
def test_top_k_and_top_p_want_a_temperature(options):
    with pytest.raises(ValueError, match="top-[kp] .* but temperature 0 draws nothing"):
        Sampling(**options)


def test_draws_follow_the_distribution():
    sampling, g = Sampling(temperature=1.3, top_k=4), generator(3)
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[one(sampling, g)] += 1
    probabilities, tokens = distribution(LOGITS, sampling)
    assert counts[2] == 0
    torch.testing.assert_close(counts[tokens].double() / 4000, probabilities, atol=0.03, rtol=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_lanes_without_finite_scores_get_no_token(temperature, bad):
    logits = torch.stack([LOGITS, LOGITS.flip(0), LOGITS])
    logits[1, 2] = bad
    found = choose(logits, Sampling(temperature), [generator(i) for i in range(3)]).tolist()
    assert found[1] == NO_TOKEN
    assert [found[0], found[2]] == [one(Sampling(temperature), generator(i)) for i in (0, 2)]


def test_the_seed_decides():
    sampling = Sampling(temperature=2.0)
    drawn = [[one(sampling, g) for _ in range(20)] for g in (generator(1), generator(1), generator(2))]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    "settings, name",
    [({"temperature": -1}, "temperature"), ({"top_k": 0}, "top-k"), ({"top_p": 0}, "top-p"), ({"top_p": 1.1}, "top-p")],
)
def test_settings_out_of_range_are_refused(settings, name):
    with pytest.raises(ValueError, match=name):
        Sampling(**settings)
