"""One-shot pruning: a single cut of the trained network (Frankle and Carbin, The Lottery Ticket
Hypothesis, 2019, 1803.03635, section 2).

    train the dense network
    for each control round r: prune 1 - (1 - p)^r of its weights at once, go back to step k, retrain

    python -m methods.oneshot --dataset mnist --control-rounds 3 7 10
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module, from the repository's folder:  python -m methods.oneshot")

from lth_diffusion import Job, controls, controls_at, make_parser, parse_args, run
from prune import prune_magnitude, ramp_rates, rewind


def find_tickets(args, exp):
    """One ticket per control round, all from the same dense network."""
    for seed in args.seeds:
        dense = exp.train_dense(seed)
        for r in args.control_rounds:
            rates = ramp_rates(dense.model, args.prune_rate) if args.scope == "ramp" else None
            masks = prune_magnitude(dense.model, dense.masks, cut_at(args, r), args.scope, rates,
                                    args.score)
            retrain(exp, Job(seed, r, "ticket"), masks, dense, dense.spent)


def cut_at(args, r):
    """The share of the dense network that r rounds of pruning remove."""
    return 1 - (1 - args.prune_rate) ** r


def retrain(exp, job, masks, dense, after):
    """Rewind to step k with these masks, retrain, train the controls. after: (steps, MACs) that
    finding the masks took."""
    ticket = exp.new_model(job.seed)
    start = rewind(ticket, masks, dense.checkpoint)
    found = exp.train(job, ticket, masks, start, after=after)
    compare(exp, job, found.masks, dense, dense, after)


def compare(exp, job, masks, dense, pruned, after):
    """Train the controls of a ticket."""
    for arm, model, its_masks, options in controls(exp, job, masks, dense, pruned, after):
        exp.train(job._replace(arm=arm), model, its_masks, **options)


def jobs(args, before=()):
    """Every training run, in order. before: arms that each ticket needs first."""
    planned = []
    for seed in args.seeds:
        planned.append(Job(seed, 0, "dense"))
        for r in args.control_rounds:
            arms = *before, "ticket", *controls_at(args, r)
            planned += [Job(seed, r, arm) for arm in arms]
    return planned


def main(argv=None):
    """The command line, with all flags of lth_diffusion.py."""
    parser = make_parser(prog="methods.oneshot", description=__doc__.split("\n\n")[0])
    run(*parse_args(argv, parser, "_oneshot"), find_tickets, jobs)


if __name__ == "__main__":
    main()
