"""Can the verdict of protocol line 7 be trusted, and how many seeds does it need?

    python -m studies.verdict results/mnist/results.csv     # the verdict again, in seconds, from the table
    python -m studies.verdict a/results.csv b/results.csv   # more seeds of the same experiment
    python -m studies.verdict --calibrate                   # false positives and power on made-up data

Made-up data: value[arm, seed] = mean[arm] + 2 u[seed] + e[arm, seed]; u is the luck of the seed, shared by
its arms and sparsities, e the run's own, both standard normal. In 'bad runs' the ticket's e is exponential
(mean 0, sd 1): mostly a little better than its mean, now and then much worse. Effects are in units of the sd
over seeds of the paired difference under test; a test at its boundary should say yes alpha of the time.
"""
import csv
import math
import os

import numpy as np
from scipy import stats

import lth_diffusion as lth
import metrics
from ddpm import atomic, fraction, positive_int

ARMS = {"dense": "dense", "rewind": "ticket", "reinit": "reinit", "random": "random"}  # csv -> verdict
SEEDS, EFFECTS = (3, 5, 10), (0, 0.5, 1, 1.5, 2, 2.5, 3, 4)
IN = 20  # an effect so far inside a boundary that its test always says yes
DENSE, SHARED = 100.0, 2.0  # mean of dense and sd of the seed's luck, in units of the sd of e
CHECKED = 20  # draws of every setting that also go through metrics.verdicts itself


# --- verdicts from files

def read_rows(paths, metric):
    """{(seed, round, arm): row} of the four arms in CSV files. ValueError, one line, for a bad file."""
    rows = {}
    for path in paths:
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                header, *lines = list(csv.reader(file)) or [[]]
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is no table of text: {error}") from error
        if missing := [c for c in ("seed", "round", "arm", "sparsity", metric) if c not in header]:
            raise ValueError(f"{path} has no column {', '.join(missing)}: no results.csv of lth_diffusion.py")
        for line, cells in enumerate(lines, 2):
            row, where = dict(zip(header, cells)), f"{path}, line {line}"
            if row.get("arm") not in ARMS:
                continue
            key = number(row, "seed", where, int), number(row, "round", where, int), row["arm"]
            if key in rows:
                raise ValueError(f"{where}: seed {key[0]} round {key[1]} {key[2]} comes twice; several files "
                                 "must hold different seeds of one experiment")
            rows[key] = row | {name: number(row, name, where) for name in ("sparsity", metric)}
    for name in ("n_samples", "total_weights"):  # FIDs of unequal n do not compare, nor do unequal networks
        if len(found := {row.get(name) for row in rows.values()}) > 1:
            raise ValueError(f"{name} differs ({', '.join(sorted(map(str, found)))}): not one experiment")
    return rows


def number(row, name, where, kind=float):
    """row[name] as a number; a quality may be NaN or infinite, for runs do diverge."""
    try:
        value = kind(row[name])
        if name == "sparsity" and not 0 <= value < 1 or kind is int and value < 0:
            raise ValueError
    except (KeyError, ValueError):
        raise ValueError(f"{where}: {name} is {row.get(name)!r}, not a number that it can be") from None
    return value


def make_tables(rows, metric):
    """{(round, sparsity): {arm: {seed: value}}} of the rounds with every arm, and remarks on the others."""
    tables, remarks, untested = {}, [], {}
    for round in sorted({round for _, round, arm in rows if arm != "dense"}):
        table = {ARMS[arm]: {seed: row[metric] for (seed, r, a), row in rows.items()
                             if (r, a) == (0 if arm == "dense" else round, arm)} for arm in ARMS}
        shares = [row["sparsity"] for (_, r, _), row in rows.items() if r == round]
        if max(shares) - min(shares) > 0.005:
            raise ValueError(f"round {round} is {min(shares):g} and {max(shares):g} sparse: two experiments")
        if absent := [arm for arm in table if not table[arm]]:
            untested.setdefault(", no ".join(absent), []).append(str(round))
            continue
        lost = {s for values in table.values() for s in values} - set.intersection(*map(set, table.values()))
        if lost:  # a run that diverged leaves no row: the reader must know that it was tried
            remarks.append(f"Round {round}: seeds {sorted(lost)} lack an arm and are left out.")
        tables[round, shares[0]] = table
    remarks += [f"Not tested: round {', '.join(rounds)} (no {arms})." for arms, rounds in untested.items()]
    if not tables:
        raise ValueError(" ".join(["no round has all of dense, rewind, reinit, random.", *remarks]))
    return tables, remarks


def judge(args):
    """The text to print: a table of the three tests at every sparsity, then the verdicts in words."""
    rows = read_rows(args.tables, args.metric)
    (tables, remarks), lines, said = make_tables(rows, args.metric), [], []
    found = metrics.verdicts(tables, margin=args.margin, alpha=args.alpha, metric=args.metric)
    for (round, share), one in found.items():
        lines += [[round, f"{100 * share:.1f} %", one.n, test, *effect, p]
                  for (test, p), effect in zip(one.tests.items(), one.effects.values())]
        means = ", ".join(f"{a} {np.mean(list(v.values())):.4g}" for a, v in tables[round, share].items())
        said.append(f"At {100 * share:.1f} % sparsity {args.metric} is {means}; {one}.")
    header = ["round", "pruned", "seeds", "test", "ticket - other", "low", "high", "p"]
    n = next(iter(rows.values())).get("n_samples") or "unknown"
    family = len(found)  # those without a verdict too, at p = 1
    parts = [f"{args.metric}, n_samples {n}; one-sided paired t tests over seeds, alpha {args.alpha:g}; "
             f"sparsities in Holm's family: {family}"]
    parts += [lth.text_table(header, lines)] if lines else []
    return "\n\n".join([*parts, "\n".join(said + remarks)])


# --- calibration

def made_up(rng, effects, n, args, bad_runs=False):
    """Values [sparsities, 4 arms, draws, n seeds] with effects [sparsities][3 tests]; 0 is the boundary."""
    noise = rng.normal(size=(len(effects), 4, args.draws, n))
    if bad_runs:
        noise[:, 1] = rng.exponential(size=noise[:, 1].shape) - 1
    noise[:, 0] = noise[0, 0]  # one dense run a seed, compared with every sparsity
    sd = [math.hypot(args.margin * SHARED, 1, 1 + args.margin), math.sqrt(2), math.sqrt(2)]
    within, reinit, random = (sd * np.array(effects, float)).T  # (sparsities,) each
    ticket = (1 + args.margin) * DENSE - within
    means = np.stack([DENSE + 0 * ticket, ticket, ticket + reinit, ticket + random], 1)
    return means[:, :, None, None] + SHARED * rng.normal(size=(args.draws, n)) + noise


def p_values(values, args):
    """p of the conjunction of the three tests, plain and after Holm, [sparsities, draws] each.

    All draws at once, for metrics.verdict takes 3 ms for one; the first ones go through both and must agree.
    """
    dense, ticket, reinit, random = np.moveaxis(values, 1, 0)
    differences = np.stack([ticket - (1 + args.margin) * dense, ticket - reinit, ticket - random])
    plain = stats.ttest_1samp(differences, 0.0, axis=-1, alternative="less").pvalue.max(0)
    holm = np.array([metrics.holm(list(p)) for p in plain.T]).T
    for draw in range(min(CHECKED, args.draws)):
        found = metrics.verdicts({k: dict(zip(ARMS.values(), v[:, draw])) for k, v in enumerate(values)},
                                 margin=args.margin, alpha=args.alpha)
        np.testing.assert_allclose([v.p for v in found.values()], plain[:, draw], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose([v.p_holm for v in found.values()], holm[:, draw], rtol=1e-9, atol=1e-12)
    return plain, holm


def false_positives(rng, args):
    """Rows (data, setting, seeds, rate, standard error): how often it says winning without cause."""
    settings = {"within the margin of dense": [(0, IN, IN)], "better than reinit": [(IN, 0, IN)],
                "better than random": [(IN, IN, 0)], "all three": [(0, 0, 0)],
                "reinit, at each of 3 sparsities": [(IN, 0, IN)] * 3,
                "reinit, at 1 of 3 sparsities": [(IN, IN, IN)] * 2 + [(IN, 0, IN)]}
    rows = []
    for data, name, n in [(d, name, n) for d in ("normal", "bad runs") for name in settings for n in SEEDS]:
        null = [k for k, effect in enumerate(settings[name]) if 0 in effect]  # where a win is a mistake
        plain, holm = p_values(made_up(rng, settings[name], n, args, data == "bad runs"), args)
        rows.append([data, name, n, *rate((holm[null] < args.alpha).any(0))])
        if len(null) > 1:
            rows.append([data, f"{name}, without Holm", n, *rate((plain[null] < args.alpha).any(0))])
    return rows


def rate(hits):
    """The share of hits and its Monte-Carlo standard error."""
    share = float(np.mean(hits))
    return share, math.sqrt(share * (1 - share) / len(hits))


def pivot(rows):
    """A line for each (data, setting), a column for each number of seeds."""
    lines = {}
    for data, setting, _, share, error in rows:
        lines.setdefault((data, setting), []).append(f"{share:.3f} ± {error:.3f}")
    return [[*key, *cells] for key, cells in lines.items()]


def calibrate(study, args):
    """Write verdict_calibration.csv, .md, .json and power.png to --out; return the text to print."""
    rng, columns = np.random.default_rng(0), [f"{n} seeds" for n in SEEDS]
    wrong = false_positives(rng, args)
    right = [["normal", f"{effect:g} inside", n, *rate(p[0] < args.alpha)] for effect in EFFECTS
             for n in SEEDS for p, _ in [p_values(made_up(rng, [[effect] * 3], n, args), args)]]
    curves = {n: [row[3] for row in right if row[2] == n] for n in SEEDS}
    enough = [f"{np.interp(0.8, np.maximum.accumulate(y), EFFECTS):.1f} with {n}" for n, y in curves.items()]
    texts = [f"{args.draws:,} made-up draws a figure, ± Monte-Carlo standard error; alpha {args.alpha:g}, "
             f"margin {100 * args.margin:g} % of dense. studies/verdict.py says how they are made up.",
             "**False positives**: how often it says 'winning' where the named test is at its boundary and "
             "the others far inside, so that they pass. At several sparsities: any false win, after Holm.",
             lth.markdown_table(["data", "at its boundary", *columns], pivot(wrong)),
             "**Power**: the same for a ticket inside all three boundaries by an effect, in units of the sd "
             "over seeds of the paired difference; normal data, one sparsity.",
             lth.markdown_table(["effect", *columns], [line[1:] for line in pivot(right)]),
             f"Four of five such tickets are found from an effect of {', '.join(enough)} seeds on."]
    with atomic(os.path.join(args.out, "verdict_calibration.md")) as temporary:
        metrics.write_text(temporary, "\n\n".join(texts))
    lth.line_chart([dict(label=f"{n} seeds", x=EFFECTS, y=curve) for n, curve in reversed(curves.items())],
                   os.path.join(args.out, "power.png"), "How large an advantage must be before it is seen",
                   "true advantage, in sd over seeds of the paired difference", "share called winning",
                   hlines=[("80 %", 0.8, "dotted"), (f"alpha {args.alpha:g}", args.alpha, "dashed")],
                   note="A ticket inside all three boundaries (margin of dense, reinit, random) by the same "
                        f"advantage; one sparsity; {args.draws:,} made-up draws a marker.")
    study.save(os.path.join(args.out, "verdict_calibration"),
               ["data", "setting or effect", "seeds", "rate", "standard_error"], wrong + right,
               n=args.draws, seeds=SEEDS, generator_seed=0)
    return "\n\n".join(texts)


# --- command

def main(argv=None):
    study = lth.Study("verdict", __doc__)
    add = study.add_argument
    add("tables", nargs="*", metavar="results.csv", help="judge these; several hold different seeds")
    add("--calibrate", action="store_true", help="false positives and power on made-up data")
    add("--metric", choices=["fid_domain", "val_loss"], default="fid_domain", help="default: fid_domain")
    add("--margin", type=fraction, default=lth.MARGIN, help="of dense, still its equal (default: 0.10)")
    add("--alpha", type=fraction, default=0.05, help="of each test (default: 0.05)")
    add("--draws", type=positive_int, default=10_000, help="made-up draws a figure (default: 10000)")
    with study.arguments(argv) as args:
        if bool(args.tables) == args.calibrate:
            raise ValueError("name results.csv files to judge, or else --calibrate")
        if not 0 < args.alpha < 0.5:
            raise ValueError(f"--alpha {args.alpha:g} is not between 0 and 0.5")
        print(judge(args) if args.tables else calibrate(study, args))


if __name__ == "__main__":
    main()
