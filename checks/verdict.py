"""Can the verdict over seeds be trusted, and how many seeds does it need?

    python -m checks.verdict results/mnist/results.csv     # the verdict again, from the table
    python -m checks.verdict a/results.csv b/results.csv   # more seeds of the same experiment
    python -m checks.verdict --calibrate                   # false positives and power: 15 seconds

Calibration draws values[arm, seed] = mean[arm] + 2 u[seed] + e[arm, seed] at random. u is the luck
of the seed, which its arms and sparsities share; e is the run's own; both are standard normal. In
'bad runs' the ticket's e is exponential (mean 0, sd 1): mostly a little better than its mean, now
and then much worse. Effects are in units of the standard deviation (sd), over seeds, of the paired
difference under test. A test whose effect is 0 should pass in a share alpha of all draws.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m checks.verdict")

import csv
import math

import numpy as np
from scipy import stats

import lth_diffusion as lth
from studies.common import Study
from support import charts, cli, runs
from support.verdict import POWER, detectable, holm, verdicts
from support.words import ARMS as NAMES, seeds_of

ARMS = "dense", "ticket", "reinit", "random"
SEEDS = 3, 5, 10
EFFECTS = 0, 0.5, 1, 1.5, 2, 2.5, 3, 4
FAR = 20  # an effect so large that its test always passes
DENSE, SHARED = 100.0, 2.0  # mean of dense; sd of the seed's luck
# setting -> effects in the three tests (dense, reinit, random), per sparsity
SETTINGS = {
    "within the margin of dense": [(0, FAR, FAR)],
    "better than reinit": [(FAR, 0, FAR)],
    "better than random": [(FAR, FAR, 0)],
    "all three": [(0, 0, 0)],
    "reinit, at each of 3 sparsities": [(FAR, 0, FAR)] * 3,
    "reinit, at 1 of 3 sparsities": [(FAR, FAR, FAR)] * 2 + [(FAR, 0, FAR)],
}


# --------------------------------------------------------------------------- verdicts from files

def read_rows(paths, metric):
    """{(seed, round, arm): row} of the four arms in CSV files; Mistake for a bad file."""
    rows = {}
    for path in paths:
        for line, cells in enumerate(read_lines(path, metric), 2):
            if cells.get("arm") in ARMS:
                where = f"{path}, line {line}"
                row = numbers(cells, metric, where)
                key = row["seed"], row["round"], row["arm"]
                if key in rows:
                    raise cli.Mistake(
                        f"{where}: seed, round and arm {key} occur twice; "
                        "each file must hold other seeds")
                rows[key] = row
    # An FID depends on the number of samples, a sparsity on the network.
    for name in "n_samples", "total_weights":
        found = {str(row.get(name)) for row in rows.values()}
        if len(found) > 1:
            raise cli.Mistake(f"{name} differs ({', '.join(sorted(found))}): "
                              "these are several experiments")
    return rows


def read_lines(path, metric):
    """The lines of a CSV file as dicts of texts."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            lines, header = list(table), table.fieldnames or []
    except OSError as error:
        raise cli.Mistake(f"cannot read {path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise cli.Mistake(f"{path} is not a text table: {error}") from error
    needed = {"seed", "round", "arm", "sparsity", metric}
    if missing := sorted(needed - set(header)):
        raise cli.Mistake(f"{path} has no column {', '.join(missing)}: name "
                          "a results.csv of lth_diffusion.py")
    return lines


def numbers(row, metric, where):
    """The row with numbers in it. The metric may be NaN: runs do diverge."""
    kinds = {"seed": int, "round": int, "sparsity": float, metric: float}
    for name, kind in kinds.items():
        try:
            row[name] = kind(row[name])
        except (TypeError, ValueError):
            raise cli.Mistake(f"{where}: {name} is {row[name]!r}, "
                              "not a number") from None
    return row


def make_tables(rows, metric):
    """{(round, sparsity): {arm: {seed: value}}} of complete rounds, and remarks on the others."""
    tables, remarks = {}, []
    for r in sorted({r for _, r, arm in rows if arm != "dense"}):
        table, shares = {arm: {} for arm in ARMS}, []
        for (seed, other, arm), row in rows.items():
            if other == r:
                shares.append(row["sparsity"])
            if other == (0 if arm == "dense" else r):
                table[arm][seed] = row[metric]
        if max(shares) - min(shares) > 0.005:
            raise cli.Mistake(f"round {r} has sparsities {min(shares):g} and "
                              f"{max(shares):g}: these are several experiments")
        if absent := [arm for arm in ARMS if not table[arm]]:
            remarks.append(f"Round {r} is not tested: no {', no '.join(absent)}.")
            continue
        # A diverged run leaves no row: the reader must know that it was tried.
        seeds = [set(values) for values in table.values()]
        if lost := set.union(*seeds) - set.intersection(*seeds):
            remarks.append(f"Round {r}: {seeds_of(sorted(lost))} left out: not in all arms.")
        tables[r, shares[0]] = table
    if not tables:
        missing = f"no round has all of {', '.join(ARMS)}."
        raise cli.Mistake(" ".join([missing, *remarks]))
    return tables, remarks


def judge(args):
    """The text to print: the verdict at every sparsity."""
    rows = read_rows(args.tables, args.metric)
    tables, remarks = make_tables(rows, args.metric)
    found = verdicts(tables, margin=args.margin, alpha=args.alpha,
                     metric=args.metric)
    samples = next(iter(rows.values())).get("n_samples") or "unknown"
    said = [f"{args.metric}, n_samples {samples}; one-sided paired t tests over "
            f"seeds, alpha {args.alpha:g}; sparsities in Holm's family: "
            f"{len(found)}.", ""]
    for (r, share), one in found.items():
        means = []
        for arm, values in tables[r, share].items():
            means.append(f"{NAMES[arm]} {np.mean([*values.values()]):.4g}")
        said.append(f"At {100 * share:.1f} % sparsity, {args.metric}: "
                    f"{', '.join(means)}: {one.answer}.")
        said += [f"    {line}." for line in one.details]
        for test, p in one.tests.items():
            said.append(f"    {test}: p={p:.4g}")
        if one.winning is False:
            said.append(f"    {POWER:.0%} power, in each test: from "
                        f"{detectable(one.n, args.alpha):.1f} sd over seeds")
    return "\n".join([*said, *remarks])


# --------------------------------------------------------------------------- calibration

def simulate(rng, effects, n, args, bad_runs=False):
    """Values [sparsities, 4 arms, draws, n seeds] with effects [sparsities][3 tests]."""
    noise = rng.normal(size=(len(effects), 4, args.draws, n))
    if bad_runs:
        noise[:, 1] = rng.exponential(size=noise[:, 1].shape) - 1
    noise[:, 0] = noise[0, 0]  # one dense run per seed, for every sparsity
    luck = SHARED * rng.normal(size=(args.draws, n))
    limit = 1 + args.margin
    sd = math.hypot(args.margin * SHARED, 1, limit), math.sqrt(2), math.sqrt(2)
    within, reinit, random = np.transpose(effects) * np.array(sd)[:, None]
    ticket = limit * DENSE - within  # (sparsities,)
    dense = np.full_like(ticket, DENSE)
    means = np.stack([dense, ticket, ticket + reinit, ticket + random], 1)
    return means[:, :, None, None] + luck + noise


def p_values(values, args):
    """p of the three tests together, plain and by Holm, [sparsities, draws] each; all draws at
    once, because support.verdict takes 3 ms for one."""
    dense, ticket, reinit, random = np.moveaxis(values, 1, 0)
    limit = (1 + args.margin) * dense
    gains = ticket - np.stack([limit, reinit, random])
    tests = stats.ttest_1samp(gains, 0.0, axis=-1, alternative="less")
    plain = tests.pvalue.max(0)
    adjusted = [holm(list(p)) for p in plain.T]
    return plain, np.transpose(adjusted)


def measure(rng, args, settings, data="normal"):
    """[data, setting, seeds, rate, standard error]: how often it says winning.

    Where some effects are 0, at these sparsities: there a win is false.
    """
    rows = []
    for name, effects in settings.items():
        counted = [k for k, tests in enumerate(effects) if 0 in tests] or [0]
        for n in SEEDS:
            values = simulate(rng, effects, n, args, data == "bad runs")
            plain, adjusted = p_values(values, args)
            rows.append([data, name, n, *rate(adjusted[counted], args)])
            if len(counted) > 1:
                row = [data, f"{name}, without Holm", n]
                rows.append(row + rate(plain[counted], args))
    return rows


def rate(p, args):
    """[share of draws with a win at any sparsity, its standard error] of p [sparsities, draws]."""
    share = float((p < args.alpha).any(0).mean())
    return [share, math.sqrt(share * (1 - share) / args.draws)]


def table_of(rows):
    """Markdown: one line per setting, one column per number of seeds."""
    lines = {}
    for data, setting, _, share, error in rows:
        line = lines.setdefault((data, setting), [data, setting])
        line.append(f"{share:.3f} ± {error:.3f}")
    header = ["data", "setting", *(f"{n} seeds" for n in SEEDS)]
    return charts.markdown_table(header, lines.values())


def draw_power(rows, path, args):
    """The share called winning against the effect, one line per number of seeds."""
    curves = []
    for n in reversed(SEEDS):
        y = [row[3] for row in rows if row[2] == n]
        curves.append(dict(label=f"{n} seeds", x=EFFECTS, y=y))
    charts.line_chart(
        curves, path, "How large an advantage must be to be detected",
        "true advantage, in sd over seeds of the paired difference",
        "share called winning", hlines=[
            ("80 %", POWER, "dotted"),
            (f"alpha {args.alpha:g}", args.alpha, "dashed")],
        note="A ticket better by the same advantage in all three tests (margin "
             "of dense, reinit, random mask); one sparsity; "
             f"{args.draws:,} simulated draws per marker.")


def calibrate(study, args):
    """Write verdict_calibration.csv, .md, .json and power.png to --out; return the text."""
    rng = np.random.default_rng(0)
    wrong = measure(rng, args, SETTINGS)
    wrong += measure(rng, args, SETTINGS, "bad runs")
    effects = {f"effect {effect:g}": [[effect] * 3] for effect in EFFECTS}
    right = measure(rng, args, effects)
    enough = []
    for n in SEEDS:
        shares = [row[3] for row in right if row[2] == n]
        shares = np.maximum.accumulate(shares)
        least = np.interp(POWER, shares, EFFECTS)
        enough.append(f"{least:.1f} with {n} seeds")
    text = (f"{args.draws:,} simulated draws per value, ± Monte-Carlo standard "
            f"error; alpha {args.alpha:g}, margin {100 * args.margin:g} % of dense. "
            "checks/verdict.py describes the data.\n\n"
            "**False positives**: how often it says 'winning' where the effect "
            "in the named test is 0 and the others are so large that they pass. "
            "At several sparsities: any false win, after Holm.\n\n"
            f"{table_of(wrong)}\n\n**Power**: the same for a ticket that is "
            "better by an effect in all three tests; one sparsity.\n\n"
            f"{table_of(right)}\n\n80 % power needs an effect of "
            f"{', '.join(enough)}.")
    path = f"{args.out}/verdict_calibration"
    runs.write_text(path + ".md", text)
    draw_power(right, f"{args.out}/power.png", args)
    header = ["data", "setting", "seeds", "rate", "standard_error"]
    study.save(path, header, wrong + right, n=args.draws,
               generator_seed=0)
    return text


def main(argv=None):
    """The command line."""
    study = Study("checks.verdict", __doc__)
    level = cli.checked(float, lambda x: 0 < x < 0.5, "between 0 and 0.5")
    add = study.add_argument
    add("tables", nargs="*", metavar="results.csv", type=cli.path,
        help="judge these; each file holds other seeds")
    add("--calibrate", action="store_true",
        help="false positives and power on simulated data")
    add("--metric", choices=["fid_domain", "val_loss"], default="fid_domain",
        help="default: fid_domain")
    add("--margin", type=cli.fraction,
        help="share of dense that counts as equal (default: 0.1; of val_loss 0.03)")
    add("--alpha", type=level, default=0.05,
        help="level of each test (default: 0.05)")
    add("--draws", type=cli.positive_int, default=10_000,
        help="simulated draws per value (default: 10000)")
    with study.arguments(argv) as args:
        if args.margin is None:
            args.margin = lth.MARGINS[args.metric]
        if bool(args.tables) == args.calibrate:
            raise cli.Mistake("name results.csv files, or give --calibrate")
        print(judge(args) if args.tables else calibrate(study, args))


if __name__ == "__main__":
    main()
