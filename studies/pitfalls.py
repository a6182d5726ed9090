"""Which published mistakes turn the verdict on a ticket, one at a time?

    python -m studies.pitfalls                       # makes a small run on digits first: minutes
    python -m studies.pitfalls --from runs/mnist     # a finished run with arms rewind, reinit and random
    python -m studies.pitfalls --from runs/mnist --full

From one finished run of imp or oneshot come the figures as they should be: fid_domain of dense, of the last
ticket and of its controls, each a mean over several sets of x_T. Then each mistake is made alone and the same
question asked again: is the ticket within 10 % of dense, better than reinit, better than random? These are
orders of figures, not tests: a mistake matters where it changes them. Who makes it is said where it was read
in a source. Two mistakes are made in training, which is done again as the ticket's was, from the same step
with the same batches: by default for the ticket of the first seed alone, while dense and the controls keep
their figures; with --full for the controls and every seed too.

All samples here are by DDIM without noise, so that x_T is all of the evaluation's chance. A verdict that a
mistake leaves alone here may fall on another run: what is shown is that it can matter, and how much.

What would change our mind about a mistake: a verdict and figures that stay the same with it in several runs.
"""
import copy
import os

import numpy as np
import torch

import lth_diffusion as lth
import metrics
from prune import live_counts, mask_hooks, prunable

ARMS = "dense", "rewind", "reinit", "random"
DRAWS = 4  # sets of x_T behind a figure as it should be
FEW, REAL = 25, 20  # samples, and real images for them: public code of 2310.18823
REPEATS = 300  # draws of so few
COVARIED = 250  # images whose covariance is taken the wrong way round
RATE = 0.2  # of the live weights a round: 1803.03635, 2310.18823
CODE, NOBODY = "public code of 2310.18823", "no source read"
HEADER = ["mistake", "made by", "figure", "seed", *ARMS, *(f"{arm}, mistaken" for arm in ARMS), "verdict",
          "becomes", "remark"]


def verdict(figures):
    """Whether the ticket is within the margin of dense, and better than the controls, by figures alone."""
    ticket = figures["rewind"]
    signs = dict(dense=ticket <= (1 + lth.MARGIN) * figures["dense"], reinit=ticket < figures["reinit"],
                 random=ticket < figures["random"])
    return ", ".join(f"{arm} {'yes' if sign else 'no'}" for arm, sign in signs.items())


def row(mistake, who, seed, right, wrong, remark=""):
    """A row of HEADER about fid_domain; right, wrong: {arm: figure}."""
    return [mistake, who, "fid_domain", seed, *(right[arm] for arm in ARMS), *(wrong[arm] for arm in ARMS),
            verdict(right), verdict(wrong), remark]


def count_row(mistake, who, figure, seed, right, wrong, of, remark=""):
    """A row of HEADER about numbers of the ticket's weights, of which there are `of`."""
    shares = (f"{100 * count / of:.2f} %" for count in (right, wrong))
    return [mistake, who, figure, seed, None, right, None, None, None, wrong, None, None, *shares, remark]


class Bench:
    """The samples of every arm of one seed, and the figures as they should be."""

    def __init__(self, exp, seed, round):
        self.exp, self.seed, self.n = exp, seed, exp.args.samples
        self.jobs = {arm: lth.Job(seed, 0 if arm == "dense" else round, arm) for arm in ARMS}
        self.samples = {arm: self.draw(self.network(arm)[0], arm) for arm in ARMS}
        self.fids = {arm: self.score(samples) for arm, samples in self.samples.items()}
        self.right = {arm: np.mean(values) for arm, values in self.fids.items()}
        self.features = {arm: metrics.features(exp.classifier, torch.cat(samples))
                         for arm, samples in self.samples.items()}  # (DRAWS * n, 64)

    def network(self, arm, weights="ema"):
        """(model, masks) of an arm."""
        return self.exp.rebuild(self.exp.load(self.jobs[arm]), weights)

    def draw(self, model, label):
        """DRAWS sets of n samples, the same x_T for every model."""
        shape, found = self.exp.images.shape[1:], []
        for k in range(DRAWS):
            generator = torch.Generator().manual_seed(lth.EVAL_SEED + 1_000_000 * k)
            found.append(self.exp.draw(model, x_T=torch.randn(self.n, *shape, generator=generator),
                                       sampler="ddim", label=f"seed {self.seed} {label}: x_T {k}"))
        return found

    def score(self, samples):
        """fid_domain of each set."""
        return [self.exp.quality(images)["fid_domain"] for images in samples]


# --------------------------------------------------------------------------------- mistakes of the evaluation

def few_images(bench):
    """FID of a few samples against a few real images, and how often it reverses ticket and dense."""
    _, reference, real, _ = bench.exp.rulers["_domain"]
    few = metrics.statistics(real[:REAL])
    wrong = {arm: metrics.fid(feats[:FEW], few) for arm, feats in bench.features.items()}
    ticket, dense = bench.features["rewind"], bench.features["dense"]
    rates = [reversal(ticket, dense, *pair) for pair in (
        (FEW, few, reference), (bench.n, reference, reference))]
    return row(f"FID of {FEW} images", CODE, bench.seed, bench.right, wrong,
               f"order of ticket and dense reversed in {rates[0]:.0%} of such draws, at n={bench.n:,} in "
               f"{rates[1]:.0%} (subsets of {DRAWS} n)")


def reversal(ticket, dense, n, reference, truth):
    """Share of draws of n whose FIDs against `reference` order ticket and dense (M, D) otherwise than all of
    them do against `truth`."""
    def worse(index, against):
        return metrics.fid(ticket[index], against) > metrics.fid(dense[index], against)
    generator, everything = torch.Generator().manual_seed(lth.EVAL_SEED), worse(slice(None), truth)
    draws = [torch.randperm(len(ticket), generator=generator)[:n] for _ in range(REPEATS)]
    return np.mean([worse(index, reference) != everything for index in draws])


def fid_over_images(feats, real):
    """FID with the images as variables: covariances (n, n), whose order of images matters."""
    zero = torch.zeros(len(feats))
    sigmas = [np.cov(v.double().numpy()) for v in (feats, real)]  # np.cov takes rows for variables
    return float((feats.mean(0) - real.mean(0)).square().sum()) + metrics.frechet_distance(
        zero, sigmas[0], zero, sigmas[1])


def wrong_covariance(bench):
    """Covariance over images; the same images in another order."""
    real = bench.exp.rulers["_domain"][2][:COVARIED]
    feats = {arm: v[:len(real)] for arm, v in bench.features.items()}
    wrong = {arm: fid_over_images(v, real) for arm, v in feats.items()}
    order = torch.randperm(len(real), generator=torch.Generator().manual_seed(0))
    moved = fid_over_images(feats["dense"][order], real)
    return row("covariance over images", CODE, bench.seed, bench.right, wrong,
               f"n={len(real)}; dense's samples in another order: {moved:.2f}")


@torch.no_grad()
def batch_features(model, images, batch):
    """Features (N, D) in train mode: batch norms take the batch's own statistics; whole batches only."""
    model = copy.deepcopy(model).cpu().train()
    return torch.cat([model(part)[0] for part in images.cpu().split(batch) if len(part) == batch])


def train_mode(bench):
    """The classifier left in train mode, in two sizes of batch."""
    exp, wrong = bench.exp, {}
    real = metrics.random_draw(exp.images, 2000)
    for batch in (FEW, min(250, bench.n)):
        reference = metrics.statistics(batch_features(exp.classifier, real, batch))
        wrong[batch] = {arm: metrics.fid(batch_features(exp.classifier, samples[0], batch), reference)
                        for arm, samples in bench.samples.items()}
    (_, first), (other, second) = wrong.items() if len(wrong) > 1 else [*wrong.items()] * 2
    return row("features in train mode", CODE, bench.seed, bench.right, first,
               f"in batches of {FEW}; of {other}: dense {second['dense']:.2f}, ticket "
               f"{second['rewind']:.2f}, {verdict(second)}")


def best_of_two(bench):
    """The better of two noisy FIDs for the ticket, one for the others."""
    wrong, values = {arm: values[0] for arm, values in bench.fids.items()}, bench.fids["rewind"]
    wrong["rewind"] = min(values[:2])
    pairs = [min(values[i], values[j]) for i in range(DRAWS) for j in range(i)]
    return row("best of two FIDs for the ticket", CODE, bench.seed, bench.right, wrong,
               f"over all pairs of x_T this takes {np.mean(values) - np.mean(pairs):.2f} off")


# ------------------------------------------------------------------------------------ mistakes in the network

class Hook:
    """A hook of ddpm.train with a name, by which exp.fit knows a training again."""

    def __init__(self, name, function):
        self.name, self.function = name, function

    def __call__(self, *args):
        return self.function(*args)

    def __repr__(self):
        return self.name


def carry_on(dense, after_step):
    """The hook that masks the weights but lets the average go on from the dense run's, past its warm-up."""
    def carried(step, model, optimizer, ema):
        if ema.updates < 10 ** 9:
            ema.model.load_state_dict(dense.state_dict())
            ema.updates = 10 ** 9
        after_step(step, model, optimizer, ema)
    return Hook(f"the average of {metrics.weights_hash(dense)} carried on", carried)


def nonzero(model):
    """How many prunable weights are not exactly 0."""
    return sum(int(p.count_nonzero()) for p in prunable(model).values())


def trained(bench, mistake, arms):
    """Two rows: the figures with a mistake made in training the arms named, and the weights it leaves."""
    exp, seed, models, wrong = bench.exp, bench.seed, {}, dict(bench.right)
    for arm in arms:
        model, masks, _, start, _ = exp.start(bench.jobs[arm])
        masked = mask_hooks(model, masks)
        hooks = dict(after_backward=Hook("masked gradients", masked["after_backward"]))
        if mistake.startswith("average"):
            hooks["after_step"] = carry_on(bench.network("dense")[0], masked["after_step"])
        else:
            whole = exp.new_model(lth.REINIT_SEED + seed) if arm == "reinit" else exp.theta(seed)
            model.load_state_dict(whole.state_dict())
        name = f"pitfalls_{mistake.split()[0]}_{seed}_{arm}"
        models[arm] = exp.fit(name, seed, model, start=start, **hooks)
        wrong[arm] = np.mean(bench.score(bench.draw(models[arm], f"{mistake}, {arm}")))
    who = CODE if mistake.startswith("average") else NOBODY
    masks = bench.network("rewind")[1]
    live, total = sum(live_counts(masks).values()), sum(mask.numel() for mask in masks.values())
    yield row(mistake, who, seed, bench.right, wrong, f"made in {', '.join(arms)}")
    yield count_row(mistake, who, "weights that are not 0", seed, live, nonzero(models["rewind"]), total,
                    "" if who == CODE else "the dead stay what they were at the restart")


@torch.no_grad()
def standardised(model):
    """A copy with every convolution's filters at mean 0 and variance 1: weight standardisation."""
    model = copy.deepcopy(model)
    for p in prunable(model).values():
        if p.dim() == 4:
            flat = p.flatten(1)
            scale = (flat.var(1, keepdim=True, unbiased=False) + 1e-5).rsqrt()
            p.copy_(((flat - flat.mean(1, keepdim=True)) * scale).view_as(p))
    return model


def threshold_cuts(weights, live):
    """{rule: (requested, cut)} of the live weights by a threshold on |w|, taken over all weights, dead ones
    too; weights: |w| (N,), live: bool (N,)."""
    k = round(RATE * len(weights))
    value = np.partition(weights, k)[k]  # without ties k weights are smaller
    requested = round(RATE * int(live.sum()))
    return {"|w| < t": (requested, int((live & (weights < value)).sum())),
            "|w| <= t": (requested, int((live & (weights <= value)).sum()))}


def counts(bench):
    """Rows about numbers of weights alone: standardisation, thresholds."""
    model, masks = bench.network("rewind", "model")
    live, total = sum(live_counts(masks).values()), sum(mask.numel() for mask in masks.values())
    yield count_row("weight standardisation", CODE, "weights that are not 0", bench.seed, live,
                    nonzero(standardised(model)), total, "counted only: the network was trained without")
    every = {name: torch.ones_like(mask) for name, mask in masks.items()}
    for place, net, alive in (("theta_0", bench.exp.new_model(bench.seed), every),
                              ("trained dense", bench.network("dense", "model")[0], every),
                              ("the ticket", model, masks)):
        weights, alive = (torch.cat([v.flatten().cpu() for v in values.values()]).detach().numpy()
                          for values in (prunable(net), alive))
        for rule, (asked, cut) in threshold_cuts(np.abs(weights), alive).items():
            who = "both public codes of 1803.03635" if "=" in rule else NOBODY
            zeros = f"{int((weights == 0).sum()):,} of all {len(weights):,} are 0"
            yield count_row(f"{rule} over all weights, {place}", who, "weights cut", bench.seed, asked, cut,
                            int(alive.sum()), zeros)


def best_seed(benches):
    """The ticket of the best seed against the others' means."""
    right = {arm: np.mean([bench.right[arm] for bench in benches]) for arm in ARMS}
    best = min(bench.right["rewind"] for bench in benches)
    return row("best seed of the ticket", NOBODY, "all", right, right | dict(rewind=best))


def by_mistake(table):
    """{mistake: its rows about fid_domain}."""
    groups = {}
    for one in table:
        if one[2] == "fid_domain":
            groups.setdefault(one[0], []).append(one)
    return groups


def draw(table, path, note):
    """The ticket's figure over each other arm's, a row a mistake, geometric means over seeds."""
    def ratios(rows, first):
        logs = np.log([[float(one[first + 1]) / float(one[first + k]) for k in (0, 2, 3)] for one in rows])
        return np.exp(logs.mean(0))
    groups = by_mistake(table)
    matrix = [ratios(next(iter(groups.values())), 4), *(ratios(rows, 8) for rows in groups.values())]
    lth.heat_map(matrix, ["as it should be", *groups], ["dense", "reinit", "random"], path,
                 "What a mistake does to the ticket's fid_domain", note, log=True,
                 x_label="the ticket's figure over that of", bar_label="below 1: better")


def conclude(table):
    """What was and was not shown."""
    groups, seeds = by_mistake(table), {one[3] for one in table} - {"all"}
    said = []
    for name, rows in groups.items():
        turned = [f"{one[12]} -> {one[13]}" for one in rows if one[12] != one[13]]
        said += [f"{name} ({len(turned)} of {len(rows)} seeds: {turned[0]})"] if turned else []
    return (f"Verdict: ticket within {100 * lth.MARGIN:.0f} % of dense, better than reinit, than random. "
            f"{len(said)} of {len(groups)} mistakes turn it: {'; '.join(said) or 'none'}. n={len(seeds)} "
            f"seed{'s' * (len(seeds) > 1)}: orders of figures, no test of the ticket.")


def main(argv=None):
    """The command line."""
    study = lth.Study("pitfalls", __doc__)
    add = study.add_argument
    add("--from", dest="run", metavar="runs/NAME", help="a finished run (default: a small one on digits)")
    add("--full", action="store_true", help="mistakes in training are made in every seed and control too")
    with study.arguments(argv) as args:
        exp, rows = lth.open_run(args.run)
        last = max(job.round for job in rows if job.arm == "rewind")
        seeds = [seed for seed in dict.fromkeys(job.seed for job in rows)
                 if all(lth.Job(seed, last, arm) in rows for arm in ARMS[1:])]
        if not seeds or exp.args.method not in ("imp", "oneshot") or exp.args.granularity == "channel":
            raise ValueError(f"{exp.args.out}: needs a run of imp or oneshot, of single weights, that ended "
                             "with the arms rewind, reinit and random at its last round")
        path, benches, table = os.path.join(args.out, f"pitfalls_{exp.args.dataset}"), [], []
        for seed in seeds:
            bench = Bench(exp, seed, last)
            benches.append(bench)
            table += [mistake(bench) for mistake in (few_images, wrong_covariance, train_mode, best_of_two)]
            study.save(path, HEADER, table, exp.device, n=exp.args.samples, draws=DRAWS)
            print(f"seed {seed}:", *(f"{arm} {v:.2f}" for arm, v in bench.right.items()), flush=True)
        table += [best_seed(benches)] * (len(benches) > 1) + list(counts(benches[0]))
        for mistake in ("average carried over from dense", "gradients masked, weights not"):
            for bench in benches if args.full else benches[:1]:
                table += trained(bench, mistake, ARMS[1:] if args.full else ARMS[1:2])
                study.save(path, HEADER, table, exp.device, n=exp.args.samples, draws=DRAWS)
        draw(table, path + ".png", f"{exp.args.dataset}, n={exp.args.samples:,}, DDIM, {len(seeds)} seed(s), "
             f"round {last}. In training: {'all seeds and arms' if args.full else 'first seed, ticket'}.")
    short = [0, 2, 5, 4, 9, 8, 12, 13, 14]
    print(f"\n{lth.text_table([HEADER[k] for k in short], [[one[k] for k in short] for one in table])}\n\n"
          f"{conclude(table)}\n{path}.csv, .json, .png")


if __name__ == "__main__":
    main()
