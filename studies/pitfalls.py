"""Which published mistakes in the evaluation change the verdict on a ticket?

    python -m studies.pitfalls                     # makes a small run on digits first: minutes
    python -m studies.pitfalls --from runs/mnist   # a finished run with reinit and random

The correct fid_domain of the dense network, the last ticket and its controls is a mean over several
sets of starting noise x_T. Then one mistake is made at a time, and the same questions are asked
again: is the ticket within 10 % of dense, better than reinit, better than the random mask? Single
values are compared, without a test: a mistake matters where an answer changes. All samples are
drawn by DDIM without noise, so that x_T is the only source of chance in the measurement.

The mistakes: FID from 25 samples and 20 real images; covariances over images; the feature extractor
in train mode; the better of two FIDs for the ticket; the best seed for the ticket (not read in
code); dense alone as the comparison: in how many seeds would reinit and the random mask count as
tickets? They were read in the public code of Jiang et al., Successfully Applying Lottery Ticket
Hypothesis to Diffusion Model, 2023, 2310.18823, unless the text says otherwise. Those made in
training are in studies.pitfalls_training. One that changes no answer in this run may change one in
another.

What would change our mind about a mistake: verdicts that stay the same with it in several runs.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.pitfalls")

import copy
import os

import numpy as np
import torch

import lth_diffusion as lth
import metrics
from studies.common import Study, add_run_flag, open_run
from support import charts, cli
from support.words import ARMS as NAMES, counted

ARMS = "dense", "ticket", "reinit", "random"
DRAWS = 4  # sets of x_T behind a correct value
FEW, REAL = 25, 20  # samples, and real images to compare them with
REPEATS = 300  # draws of so few
COVARIED = 250  # images in a covariance over images
LIMIT = lth.MARGINS["fid_domain"]
HEADER = ["mistake", "seed", *ARMS, *(f"{arm}, mistaken" for arm in ARMS),
          "verdict", "becomes"]


class Bench:
    """The networks of one seed, their samples, and fid_domain as it should be."""

    def __init__(self, exp, seed):
        self.exp, self.seed, self.n = exp, seed, exp.args.samples
        _, self.reference, self.real, _ = exp.quality.extractors["_domain"]
        self.networks, self.samples, self.fids, self.features = {}, {}, {}, {}
        for arm in ARMS:
            job = job_of(exp, seed, arm)
            self.networks[arm] = exp.load(job)
            sets = self.draw(self.networks[arm].ema, str(job))
            self.samples[arm], self.fids[arm] = sets, self.score(sets)
            # (DRAWS * n, 64)
            self.features[arm] = metrics.features(exp.classifier, torch.cat(sets))
        self.right = {arm: np.mean(fids) for arm, fids in self.fids.items()}

    def draw(self, model, label):
        """DRAWS sets of n samples, from the same x_T for every model of the seed."""
        noise = [self.exp.x_T(self.n, self.seed + 1000 * k) for k in range(DRAWS)]
        return [self.exp.draw(model, x_T=x_T, sampler="ddim", label=label) for x_T in noise]

    def score(self, sets):
        """fid_domain of each set."""
        return [self.exp.quality(samples)["fid_domain"] for samples in sets]


def job_of(exp, seed, arm):
    """The dense network, or an arm of the last round."""
    return lth.Job(seed, 0 if arm == "dense" else exp.args.rounds, arm)


# --------------------------------------------------------------------------- the mistakes

# Each of EVALUATIONS gives {arm: fid_domain}.

def few_images(bench):
    """FID from a few samples against a few real images."""
    few = metrics.statistics(bench.real[:REAL])
    return {arm: metrics.fid(feats[:FEW], few)
            for arm, feats in bench.features.items()}


def reversals(bench):
    """Share of draws of a few samples that order ticket and dense otherwise than all samples."""
    ticket, dense = bench.features["ticket"], bench.features["dense"]

    def worse(index, against):
        a, b = (metrics.fid(one[index], against) for one in (ticket, dense))
        return a > b
    truth, changed = worse(slice(None), bench.reference), 0
    few = metrics.statistics(bench.real[:REAL])
    generator = torch.Generator().manual_seed(lth.EVAL_SEED)
    for _ in range(REPEATS):
        index = torch.randperm(len(ticket), generator=generator)[:FEW]
        changed += worse(index, few) != truth
    return changed / REPEATS


def covariance_over_images(bench):
    """FID with images and features exchanged."""
    real = bench.real[:COVARIED]
    return {arm: fid_over_images(feats[:len(real)], real)
            for arm, feats in bench.features.items()}


def fid_over_images(feats, real):
    """FID whose covariances (n, n) are over images and depend on their order."""
    zero = torch.zeros(len(feats))
    # np.cov takes rows for variables.
    fake, true = (np.cov(v.double().numpy()) for v in (feats, real))
    means = (feats.mean(0) - real.mean(0)).square().sum().item()
    return means + metrics.frechet_distance(zero, fake, zero, true)


def train_mode(bench):
    """The feature extractor left in train mode; one set of samples, 2,000 real images."""
    model, batch = bench.exp.classifier, min(FEW, bench.n)
    real = metrics.random_draw(bench.exp.images, 2000)
    reference = metrics.statistics(batch_features(model, real, batch))
    return {arm: metrics.fid(batch_features(model, sets[0], batch), reference)
            for arm, sets in bench.samples.items()}


@torch.no_grad()
def batch_features(model, images, batch):
    """Features (N, D), batch norms with the statistics of each batch; whole batches only."""
    model = copy.deepcopy(model).cpu().train()
    parts = [part for part in images.cpu().split(batch) if len(part) == batch]
    return torch.cat([model(part)[0] for part in parts])


def best_of_two(bench):
    """The better of two FIDs for the ticket, one FID for the others."""
    wrong = {arm: fids[0] for arm, fids in bench.fids.items()}
    return wrong | dict(ticket=min(bench.fids["ticket"][:2]))


EVALUATIONS = {f"FID from {FEW} samples": few_images,
               "covariance over images": covariance_over_images,
               "features in train mode": train_mode,
               "better of two FIDs for the ticket": best_of_two}


def best_seed(benches):
    """The best seed for the ticket, the mean for the others: a row of HEADER."""
    means = {arm: np.mean([one.right[arm] for one in benches]) for arm in ARMS}
    best = min(one.right["ticket"] for one in benches)
    return row("best seed for the ticket", "all", means, means | dict(ticket=best))


def dense_alone(benches):
    """A sentence: in how many seeds the controls would pass for tickets, and the ticket."""
    passed = []
    for arm in ARMS[1:]:
        number = sum(one.right[arm] < (1 + LIMIT) * one.right["dense"] for one in benches)
        passed.append(f"{NAMES[arm]} in {number}")
    return f"Within {LIMIT:.0%} of dense, of {counted(len(benches), 'seed')}: {', '.join(passed)}."


# --------------------------------------------------------------------------- the study

def verdict(values):
    """The answers to the three questions, from {arm: value}."""
    said = []
    for arm in "dense", "reinit", "random":
        bound = values[arm] * (1 + LIMIT if arm == "dense" else 1)
        said.append(f"{arm} {'yes' if values['ticket'] < bound else 'no'}")
    return ", ".join(said)


def row(mistake, seed, right, wrong):
    """A row of HEADER; right, wrong: {arm: fid_domain}."""
    values = [one[arm] for one in (right, wrong) for arm in ARMS]
    return [mistake, seed, *values, verdict(right), verdict(wrong)]


def over_others(rows, start):
    """The ticket over dense, reinit and random, geometric means over rows whose values begin in
    column `start`."""
    logs = np.log([one[start:start + 4] for one in rows]).mean(0)
    return np.exp(logs[1] - logs[[0, 2, 3]])


def conclude(groups, n):
    """Which mistakes changed answers in n seeds."""
    said = []
    for name, rows in groups.items():
        turned = [f"{before} -> {after}"
                  for *_, before, after in rows if before != after]
        if turned:
            said.append(f"{name} ({len(turned)} of {len(rows)}: {turned[0]})")
    return (f"Is the ticket within {LIMIT:.0%} of dense, better than reinit, better than "
            f"random? Mistakes that change an answer, {len(said)} of {len(groups)}: "
            f"{'; '.join(said) or 'none'}. {counted(n, 'seed')}: single values, no test.")


def find_benches(exp, rows):
    """A Bench for each seed with all arms at the last round; Mistake where there is none."""
    seeds = [seed for seed in exp.args.seeds
             if all(job_of(exp, seed, arm) in rows for arm in ARMS)]
    if not seeds:
        cli.refuse("from", f"{exp.args.out} has no seed with reinit and "
                   "random at its last round")
    return [Bench(exp, seed) for seed in seeds]


def draw(groups, path, note):
    """The ticket's fid_domain over that of the others, from {mistake: rows}."""
    ratios = [over_others(next(iter(groups.values())), 2)]  # measured correctly
    ratios += [over_others(rows, 6) for rows in groups.values()]
    turned = sum(any(one[-2] != one[-1] for one in rows) for rows in groups.values())
    title = f"Mistakes that change an answer about the ticket: {turned} of {len(groups)}"
    charts.heat_map(ratios, ["measured correctly", *groups], ["dense", "reinit", "random"], path,
                    title, note, log=True, x_label="fid_domain of the ticket over",
                    bar_label="below 1: better")


def publish(study, args, exp, groups, said, note="", **facts):
    """Save, draw and print {mistake: rows}. said: sentences; note: of the picture."""
    table = [one for rows in groups.values() for one in rows]
    n = len({one[1] for one in table} - {"all"})
    said = [*said, conclude(groups, n)]
    path = os.path.join(args.out, f"{study.prog.split('.')[-1]}_{exp.args.dataset}")
    study.save(path, HEADER, table, exp.device, n=exp.args.samples, draws=DRAWS, said=said, **facts)
    draw(groups, path + ".png", f"{exp.args.dataset}, n={exp.args.samples:,} samples, DDIM, "
         f"{counted(n, 'seed')}, round {exp.args.rounds}.{note}")
    shown = [[*one[:2], *one[-2:]] for one in table]
    print(f"\n{charts.text_table([*HEADER[:2], *HEADER[-2:]], shown)}\n")
    print(*said, f"{path}.csv, .json, .png", sep="\n")


def main(argv=None):
    """The command line."""
    study = Study("studies.pitfalls", __doc__)
    add_run_flag(study)
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run)
        benches = find_benches(exp, rows)
        groups = {name: [row(name, one.seed, one.right, mistake(one)) for one in benches]
                  for name, mistake in EVALUATIONS.items()}
        if len(benches) > 1:
            best = best_seed(benches)
            groups[best[0]] = [best]
        rates = {one.seed: reversals(one) for one in benches}
        said = [f"Seed {seed}: {rate:.0%} of draws of {FEW} samples reverse ticket and dense."
                for seed, rate in rates.items()]
        publish(study, args, exp, groups, [*said, dense_alone(benches)], reversals=rates)


if __name__ == "__main__":
    main()
