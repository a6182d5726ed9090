"""support/verdict.py: the paired test, Holm's adjustment, and when a ticket counts as winning."""
import math

import numpy as np
import pytest
import scipy.stats

from support.verdict import detectable, holm, t_test, verdict, verdicts


def table(ticket, reinit=(14, 15, 16.5), random=(20, 21, 19)):
    return {"dense": dict(enumerate((10, 11, 12))), "ticket": dict(enumerate(ticket)),
            "reinit": dict(enumerate(reinit)), "random": dict(enumerate(random))}


def test_t_test_is_scipys():
    differences = np.random.default_rng(0).normal(-0.3, 1, 7)
    p, (mean, low, high) = t_test(differences, 0.05)
    expected = scipy.stats.ttest_1samp(differences, 0, alternative="less")
    assert p == pytest.approx(expected.pvalue, rel=1e-9) and mean == pytest.approx(differences.mean())
    assert high == pytest.approx(expected.confidence_interval(0.95).high, rel=1e-9)  # one-sided 95 %
    assert low == pytest.approx(2 * mean - high)


@pytest.mark.parametrize("value, p", [(-1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_without_spread_the_sign_decides(value, p):
    assert t_test(np.full(4, value), 0.05) == (p, (value, value, value))


def test_verdict():
    good = verdict(table((10.1, 11.0, 12.1)))
    assert good.winning and good.n == 3 and good.p == max(good.tests.values()) < 0.05
    assert str(good).startswith("winning (3 seeds, p=")
    mean, low, high = good.effects["reinit"]
    assert low < mean < high < 0
    # each of the three conditions can fail alone
    for bad, word in ((table((13, 14, 15.2), (24, 25, 26.5), (30, 31, 29)), "dense"),
                      (table((10.1, 11, 12.1), reinit=(10, 11.2, 12)), "reinit"),
                      (table((10.1, 11, 12.1), random=(10, 11.2, 12)), "random mask")):
        found = verdict(bad)
        failed = [test for test, p in found.tests.items() if p >= 0.05]
        assert found.winning is False and len(failed) == 1 and failed[0].endswith(word)
        assert str(found).startswith("not shown to win") and failed[0] in str(found)
    d, t = np.array([10, 11, 12]), np.array([10.1, 11.0, 12.1])
    assert good.tests["within 10 % of dense"] == pytest.approx(
        scipy.stats.ttest_rel(t, 1.1 * d, alternative="less").pvalue)


def test_margin_and_alpha_decide():
    values = table((10.1, 11.0, 12.1))
    assert verdict(values, margin=0.01).winning is False and verdict(values, alpha=0.001).winning is False
    assert verdict(values, margin=0.2).p <= verdict(values, margin=0.1).p


def test_not_shown_says_what_would_have_been_found():
    """The gap that a test of 3 seeds finds in 80 % of draws, by simulation; scaled by the spread seen."""
    effect, rng = detectable(3, 0.05), np.random.default_rng(0)
    draws = rng.normal(-effect, 1, (20_000, 3))
    p = scipy.stats.ttest_1samp(draws, 0, axis=1, alternative="less").pvalue
    assert np.mean(p < 0.05) == pytest.approx(0.8, abs=0.012)  # four standard errors
    found = verdict(table((10.1, 11, 12.1), reinit=(10, 11.2, 12)))
    gap = effect * np.std(np.array([10.1, 11, 12.1]) - [10, 11.2, 12], ddof=1)
    assert found.gaps["better than reinit"] == pytest.approx(gap)
    assert f"better than reinit (p={found.tests['better than reinit']:.3g}; needs a gap of {gap:.3g} for" in str(found)
    assert "power of 80%" in str(found) and "needs" not in str(verdict(table((10.1, 11.0, 12.1))))


def test_verdict_is_paired_by_seed():
    values = table((10.1, 11.0, 12.1))
    shuffled = {arm: dict(reversed(list(seeds.items()))) for arm, seeds in values.items()}
    assert verdict(shuffled).p == verdict(values).p
    values["dense"][7] = 1.0  # a seed the others lack
    assert verdict(values).n == 3
    listed = {arm: [seeds[s] for s in (0, 1, 2)] for arm, seeds in values.items()}
    assert verdict(listed).p == verdict(values).p  # lists are in the order of the seeds


def test_no_verdict():
    two = {arm: {0: v[0], 1: v[1]} for arm, v in table((10, 11, 12)).items()}
    assert str(verdict(two)) == "no verdict (2 seeds; it needs 3)" and verdict(two).winning is None
    diverged = verdict(table((10, 11, math.nan)))
    assert diverged.winning is None and "ticket" in str(diverged)
    with pytest.raises(ValueError, match="random"):
        verdict({arm: v for arm, v in two.items() if arm != "random"})
    equal = verdict(dict(dense=[2.0] * 3, ticket=[1.0] * 3, reinit=[3.0] * 3, random=[1.0] * 3))
    assert equal.p == 1.0  # no spread and no difference: not better than random


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_several_sparsities_are_a_family():
    """What has no verdict counts in the family: losing a diverged run must not help the others."""
    single = dict.fromkeys(("dense", "ticket", "reinit", "random"), [1.0])
    found = verdicts({0.5: table((10.1, 11.0, 12.1)), 0.9: table((13, 14, 15.2)), 0.8: single})
    assert found[0.5].p_holm == pytest.approx(3 * found[0.5].p) and "Holm" in str(found[0.5])
    assert found[0.8].p_holm is None and found[0.8].winning is None
    assert found[0.5].winning == (3 * found[0.5].p < 0.05)
