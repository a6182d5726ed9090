"""Do tickets depend on the noise schedule, on what the network predicts, on the loss's weights?

    python -m studies.variants                                # drawn digits, three seeds
    python -m studies.variants --only linear/v/plain linear/eps/plain     # two of the variants
    python -m studies.variants --dataset mnist --preset tiny --steps 560

Flags that are not the study's own go to lth_diffusion.py. Each variant (noise schedule, prediction,
weighting of the loss by t) is one run of it, in runs/variants_DATASET/VARIANT; the same command
goes on where it stopped.

linear   Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, 2020, 2006.11239
cosine   Nichol and Dhariwal, Improved Denoising Diffusion, 2021, 2102.09672
sigma    score-based: Song et al., Score-Based Generative Modeling through SDEs, 2021, 2011.13456
v        Salimans and Ho, Progressive Distillation for Fast Sampling, 2022, 2202.00512
min-snr  Hang et al., Efficient Diffusion Training via Min-SNR Weighting, 2023, 2303.09556

Winning, in each variant, is what it is in the main job: within 10 % of dense in fid_domain or 3 %
in val_loss, better than reinit, better than a random mask, each by a one-sided paired t test at
5 %, here without adjustment over variants. Intervals are 90 %. val_loss is an error on eps at the
noise levels of the schedule: compare it between variants of one schedule only.

What would change our mind about 'a ticket is a ticket under any loss': a variant in which reinit is
shown to be better than the ticket.
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
from studies.common import (JUDGED, SHOWN, SMALL, Study, deviation, judged, over_seeds,
                            rounded)
from support import charts, cli, report
from support.words import ARMS, counted, seeds_of

SIGMA = "sigma/eps/plain"
VARIANTS = ("linear/v/min-snr", "linear/v/plain", "linear/eps/min-snr", "linear/eps/plain",
            "cosine/v/min-snr", SIGMA)
# difference: fid_domain of the ticket less that of the arm, with the ends of its interval
Row = collections.namedtuple("Row", "variant arm sparsity seeds fid_domain sd "
                             "difference low high val_loss")
VERDICTS = ["variant", "metric", *JUDGED]
VARIED = "schedule", "prediction", "weighting"  # flags in which the variants differ
OWN = *VARIED, "out", "seeds", "workers"  # flags in which their runs may


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
    schedule, prediction, weighting = name.split("/")
    flags = [*rest, "--prediction", prediction, "--weighting", weighting]
    if name != SIGMA:
        flags += ["--schedule", schedule]
    given = {flag.split("=")[0] for flag in rest}
    if not {"--rounds", "--final-sparsity", "--prune-rate", "--control-rounds"} & given:
        flags = [*SMALL, "--control-rounds", "2", *flags]
    if "--seeds" not in given:
        flags += ["--seeds", "10", "11", "12"]
    args, parser = lth.parse_args(flags)
    if not {"reinit", "random"} <= set(args.controls):
        cli.refuse("controls", "the ticket is compared with reinit and random; add them")
    if args.rounds not in args.control_rounds:
        cli.refuse("control-rounds", f"the last round, {args.rounds}, is what is compared: add it")
    if name == SIGMA:
        args.workers = 1  # helpers of a run know the schedules of lth_diffusion.py alone
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
    for arm in SHOWN:
        rows = rows_of(arm)
        fids = [row["fid_domain"] for row in rows]
        gap = [None] * 3 if arm == "ticket" else over_seeds(np.subtract(ticket, fids))
        loss = np.mean([row["val_loss"] for row in rows])
        yield Row(name, arm, rows[0]["sparsity"], len(rows), np.mean(fids), deviation(fids), *gap,
                  loss)


def verdict_rows(name, exp, seeds):
    """The rows of VERDICTS of a variant: what is shown of its last ticket by each metric."""
    mine = {job: row for job, row in exp.rows.items() if job.seed in seeds}
    for metric in lth.MARGINS:
        yield [name, metric, *judged(report.arms_of(mine, exp.args.rounds, metric), metric)]


# --------------------------------------------------------------------------- what they show

def title_of(verdicts):
    """What the verdicts say, for the picture."""
    won = {metric: sum(row[1] == metric and row[VERDICTS.index("answer")] == "winning"
                       for row in verdicts) for metric in lth.MARGINS}
    if all(row[VERDICTS.index("answer")].startswith("no verdict") for row in verdicts):
        return "No verdict: fewer than three seeds, or runs that diverged"
    said = ", ".join(f"{n} by {metric}" for metric, n in won.items())
    return f"Of {counted(len(verdicts) // len(won), 'variant')} tickets win in {said}"


def draw(table, title, path, note):
    """fid_domain by variant and arm."""
    names, series = cli.once(row.variant for row in table), []
    for arm in SHOWN:
        rows = [row for row in table if row.arm == arm]
        y = np.array([row.fid_domain for row in rows])
        sd = np.array([row.sd or np.nan for row in rows])
        series.append(dict(label=ARMS[arm], x=[names.index(row.variant) for row in rows], y=y,
                           style="points", y_low=y - sd, y_high=y + sd, **report.look_of(arm)))
    ticks = [name.replace("/", "\n") for name in names]
    charts.line_chart(series, path, title, "", "fid_domain (log, lower is better)", log_y=True,
                      x_ticks=[*enumerate(ticks)], note=note)


def save(study, path, table, verdicts, options, seeds):
    """Write both tables, with the flags that all variants share."""
    flags = {flag: value for flag, value in vars(options).items() if flag not in OWN}
    facts = dict(device=cli.pick_device(options.device)[0], n=options.samples, seeds=seeds,
                 flags=flags)
    study.save(path, Row._fields, table, **facts)
    study.save(path + "_verdicts", VERDICTS, verdicts, **facts)


def main(argv=None):
    """The command line; other flags go to lth_diffusion.py."""
    study = Study("studies.variants", __doc__)
    add = study.add_argument
    add("--only", nargs="+", choices=VARIANTS, default=VARIANTS,
        help="default: all six")
    add("--runs", type=cli.path,
        help="folder of the runs (default: runs/variants_DATASET)")
    table, verdicts = [], []
    with study.arguments(argv, [f"--{flag}" for flag in VARIED]) as args:
        plans = {name: parse(name, args.rest, args.runs) for name in args.only}
        for name, (options, parser) in plans.items():
            print(f"\n--- {name}: {options.out}", flush=True)
            seeds = list(options.seeds)  # a run adds those of its folder
            kind = ScoreBased if name == SIGMA else lth.Experiment
            try:
                exp = lth.run(options, parser, experiment=kind)
                table += arm_rows(name, exp, seeds)
                verdicts += verdict_rows(name, exp, seeds)
            except SystemExit as stop:
                if stop.code != 1:  # 1: it diverged, as it has said itself
                    raise
                verdicts += [[name, metric, len(seeds), *[None] * 5, "no verdict: it diverged",
                              *[None] * 6] for metric in lth.MARGINS]
            path = f"{args.out}/variants_{options.dataset}"
            if table:
                save(study, path, table, verdicts, options, seeds)
        if not table:
            raise FloatingPointError("every variant diverged: give a lower --lr")
        bars = " Bars: standard deviation over seeds." if len(seeds) > 1 else ""
        draw(table, title_of(verdicts), path + ".png",
             f"{options.dataset}, {options.steps:,} steps of {options.batch}; FID from "
             f"{options.samples:,} samples; {seeds_of(seeds)}.{bars}")
    print("", charts.text_table(Row._fields, rounded(table)), "",
          charts.text_table(VERDICTS, rounded(verdicts)), "", f"{path}*.csv, .json, .png", sep="\n")


if __name__ == "__main__":
    main()
