"""Do tickets, and what their blocks look like, depend on the noise schedule or on what the network predicts?

    python -m studies.variants                                   # digits, one seed: some 20 minutes
    python -m studies.variants --only cosine/eps sigma/eps       # some of them
    python -m studies.variants --dataset mnist --seeds 0 1 2 --rounds 10

Any other flag goes to lth_diffusion.py. Each variant is one run of it with the same flags but for --schedule
and --prediction, in runs/variants_DATASET, and goes on where it stopped; linear/eps on digits is runs/digits
when that has the same flags.

linear/eps     betas of 2006.11239, the network predicts the noise: the default everywhere else
cosine/eps     2102.09672
linear/v       the network predicts v (2202.00512)
sigma/eps      noise levels as score-based models have them, as good as continuous (2011.13456)

2310.18823 reports that two tickets of one network are more alike in upstream blocks than in downstream ones,
and prunes with depth therefore. Here, by residual block in U-Net order: the CKA of the weights of two dense
trainings from theta_k in different data orders (theirs are of tickets, and by an estimator that is printed
without the root; on an unbiased one see metrics.cka), the CKA of networks of different starts, which have no
channels in common (the null), and the density of the last ticket, cut with one threshold for all blocks
unless --scope says otherwise. A slope is the change from the first block to the last of a straight line.
Blocks differ in width, and a threshold cuts wide ones more: with so few blocks a slope cannot tell depth from
width. val_loss is an error on eps or on v, at each schedule's own noise levels: it can be compared between
the arms of one variant, never between variants.

What would change our mind about 'a ticket is a ticket under any schedule': a variant in which it loses to
reinit or random in every seed while it beats them in the others; about 'upstream blocks are more alike': a
slope of CKA that is not below 0 or no further below it than that of the null.
"""
import os

import numpy as np

import lth_diffusion as lth
import metrics
from prune import density_by_block, live_counts

FLAGS = ["--rounds", "2", "--final-sparsity", "0.9"]  # those of lth.open_run, unless the user gives --rounds
VARIANTS = {name: ["--schedule", name.split("/")[0], "--prediction", name.split("/")[1]]
            for name in ("linear/eps", "cosine/eps", "linear/v", "sigma/eps")}
ARMS = {"dense": "dense", "twin": "twin", "rewind": "ticket", "reinit": "reinit", "random": "random"}
HEADER = ["variant", "arm", "sparsity", "seeds", "fid_domain", "sd", "ticket less it", "low", "high",
          "val_loss"]
BLOCKS = ["variant", "seed", "block", "CKA", "CKA null", "density"]
SLOPES = ["variant", "slope of", "seeds", "slope", "standard error", "sd over seeds"]


def settings(args):
    """The flags of a run that decide what comes out of it."""
    return {name: value for name, value in vars(args).items() if name not in lth.FREE}


def parse(name, rest, runs):
    """(args, parser) of one variant's run of lth_diffusion.py."""
    given = any(flag.startswith("--rounds") for flag in rest)
    args, parser = lth.parse_args([*([] if given else FLAGS), *rest, *VARIANTS[name]])
    if not {"reinit", "random"} <= set(args.arms):
        raise ValueError("argument --arms: reinit and random are what the ticket is compared with; add them")
    home, _ = lth.parse_args(FLAGS)
    same = settings(args) == settings(home)
    if same and os.path.exists(os.path.join(home.out, "config.json")):
        there = lth.read_config(home.out)["args"]
        same = all(there.get(key) == value for key, value in settings(args).items())
    if not same or runs:
        args.out = os.path.join(runs or f"runs/variants_{args.dataset}", name.replace("/", "-"))
    return args, parser


def run(name, args):
    """(experiment, rows) of one variant: the rows of the seeds asked for."""
    options, parser = parse(name, args.rest, args.runs)
    seeds = list(options.seeds)  # the folder may hold more
    print(f"\n--- {name}: {options.out}", flush=True)
    exp, rows = lth.run_alone(options, parser)
    return exp, {job: row for job, row in rows.items() if job.seed in seeds}, networks(exp, seeds)


def networks(exp, seeds):
    """{seed: (twin, the same from another data order, one from another start)}, online weights, each dense
    and trained to the end. The other start is the next seed's; with one seed one more is trained."""
    def trained(seed):
        twin = lth.Job(seed, 0, "twin")  # not there when tickets are rewound to step 0: dense is the same
        job = twin if os.path.exists(twin.path(exp.args.out)) else lth.Job(seed, 0, "dense")
        return exp.rebuild(exp.load(job))[0]

    found = {}
    for k, seed in enumerate(seeds):
        probe = exp.theta(seed)
        exp.fit(f"variants_probe_seed{seed}", seed, probe, seed=lth.PROBE_SEED + seed)
        if len(seeds) > 1:
            other = trained(seeds[(k + 1) % len(seeds)])
        else:
            other = exp.new_model(lth.REINIT_SEED + seed)
            exp.fit(f"variants_null_seed{seed}", seed, other, start=0)
        found[seed] = trained(seed), probe, other
    return found


def block_lines(name, exp, found):
    """Rows of BLOCKS of one variant."""
    for seed, (twin, probe, other) in found.items():
        alike, null = lth.block_similarity(twin, probe), lth.block_similarity(twin, other)
        _, masks = exp.rebuild(exp.load(lth.Job(seed, exp.args.rounds, "rewind")))
        density = density_by_block(twin, live_counts(masks))
        yield from ([name, seed, block, alike[block], null[block], density[block]] for block in density)


def arm_lines(name, rows, last):
    """Rows of HEADER of one variant: its arms at the last round, and the ticket less each, paired by seed."""
    arms = {}
    for job, row in rows.items():
        if job.round in (0, last):
            arms.setdefault(job.arm, {})[job.seed] = row
    for arm, label in ARMS.items():
        if arm in arms:  # no twin where tickets are rewound to step 0
            values = np.array([row["fid_domain"] for row in arms[arm].values()])
            less = np.array([arms["rewind"][seed]["fid_domain"] for seed in arms[arm]]) - values
            gap = metrics.over_seeds(less)
            yield [name, label, next(iter(arms[arm].values()))["sparsity"], len(values), float(values.mean()),
                   metrics.deviation(values), *((None,) * 3 if arm == "rewind" else gap),
                   float(np.mean([row["val_loss"] for row in arms[arm].values()]))]


def slope_lines(table):
    """Rows of SLOPES from those of BLOCKS; the standard error is that of the line through the seeds' mean."""
    for name in dict.fromkeys(row[0] for row in table):
        mine = [row for row in table if row[0] == name]
        seeds = list(dict.fromkeys(row[1] for row in mine))
        for column in (3, 4, 5):
            each = np.array([[row[column] for row in mine if row[1] == seed] for seed in seeds])  # (seeds, J)
            spread = metrics.deviation([metrics.slope(one)[0] for one in each])
            yield [name, BLOCKS[column], len(seeds), *metrics.slope(each.mean(0)), spread]


def draw(table, blocks, path, note):
    """fid_domain by variant and arm, and CKA and density by block."""
    names, series = list(dict.fromkeys(row[0] for row in table)), []
    for label in ARMS.values():
        mine = {row[0]: row for row in table if row[1] == label}
        x, y = [names.index(name) for name in mine], np.array([row[4] for row in mine.values()])
        sd = np.array([row[5] or np.nan for row in mine.values()])
        series.append(dict(label=label, x=x, y=y, y_low=y - sd, y_high=y + sd, style="points"))
    lth.line_chart(series, path + ".png", "Tickets under other schedules and predictions", "",
                   "fid_domain (log, lower is better)", log_y=True, x_ticks=list(enumerate(names)),
                   note=f"{note} Bars: standard deviation over seeds.")
    series, order = [], list(dict.fromkeys(row[2] for row in blocks))
    for colour, name in zip(lth.PALETTE, names):
        for column, style in ((3, "solid"), (4, "dotted"), (5, "dashed")):
            y = [np.mean([row[column] for row in blocks if row[0] == name and row[2] == block])
                 for block in order]
            series.append(dict(label=f"{name}, {BLOCKS[column]}", x=range(len(order)), y=y, style=style,
                               colour=colour, shape="circle" if style == "solid" else None))
    lth.line_chart(series, path + "_blocks.png", "Likeness and density along the U-Net", "residual block",
                   "CKA; share of live weights", height=460,
                   x_ticks=[(k, block.replace("blocks.", "")) for k, block in enumerate(order)],
                   note=f"{note} CKA: twin and a training from the same theta_k in another data order; null: "
                   "from another start. Density: of the last ticket.")


def conclude(table, slopes):
    """In which variants the ticket is better, and whether the slopes have one sign."""
    n, said = min(row[3] for row in table), []
    for other in ("dense", "reinit", "random"):
        pairs = [row for row in table if row[1] == other]
        better = [f"{row[0]} ({row[6]:+.2f})" for row in pairs if (row[6] if n < 3 else row[8]) < 0]
        said.append(f"than {other} in {len(better)} of {len(pairs)} variants"
                    + (f": {', '.join(better)}" if better else ""))
    figures = f"n={n}, no verdict" if n < 3 else f"counted where the 90 % interval is below 0; n={n} seeds"
    said = [f"The ticket has the lower fid_domain {'; '.join(said)} ({figures})."]
    for kind in BLOCKS[3:]:
        mine = [row for row in slopes if row[1] == kind]
        signs = [np.sign(row[3]) * (abs(row[3]) > 2 * row[4]) for row in mine]
        figures = ", ".join(f"{row[0]} {row[3]:+.3f} ± {row[4]:.3f}" for row in mine)
        said.append(f"Slope of {kind} with depth: {figures}; {signs.count(-1)} fall and {signs.count(1)} "
                    "rise by more than 2 standard errors.")
    return "\n".join(said)


def main(argv=None):
    """The command line; what it does not know goes to lth_diffusion.py."""
    study = lth.Study("variants", __doc__)
    add = study.add_argument
    add("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all four")
    add("--runs", help="folder of the runs (default: runs/variants_DATASET, and runs/digits where it fits)")
    table, blocks = [], []
    with study.arguments(argv, ("--schedule", "--prediction")) as args:
        for name in dict.fromkeys(args.only):
            exp, rows, found = run(name, args)
            table += arm_lines(name, rows, exp.args.rounds)
            blocks += block_lines(name, exp, found)
            slopes = list(slope_lines(blocks))
            path, seeds = os.path.join(args.out, f"variants_{exp.args.dataset}"), list(found)
            for end, header, lines in (("", HEADER, table), ("_blocks", BLOCKS, blocks),
                                       ("_slopes", SLOPES, slopes)):
                study.save(path + end, header, lines, exp.device, n=exp.args.samples, seeds=seeds,
                           flags=vars(exp.args))
        draw(table, blocks, path, f"{exp.args.dataset}, {exp.args.steps:,} steps of {exp.args.batch}, seeds "
             f"{seeds}, n={exp.args.samples:,} samples a figure.")
    print(f"\n{lth.text_table(HEADER, table)}\nval_loss: on eps or v, at each schedule's noise levels; not "
          f"comparable between variants.\n\n{lth.text_table(SLOPES, slopes)}\n\n{conclude(table, slopes)}\n"
          f"{path}*.csv, .json, .png")


if __name__ == "__main__":
    main()
