"""Do tickets depend on the noise schedule, or on what the network predicts?

    python -m studies.variants                                # digits, one seed: some 20 minutes
    python -m studies.variants --only cosine/eps sigma/eps    # two of the variants
    python -m studies.variants --dataset mnist --seeds 0 1 2 --rounds 10

Flags that are not the study's own go to lth_diffusion.py. Each variant is one run of it, in
runs/variants_DATASET/VARIANT. The same command goes on where it stopped.

linear/eps   Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, 2020, 2006.11239
cosine/eps   Nichol and Dhariwal, Improved Denoising Diffusion, 2021, 2102.09672
linear/v     Salimans and Ho, Progressive Distillation for Fast Sampling, 2022, 2202.00512
sigma/eps    Song et al., Score-Based Generative Modeling through SDEs, 2021, 2011.13456

Jiang et al., Successfully Applying Lottery Ticket Hypothesis to Diffusion Model, 2023, 2310.18823,
report that two tickets of one network are more alike in upstream blocks than in downstream ones,
and choose rates by depth for that reason. Measured here, by residual block: the CKA of the weights
of two dense networks trained from step k on different data orders and, as a null, of networks with
different initialisations. Theirs is the CKA of tickets; for that see studies/layers.py. A slope is
the change from the first block to the last along a straight line. val_loss is an error on eps at
the noise levels of the schedule: compare it between variants of one schedule only.

What would change our mind about 'a ticket is a ticket under any schedule': a variant in which it
loses to reinit or to the random mask in every seed while it beats them in the others. About
'upstream blocks are more alike': a slope of CKA that is not below 0 and below that of the null.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.variants")

import collections
import math
import os

import numpy as np
import torch

import lth_diffusion as lth
from ddpm import Diffusion, sampling_times
from methods.cka import PROBE_SEED, block_similarity
from studies.common import SMALL, Study, checkpoint, deviation, fit, over_seeds, slope
from support import charts, cli
from support.words import counted

SIGMA = "sigma/eps"
VARIANTS = "linear/eps", "cosine/eps", "linear/v", SIGMA
ARMS = dict(dense="dense", ticket="ticket", reinit="reinit", random="random mask")
# difference: fid_domain of the ticket less that of the arm, with the ends of its interval
Row = collections.namedtuple("Row", "variant arm sparsity seeds fid_domain sd "
                             "difference low high val_loss")
BLOCKS = ["variant", "seed", "block", "CKA", "CKA null"]


class SigmaDiffusion(Diffusion):
    """The noise levels of score-based models, log-uniform from 0.01 to 50 (2011.13456,
    appendix C), in a million steps: almost continuous. Its input is scaled to unit variance."""

    def __init__(self, prediction="eps", weighting="plain"):
        super().__init__(1_000_000, "sigma", prediction, weighting)

    @staticmethod
    def make_betas(T, schedule):
        ends = math.log(0.01), math.log(50)
        log_sigma = torch.linspace(*ends, T, dtype=torch.float64)
        abar = 1 / (1 + torch.exp(2 * log_sigma))
        one = torch.ones(1, dtype=torch.float64)
        return 1 - abar / torch.cat([one, abar[:-1]])

    def rescaled(self, model):
        """The model as a callable that turns t into 0 .. 1000, as other schedules have it."""
        return lambda x, t: model(x, t / (self.T / 1000))

    def predict(self, model, x_t, t):
        return super().predict(self.rescaled(model), x_t, t)

    def loss(self, model, x0, t, noise):
        return super().loss(self.rescaled(model), x0, t, noise)


class ScoreBased(lth.Experiment):
    """Trains and samples with these noise levels, whatever --schedule says."""

    def __init__(self, args, guard=None):
        super().__init__(args, guard)
        self.diffusion = SigmaDiffusion(args.prediction, args.weighting)


# --------------------------------------------------------------------------- the runs

def parse(name, rest, folder=None):
    """(flags, parser) of one variant's run of lth_diffusion.py."""
    schedule, prediction = name.split("/")
    flags = [*rest, "--prediction", prediction]
    if name != SIGMA:
        flags += ["--schedule", schedule]
    if not any(flag.startswith("--rounds") for flag in rest):
        flags = SMALL + flags
    args, parser = lth.parse_args(flags)
    if not {"reinit", "random"} <= set(args.controls):
        cli.refuse("controls", "the ticket is compared with reinit and random; add them")
    if name == SIGMA:
        try:
            sampling_times(SigmaDiffusion(), args.nfe)
        except ValueError as error:
            cli.refuse("nfe", error)
    folder = folder or f"runs/variants_{args.dataset}"
    args.out = os.path.join(folder, name.replace("/", "-"))
    return args, parser


def arm_rows(name, exp, seeds):
    """Rows: the arms at the last round, paired by seed with the ticket."""
    def rows_of(arm):
        number = 0 if arm == "dense" else exp.args.rounds
        return [exp.rows.get(lth.Job(seed, number, arm)) for seed in seeds]

    ticket = [row["fid_domain"] for row in rows_of("ticket")]
    for arm in ARMS:
        rows = rows_of(arm)
        fids = [row["fid_domain"] for row in rows]
        gap = [None] * 3
        if arm != "ticket":
            gap = over_seeds(np.subtract(ticket, fids))
        loss = np.mean([row["val_loss"] for row in rows])
        yield Row(name, arm, rows[0]["sparsity"], len(rows), np.mean(fids),
                  deviation(fids), *gap, loss)


def trained(exp, seed):
    """The dense network of a seed."""
    return exp.load(lth.Job(seed, 0, "dense")).model


def block_rows(name, exp, seeds):
    """Rows of BLOCKS: CKA with the network of another data order, and of another initialisation.

    The latter is the next seed's; with a single seed one more network is trained.
    """
    for number, seed in enumerate(seeds):
        model, probe, order = trained(exp, seed), exp.new_model(seed), PROBE_SEED + seed
        state = checkpoint(exp, seed)
        fit(exp, f"variants_probe_seed{seed}", seed, probe, None, state, seed=order)
        if len(seeds) > 1:
            other = trained(exp, seeds[(number + 1) % len(seeds)])
        else:
            other = exp.new_model(lth.REINIT_SEED + seed)
            fit(exp, f"variants_null_seed{seed}", seed, other)
        null = block_similarity(model, other)
        for block, value in block_similarity(model, probe).items():
            yield [name, seed, block, value, null[block]]


# --------------------------------------------------------------------------- what they show

def slopes_of(blocks):
    """{variant: (slope along the blocks, its standard error) of CKA and of its null}."""
    groups, slopes = {}, {}
    for name, _, block, *pair in blocks:
        groups.setdefault(name, {}).setdefault(block, []).append(pair)
    for name, by_block in groups.items():
        means = np.mean([*by_block.values()], axis=1)  # (blocks, 2), over seeds
        slopes[name] = [slope(column) for column in means.T]
    return slopes


def draw(table, path, note):
    """fid_domain by variant and arm."""
    names, series = cli.once(row.variant for row in table), []
    for arm, label in ARMS.items():
        rows = [row for row in table if row.arm == arm]
        x = [names.index(row.variant) for row in rows]
        y = np.array([row.fid_domain for row in rows])
        sd = np.array([row.sd or np.nan for row in rows])
        ends = dict(y_low=y - sd, y_high=y + sd)
        series.append(dict(label=label, x=x, y=y, style="points", **ends))
    charts.line_chart(
        series, path, "Tickets under other schedules and predictions", "",
        "fid_domain (log, lower is better)", log_y=True,
        x_ticks=[*enumerate(names)], note=note)


def conclude(table, slopes):
    """How far the ticket is from each arm, and the slopes, by variant."""
    n, lines = table[0].seeds, []
    rule = "90 % intervals" if n > 2 else "no verdict"
    for arm in "dense", "reinit", "random":
        parts = []
        for row in table:
            if row.arm == arm:
                ends = f" [{row.low:+.2f}, {row.high:+.2f}]" if n > 2 else ""
                parts.append(f"{row.variant} {row.difference:+.2f}{ends}")
        lines.append(f"fid_domain of the ticket less that of {ARMS[arm]}: "
                     f"{', '.join(parts)} ({counted(n, 'seed')}, {rule}).")
    for name, pair in slopes.items():
        cka, null = (f"{value:+.3f} ± {error:.3f}" for value, error in pair)
        lines.append(f"Slope of CKA along the blocks, {name}: {cka}; null {null}.")
    return "\n".join(lines)


def main(argv=None):
    """The command line; other flags go to lth_diffusion.py."""
    study = Study("studies.variants", __doc__)
    add = study.add_argument
    add("--only", nargs="+", choices=VARIANTS, default=VARIANTS,
        help="default: all four")
    add("--runs", type=cli.path,
        help="folder of the runs (default: runs/variants_DATASET)")
    table, blocks = [], []
    with study.arguments(argv, ("--schedule", "--prediction")) as args:
        plans = {name: parse(name, args.rest, args.runs) for name in args.only}
        for name, (options, parser) in plans.items():
            print(f"\n--- {name}: {options.out}", flush=True)
            seeds = list(options.seeds)  # a run adds those of its folder
            kind = ScoreBased if name == SIGMA else lth.Experiment
            exp = lth.run(options, parser, experiment=kind)
            table += arm_rows(name, exp, seeds)
            blocks += block_rows(name, exp, seeds)
        path = f"{args.out}/variants_{options.dataset}"
        slopes = slopes_of(blocks)
        facts = dict(n=options.samples, seeds=seeds, flags=vars(options))
        study.save(path, Row._fields, table, exp.device, **facts)
        study.save(path + "_blocks", BLOCKS, blocks, exp.device, slopes=slopes, **facts)
        bars = " Bars: standard deviation over seeds." if len(seeds) > 1 else ""
        draw(table, path + ".png",
             f"{options.dataset}, {options.steps:,} steps of {options.batch}; FID from "
             f"{options.samples:,} samples; seeds {', '.join(map(str, seeds))}.{bars}")
    print("", charts.text_table(Row._fields, table), "", conclude(table, slopes),
          f"{path}*.csv, .json, .png", sep="\n")


if __name__ == "__main__":
    main()
