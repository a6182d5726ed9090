"""How stable are tickets, and does a stable start make a good one?

    python -m studies.stability                               # makes a small run on digits first: minutes
    python -m studies.stability --from runs/mnist --seeds 0 1 2

Two copies are trained on from theta_k with fresh Adam, in two data orders: the instability analysis of
1912.05671 (section 2), for k at several shares of the steps, all theta_k along one dense run.

masks    intersection over union, over all layers and layer by layer, beside what random masks of the same
         layer densities have. One cut of both copies: data orders, like with like; the run's own masks (IMP)
         beside them. Masks of two seeds: no weight of one network corresponds to one of the other. Masks of
         successive IMP rounds are nested, so theirs must be the ratio of the live weights, and is checked.
barrier  the most that val_loss of (1-a) A + a B lies above the line between its ends, at 11 points a in 0..1.
         The averaged weights (EMA) are taken, which are what is sampled; GroupNorm keeps no statistics.
ticket   the dense run's end cut once to the density of the run's last round; this one mask is rewound to each
         theta_k and trained on. Beside it copy A: dense, from the same theta_k, with the same batches, steps
         and fresh Adam. Copy B, another order, shows how much of a difference the order alone makes.

From a larger k both have fewer steps left: compare a ticket with the copies of its k, never across k. A
barrier falls with k, and so may a ticket's loss to copy A, for reasons of their own: a rank correlation
over k shows no cause. The k of one seed share a dense run and a mask: the seeds are the replicates, and so
rho is taken within each of them. There is no shuffled mask: whether any mask would do at that k is not shown.

What would change our mind about 'choose k where the barrier is about zero': seeds in which the tickets of a
small barrier lose as much to the dense copy as those of a large one.
"""
import math
import os

import numpy as np
from scipy.stats import spearmanr

import lth_diffusion as lth
import metrics
from ddpm import fraction, seed_number, train
from prune import dense_masks, density, live_counts, overlap, prune_magnitude

ALL = "all"  # layers, or seeds
SHARES = (0.0, 0.05, 0.2, 0.5)  # of the steps
ALPHAS = np.linspace(0, 1, 11)
HEADER = ["seed", "k", "steps left", "barrier", "over end loss", "val_loss A", "val_loss B",
          "val_loss ticket", "fid_domain A", "fid_domain B", "fid_domain ticket", "ticket's excess loss",
          "ticket's excess fid"]
MASKS = ["across", "masks", "which", "layer", "live of one", "live of other", "IoU", "by chance",
         "times chance", "must be"]


def dense_run(exp, seed, steps):
    """The dense run of a seed once more, with its weights after each of `steps`: a state with thetas {k:
    weights}, model and ema. Kept in the run's folder."""
    model, path = exp.new_model(seed), f"{exp.args.out}/studies/stability_seed{seed}_dense.pt"
    options = exp.options(lth.Job(seed, 0, "dense"))
    key = f"{options}, {steps} from {metrics.weights_hash(model)}"
    if os.path.exists(path):
        state = lth.load_state(path, ("key", "thetas", "model", "ema"))
        if state["key"] == key:
            return state

    def copied():
        return {name: value.detach().clone() for name, value in model.state_dict().items()}
    thetas = {0: copied()}

    def after_step(step, model, optimizer, ema):
        if step + 1 in steps:
            thetas[step + 1] = copied()
    ema, _ = train(model, exp.diffusion, exp.images, after_step=after_step, **options)
    state = dict(key=key, thetas=thetas, model=model.state_dict(), ema=ema.model.state_dict())
    lth.save_state(path, state)
    return state


def build(exp, weights):
    """A dense U-Net with these weights."""
    model = exp.new_model(0)
    model.load_state_dict(weights)
    return model


def path_losses(exp, a, b):
    """val_loss at every point ALPHAS of the way from model a to model b."""
    ends, losses = (a.state_dict(), b.state_dict()), []
    for alpha in ALPHAS:
        between = {name: value.lerp(ends[1][name], float(alpha)) for name, value in ends[0].items()}
        losses.append(exp.val_loss(build(exp, between).eval()))
    return losses


def barrier(losses):
    """The most by which losses at ALPHAS lie above the straight line between the first and the last."""
    return float(np.max(losses - ((1 - ALPHAS) * losses[0] + ALPHAS * losses[-1])))


def one_cut(exp, model, left):
    """Masks of one cut by magnitude down to density `left`, by layer or shape where the run does so."""
    scope = exp.args.scope if exp.args.scope in ("layer", "erk") else "global"
    return prune_magnitude(model, dense_masks(model), 1 - left, scope)


def copies(exp, seed, k, weights, dense):
    """[(online model, EMA)] of copies A and B from theta_k; from theta_0 copy A is the dense run itself."""
    found = [(build(exp, dense["model"]), build(exp, dense["ema"]))] if k == 0 else []
    orders = {"A": seed, "B": lth.PROBE_SEED + seed}
    for name in list(orders)[len(found):]:
        model = build(exp, weights)
        found.append((model, exp.fit(f"stability_seed{seed}_k{k}_{name}", orders[name], model, start=k)))
    return found


def one_start(exp, seed, k, dense, left):
    """(row of HEADER, losses on the way from A to B, one-cut masks of A and B) for one theta_k."""
    # the run's own theta_k: on another machine the dense run would not come out the same to the bit
    weights = exp.theta(seed).state_dict() if k == exp.k else dense["thetas"][k]
    pair = copies(exp, seed, k, weights, dense)
    ticket = exp.fit(f"stability_seed{seed}_k{k}_ticket", seed, build(exp, weights),
                     one_cut(exp, build(exp, dense["model"]), left), start=k)
    nets = [pair[0][1], pair[1][1], ticket]
    losses = path_losses(exp, *nets[:2])
    val = [exp.val_loss(net.eval()) for net in nets]
    fid = [exp.quality(exp.draw(net, label=f"k={k}: sample"))["fid_domain"] for net in nets]
    height = barrier(losses)
    row = [seed, k, exp.args.steps - k, height, height / (0.5 * (losses[0] + losses[-1])), *val, *fid,
           val[2] / val[0] - 1, fid[2] / fid[0] - 1]
    return row, losses, [one_cut(exp, model, left) for model, _ in pair]


def compare(across, masks, which, a, b, nested=False):
    """Rows of MASKS: all layers, then each. Nested masks must overlap in the ratio of their live weights."""
    for names in (list(a), *([name] for name in a)):
        one, other = ({name: ticket[name] for name in names} for ticket in (a, b))
        live = [sum(live_counts(part).values()) for part in (one, other)]
        (iou, chance), must = overlap(one, other), live[1] / live[0] if nested else None
        if nested and not math.isclose(iou, must):
            raise AssertionError(f"{which}, {names[0]}: masks of successive rounds that are not nested")
        layer = ALL if names == list(a) else names[0].removesuffix(".weight")
        yield [across, masks, which, layer, *live, iou, chance, iou / chance, must]


def of_run(exp, tickets):
    """Rows of MASKS that need no training: the run's tickets {(seed, round): masks} over rounds and seeds."""
    method, last = exp.args.method, max(round for _, round in tickets)
    for (seed, round), masks in tickets.items():
        if method == "imp" and (seed, round + 1) in tickets:
            yield from compare("rounds", method, f"seed {seed}, rounds {round}, {round + 1}", masks,
                               tickets[seed, round + 1], nested=True)
        for other, its_round in tickets:
            if round == its_round == last and seed < other:
                yield from compare("seeds", method, f"seeds {seed}, {other}", masks, tickets[other, last])


def of_cuts(exp, cuts, tickets):
    """Rows of MASKS of one-cut masks {(seed, k): (A's, B's)}: over orders, seeds, and beside the run's."""
    last, here = max(round for _, round in tickets), {s: a for (s, k), (a, _) in cuts.items() if k == exp.k}
    for (seed, k), pair in cuts.items():
        yield from compare(f"orders, k={k}", "one cut", f"seed {seed}", *pair)
    for seed, a in here.items():
        ticket = tickets[seed, last]
        yield from compare("cut, run's", f"one cut, {exp.args.method}", f"seed {seed}", a, ticket)
        for other in here:
            if seed < other:
                yield from compare("seeds", "one cut", f"seeds {seed}, {other}", a, here[other])


def rank_correlation(table, column):
    """{seed: Spearman's rho over k of the barrier and `column`}, and under ALL that over seeds x k; NaN for
    fewer than 3 points and where all are alike."""
    found = {}
    for seed in [*dict.fromkeys(row[0] for row in table), ALL]:
        x, y = zip(*((row[3], row[column]) for row in table if seed in (row[0], ALL)))
        enough = len(x) > 2 and min(len(set(x)), len(set(y))) > 1
        found[seed] = float(spearmanr(x, y).statistic) if enough else math.nan
    return found


def conclude(table, overlaps):
    """What the numbers say, with their n."""
    said = []
    for across, masks in dict.fromkeys((row[0], row[1]) for row in overlaps):
        iou, chance = np.mean([row[6:8] for row in overlaps if row[:2] == [across, masks]
                               and row[3] == ALL], axis=0)
        said.append(f"{across} ({masks}) {iou:.3f}, by chance {chance:.3f}")
    said = [f"Overlap of masks, IoU: {'; '.join(said)}."]
    for column in (11, 12):
        rho = rank_correlation(table, column)
        overall, each = rho.pop(ALL), np.array(list(rho.values()))
        alike = " (nan: all alike)" if np.isnan([overall, *each]).any() else ""
        ends = metrics.t_test(each, 0.05)[1] if len(each) > 2 and not alike else None
        said.append(
            f"Spearman's rho of the barrier and the {HEADER[column]}: {overall:.2f} over seeds x k, n="
            f"{len(table)}; within each seed over k {', '.join(f'{r:.2f}' for r in each)}{alike}: " +
            ("mean {:.2f} [{:.2f}, {:.2f}] at 90 %, ".format(*ends) if ends else "no verdict, ") +
            f"n={len(each)} seed{'s' * (len(each) > 1)}.")
    return "\n".join(said)


def draw(table, paths, overlaps, path, note):
    """Losses of the copies, between them and of the ticket over k; the ways between; overlap by layer."""
    ks, series = sorted({row[1] for row in table}), []
    for label, value in (("worst between A and B", lambda row: max(paths[row[0], row[1]])),
                         ("copy A", lambda row: row[5]), ("copy B", lambda row: row[6]),
                         ("ticket", lambda row: row[7])):
        dots = [[value(row) for row in table if row[1] == k] for k in ks]
        series.append(dict(label=label, x=ks, y=[np.mean(one) for one in dots],
                           dots=dots if max(map(len, dots)) > 1 else (),
                           style="dashed" if label.startswith("copy") else "solid"))
    lth.line_chart(series, path + ".png", "A stable start, and the ticket rewound to it",
                   "k, the step of the start", "val_loss (log)", log_y=True, note="A, B: dense, from theta_k "
                   f"in two data orders; worst: on the straight line between their weights. {note}",
                   x_ticks=[(k, str(k)) for k in ks])
    ways = {k: np.mean([losses for (_, at), losses in paths.items() if at == k], axis=0) for k in ks}
    lth.line_chart([dict(label=f"k={k}", x=ALPHAS, y=way) for k, way in ways.items()],
                   path + "_paths.png", "From one data order to the other, in a straight line",
                   "share of copy B's weights", "val_loss", note=f"Means over seeds. {note}")
    columns = list(dict.fromkeys((row[0], row[1]) for row in overlaps))
    layers = list(dict.fromkeys(row[3] for row in overlaps))
    lth.heat_map([[np.mean([row[8] for row in overlaps if (row[0], row[1], row[3]) == (*column, layer)])
                   for column in columns] for layer in layers], layers,
                 [f"{across.replace(', ', chr(10))}\n{masks.replace(', ', chr(10))}" if "," not in across else
                  across.replace(", ", "\n") for across, masks in columns], path + "_masks.png",
                 "How much two masks agree: IoU over that of random masks", "1 is chance. Orders, cut: one "
                 f"cut of the dense copies. {note}", log=True, bar_label="times chance")


def starts(args, exp, rows):
    """(seeds, steps k, the run's tickets {(seed, round): masks}), checked."""
    if exp.args.granularity == "channel":
        raise ValueError(f"--from {args.run}: channel tickets have no masks over the dense network's weights")
    there = list(dict.fromkeys(job.seed for job in rows))
    if absent := set(args.seeds or ()) - set(there):
        raise ValueError(f"argument --seeds: {min(absent)} is not among the run's, {there}")
    ks = sorted({round(share * exp.args.steps) for share in args.shares} | {exp.k})
    if ks[-1] >= exp.args.steps:
        raise ValueError(f"argument --shares: {max(args.shares)} of {exp.args.steps} steps leaves none")
    tickets = {job[:2]: exp.rebuild(exp.load(job))[1] for job in rows if job.arm == "rewind"}
    seeds = args.seeds or there[:1]
    if not all((seed, exp.args.rounds) in tickets for seed in seeds):
        raise ValueError(f"--from {args.run}: not finished, there is no ticket of round {exp.args.rounds}")
    return seeds, ks, tickets


def main(argv=None):
    """The command line."""
    study = lth.Study("stability", __doc__)
    add = study.add_argument
    add("--from", dest="run", metavar="runs/NAME", help="a finished run (default: a small one on digits)")
    add("--seeds", nargs="+", type=seed_number, help="which of the run's (default: its first)")
    add("--shares", nargs="+", type=fraction, default=SHARES, metavar="SHARE",
        help="k as shares of the steps, beside the run's own k (default: 0 0.05 0.2 0.5)")
    with study.arguments(argv) as args:
        exp, rows = lth.open_run(args.run)
        seeds, ks, tickets = starts(args, exp, rows)
        path, table, cuts, paths = os.path.join(args.out, f"stability_{exp.args.dataset}"), [], {}, {}
        for seed in seeds:
            dense, left = dense_run(exp, seed, ks), density(tickets[seed, exp.args.rounds])
            for k in ks:
                row, paths[seed, k], cuts[seed, k] = one_start(exp, seed, k, dense, left)
                table.append(row)
                study.save(path, HEADER, table, exp.device, n=exp.args.samples, density=left,
                           paths={f"seed {s}, k={at}": way for (s, at), way in paths.items()})
                print(f"seed {seed}, k={k}: barrier {row[3]:.4f}, val_loss of copy A {row[5]:.4f}, of the "
                      f"ticket {row[7]:.4f}", flush=True)
        overlaps = [*of_cuts(exp, cuts, tickets), *of_run(exp, tickets)]
        study.save(path + "_masks", MASKS, overlaps, exp.device, density=left)
        draw(table, paths, overlaps, path, f"{exp.args.dataset}, {exp.args.steps:,} steps, tickets at "
             f"{100 * left:.1f} % of the weights, {len(seeds)} seed(s).")
    whole = lth.text_table(MASKS, [row for row in overlaps if row[3] == ALL])
    print(f"\n{lth.text_table(HEADER, table)}\n\n{whole}\n\n{conclude(table, overlaps)}\n"
          f"{path}.csv, .json, .png, _masks.csv, .json, .png, _paths.png")


if __name__ == "__main__":
    main()
