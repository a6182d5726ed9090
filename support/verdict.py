"""What seeds show: paired t tests, Holm's adjustment, and the verdict on a ticket."""
import dataclasses
import math

import numpy as np
from scipy import optimize, stats

from support.words import ARMS, counted

POWER = 0.8  # at which "not shown" says what would have been


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What n seeds show of one sparsity; str(verdict): .answer and .details in one sentence.

    tests: {comparison: one-sided p}; p: the largest; p_holm: adjusted over sparsities. gaps:
    {comparison: the true gap that such a test finds with power POWER}. effects: {arm: (mean of
    ticket - arm, low, high)} at level 1 - 2 alpha. winning: True, False or None.
    """
    n: int
    metric: str
    margin: float
    alpha: float
    tests: dict
    effects: dict
    gaps: dict = dataclasses.field(default_factory=dict)
    p: float | None = None
    p_holm: float | None = None
    why: str = ""

    @property
    def winning(self):
        p = self.p if self.p_holm is None else self.p_holm
        return None if p is None else p < self.alpha

    @property
    def answer(self):
        """What is shown, in a few words."""
        n = counted(self.n, "seed")
        if self.winning is None:
            few = "; it needs 3" if self.n < 3 else ""
            return f"no verdict ({n}{few}{self.why})"
        said = "winning" if self.winning else "not shown to win"
        adjusted = "" if self.p_holm is None else f", Holm {self.p_holm:.3g}"
        return f"{said} ({n}, p={self.p:.3g}{adjusted})"

    @property
    def details(self):
        """Sentences: the differences with their intervals, and what was not shown."""
        level = f"{100 - 200 * self.alpha:.0f} % interval"
        said = [f"ticket - {ARMS[arm]}: {mean:+.4g}, {level} [{low:+.4g}, {high:+.4g}]"
                for arm, (mean, low, high) in self.effects.items()]
        return said + [f"not shown: {test} (p={p:.3g}; needs a gap of {self.gaps[test]:.3g} for a "
                       f"power of {POWER:.0%} at this spread)"
                       for test, p in self.tests.items() if not p < self.alpha]

    def __str__(self):
        return "; ".join([self.answer, *self.details])


def verdict(table, margin=0.10, alpha=0.05, metric="fid_domain"):
    """Does the ticket win? An intersection-union test over seeds, paired; lower is better.

    table: {"dense", "ticket", "reinit", "random": {seed: value} or values in the order of seeds}.
    Winning = ticket < (1 + margin) dense, < reinit, < random, each by a one-sided paired t test at
    alpha; p is the largest. No verdict with fewer than 3 common seeds or a value that is not
    finite. ValueError for a missing arm.
    """
    names = "dense", "ticket", "reinit", "random"
    if missing := set(names) - set(table):
        raise ValueError(f"verdict needs the arms {sorted(missing)} too; the table has "
                         f"{sorted(table)}")
    arms = [table[name] if hasattr(table[name], "items") else dict(enumerate(table[name]))
            for name in names]
    seeds = sorted(set.intersection(*map(set, arms)))
    values = np.array([[arm[seed] for seed in seeds] for arm in arms], float)  # (4, n)
    broken = [name for name, row in zip(names, values) if not np.isfinite(row).all()]
    known = dict(n=len(seeds), metric=metric, margin=margin, alpha=alpha)
    if len(seeds) < 3 or broken:  # leaving a diverged run out would flatter its arm
        why = f"; {', '.join(ARMS[name] for name in broken)} not finite" if broken else ""
        return Verdict(**known, tests={}, effects={}, why=why)
    dense, ticket, reinit, random = values
    gaps = {f"within {100 * margin:g} % of dense": ticket - (1 + margin) * dense,
            "better than reinit": ticket - reinit,
            "better than random mask": ticket - random}
    tests = {name: t_test(gap, alpha)[0] for name, gap in gaps.items()}
    least = detectable(len(seeds), alpha)
    found = {name: least * float(gap.std(ddof=1)) for name, gap in gaps.items()}
    effects = {name: t_test(ticket - row, alpha)[1] for name, row in zip(names, values)
               if name != "ticket"}
    return Verdict(**known, tests=tests, effects=effects, gaps=found, p=max(tests.values()))


def detectable(n, alpha):
    """The true mean, in standard deviations of the differences, that a one-sided paired t test of
    n seeds finds with power POWER."""
    limit = stats.t.ppf(1 - alpha, n - 1)

    def lack(effect):
        return POWER - stats.nct.sf(limit, n - 1, effect * math.sqrt(n))
    return float(optimize.brentq(lack, 0, 100))


def t_test(differences, alpha):
    """(one-sided p that the mean of differences [n >= 2] is below 0, (mean, low, high)); the
    interval is at 1 - 2 alpha."""
    n, mean = len(differences), float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    # without any spread the sign decides
    p = float(stats.t.cdf(mean / error, n - 1)) if error else float(mean >= 0)
    half = float(stats.t.ppf(1 - alpha, n - 1)) * error
    return p, (mean, mean - half, mean + half)


def verdicts(tables, **options):
    """{sparsity: table (see verdict)} to {sparsity: Verdict}, with Holm's p over sparsities.

    One without a verdict stays in the family with p = 1: losing a diverged run must not help.
    """
    found = {sparsity: verdict(table, **options) for sparsity, table in tables.items()}
    adjusted = holm([1.0 if one.p is None else one.p for one in found.values()])
    return {sparsity: one if one.p is None else dataclasses.replace(one, p_holm=p)
            for (sparsity, one), p in zip(found.items(), adjusted)}


def holm(pvalues):
    """Holm's step-down adjustment of a list of p-values, in the same order."""
    adjusted, running = [0.0] * len(pvalues), 0.0
    for rank, i in enumerate(sorted(range(len(pvalues)), key=pvalues.__getitem__)):
        running = max(running, min(1.0, (len(pvalues) - rank) * pvalues[i]))
        adjusted[i] = running
    return adjusted
