"""The measure of what a memory holds agrees with what is known of the rules."""

from __future__ import annotations

import pytest

from pipeline.benchmarks.capacity import CODES, recalled

SETTINGS = {"sharpness": 1.0, "segment_length": 8, "seed": 3}


def share(rule: str, pairs: int, keys: str = "orthogonal", dim: int = 16, **changes) -> float:
    right, asked = recalled(rule, dim, pairs, keys=keys, **SETTINGS | changes)
    assert asked == 64 * pairs
    return right / asked


def test_a_delta_rule_holds_as_many_orthogonal_pairs_as_it_has_dimensions():
    assert share("deltanet", 16) == 1.0


@pytest.mark.parametrize("segment_length", [1, 5, 32])
def test_written_token_by_token_the_segments_do_not_matter(segment_length):
    assert share("deltanet", 24, "random") == share("deltanet", 24, "random", segment_length=segment_length)


def test_a_decay_of_one_is_no_decay():
    """Steps of `delta_product` before a token's own begin closed here."""
    expected = share("deltanet", 24, "random")
    assert all(share(rule, 24, "random") == expected for rule in ("gated_deltanet", "delta_product", "kda"))


def test_no_rule_holds_four_times_its_rank():
    for rule in ("linear", "delta", "deltanet", "gated_deltanet", "gdn2"):
        assert 1 / CODES < share(rule, 64, "random") < 0.5


def test_what_separates_the_rules():
    # phi is positive everywhere, so keys overlap that are orthogonal without it: one pair is read well, more are not.
    assert share("linear", 1) == 1.0
    assert share("linear", 16) < 0.3
    # In its first segment `delta` is `linear`; later it takes off what the memory already returns.
    assert share("delta", 8) == share("linear", 8)
    assert share("delta", 32, "random", sharpness=3.0) > share("linear", 32, "random", sharpness=3.0)


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="17 orthogonal keys do not fit in 16"):
        share("deltanet", 17)
    with pytest.raises(ValueError, match="valid are random, orthogonal"):
        share("deltanet", 4, "sparse")
