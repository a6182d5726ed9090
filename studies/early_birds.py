"""When do masks settle, and is an early-bird ticket as good as one found by rounds?

    python -m studies.early_birds                     # a small run on digits first: minutes
    python -m studies.early_birds --from runs/mnist   # a finished run, all its seeds

Early-bird tickets (You et al., Drawing Early-Bird Tickets, 2020, 1909.11957; methods/early_bird.py)
take the mask as soon as it hardly changes. Whalen et al., 2025 (2504.09606), draw one for each
region of diffusion steps and join them when sampling. At the density of the run's last tickets:

settling    The distance of each new mask from the one before it, in the training of dense.
ticket      The run's own, found by rounds; dense and reinit stand beside it.
early bird  Search and training together take as many steps as dense does.
by region   Two early birds, of the upper and the lower half of t, each searched and trained on its
            half alone, for half of the steps; together they store twice as many weights.
dense by region   The same without masks: what is due to the halves and not to pruning.

Training steps are all that an arm took, with the search, and with the dense network and the rounds
before in the case of the ticket.

Margin, fixed before the run: a tenth of the fid_domain compared with; intervals of 90 % over seeds,
paired. What would change our mind about 'rounds find better tickets': an early bird that is shown
to be as good, for it costs a fraction.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.early_birds")

import argparse
import os

import numpy as np

from lth_diffusion import Job
from methods import early_bird
from studies.common import (ALL, REGIONS, Joined, Study, add_run_flag, against, at_region, fit,
                            open_run, rounded)
from support import charts
from support.words import seeds_of

MARGIN = 0.1  # of what is compared with
HEADER = ["seed", "arm", "settled at", "training steps", "fid_domain", "val_loss"]
SETTLING = ["seed", "region", "step", "distance from the mask before"]
PAIRED = ["arm", "against", "seeds", "training steps / dense", "fid_domain", "its fid_domain",
          "difference", "low", "high", "answer"]


def early_bird_of(exp, seed, region):
    """(EMA of the early-bird ticket, step at which its mask settled, rows of SETTLING)."""
    mine, said = at_region(exp, region), []
    args = argparse.Namespace(**vars(mine.args) | dict(control_rounds=[exp.args.rounds]))

    def follow(step, r, distances):
        if distances:
            said.append([seed, region, step, distances[-1]])
    masks, state = early_bird.search(args, mine, seed, follow)[exp.args.rounds]
    name = f"early_birds_{region.replace(' ', '_')}_seed{seed}"
    return fit(mine, name, seed, exp.new_model(seed), masks, state), state["step"], said


def networks(exp, rows, seed):
    """(arm, network, settled at, training steps, rows of SETTLING) of every arm of a seed."""
    steps, last = exp.args.steps, exp.args.rounds
    for arm in "dense", "ticket", "reinit":
        job = Job(seed, 0 if arm == "dense" else last, arm)
        if job in rows:
            trained = exp.load(job)
            yield arm, trained.ema, None, trained.row["train_steps_total"], []
    model, settled, said = early_bird_of(exp, seed, ALL)
    yield "early bird", model, settled, steps, said
    both = {region: early_bird_of(exp, seed, region) for region in REGIONS}
    switch = exp.diffusion.T // 2
    said = [row for *_, mine in both.values() for row in mine]
    yield ("by region", Joined(*(model for model, *_ in both.values()), switch),
           " and ".join(str(step) for _, step, _ in both.values()), 2 * (steps // 2), said)
    dense = [fit(at_region(exp, region), f"early_birds_dense_{region.replace(' ', '_')}_seed{seed}",
                 seed, exp.new_model(seed)) for region in REGIONS]
    yield "dense by region", Joined(*dense, switch), None, 2 * (steps // 2), []


def measure(exp, rows, seeds):
    """(rows of HEADER, rows of SETTLING)."""
    table, settling = [], []
    for seed in seeds:
        for arm, model, settled, steps, said in networks(exp, rows, seed):
            samples = exp.draw(model, seed, label=f"seed {seed} {arm}: sample")
            table.append([seed, arm, settled, steps, exp.quality(samples)["fid_domain"],
                          exp.errors(model)["val_loss"]])
            settling += said
            print(f"seed {seed} {arm}: fid_domain {table[-1][4]:.2f}", flush=True)
    return table, settling


def paired(table):
    """Rows of PAIRED: every arm against the ticket, and by region against what tells halves and
    masks apart."""
    values, steps = {}, {}
    for seed, arm, _, total, fid, _ in table:
        values.setdefault(arm, {})[seed] = fid
        steps[arm] = total
    pairs = [(arm, "ticket") for arm in values if arm != "ticket"]
    for arm, base in [*pairs, ("by region", "dense by region"), ("by region", "early bird")]:
        if arm in values and base in values:
            n, *found = against(values[arm], values[base], MARGIN)
            yield [arm, base, n, steps[arm] / steps["dense"], *found]


def title_of(settled, steps):
    """When the masks of all t were drawn, for the picture; settled: a step for each seed."""
    every, latest = max(1, round(early_bird.EVERY * steps)), round(early_bird.LATEST * steps)
    if all(step + every > latest for step in settled):
        return (f"The search for masks ends, settled or not, at step {settled[0]:,} of "
                f"{steps:,}")
    between = " to ".join(f"{step:,}" for step in sorted({min(settled), max(settled)}))
    return f"Masks are drawn after {between} of {steps:,} steps"


def draw(settling, settled, steps, path, note):
    """Distances over training steps: a line for each region, means over seeds."""
    series = []
    for region in (ALL, *REGIONS):
        by_step = {}
        for _, its, step, distance in settling:
            if its == region:
                by_step.setdefault(step, []).append(distance)
        shown = {step: float(np.mean(values)) for step, values in sorted(by_step.items())}
        series.append(dict(label=region, x=list(shown), y=list(shown.values()), style="solid"))
    charts.line_chart(series, path, title_of(settled, steps), "training step",
                      "distance from the mask before",
                      hlines=[("near enough", early_bird.NEAR, "dashed")], note=note)


def main(argv=None):
    """The command line."""
    study = Study("studies.early_birds", __doc__)
    add_run_flag(study)
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run)
        seeds = [seed for seed in exp.args.seeds
                 if Job(seed, exp.args.rounds, "ticket") in rows]
        path = os.path.join(args.out, f"early_birds_{exp.args.dataset}")
        table, settling = measure(exp, rows, seeds)
        facts = dict(n=exp.args.samples, near=early_bird.NEAR, before=early_bird.BEFORE)
        summary = list(paired(table))
        study.save(path, HEADER, table, exp.device, **facts)
        study.save(path + "_settling", SETTLING, settling, exp.device, **facts)
        study.save(path + "_paired", PAIRED, summary, exp.device, **facts)
        left = 100 * density_of(exp, seeds[0])
        settled = [row[2] for row in table if row[1] == "early bird"]
        draw(settling, settled, exp.args.steps, path + ".png",
             f"{exp.args.dataset}, masks of {left:.3g} % of the weights, {seeds_of(seeds)}; "
             f"halves: half of the steps each. Settled: near enough to all {early_bird.BEFORE} "
             "masks before.")
    print(f"\n{charts.text_table(PAIRED, rounded(summary))}\n\n{path}.csv, _paired.csv, "
          "_settling.csv, .json, .png")


def density_of(exp, seed):
    """The share of weights that the run's last tickets keep."""
    return 1 - exp.load(Job(seed, exp.args.rounds, "ticket")).row["sparsity"]


if __name__ == "__main__":
    main()
