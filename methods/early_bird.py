"""Early-bird tickets: draw the mask as soon as it has settled, long before training ends (You et
al., Drawing Early-Bird Tickets, 2020, 1909.11957; for diffusion: Whalen et al., 2025,
2504.09606).

    train the dense network; every 2 % of the steps, draw the mask that one cut would leave now
    once it is near each of the five masks before: prune, and train on from there, not going back
    its control, a random mask, goes on from there too

    python -m methods.early_bird --dataset mnist --control-rounds 3 7 10

One ticket per control round, of that round's density. Search and training together take as many
steps as the dense network alone. Distance of two masks: the share of weights that are in one only,
over the most possible, 2 min(density, 1 - density): the threshold then means the same at every
density. A mask that has not settled after half of the steps is taken as it is, with a note.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module, from the repository's folder:  "
                     "python -m methods.early_bird")

import copy
import os
from collections import deque

from ddpm import train
from lth_diffusion import Job, controls_at, make_parser, parse_args, run
from methods.oneshot import compare, cut_at, jobs
from prune import dense_masks, density, prune_magnitude, ramp_rates, rewind
from support import runs

EVERY = 0.02  # of the steps: how often a mask is drawn
BEFORE, NEAR = 5, 0.1  # masks that the new one must be near to (1909.11957: five epochs, 0.1)
LATEST = 0.5  # of the steps: here the search ends, settled or not
SETTLED = ".settled.pt"  # the training state that a ticket starts from


class Settled(Exception):
    """All masks are found: no need to train the dense network any further."""


def distance(a, b):
    """Share of weights that are live in one of two masks of one density only, of those possible."""
    apart = sum(int((mask ^ b[name]).sum()) for name, mask in a.items())
    total, left = sum(mask.numel() for mask in a.values()), density(a)
    return apart / (2 * min(left, 1 - left) * total)


def search(args, exp, seed, follow=None):
    """{round: (masks, training state they were drawn at)}; follow(step, r, distances) is told the
    distances of each new mask of round r from those before it."""
    model, found, before = exp.new_model(seed), {}, {}
    every, latest = max(1, round(EVERY * args.steps)), round(LATEST * args.steps)
    rates = ramp_rates(model, args.prune_rate) if args.scope == "ramp" else None

    def draw(step, get_state):
        if step == 0 or step % every:
            return
        for r in [r for r in args.control_rounds if r not in found]:
            masks = prune_magnitude(model, dense_masks(model), cut_at(args, r), args.scope, rates,
                                    args.score)
            known = before.setdefault(r, deque(maxlen=BEFORE))
            distances = [distance(masks, one) for one in known]
            if follow:
                follow(step, r, distances)
            settled = len(known) == BEFORE and max(distances) < NEAR
            if settled or step + every > latest:
                if not settled:
                    print(f"note: seed {seed} round {r}: the mask has not settled after {step:,} "
                          "steps and is taken as it is", flush=True)
                found[r] = masks, copy.deepcopy(get_state())
            known.append(masks)
        if len(found) == len(args.control_rounds):
            raise Settled

    options = exp.options(Job(seed, 0, "dense"), label=f"seed {seed}: early-bird search")
    try:
        train(model, exp.diffusion, exp.images, checkpoint=draw, **options)
    except Settled:
        pass
    return found


def find_tickets(args, exp):
    """One ticket per control round, each trained on from the step at which its mask settled."""
    for seed in args.seeds:
        dense, found = exp.train_dense(seed), {}
        steps, macs = dense.spent
        for r in args.control_rounds:
            job, ticket, options = Job(seed, r, "ticket"), exp.new_model(seed), {}
            mine = exp.claims is None or exp.claims.owns_chain
            if mine and not os.path.exists(job.path(args.out)):
                found = found or search(args, exp, seed)
                masks, state = found[r]
                runs.save_state(job.path(args.out, SETTLED), **state)
                after = state["step"], round(macs * state["step"] / steps)
                options = dict(masks=masks, state=rewind(ticket, masks, state), after=after)
            ticket = exp.train(job, ticket, **options)
            at = ticket.row["train_steps_total"] - ticket.row["steps"]  # the mask settled here
            start = dense
            if "random" in controls_at(args, r):  # it goes on from where the ticket did
                start = dense._replace(checkpoint=runs.load_state(job.path(args.out, SETTLED)))
            compare(exp, job, ticket.masks, start, dense, (at, round(macs * at / steps)))


def main(argv=None):
    """The command line, with all flags of lth_diffusion.py."""
    parser = make_parser(prog="methods.early_bird", description=__doc__.split("\n\n")[0])
    run(*parse_args(argv, parser, "_early_bird"), find_tickets, jobs)


if __name__ == "__main__":
    main()
