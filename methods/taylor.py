"""Taylor scores: prune the weights whose removal changes the loss least, to first order (Fang, Ma
and Wang, Structural Pruning for Diffusion Models, 2023, 2305.10924, section 3).

    as iterative magnitude pruning, ranked by |w * dL/dw| with gradients summed over time steps

    python -m methods.taylor --dataset mnist [--oneshot]
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m methods.taylor")

import torch

import lth_diffusion as lth
from ddpm import batch_at
from lth_diffusion import Job
from methods import oneshot
from prune import prunable, prune_scores, ramp_rates, rewind

TIMES = 100  # time steps, evenly spread, whose gradients are summed


def taylor_scores(model, losses, stop=0.05):
    """|w * gradient|, the gradient summed over the losses of successive time steps.

    losses: an iterable of scalar losses L_t, made one by one. The sum stops at the first L_t below
    `stop` times the largest so far: where x_t is nearly noise, eps is easy and tells little.
    """
    model.zero_grad()
    largest = 0.0
    for loss in losses:
        largest = max(largest, loss.item())
        if loss.item() < stop * largest:
            break
        loss.backward()
    scores = {name: (p * p.grad).detach().abs() for name, p in prunable(model).items()}
    model.zero_grad()
    return scores


def score(exp, model, seed):
    """taylor_scores of a network on one batch of training images."""
    diffusion, T = exp.diffusion, exp.diffusion.T
    model.eval()  # no dropout in what weights are ranked by
    x0, _, noise = batch_at(exp.images, 0, lth.MASK_SEED // 1000 + seed, exp.args.batch, False, T,
                            torch.Generator(exp.device))
    times = (torch.full((len(x0),), t, device=exp.device) for t in range(0, T, T // TIMES))
    return taylor_scores(model, (diffusion.loss(model, x0, t, noise) for t in times))


def find_tickets(args, exp):
    """Train, prune by Taylor scores, rewind, repeat; with --oneshot, one cut per control round."""
    for seed in args.seeds:
        dense = last = exp.train_dense(seed)
        masks = dense.masks
        for r in args.control_rounds if args.oneshot else range(1, args.rounds + 1):
            job, fraction = Job(seed, r, "ticket"), args.prune_rate
            if args.oneshot:
                last, masks, fraction = dense, dense.masks, oneshot.cut_at(args, r)
            rates = ramp_rates(last.model, args.prune_rate) if args.scope == "ramp" else None
            scores = score(exp, last.model, seed)
            masks = prune_scores(scores, masks, fraction, args.scope, rates)
            ticket = exp.new_model(seed)
            start, pruned = rewind(ticket, masks, dense.checkpoint), last
            last = exp.train(job, ticket, masks, start, after=pruned.spent)
            masks = last.masks
            oneshot.compare(exp, job, masks, dense, pruned, pruned.spent)


def plan(args):
    """Every training run."""
    return oneshot.jobs(args) if args.oneshot else lth.jobs(args)


def main(argv=None):
    """The command line, with the flags of lth_diffusion.py but --score, and --oneshot."""
    parser = lth.make_parser(prog="methods.taylor", description=__doc__.split("\n\n")[0])
    parser.add_argument("--oneshot", action="store_true", help="one cut per control round")
    args, parser = lth.parse_args(argv, parser, "_taylor", score="magnitude")
    lth.run(args, parser, find_tickets, plan)


if __name__ == "__main__":
    main()
