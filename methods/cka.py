"""Layer rates from measured similarity: blocks that agree more between two networks are pruned less
(after Jiang et al. 2023, 2310.18823, which motivates a fixed ramp with such a measurement).

    train the dense network again from step k on another data order; measure the CKA of the two
    as iterative magnitude pruning, with rates that follow 1 - CKA

    python -m methods.cka --dataset mnist
    python -m methods.cka --dataset mnist --shuffled    # the control: the same rates, elsewhere

Rates that help wherever they are put say nothing about similarity, hence the control.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m methods.cka")

import math

import numpy as np
import torch

import lth_diffusion as lth
from lth_diffusion import Job
from methods.oneshot import compare
from metrics import squared_distances
from prune import blocks_of, prunable, prune_magnitude, rewind
from support import cli

PROBE_SEED = 4001  # added to the seed for the other data order


def cka(weights_a, weights_b):
    """Centred kernel alignment (Kornblith et al. 2019, 1905.00414) of weights [n >= 4, ...] by row.

    HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with unbiased HSIC (the biased one gives 0.9 on
    independent weights) and Gaussian kernels, 2 sigma^2 = the median squared distance. 1 for equal
    weights, about 0 for independent ones, NaN where all rows of one are alike (pruned away).
    ValueError for other shapes.
    """
    a, b = (torch.as_tensor(w).detach().cpu().double().flatten(1) for w in (weights_a, weights_b))
    if len(a) != len(b) or len(a) < 4:
        raise ValueError(f"cka: {len(a)}, {len(b)} rows, not equally many >= 4")

    def gram(w):
        distances = squared_distances(w, w)
        median = distances[~torch.eye(len(w), dtype=torch.bool)].median()
        return torch.exp(-distances / median) if median > 0 else torch.ones_like(distances)

    k, l = u_centred(gram(a)), u_centred(gram(b))  # (n, n)
    norm = ((k * k).sum() * (l * l).sum()).sqrt().item()  # the factor 1 / (n (n - 3)) cancels
    return (k * l).sum().item() / norm if norm > 0 else math.nan


def u_centred(k):
    """Kernel [n, n] with its diagonal and every row sum zero; their products are unbiased HSIC."""
    k = k - torch.diag(k.diagonal())
    rows = k.sum(1) / (len(k) - 2)
    k = k - rows[:, None] - rows + rows.sum() / (len(k) - 1)
    return k - torch.diag(k.diagonal())


def block_similarity(a, b):
    """{residual block: mean CKA of its convolutions' weights in two models of one shape}; NaN where
    every row of a layer is alike."""
    other, by_block, owner = prunable(b), {}, blocks_of(a)
    for name, p in prunable(a).items():
        if p.dim() == 4 and len(p) > 3:
            value = cka(p.detach().cpu(), other[name].detach().cpu())
            by_block.setdefault(owner[name], []).append(value)
    return {block: float(np.mean(values)) for block, values in by_block.items()}


def cka_rates(model, similarity, p=0.2, q=0.01):
    """layer_fractions from {block: CKA}: blocks that agree more are pruned less.

    The rates spread linearly around p, over a range as wide as the ramp's, q * (J - 1).
    """
    known = [value for value in similarity.values() if math.isfinite(value)]
    if not known:
        raise cli.Mistake("argument --steps: too few to measure a similarity of trained weights")
    middle, width = sum(known) / len(known), max(max(known) - min(known), 1e-12)
    span, rates = q * (len(similarity) - 1), {}
    for block, value in similarity.items():  # NaN: weights that are all alike get the mean rate
        shift = (middle - value) / width if math.isfinite(value) else 0.0
        rates[block] = max(p + span * shift, 0.0)
    return {name: rates[block] for name, block in blocks_of(model).items()}


def shuffle(similarity, seed):
    """The same values, dealt out to the blocks at random."""
    blocks = np.random.default_rng(lth.MASK_SEED + seed).permutation(list(similarity))
    return dict(zip(blocks.tolist(), similarity.values()))


def find_tickets(args, exp):
    """Train, prune by measured similarity, rewind, repeat."""
    for seed in args.seeds:
        dense = last = exp.train_dense(seed)
        probe = exp.train(Job(seed, 0, "probe"), exp.new_model(seed), state=dense.checkpoint,
                          seed=PROBE_SEED + seed, after=dense.spent)
        alike = block_similarity(dense.model, probe.model)
        if args.shuffled:
            alike = shuffle(alike, seed)
        masks, spent = dense.masks, probe.spent  # measuring is part of the cost
        for r in range(1, args.rounds + 1):
            rates = cka_rates(last.model, alike, args.prune_rate)
            masks = prune_magnitude(last.model, masks, args.prune_rate, "global", rates)
            ticket, job, pruned = exp.new_model(seed), Job(seed, r, "ticket"), last
            start = rewind(ticket, masks, dense.checkpoint)
            last = exp.train(job, ticket, masks, start, after=spent)
            compare(exp, job, last.masks, dense, pruned, spent)
            masks, spent = last.masks, last.spent


def plan(args):
    """Every training run."""
    planned = []
    for job in lth.jobs(args):
        if (job.round, job.arm) == (1, "ticket"):
            planned.append(Job(job.seed, 0, "probe"))
        planned.append(job)
    return planned


def main(argv=None):
    """The command line, with the flags of lth_diffusion.py but --scope and --score."""
    fixed = dict(scope="global", score="magnitude")
    parser = lth.make_parser(prog="methods.cka", description=__doc__.split("\n\n")[0])
    parser.add_argument("--shuffled", action="store_true",
                        help="deal the rates out to the blocks at random: the control")
    lth.run(*lth.parse_args(argv, parser, "_cka", **fixed), find_tickets, plan)


if __name__ == "__main__":
    main()
