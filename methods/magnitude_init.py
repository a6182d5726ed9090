"""Magnitude pruning at initialisation: rank the initial weights, before any training (Frankle et
al., Pruning Neural Networks at Initialization: Why Are We Missing the Mark?, 2021, 2009.08576).

    for each control round r: keep the (1 - p)^r largest |theta_0| of each layer; train from step 0

    python -m methods.magnitude_init --dataset mnist
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m methods.magnitude_init")

from lth_diffusion import Job, generator_of, make_parser, parse_args, run
from methods.oneshot import cut_at, jobs, retrain
from methods.random_pruning import random_scores
from prune import prunable, prune_scores


def init_scores(model, generator):
    """|theta_0|; layers that start at zero have no ranking and are drawn at random.

    Use them within layers: a global ranking would empty exactly those that start at zero.
    """
    random = random_scores(model, generator)
    return {name: p.detach().abs() if bool(p.any()) else random[name]
            for name, p in prunable(model).items()}


def find_tickets(args, exp):
    """One mask per control round, chosen and trained from the initial weights."""
    for seed in args.seeds:
        dense = exp.train_dense(seed)
        for r in args.control_rounds:
            job = Job(seed, r, "ticket")
            scores = init_scores(exp.new_model(seed), generator_of(job))
            masks = prune_scores(scores, dense.masks, cut_at(args, r), args.scope)
            retrain(exp, job, masks, dense, after=(0, 0))


def main(argv=None):
    """The command line, with the flags of lth_diffusion.py; --rewind is 0, --scope is layer."""
    parser = make_parser(prog="methods.magnitude_init", description=__doc__.split("\n\n")[0])
    fixed = dict(rewind=0.0, scope="layer", score="magnitude")
    run(*parse_args(argv, parser, "_magnitude_init", **fixed), find_tickets, jobs)


if __name__ == "__main__":
    main()
