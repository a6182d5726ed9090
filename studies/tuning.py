"""Are hyper-parameters behind the verdict? A search for a better dense network, and the ticket at two rates.

    python -m studies.tuning                                      # digits, one seed: a quarter of an hour
    python -m studies.tuning --quick --seeds 0 1 2                # no search: the default rate and a quarter
    python -m studies.tuning --dataset mnist --data-dir data --seeds 0 1 2 --full    # 24 settings, half steps

Any other flag goes to lth_diffusion.py. With larger learning rates the ticket's edge over new weights can
vanish, and short training makes false tickets (1810.05270, 2107.00166): a verdict wants both looked at.

search   The default setting and others drawn at random (rate log-uniform; batch at an equal number of images
         seen, so that steps change; decay of the EMA; schedule of the rate; beta2) train the dense network
         from one seed. They are ranked by val_loss; fid_domain stands beside it, and the rank correlation of
         the two. The best of n tries on one seed flatters itself a little: a reason to look at its
         neighbours in the table, not at it alone.
tickets  dense, ticket (rewind), reinit and random at 90 %, in the best setting, at a quarter of its rate and,
         with --half, in half its steps: runs of lth_diffusion.py under --runs that differ in nothing else.

What would change our mind about 'the verdict is of the network, not of its training': a verdict, or the sign
of ticket - reinit, that differs between these runs by more than its spread over seeds; each gap less that of
the first run says so directly. A search as small as this does not show that there is no better setting.
"""
import math
import os
import sys
import time

import numpy as np
from scipy import stats

import lth_diffusion as lth
import metrics
from ddpm import one_line, positive_int, writable

RATES = (0.1, 3)  # of the default rate: the range that rates are drawn from
BATCHES = (16, 32, 64)
MEMORY = (0.25, 0.5, 1, 2, 4)  # of the default's 1 - EMA decay: a quarter remembers four times as long
SCHEDULES, BETA2 = ("cosine", "linear", "constant"), (0.9, 0.95, 0.99, 0.999)
SEARCH_SEED = 2024  # of the draw of settings, apart from all seeds of networks
SEARCH_NET = 999  # of the search's networks: were it one of --seeds, its dense network would be a chosen one
TICKETS = "--rounds 2 --final-sparsity 0.9".split()  # 68 and 90 %, as in the studies' small run on digits
HEADER = ["part", "setting", "seed", "arm", "lr", "batch", "steps", "ema", "lr_schedule", "beta2", "val_loss",
          "fid_domain"]
SETTING = HEADER[4:10]  # names of flags too
GAPS = ["setting", "gap", "quantity", "seeds", "mean", "low", "high"]
ARMS = {"dense": "dense", "rewind": "ticket", "reinit": "reinit", "random": "random"}


def settings(args, n):
    """{name: {flag: value}} of n settings, the default first; all see as many images."""
    rng = np.random.default_rng(SEARCH_SEED)
    found = {"default": {name: getattr(args, name) for name in SETTING}}
    for k in range(1, n):
        batch = int(rng.choice(BATCHES))
        lr = args.lr * math.exp(rng.uniform(*np.log(RATES)))
        found[f"draw {k}"] = dict(
            lr=float(f"{lr:.3g}"), batch=batch, steps=max(2, round(args.steps * args.batch / batch)),
            ema=round(max(0.0, 1 - (1 - args.ema) * float(rng.choice(MEMORY))), 6),
            lr_schedule=str(rng.choice(SCHEDULES)), beta2=float(rng.choice(BETA2)))
    return found


def train_dense(exp, seed, name, setting):
    """(val_loss, fid_domain) of the dense network in this setting; NaN where it diverges."""
    changed = dict(setting)
    options = dict(ema_decay=changed.pop("ema"), warmup=max(1, setting["steps"] // 20), start=0, **changed)
    try:
        ema = exp.fit(f"tuning_{name.replace(' ', '')}", seed, exp.new_model(seed), **options)
    except FloatingPointError as error:
        print(f"{name}: {error}")
        return math.nan, math.nan
    return exp.val_loss(ema), exp.quality(exp.draw(ema, label=f"{name}: sample"))["fid_domain"]


def rank(table):
    """Rows of the search, best val_loss first, diverged ones last."""
    return sorted((row for row in table if row[0] == "search"), key=lambda row: (row[10] != row[10], row[10]))


def half(setting):
    """The same training, over in half the steps."""
    return setting | dict(steps=max(2, setting["steps"] // 2))


def run_tickets(name, setting, rest, runs, dataset, seeds):
    """Rows of HEADER of one run of lth_diffusion.py: its dense networks and the arms of its last round."""
    out = os.path.join(runs, f"tuning_{dataset}_lr{setting['lr']:g}_steps{setting['steps']}")
    flags = [part for flag, value in setting.items() for part in (f"--{flag.replace('_', '-')}", str(value))]
    last = lth.parse_args(rest)[0].rounds
    arms = ["--arms", "rewind", "reinit", "random", "--control-rounds", str(last)]
    _, rows = lth.run_alone(*lth.parse_args([*rest, *flags, *arms, "--out", out]))
    for row in rows.values():
        if row["seed"] in seeds and row["arm"] in ARMS and row["round"] in (0, last):
            yield ["tickets", name, row["seed"], ARMS[row["arm"]], *setting.values(), row["val_loss"],
                   row["fid_domain"]]


# ----------------------------------------------------------------------------------------------- the report

def arms_of(table, setting, column):
    """{arm: {seed: value}} of one setting of the tickets."""
    found = {}
    for row in table:
        if row[:2] == ["tickets", setting]:
            found.setdefault(row[3], {})[row[2]] = row[column]
    return found


def gaps(table, setting, other, column):
    """Ticket less another arm, an array over seeds."""
    arms = arms_of(table, setting, column)
    return np.array([value - arms[other][seed] for seed, value in sorted(arms["ticket"].items())])


def differences(table):
    """Rows of GAPS: the ticket's gap to each arm, and how it differs from that in the first setting; 95 %
    intervals over seeds, paired by seed, from three on."""
    first, *others = dict.fromkeys(row[1] for row in table if row[0] == "tickets")
    for column in (11, 10):
        for other in ("dense", "reinit", "random"):
            base = gaps(table, first, other, column)
            found = {first: base}
            for name in others:
                found[name] = gaps(table, name, other, column)
                found[f"{name}, less {first}"] = found[name] - base
            for label, gap in found.items():
                yield [label, f"ticket - {other}", HEADER[column], len(gap), *metrics.over_seeds(gap, 0.025)]


def conclude(table):
    """The search in a sentence, then a verdict a setting, and whether they agree."""
    said, ranked = [], [row for row in rank(table) if row[10] == row[10]]
    if ranked:
        place = next((k for k, row in enumerate(rank(table), 1) if row[1] == "default"))
        rho = stats.spearmanr(*zip(*(row[10:12] for row in ranked)))[0] if len(ranked) > 2 else math.nan
        said.append(f"Of {len(rank(table))} settings, one seed each, {ranked[0][1]} has the lowest val_loss "
                    f"({ranked[0][10]:.4f}); the default is number {place}. Spearman's rank correlation of "
                    f"val_loss and fid_domain: {rho:+.2f}, n={len(ranked)}.")
    names = dict.fromkeys(row[1] for row in table if row[0] == "tickets")
    verdicts = metrics.verdicts({name: arms_of(table, name, 11) for name in names}, margin=lth.MARGIN)
    said += [f"{name}: {verdict}." for name, verdict in verdicts.items()]
    known = {verdict.winning for verdict in verdicts.values()}
    if None not in known:
        said.append(f"The verdict {'is the same in all' if len(known) == 1 else 'DIFFERS between'} of them.")
    return "\n".join(said)


def draw(table, path, note):
    """val_loss of every setting against its rate, and the arms in every setting of the tickets."""
    series = []
    for label, shape in zip(("default", *SCHEDULES), ("triangle", "circle", "square", "diamond")):
        mine = [row for row in rank(table) if label == ("default" if row[1] == "default" else row[8])]
        x, y = ([v for row in mine for v in (row[k], math.nan)] for k in (4, 10))  # NaN: no line between
        series += [dict(label=label, x=x, y=y, shape=shape)] if mine else []
    if series:
        lth.line_chart(series, f"{path}.png", "The dense network in every setting of the search",
                       "peak learning rate (log)", "val_loss (log)", log_x=True, log_y=True, note=note)
    names = list(dict.fromkeys(row[1] for row in table if row[0] == "tickets"))
    arms = {arm: [list(arms_of(table, name, 11)[arm].values()) for name in names] for arm in ARMS.values()}
    lth.line_chart([dict(label=arm, x=range(len(names)), y=[np.mean(v) for v in values],
                         dots=values if len(values[0]) > 1 else (),
                         style="dashed" if arm == "dense" else "solid")
                    for arm, values in arms.items()], f"{path}_arms.png", "The same arms, trained otherwise",
                   "", "fid_domain (log)", log_y=True, x_ticks=list(enumerate(names)), note=note)


def main(argv=None):
    """The command line; what it does not know goes to lth_diffusion.py."""
    study = lth.Study("tuning", __doc__)
    add = study.add_argument
    add("--settings", type=positive_int, default=4, help="how many to try, the default among them (4)")
    add("--quick", action="store_true", help="no search: the default setting and a quarter of its rate")
    add("--half", action="store_true", help="tickets also in half the steps")
    add("--full", action="store_true", help="24 settings, and --half")
    add("--runs", default="runs", help="folder for the runs, tuning_DATASET_* (default: runs)")
    args, rest = study.parse_known_args(argv)
    study.command = " ".join(["python -m studies.tuning", *(sys.argv[1:] if argv is None else argv)])
    study.began, table = time.monotonic(), []
    if not any(flag.startswith("--rounds") for flag in rest):
        rest = [*TICKETS, *rest]
    common, _ = lth.parse_args(rest)  # a mistake in them ends here
    common.out = os.path.join(args.runs, f"tuning_{common.dataset}")
    with one_line(study, args.runs):
        writable([args.out], "--out")
        exp, path = lth.Experiment(common), os.path.join(args.out, f"tuning_{common.dataset}")
        tried = settings(common, 24 if args.full else args.settings)
        for name, setting in {} if args.quick else tried.items():
            measured = train_dense(exp, SEARCH_NET, name, setting)
            table.append(["search", name, SEARCH_NET, "dense", *setting.values(), *measured])
            study.save(path, HEADER, table, exp.device, n=common.samples, seeds=common.seeds)
            print(f"{name}: {setting}: val_loss {measured[0]:.4f}, fid_domain {measured[1]:.2f}", flush=True)
        best, name = tried["default"], "default"
        if not args.quick:
            best, name = tried[rank(table)[0][1]], "best"
            if rank(table)[0][10] != rank(table)[0][10]:
                raise FloatingPointError("every setting diverged: give a lower --lr")
        chosen = {name: best, "a quarter of its rate": best | dict(lr=float(f"{best['lr'] / 4:.3g}"))}
        if args.half or args.full:
            chosen["half the steps"] = half(best)
        for name, setting in chosen.items():
            table += run_tickets(name, setting, rest, args.runs, common.dataset, common.seeds)
            study.save(path, HEADER, table, exp.device, n=common.samples, seeds=common.seeds)
        draw(table, path, f"{common.dataset}, {common.steps * common.batch:,} images a training, seeds "
             f"{common.seeds}, n={common.samples:,} samples a figure.")
    print(f"\n{lth.text_table(HEADER, [*rank(table), *(row for row in table if row[0] == 'tickets')])}\n\n"
          + lth.text_table(GAPS, differences(table)) +
          f"\n\n{conclude(table)}\n{path}.csv, .json, {'' if args.quick else '.png, '}_arms.png")


if __name__ == "__main__":
    main()
