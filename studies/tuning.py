"""Are hyper-parameters behind the verdict? A search for a better dense network, then its tickets.

    python -m studies.tuning                             # digits, one seed: a quarter of an hour
    python -m studies.tuning --settings 1 --seeds 0 1 2  # no search: the default rate and a quarter
    python -m studies.tuning --dataset mnist --settings 24 --half --seeds 0 1 2

Other flags go to lth_diffusion.py. With larger learning rates the advantage of tickets over new
weights can vanish (Liu et al., Rethinking the Value of Network Pruning, 2019, 1810.05270), and
short training makes false tickets (Ma et al., Sanity Checks for Lottery Tickets, 2021, 2107.00166).

search   The default setting and others drawn at random train the dense network from one seed. They
         differ in learning rate and its schedule, batch (steps change too, so that all see as many
         images), decay of the EMA and beta2, and are ranked by val_loss. The best of n settings on
         one seed is a little flattered: look at its neighbours in the table too.
tickets  dense, ticket, reinit and random at 90 % sparsity in the best setting, at a quarter of its
         rate and, with --half, in half its steps. These runs differ in nothing else.

What would change our mind about 'the verdict is about the network, not its training': a verdict, or
a sign of ticket - reinit, that differs between these runs by more than its spread over seeds. A
search of this size does not show that no better setting exists.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.tuning")

import math
import os
from operator import itemgetter

import numpy as np

import lth_diffusion as lth
from studies.common import SMALL, Study, fit, over_seeds
from support import charts, cli, runs
from support.verdict import verdicts

RATES = (0.1, 3)  # times the default rate: the range that rates are drawn from
BATCHES = (16, 32, 64)
MEMORY = (0.25, 0.5, 1, 2, 4)  # times the default's 1 - EMA decay
SCHEDULES = ("cosine", "linear", "constant")
BETA2 = (0.9, 0.95, 0.99, 0.999)
SEARCH_SEED = 2024  # of the draw of settings
SEARCH_NET = 999  # seed of the searched networks, apart from --seeds: theirs must not be chosen
SETTING = ["lr", "batch", "steps", "ema", "lr_schedule", "beta2"]  # flags
HEADER = ["part", "setting", "seed", "arm", *SETTING, "val_loss", "fid_domain"]
GAPS = ["setting", "fid_domain of", "seeds", "mean", "low", "high"]
ARMS = ["dense", "ticket", "reinit", "random"]


def settings(args, n):
    """{name: {flag: value}} of n settings, the default first; all see as many images."""
    rng = np.random.default_rng(SEARCH_SEED)
    found = {"default": {name: getattr(args, name) for name in SETTING}}
    for k in range(1, n):
        batch = int(rng.choice(BATCHES))
        lr = args.lr * math.exp(rng.uniform(*np.log(RATES)))
        forgets = (1 - args.ema) * float(rng.choice(MEMORY))
        found[f"draw {k}"] = dict(
            lr=float(f"{lr:.3g}"), batch=batch,
            steps=max(2, round(args.steps * args.batch / batch)),
            ema=round(max(0.0, 1 - forgets), 6),
            lr_schedule=str(rng.choice(SCHEDULES)),
            beta2=float(rng.choice(BETA2)))
    return found


def train_dense(exp, seed, name, setting):
    """(val_loss, fid_domain) of the dense network in a setting; infinite if it diverges."""
    options = dict(setting)
    options["ema_decay"] = options.pop("ema")
    options["warmup"] = max(1, setting["steps"] // 20)
    file = f"tuning_{name.replace(' ', '')}"
    try:
        ema = fit(exp, file, seed, exp.new_model(seed), **options)
    except FloatingPointError as error:
        print(f"{name}: {error}")
        return math.inf, math.inf
    samples = exp.draw(ema, seed, label=f"{name}: sample")
    return exp.errors(ema)["val_loss"], exp.quality(samples)["fid_domain"]


def search(exp, n):
    """Rows of HEADER, as dicts: the dense network in n settings, the lowest val_loss first."""
    table = []
    for name, setting in settings(exp.args, n).items():
        loss, fid = train_dense(exp, SEARCH_NET, name, setting)
        print(f"{name}: val_loss {loss:.4f}, fid_domain {fid:.2f}; {setting}", flush=True)
        row = "search", name, SEARCH_NET, "dense", *setting.values(), loss, fid
        table.append(dict(zip(HEADER, row)))
    return sorted(table, key=itemgetter("val_loss"))


def variations(args, table, half):
    """{name: setting} of the tickets: the best of the search, or the default, and variations."""
    name, best = "default", vars(args)
    if table:
        name, best = table[0]["setting"], table[0]
        if best["val_loss"] == math.inf:
            raise FloatingPointError("every setting diverged: give a lower --lr")
    best = {flag: best[flag] for flag in SETTING}
    slow = float(f"{best['lr'] / 4:.3g}")
    found = {name: best, "a quarter of its rate": best | dict(lr=slow)}
    if half:
        short = max(2, best["steps"] // 2)
        found["half its steps"] = best | dict(steps=short)
    return found


def run_tickets(name, setting, rest, folder):
    """Rows of HEADER of a run of lth_diffusion.py: its dense networks and its last round."""
    args, _ = lth.parse_args(rest)
    out = f"{folder}_lr{setting['lr']:g}_steps{setting['steps']}"
    flags = [*rest, "--out", out, "--controls", "reinit", "random",
             "--control-rounds", str(args.rounds)]
    for flag, value in setting.items():
        flags += [f"--{flag.replace('_', '-')}", str(value)]
    exp = lth.run(*lth.parse_args(flags))
    for job, row in exp.rows.items():
        there = job.arm in ARMS and job.round in (0, args.rounds)
        if there and job.seed in args.seeds:
            quality = row["val_loss"], row["fid_domain"]
            yield dict(zip(HEADER, ["tickets", name, job.seed, job.arm,
                                    *setting.values(), *quality]))


def arms_of(table):
    """{setting: {arm: {seed: fid_domain}}} of the tickets."""
    found = {}
    for row in table:
        if row["part"] == "tickets":
            arms = found.setdefault(row["setting"], {})
            arms.setdefault(row["arm"], {})[row["seed"]] = row["fid_domain"]
    return found


def gaps(arms, other):
    """fid_domain of the ticket less that of another arm, an array over seeds."""
    pairs = sorted(arms["ticket"].items())
    return np.array([value - arms[other][seed] for seed, value in pairs])


def differences(table):
    """Rows of GAPS: the ticket's gap to each arm, and its change from the first setting.

    95 % intervals over seeds, paired by seed, from three seeds on.
    """
    found = arms_of(table)
    first, *others = found
    for other in ARMS[:1] + ARMS[2:]:
        base = gaps(found[first], other)
        values = {first: base}
        for name in others:
            values[name] = gaps(found[name], other)
            values[f"{name}, less {first}"] = values[name] - base
        for name, gap in values.items():
            interval = over_seeds(gap, 0.025)
            yield [name, f"ticket - {other}", len(gap), *interval]


def conclude(table):
    """The search in a sentence, then a verdict per setting, and whether they agree."""
    said, tried = [], [row for row in table if row["part"] == "search"]
    if tried:
        best, names = tried[0], [row["setting"] for row in tried]
        said.append(f"Of {len(names)} settings, one seed each, {names[0]} has the lowest val_loss "
                    f"({best['val_loss']:.4f}); the default is number "
                    f"{names.index('default') + 1}.")
    found = verdicts(arms_of(table), margin=lth.MARGIN)
    said += [f"{name}: {verdict}." for name, verdict in found.items()]
    answers = {verdict.winning for verdict in found.values()}
    if answers and None not in answers:
        same = "is the same in all" if len(answers) == 1 else "DIFFERS between"
        said.append(f"The verdict {same} of them.")
    return "\n".join(said)


def draw(table, path, note):
    """fid_domain of the arms in every setting of the tickets."""
    found, series = arms_of(table), []
    for arm in ARMS:
        values = [list(arms[arm].values()) for arms in found.values()]
        means = [np.mean(over) for over in values]
        several = values if len(values[0]) > 1 else ()
        style = "dashed" if arm == "dense" else "solid"
        series.append(dict(label=arm, x=range(len(found)), y=means,
                           dots=several, style=style))
    charts.line_chart(series, path, "The same arms, trained in other settings",
                      "", "fid_domain (log)", log_y=True,
                      x_ticks=list(enumerate(found)), note=note)


def main(argv=None):
    """The command line; other flags go to lth_diffusion.py."""
    study = Study("studies.tuning", __doc__)
    add = study.add_argument
    add("--settings", type=cli.positive_int, default=4, metavar="N",
        help="settings to try, the default among them; 1: no search (default: 4)")
    add("--half", action="store_true", help="tickets also in half the steps")
    add("--runs", default="runs", type=cli.path, help="folder of the runs (default: runs)")
    owned = "--controls", "--control-rounds"
    with study.arguments(argv, owned) as args, cli.one_line(study, args.runs):
        rest, table = args.rest, []
        if not any(flag.startswith("--rounds") for flag in rest):
            rest = [*SMALL, *rest]
        common, _ = lth.parse_args(rest)  # a mistake in them ends here
        runs.writable([args.runs], "--runs")
        name = f"tuning_{common.dataset}"
        common.out = os.path.join(args.runs, name)
        cli.settle_device(common)
        exp = lth.Experiment(common)
        if args.settings > 1:
            table = search(exp, args.settings)
        tried = variations(common, table, args.half)
        for title, setting in tried.items():
            table += run_tickets(title, setting, rest, common.out)
        cells = [list(row.values()) for row in table]
        path = os.path.join(args.out, name)
        study.save(path, HEADER, cells, exp.device, n=common.samples, seeds=common.seeds)
        draw(table, path + ".png", f"{common.dataset}: FID from {common.samples:,} samples, seeds "
             f"{', '.join(map(str, common.seeds))}. Small dots: single seeds.")
    print(charts.text_table(HEADER, cells), charts.text_table(GAPS, differences(table)),
          f"{conclude(table)}\n{path}.csv, .json, .png", sep="\n\n")


if __name__ == "__main__":
    main()
