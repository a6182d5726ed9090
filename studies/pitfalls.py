"""Which published mistakes change the verdict on a ticket?

    python -m studies.pitfalls                     # makes a small run on digits first: minutes
    python -m studies.pitfalls --from runs/mnist   # a finished run with reinit and random

The correct fid_domain of the dense network, the last ticket and its controls is a mean over several
sets of starting noise x_T. Then one mistake is made at a time, and the same questions are asked
again: is the ticket within 10 % of dense, better than reinit, better than the random mask? Single
values are compared, without a test: a mistake matters where an answer changes. All samples are
drawn by DDIM without noise, so that x_T is the only source of chance in the measurement.

In the evaluation: FID from 25 samples and 20 real images; covariances over images; the feature
extractor in train mode; the better of two FIDs for the ticket; the best seed for the ticket (not
read in code). In training, where the ticket is trained again from step k on the same batches:

restart fresh    The ticket's weights go back to step k, but Adam and the average start anew at full
                 rate, without the warm-up that reinit has (the first edition of this code; open_lth
                 restarts its optimizer too, but that of the dense network with it).
negative frozen  No gradient where w < 1e-6, which should have been |w|: negative weights get none
                 (rahulvigneswaran/Lottery-Ticket-Hypothesis-in-Pytorch, its issues 5 and 31).
EMA continued    The average goes on from the dense network's (first seed only), so that pruned
                 weights stay alive in it.

Without training: cutting every weight up to the k-th smallest takes one too many, and all that tie
with it (Eric-mingjie/rethinking-network-pruning, weight-level lottery tickets), counted for a cut
of a fifth. Weight standardisation revives pruned weights: counted. Dense alone as the comparison:
in how many seeds would reinit and the random mask count as tickets?

The mistakes were read in the public code of Jiang et al., Successfully Applying Lottery Ticket
Hypothesis to Diffusion Model, 2023, 2310.18823, unless the text says otherwise. One that changes no
answer in this run may change one in another.

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
from ddpm import train
from prune import live_total, mask_hooks, prunable, rewind
from studies.common import Study, add_run_flag, fit, open_run, over_seeds
from support import charts, cli
from support.words import ARMS as NAMES, counted

ARMS = "dense", "ticket", "reinit", "random"
DRAWS = 4  # sets of x_T behind a correct value
FEW, REAL = 25, 20  # samples, and real images to compare them with
REPEATS = 300  # draws of so few
COVARIED = 250  # images in a covariance over images
LIMIT = lth.MARGINS["fid_domain"]
FRESH, NEGATIVE, AVERAGE = "restart fresh", "negative frozen", "EMA continued from dense"
EPS = 1e-6  # below it a weight is taken for pruned
FIFTH = 0.2  # cut by a threshold
BEST_SEED = "best seed for the ticket"  # not read in code
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


# --------------------------------------------------------------------------- in the evaluation
# Each gives {arm: fid_domain}.

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
    """The feature extractor left in train mode."""
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


# --------------------------------------------------------------------------- in the network

def restart_fresh(bench):
    """The EMA of the ticket trained again from its weights at step k alone."""
    exp, dense = bench.exp, bench.networks["dense"].checkpoint
    fresh = dense | dict(optimizer=None, ema=dense["model"], ema_updates=0)
    return fit(exp, f"restart_fresh_seed{bench.seed}", bench.seed, exp.new_model(bench.seed),
               bench.networks["ticket"].masks, fresh)


def train_again(bench, label, changed=None, **hooks):
    """The EMA of the ticket, trained again from step k. changed: of its state; hooks: of train."""
    exp, masks, model = bench.exp, bench.networks["ticket"].masks, bench.exp.new_model(bench.seed)
    state = rewind(model, masks, bench.networks["dense"].checkpoint) | (changed or {})
    options = exp.options(job_of(exp, bench.seed, "ticket"), label=label)
    return train(model, exp.diffusion, exp.images, state=state, **options,
                 **mask_hooks(model, masks) | hooks)[0].model


def continue_average(bench):
    """Where the average goes on from that of dense, its warm-up over."""
    ema = bench.networks["dense"].ema.state_dict()
    return train_again(bench, AVERAGE, dict(ema=ema, ema_updates=10 ** 9))


def freeze_negative(bench):
    """Where weights below EPS are taken for pruned and get no gradient."""
    def after_backward(step, model):
        for p in prunable(model).values():
            if p.grad is not None:
                p.grad.mul_(p >= EPS)
    return train_again(bench, NEGATIVE, after_backward=after_backward)


def cut_by_threshold(model, fraction):
    """How many weights go where everything up to the k-th value does, k = fraction * all."""
    sizes = torch.cat([p.detach().abs().flatten() for p in prunable(model).values()])
    return int((sizes <= sizes.sort().values[int(fraction * len(sizes))]).sum())


def nonzero(model):
    """How many prunable weights are not exactly 0."""
    return sum(int(p.count_nonzero()) for p in prunable(model).values())


@torch.no_grad()
def standardised(model):
    """A copy with weight standardisation: the filters of convolutions at mean 0, variance 1."""
    model = copy.deepcopy(model)
    for p in prunable(model).values():
        if p.dim() == 4:
            flat = p.flatten(1)
            variance = flat.var(1, keepdim=True, unbiased=False) + 1e-5
            flat = (flat - flat.mean(1, keepdim=True)) * variance.rsqrt()
            p.copy_(flat.view_as(p))
    return model


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


def measure(benches, averaged):
    """{mistake: its rows}. averaged: what continue_average made of the first."""
    groups, first = {}, benches[0]
    for name, mistake in EVALUATIONS.items():
        groups[name] = [row(name, one.seed, one.right, mistake(one))
                        for one in benches]
    if len(benches) > 1:
        means, best = {}, min(one.right["ticket"] for one in benches)
        for arm in ARMS:
            means[arm] = np.mean([one.right[arm] for one in benches])
        wrong = means | dict(ticket=best)
        groups[BEST_SEED] = [row(BEST_SEED, "all", means, wrong)]
    for name, mistake in {FRESH: restart_fresh, NEGATIVE: freeze_negative}.items():
        groups[name] = [retrained(name, one, mistake(one)) for one in benches]
    return groups | {AVERAGE: [retrained(AVERAGE, first, averaged)]}


def retrained(name, bench, model):
    """The row of a ticket that was trained with a mistake."""
    value = np.mean(bench.score(bench.draw(model, name)))
    return row(name, bench.seed, bench.right, bench.right | dict(ticket=value))


def over_others(rows, start):
    """The ticket over dense, reinit and random, geometric means over rows whose values begin in
    column `start`."""
    logs = np.log([one[start:start + 4] for one in rows]).mean(0)
    return np.exp(logs[1] - logs[[0, 2, 3]])


def draw(groups, path, note):
    """The ticket's fid_domain over that of the others."""
    correct = over_others(next(iter(groups.values())), 2)
    mistaken = [over_others(rows, 6) for rows in groups.values()]
    n = sum(any(one[-2] != one[-1] for one in rows) for rows in groups.values())
    charts.heat_map([correct, *mistaken], ["measured correctly", *groups],
                    ["dense", "reinit", "random"], path,
                    f"{n} of {len(groups)} mistakes change an answer about the ticket", note,
                    log=True, x_label="fid_domain of the ticket over",
                    bar_label="below 1: better")


def conclude(groups, n):
    """Which mistakes changed answers in n seeds."""
    said = []
    for name, rows in groups.items():
        turned = [f"{before} -> {after}"
                  for *_, before, after in rows if before != after]
        if turned:
            said.append(f"{name} ({len(turned)} of {len(rows)}: {turned[0]})")
    return (f"Is the ticket within {LIMIT:.0%} of dense, better than reinit, better than "
            f"random? {len(said)} of {len(groups)} mistakes change an answer: "
            f"{'; '.join(said) or 'none'}. {counted(n, 'seed')}: single values, no test.")


def ablation(rows):
    """What the fresh restart does, over seeds, in sentences with 90 % intervals."""
    values = np.array([one[2:10] for one in rows], float)  # right, then mistaken, by ARMS
    right, fresh, said = values[:, :4], values[:, 5], []
    gaps = {"fresh less restored": fresh - right[:, 1]}
    for column, arm in enumerate(ARMS):
        if arm != "ticket":
            gaps[f"restored less {arm}"] = right[:, 1] - right[:, column]
            gaps[f"fresh less {arm}"] = fresh - right[:, column]
    for name, gap in gaps.items():
        mean, low, high = over_seeds(gap)
        ends = "" if low is None else f" [{low:+.2f}, {high:+.2f}]"
        said.append(f"{name} {mean:+.2f}{ends}")
    return f"fid_domain of the ticket, {counted(len(rows), 'seed')}: {'; '.join(said)}."


def dense_alone(benches):
    """A sentence: in how many seeds the controls would pass for tickets, and the ticket."""
    passed = []
    for arm in ARMS[1:]:
        number = sum(one.right[arm] < (1 + LIMIT) * one.right["dense"] for one in benches)
        passed.append(f"{NAMES[arm]} in {number}")
    return f"Within {LIMIT:.0%} of dense, of {counted(len(benches), 'seed')}: {', '.join(passed)}."


def thresholds(exp, dense):
    """{network: [weights that a threshold cuts, weights that were asked for]}, a cut of FIFTH."""
    found = {}
    for name, model in ("trained", dense), ("at the start", exp.new_model(0)):
        total = sum(p.numel() for p in prunable(model).values())
        found[name] = [cut_by_threshold(model, FIFTH), int(FIFTH * total)]
    return found


def find_benches(exp, rows):
    """A Bench for each seed with all arms at the last round; Mistake where there is none."""
    seeds = [seed for seed in exp.args.seeds
             if all(job_of(exp, seed, arm) in rows for arm in ARMS)]
    if not seeds:
        cli.refuse("from", f"{exp.args.out} has no seed with reinit and "
                   "random at its last round")
    return [Bench(exp, seed) for seed in seeds]


def main(argv=None):
    """The command line."""
    study = Study("studies.pitfalls", __doc__)
    add_run_flag(study)
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run)
        benches, a = find_benches(exp, rows), exp.args
        averaged = continue_average(benches[0])
        groups, n = measure(benches, averaged), len(benches)
        ticket = benches[0].networks["ticket"]
        live = live_total(ticket.masks)
        dense = {AVERAGE: nonzero(averaged),
                 "weight standardisation": nonzero(standardised(ticket.model))}
        rates = {one.seed: reversals(one) for one in benches}
        path = os.path.join(args.out, f"pitfalls_{a.dataset}")
        table = [one for rows in groups.values() for one in rows]
        said = [ablation(groups[FRESH]), conclude(groups, n), dense_alone(benches)]
        cut = thresholds(exp, benches[0].networks["dense"].model)
        study.save(path, HEADER, table, exp.device, n=a.samples, draws=DRAWS,
                   live=live, not_zero=dense, reversals=rates, cut_by_threshold=cut, said=said)
        draw(groups, path + ".png",
             f"{a.dataset}, n={a.samples:,} samples, DDIM, {counted(n, 'seed')}, "
             f"round {a.rounds}. {AVERAGE}: first seed.")
    shown = [[*one[:2], *one[-2:]] for one in table]
    print(f"\n{charts.text_table([*HEADER[:2], *HEADER[-2:]], shown)}\n")
    for seed, rate in rates.items():
        print(f"Seed {seed}: {rate:.0%} of draws of {FEW} samples reverse ticket and dense.")
    for name, left in dense.items():
        print(f"{name}: {left:,} weights of the ticket are not 0, {live:,} should be.")
    for name, (gone, asked) in cut.items():
        print(f"Network {name}: a threshold cuts {gone:,} weights, {asked:,} were asked for.")
    print(*said, f"{path}.csv, .json, .png", sep="\n")


if __name__ == "__main__":
    main()
