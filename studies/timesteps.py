"""Should the network be sparser in some denoising steps than in others?

    python -m studies.timesteps                       # a small run on digits first: minutes
    python -m studies.timesteps --from runs/mnist     # a finished run, all its seeds

Jiang et al., Successfully Applying Lottery Ticket Hypothesis to Diffusion Model, 2023 (2310.18823),
leave this open. All tickets here are made alike, by one cut of the run's dense network, trained on
from step k:

even            One ticket for all t, at the density of the run's last tickets.
sparse early    Two tickets share the chain: one with half the live multiply-accumulates of `even`
                denoises the upper half of t, one with one and a half times as many the lower half.
dense early     The same the other way round.
..., by halves  Each ticket is trained on its half of t alone, for half of the steps.

So all do the same work per sample (measured; it differs by what an odd number of evaluations leaves
over) and take the same training steps (counted from step k; the dense network is common to all),
except that two tickets trained on all t take twice as many.
Splits are compared with `even`, those by halves with `even, by halves`. Margin, fixed before the
run: a tenth of the fid_domain compared with; intervals of 90 % over seeds, paired.

What would change our mind about 'one sparsity for all steps is enough': a direction that is shown
to be better than `even`, while the other one is not.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.timesteps")

import os

import numpy as np
import torch

import metrics
from ddpm import sampling_times
from lth_diffusion import Job
from prune import dense_masks, prune_magnitude
from studies.common import (ALL, REGIONS, Joined, Study, add_run_flag, against, at_region,
                            checkpoint, fit, open_run, rounded)
from support import charts, cli
from support.words import seeds_of

SHARES = dict(sparser=0.5, even=1.0, denser=1.5)  # of the live MACs of `even`
SPLITS = {"even": ("even", "even"), "sparse early": ("sparser", "denser"),
          "dense early": ("denser", "sparser")}  # tickets of the upper and the lower half
HALVES = ", by halves"
MARGIN = 0.1  # of what is compared with
HEADER = ["seed", "arm", "million MACs per evaluation", "training steps", "fid_domain", "val_loss"]
PAIRED = ["arm", "against", "seeds", "million MACs per evaluation", "fid_domain",
          "its fid_domain", "difference", "low", "high", "answer"]


def macs_of(model, masks):
    """Live multiply-accumulates of an evaluation of one image."""
    device = next(model.parameters()).device
    x = torch.zeros(1, model.config["channels"], *[model.config["image_size"]] * 2, device=device)
    found = metrics.count_macs(model, x, torch.zeros(1, device=device), masks)
    return sum(live for _, live in found.values())


def cut_to(exp, model, macs):
    """Masks of one cut, as the run ranks weights, that leave about so many live MACs."""
    low, high, masks = 0.0, 1.0, None
    for _ in range(12):  # to a part in four thousand of the weights
        share = (low + high) / 2
        masks = prune_magnitude(model, dense_masks(model), share, exp.args.scope,
                                score=exp.args.score)
        low, high = (share, high) if macs_of(model, masks) > macs else (low, share)
    return masks


def tickets_of(exp, seed):
    """{name of SHARES: masks}."""
    dense = exp.load(Job(seed, 0, "dense")).model
    last = exp.load(Job(seed, exp.args.rounds, "ticket"))
    even = prune_magnitude(dense, dense_masks(dense), last.row["sparsity"], exp.args.scope,
                           score=exp.args.score)
    macs, whole = macs_of(dense, even), macs_of(dense, dense_masks(dense))
    if max(SHARES.values()) * macs > whole:
        cli.refuse("from", f"{exp.args.out}: its tickets keep {macs / whole:.0%} of the "
                   "multiply-accumulates; name a run of sparser ones, at most two thirds")
    return {name: even if name == "even" else cut_to(exp, dense, share * macs)
            for name, share in SHARES.items()}


def networks(exp, seed):
    """(arm, network, live MACs per evaluation, training steps) of every arm."""
    masks, state = tickets_of(exp, seed), checkpoint(exp, seed)
    macs = {name: macs_of(exp.new_model(seed), mine) for name, mine in masks.items()}
    steps, half = exp.args.steps - state["step"], exp.diffusion.T // 2
    times = sampling_times(exp.diffusion, exp.args.nfe)
    upper = sum(t >= half for t in times) / len(times)  # share of the evaluations

    def ticket(name, region):
        """EMA of a ticket, trained on a region of t."""
        mine = at_region(exp, region)
        start = state if region == ALL else dict(state, step=state["step"] // 2)
        file = f"timesteps_{name}_{region.replace(' ', '_')}_seed{seed}"
        return fit(mine, file, seed, exp.new_model(seed), masks[name], start)
    whole = {name: ticket(name, ALL) for name in SHARES}
    for arm, pair in SPLITS.items():
        work = upper * macs[pair[0]] + (1 - upper) * macs[pair[1]]
        if arm == "even":
            yield arm, whole["even"], work, steps
        else:
            yield arm, Joined(*(whole[name] for name in pair), half), work, 2 * steps
        parts = [ticket(name, region) for name, region in zip(pair, REGIONS)]
        yield arm + HALVES, Joined(*parts, half), work, steps


def measure(exp, seeds):
    """Rows of HEADER."""
    for seed in seeds:
        for arm, model, macs, steps in networks(exp, seed):
            samples = exp.draw(model, seed, label=f"seed {seed} {arm}: sample")
            fid, loss = exp.quality(samples)["fid_domain"], exp.errors(model)["val_loss"]
            print(f"seed {seed} {arm}: fid_domain {fid:.2f}", flush=True)
            yield [seed, arm, macs / 1e6, steps, fid, loss]


def paired(table):
    """Rows of PAIRED: splits against even, those by halves against even by halves, and that against
    even."""
    values, work = {}, {}
    for seed, arm, macs, _, fid, _ in table:
        values.setdefault(arm, {})[seed] = fid
        work.setdefault(arm, []).append(macs)
    for arm, mine in values.items():
        base = "even" + HALVES * (arm.endswith(HALVES) and arm != "even" + HALVES)
        if arm != "even" and base in values:
            n, *found = against(mine, values[base], MARGIN)
            yield [arm, base, n, float(np.mean(work[arm])), *found]


def draw(table, summary, path, note):
    """fid_domain of every arm, a dot for each seed."""
    arms = list(dict.fromkeys(row[1] for row in table))
    dots = [[row[4] for row in table if row[1] == arm] for arm in arms]
    better = [row[0] for row in summary if row[-1] == "better" and row[0] != "even" + HALVES]
    title = (f"Shown to be better than one sparsity for all steps: {'; '.join(better)}" if better
             else "No split is shown to be better than one sparsity for all steps")
    if any(row[-1] == "no verdict" for row in summary):
        title = "One sparsity for all steps, or two: fewer than three seeds, no verdict"
    series = [dict(label="tickets", x=range(len(arms)), y=[np.mean(one) for one in dots],
                   dots=dots, style="points")]
    ticks = [arm.replace(", ", ",\n").replace("e early", "e\nearly") for arm in arms]
    charts.line_chart(series, path, title, "", "fid_domain (lower is better)",
                      x_ticks=list(enumerate(ticks)), note=note)


def main(argv=None):
    """The command line."""
    study = Study("studies.timesteps", __doc__)
    add_run_flag(study)
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run)
        seeds = [seed for seed in exp.args.seeds
                 if Job(seed, exp.args.rounds, "ticket") in rows]
        path = os.path.join(args.out, f"timesteps_{exp.args.dataset}")
        table = list(measure(exp, seeds))
        summary = list(paired(table))
        study.save(path, HEADER, table, exp.device, n=exp.args.samples)
        study.save(path + "_paired", PAIRED, summary, exp.device, n=exp.args.samples)
        draw(table, summary, path + ".png", f"{exp.args.dataset}, {exp.args.steps:,} steps, equal "
             f"work per sample; FID from {exp.args.samples:,} samples; {seeds_of(seeds)}.")
    print(f"\n{charts.text_table(PAIRED, rounded(summary))}\n\n{path}.csv, _paired.csv, .json, "
          ".png")


if __name__ == "__main__":
    main()
