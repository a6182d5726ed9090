"""Dual lottery ticket, by random sparse network transformation (Bai et al., Dual Lottery Ticket
Hypothesis, 2022, 2203.04248).

    draw a random mask, the same share of each layer
    transform: train the dense network while the weights outside the mask shrink to nothing
    cut them, and train the rest, from its transformed weights, with the mask fixed
    the control `random mask`: another random mask on weights that were not transformed

    python -m methods.rst --dataset mnist
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m methods.rst")

import torch

from lth_diffusion import Job, make_parser, parse_args, run
from methods.oneshot import compare, jobs
from methods.random_pruning import random_start
from prune import mask_hooks, prunable

SHARE = 0.5  # steps of the transformation over --steps, on top of them (the authors: 9/14)


def rst_hooks(model, masks, steps, total=10.0):
    """Hooks of ddpm.train that shrink the weights outside `masks` to about e**-total (section 4).

    They get no gradient, only decoupled shrinkage w <- w * (1 - lr * lambda): Adam would normalise
    a gradient term away. lr * lambda grows linearly over the first 5/9 of the steps, then is held
    (the authors' 50,000 and 40,000), scaled to sum to `total`. ValueError for too few steps.
    """
    shape = [min(1.0, (step + 1) / max(1, 5 * steps // 9)) for step in range(steps)]
    rates = [total * value / sum(shape) for value in shape]
    if max(rates) >= 1:
        raise ValueError(f"{steps} steps are too few to shrink weights by a sum of {total}")

    @torch.no_grad()
    def after_step(step, model, optimizer, ema):
        for name, p in prunable(model).items():
            p.mul_(torch.where(masks[name], 1.0, 1.0 - rates[step]))

    return mask_hooks(model, masks) | dict(after_step=after_step)


def find_tickets(args, exp):
    """One transformed network per control round, cut by its random mask and trained on."""
    steps = round(SHARE * args.steps)
    for seed in args.seeds:
        dense = exp.train_dense(seed)
        for r in args.control_rounds:
            job = Job(seed, r, "ticket")
            masks = random_start(args, exp, job, dense.masks)

            def hooks(model, _):
                return rst_hooks(model, masks, steps)
            transformed = exp.train(job._replace(arm="transform"), exp.new_model(seed),
                                    hooks=hooks, steps=steps)
            exp.train(job, transformed.model, masks, after=transformed.spent)
            compare(exp, job, masks, dense, dense, after=(0, 0))


def plan(args):
    """Every training run."""
    return jobs(args, before=["transform"])


def main(argv=None):
    """The command line, with the flags of lth_diffusion.py; --rewind is 0, --scope is layer."""
    fixed = dict(rewind=0.0, scope="layer", score="magnitude")
    parser = make_parser(prog="methods.rst", description=__doc__.split("\n\n")[0])
    args, parser = parse_args(argv, parser, "_rst", **fixed)
    if round(SHARE * args.steps) < 20:
        parser.error(f"argument --steps: {args.steps} are too few, the transformation needs 40")
    run(args, parser, find_tickets, plan)


if __name__ == "__main__":
    main()
