"""Which published mistakes in training and pruning change the verdict on a ticket?

    python -m studies.pitfalls_training                     # makes a small run on digits first
    python -m studies.pitfalls_training --from runs/mnist   # a finished run with reinit and random

Like studies.pitfalls, but here the ticket is trained again from step k on the same batches, with
one mistake:

restart fresh    The ticket's weights go back to step k, but Adam and the average start anew at full
                 rate, without the warm-up that reinit has (the first edition of this code; open_lth
                 restarts its optimizer too, but also that of the dense network).
negative frozen  No gradient where w < 1e-6, which should have been |w|: negative weights get none
                 (rahulvigneswaran/Lottery-Ticket-Hypothesis-in-Pytorch, its issues 5 and 31).
EMA continued    The average goes on from the dense network's (Jiang et al., 2023, 2310.18823, their
                 public code; first seed only), so that pruned weights stay alive in it.

Without training, counted: to cut k weights, all go that are no larger than entry k of the sorted
sizes, counted from 0, which takes one too many, and all that tie with it
(Eric-mingjie/rethinking-network-pruning, weight-level lottery tickets), for a cut of a fifth;
weight standardisation (2310.18823, their code) revives pruned weights.

What would change our mind about a mistake: verdicts that stay the same with it in several runs.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.pitfalls_training")

import copy

import numpy as np
import torch

from ddpm import train
from prune import live_total, mask_hooks, prunable, rewind
from studies.common import Study, add_run_flag, fit, open_run, over_seeds
from studies.pitfalls import ARMS, find_benches, job_of, publish, row
from support.words import counted

FRESH, NEGATIVE, AVERAGE = "restart fresh", "negative frozen", "EMA continued from dense"
EPS = 1e-6  # below it a weight is taken for pruned
FIFTH = 0.2  # cut by a threshold


# --------------------------------------------------------------------------- the mistakes

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
    """Where weights below EPS are taken for pruned and get no gradient. Adam's moments of the
    dense network still move them a little at first."""
    def after_backward(step, model):  # in place of that of mask_hooks: pruned weights are below EPS
        for p in prunable(model).values():
            if p.grad is not None:
                p.grad.mul_(p >= EPS)
    return train_again(bench, NEGATIVE, after_backward=after_backward)


def cut_by_threshold(model, fraction):
    """How many weights go where all up to entry k of the sorted sizes do, k = fraction * all."""
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


def thresholds(exp, dense):
    """{network: [weights that a threshold cuts, weights that were asked for]}, a cut of FIFTH."""
    found = {}
    for name, model in ("trained", dense), ("at the start", exp.new_model(0)):
        total = sum(p.numel() for p in prunable(model).values())
        found[name] = [cut_by_threshold(model, FIFTH), int(FIFTH * total)]
    return found


# --------------------------------------------------------------------------- the study

def retrained(name, bench, model):
    """The row of a ticket that was trained with a mistake."""
    value = np.mean(bench.score(bench.draw(model, name)))
    return row(name, bench.seed, bench.right, bench.right | dict(ticket=value))


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


def main(argv=None):
    """The command line."""
    study = Study("studies.pitfalls_training", __doc__)
    add_run_flag(study)
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run)
        benches = find_benches(exp, rows)
        first, ticket = benches[0], benches[0].networks["ticket"]
        groups = {name: [retrained(name, one, mistake(one)) for one in benches]
                  for name, mistake in {FRESH: restart_fresh, NEGATIVE: freeze_negative}.items()}
        averaged = continue_average(first)
        groups[AVERAGE] = [retrained(AVERAGE, first, averaged)]
        live = live_total(ticket.masks)
        alive = {AVERAGE: nonzero(averaged),
                 "weight standardisation": nonzero(standardised(ticket.model))}
        cut = thresholds(exp, first.networks["dense"].model)
        said = [f"{name}: {left:,} weights of the ticket are not 0, {live:,} should be."
                for name, left in alive.items()]
        said += [f"Network {name}: a threshold cuts {gone:,} weights, {asked:,} were asked for."
                 for name, (gone, asked) in cut.items()]
        publish(study, args, exp, groups, [ablation(groups[FRESH]), *said],
                f" {AVERAGE}: first seed.", live=live, not_zero=alive, cut_by_threshold=cut)


if __name__ == "__main__":
    main()
