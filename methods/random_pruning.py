"""Random pruning: masks that know nothing, the baseline of every method (Liu et al., Rethinking the
Value of Network Pruning, 2019, 1810.05270).

    for each control round r: keep (1 - p)^r of the weights, at random; train from step 0

    python -m methods.random_pruning --dataset mnist --scope erk
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m methods.random_pruning")

import torch

from lth_diffusion import Job, generator_of, make_parser, parse_args, run
from methods.oneshot import cut_at, jobs, retrain
from prune import prunable, prune_scores, ramp_rates


def random_scores(model, generator):
    """Scores drawn at random, for every prunable weight."""
    return {name: torch.rand(p.shape, generator=generator).to(p.device)
            for name, p in prunable(model).items()}


def random_start(args, exp, job, masks):
    """Masks drawn at random, before any training, for a job's round."""
    model = exp.new_model(job.seed)
    rates = ramp_rates(model, args.prune_rate) if args.scope == "ramp" else None
    scores = random_scores(model, generator_of(job))
    return prune_scores(scores, masks, cut_at(args, job.round), args.scope, rates)


def find_tickets(args, exp):
    """One random mask per control round, trained from the initial weights."""
    for seed in args.seeds:
        dense = exp.train_dense(seed)
        for r in args.control_rounds:
            job = Job(seed, r, "ticket")
            masks = random_start(args, exp, job, dense.masks)
            retrain(exp, job, masks, dense, after=(0, 0))


def main(argv=None):
    """The command line, with the flags of lth_diffusion.py; --rewind is 0."""
    parser = make_parser(prog="methods.random_pruning", description=__doc__.split("\n\n")[0])
    fixed = dict(rewind=0.0, score="magnitude")
    run(*parse_args(argv, parser, "_random", **fixed), find_tickets, jobs)


if __name__ == "__main__":
    main()
