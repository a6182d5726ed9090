"""Dynamic sparse training: RigL (Evci et al., Rigging the Lottery, 2020, 1911.11134), and SET
(Mocanu et al. 2018, 1707.04780).

    start from a random mask with ERK layer densities
    every 100 steps, in each layer: drop the weakest live weights; grow as many where the dense
    gradient is largest (SET: at random)

    python -m methods.rigl --dataset mnist [--grow random]
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m methods.rigl")

import functools
import math

import torch

from lth_diffusion import Job, make_parser, parse_args, run
from methods.oneshot import compare, jobs
from methods.random_pruning import random_start
from prune import apply_masks, keep_largest, prunable


class RigL:
    """The two hooks of ddpm.train that move `masks`, which is updated in place (section 3).

    Every `every` steps while step < until * steps, each layer drops the share alpha/2 * (1 + cos(pi
    step / T_end)) of its live weights with the smallest |w| and grows as many where the dense
    gradient is largest among all that were not kept. What was not alive before starts at 0 with
    fresh moments; a weight dropped and grown at once keeps its value. The move takes the place of
    that step's update. grow="random" is SET on RigL's schedule. No layer's live count changes.
    """

    def __init__(self, model, masks, steps, every=100, alpha=0.3, until=0.75, grow="gradient",
                 seed=0):
        self.weights, self.masks = prunable(model), masks
        self.every, self.alpha, self.end, self.grow = every, alpha, until * steps, grow
        self.seed, self.fresh = seed, {}

    def after_backward(self, step, model):
        moves = step > 0 and step % self.every == 0 and step < self.end
        if moves:
            self.move(step)
        for name, p in self.weights.items():
            p.grad.mul_(self.masks[name])
        return moves

    @torch.no_grad()
    def move(self, step):
        """Drop and grow in every layer; remember in self.fresh what starts anew."""
        share = self.alpha / 2 * (1 + math.cos(math.pi * step / self.end))
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        for name, p in self.weights.items():
            before, live = self.masks[name], int(self.masks[name].sum())
            moved = math.floor(share * live)
            kept = keep_largest({name: p.abs()}, {name: before}, {name: live - moved})[name]
            wish = p.grad.abs()
            if self.grow == "random":
                wish = torch.rand(p.shape, generator=generator).to(p.device)
            grown = keep_largest({name: wish}, {name: ~kept}, {name: moved})[name]
            self.masks[name], self.fresh[name] = kept | grown, grown & ~before
            p.masked_fill_(~self.masks[name], 0.0)

    @torch.no_grad()
    def after_step(self, step, model, optimizer, ema):
        """Zeros stay zeros after the update; what has just grown starts with fresh moments."""
        for name, p in self.weights.items():
            p.masked_fill_(~self.masks[name], 0.0)
            for moment in optimizer.state.get(p, {}).values():
                fits = torch.is_tensor(moment) and moment.shape == p.shape
                if fits and name in self.fresh:
                    moment.masked_fill_(self.fresh[name], 0.0)
        if self.fresh:
            apply_masks(ema.model, self.masks)
            self.fresh = {}


def rigl_hooks(model, masks, **options):
    """RigL as keyword arguments of ddpm.train; masks is changed in place."""
    moving = RigL(model, masks, **options)
    return dict(after_backward=moving.after_backward, after_step=moving.after_step)


def find_tickets(args, exp):
    """One sparse network per control round, its mask moving as it trains from step 0."""
    every = max(1, min(100, args.steps // 50))  # the authors' 100 steps, less in a short run

    def each(dense, live):  # a dense gradient every `every` steps (appendix), all the way through
        return (3 * live * every + 2 * live + dense) / (every + 1)
    each = each if args.grow == "gradient" else None
    for seed in args.seeds:
        dense = exp.train_dense(seed)
        for r in args.control_rounds:
            job, model = Job(seed, r, "ticket"), exp.new_model(seed)
            masks = random_start(args, exp, job, dense.masks)
            hooks = functools.partial(rigl_hooks, steps=args.steps, every=every, grow=args.grow,
                                      seed=seed)
            found = exp.train(job, model, masks, hooks=hooks, each=each)
            compare(exp, job, found.masks, dense, found, found.spent)


def main(argv=None):
    """The command line, with the flags of lth_diffusion.py; --rewind is 0, --scope is erk."""
    parser = make_parser(prog="methods.rigl", description=__doc__.split("\n\n")[0])
    parser.add_argument("--grow", choices=["gradient", "random"], default="gradient",
                        help="where weights grow; random: SET (default: gradient)")
    fixed = dict(rewind=0.0, scope="erk", score="magnitude")
    run(*parse_args(argv, parser, "_rigl", **fixed), find_tickets, jobs)


if __name__ == "__main__":
    main()
