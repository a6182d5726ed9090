"""Does this code find the best-known tickets? If it does not, negative results mean nothing.

    python -m studies.positive_control                               # LeNet on MNIST, three seeds
    python -m studies.positive_control --nets lenet conv --rewind 0.05

Frankle and Carbin, The Lottery Ticket Hypothesis, 2019, 1803.03635, sections 2 and 3, appendices F
to H. A LeNet-300-100 and a small convolutional network classify MNIST. In every round prune.py
prunes 20 % of each layer, half of that in the last one, and rewinds to theta_0; with --rewind to a
later step, Adam's moments included (Frankle, Dziugaite, Roy and Carbin, Linear Mode Connectivity
and the Lottery Ticket Hypothesis, 2020, 1912.05671). Each ticket is compared with its mask on a new
initialisation (reinit), a random mask on the same state, and a single cut of the dense network at
the same density (oneshot). As in the paper, training stops early by the
loss on 5,000 held-out images: the step of its minimum says how fast a network learns, the accuracy
at that step how well.

Margin, fixed before the run: half a point of test accuracy; intervals of 90 % over seeds. What
would change our mind: tickets that at 10 to 20 % of the weights are not shown to be better than
reinit and the random mask.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.positive_control")

import copy
import os
from collections import namedtuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from lth_diffusion import REINIT_SEED, Job, generator_of
from prune import (apply_masks, dense_masks, density, live_counts, live_total,
                   mask_hooks, prunable, prune_magnitude, random_masks, rewind)
from studies.common import Study, better_or_worse, deviation, over_seeds
from support import charts, cli, data, report
from support.words import ARMS, counted

LR, BATCH, HELD_OUT = 1.2e-3, 60, 5000  # 1803.03635, figure 2
LATE = 0.9  # of all steps: a minimum after this may not be the last
MARGIN = 0.5  # points of test accuracy
RATE = 0.2  # of every layer per round, half of it in the output layer
# 51, 21, 11, 5.5 and 2.3 % of the weights are left, but for the output layer.
CONTROLS = 3, 7, 10, 13, 17
TITLES = dict(lenet="LeNet-300-100 on MNIST",
              conv="Small convolutional network on MNIST")
Row = namedtuple("Row", "net seed round arm weights_left stop_step accuracy")


def build(net, seed):
    """A new LeNet-300-100 (266,200 weights), or two convolutions and two dense layers (206,736)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if net == "lenet":
            return nn.Sequential(
                nn.Flatten(), nn.Linear(784, 300), nn.ReLU(),
                nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(),  # (N, 16, 14, 14)
            nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),  # (N, 32, 7, 7)
            nn.Flatten(), nn.Linear(1568, 128), nn.ReLU(),
            nn.Linear(128, 10))


def cut(model, masks, rounds=1):
    """Masks after so many rounds' worth of pruning in one cut of every layer."""
    names, live = list(prunable(model)), live_counts(masks)
    gone = dict.fromkeys(names, 1 - (1 - RATE) ** rounds)
    gone[names[-1]] = 1 - (1 - RATE / 2) ** rounds
    total = sum(gone[name] * n for name, n in live.items())
    fraction = total / live_total(masks)
    return prune_magnitude(model, masks, fraction, layer_fractions=gone)


@torch.no_grad()
def measure(model, x, y):
    """(mean cross-entropy, accuracy) on floats (N, 1, 28, 28) with labels (N,)."""
    logits = torch.cat([model(part) for part in x.split(2500)])
    right = logits.argmax(1) == y
    return F.cross_entropy(logits, y).item(), right.double().mean().item()


def fit(model, masks, sets, steps, seed, label, state=None, keep=None):
    """Train in place under the masks -> ((step of the lowest held-out loss, test accuracy there),
    state after `keep` steps). state: what training goes on from, of an earlier call."""
    (x, y), held_out, test = sets
    hooks, kept = mask_hooks(model, masks), None
    optimizer, first = torch.optim.Adam(model.parameters(), LR, fused=True), 0
    if state is None:
        apply_masks(model, masks)
    else:
        state = rewind(model, masks, state)
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        first = state["step"]
    generator = torch.Generator()
    best = np.inf, 0, 0.0
    for step in tqdm(range(first, steps), label, leave=False, disable=None):
        if step == keep:
            kept = copy.deepcopy(dict(step=step, model=model.state_dict(), ema={},
                                      optimizer=optimizer.state_dict()))
        generator.manual_seed(seed * 1_000_003 + step)  # the same for all that go back
        pick = torch.randint(len(x), (BATCH,), generator=generator)
        F.cross_entropy(model(x[pick]), y[pick]).backward()
        hooks["after_backward"](step, model)
        optimizer.step()
        optimizer.zero_grad()
        hooks["after_step"](step, model, optimizer, None)
        if (step + 1) % max(1, steps // 40) == 0:
            loss, _ = measure(model, *held_out)
            if loss < best[0]:
                best = loss, step + 1, measure(model, *test)[1]
    return best[1:], kept


def find_tickets(net, seed, sets, steps, rounds, k=0):
    """Rows of one network and seed: the dense network, then the rounds with their controls."""
    def run(arm, r, masks, state=None, start=seed, keep=None):
        model = build(net, start)
        label = f"{net} seed {seed} round {r} {arm}"
        found, kept = fit(model, masks, sets, steps, seed, label, state, keep)
        return model, Row(net, seed, r, arm, density(masks), *found), kept

    every = masks = dense_masks(build(net, seed))
    dense, row, state = run("dense", 0, masks, keep=k)
    yield row
    model = dense
    for r in range(1, rounds + 1):
        masks = cut(model, masks)
        model, row, _ = run("ticket", r, masks, state)
        yield row
        if r in CONTROLS or r == rounds:
            shuffled = random_masks(masks, generator_of(Job(seed, r, "random")))
            yield run("reinit", r, masks, start=REINIT_SEED + seed)[1]
            yield run("random", r, shuffled, state)[1]
            yield run("oneshot", r, cut(dense, every, r), state)[1]


def load(data_dir):
    """Training, held-out and test sets of MNIST: floats (N, 1, 28, 28) in [0, 1], labels (N,)."""
    x, y = data.load_images("mnist", data_dir)
    test, labels = data.load_images("mnist", data_dir, "test")
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(x), generator=generator)  # the file has an order
    x, y, test = x[order].float() / 255, y[order], test.float() / 255
    held_out = x[:HELD_OUT], y[:HELD_OUT]
    return (x[HELD_OUT:], y[HELD_OUT:]), held_out, (test, labels)


def gains(rows, r, other):
    """Test accuracy of the ticket less that of another arm in round r, in points, by seed."""
    arms = {}
    for row in rows:
        if row.round in (0, r):
            arms.setdefault(row.arm, {})[row.seed] = row.accuracy
    return [100 * (accuracy - arms[other][seed]) for seed, accuracy in arms["ticket"].items()]


def title_of(rows):
    """At how many weights the ticket is shown to be better than both controls."""
    levels = []
    for r in sorted({row.round for row in rows if row.arm == "reinit"}):
        lows = [over_seeds(gains(rows, r, other))[1] for other in ("reinit", "random")]
        if all(low is not None and low > 0 for low in lows):
            left = next(row.weights_left for row in rows if row.round == r)
            levels.append(f"{100 * left:.3g} %")
    said = (f"tickets beat reinit and random mask at {', '.join(levels)}" if levels
            else "that tickets beat reinit and random mask is not shown")
    if len({row.seed for row in rows}) < 3:
        said = "fewer than three seeds, no verdict"
    return f"{TITLES[rows[0].net]}: {said}"


def draw(rows, column, path, y_label, k):
    """One column against the share of weights left: means and deviations over seeds."""
    values, series = {}, []
    for row in rows:
        groups = values.setdefault(row.arm, {})
        group = groups.setdefault(row.weights_left, [])
        group.append(getattr(row, column))
    dense = values.pop("dense")[1]
    for arm, groups in values.items():
        y = np.array([np.mean(group) for group in groups.values()])
        sd = [deviation(group) for group in groups.values()]
        sd = np.array(sd, float)  # None becomes NaN
        series.append(dict(label=ARMS[arm], x=list(groups), y=y, y_low=y - sd, y_high=y + sd,
                           **report.look_of(arm)))
    level = "dense", np.mean(dense), "dashed"
    charts.line_chart(series, path, title_of(rows), "weights left (log)",
                      y_label, hlines=[level], log_x=True,
                      note=f"Tickets go back to step {k}. Means over "
                      f"{counted(len(dense), 'seed')}; bars: standard deviation. Early stopping "
                      "by held-out loss.")


def conclude(rows, steps):
    """A sentence per control round: ticket less each other arm, paired by seed, in test accuracy,
    and the early-stopping steps."""
    said = []
    for r in sorted({row.round for row in rows if row.arm == "reinit"}):
        arms, parts, stops = {}, [], []
        for row in rows:
            if row.round in (0, r):
                arms.setdefault(row.arm, []).append(row)
        tickets = arms["ticket"]
        for arm, group in arms.items():
            last = [row.stop_step for row in group]
            late = ">= " if max(last) > LATE * steps else ""
            stops.append(f"{arm} {late}{np.mean(last):,.0f}")
            if arm != "ticket":
                mean, low, high = over_seeds(gains(rows, r, arm))
                answer = better_or_worse([None if v is None else -v for v in
                                          (mean, high, low)], MARGIN)
                ends = "" if low is None else f" [{low:+.2f}, {high:+.2f}] ({answer})"
                parts.append(f"{arm} {mean:+.2f}{ends}")
        left, n = 100 * tickets[0].weights_left, len(tickets)
        certain = "90 % intervals" if n > 2 else "no verdict"
        said.append(f"{rows[0].net}, {left:.1f} % of the weights, {counted(n, 'seed')}: "
                    f"ticket less {', '.join(parts)} points of test accuracy, "
                    f"{certain}. Early stop at step: {', '.join(stops)}.")
    return said


def main(argv=None):
    """The command line."""
    study = Study("studies.positive_control", __doc__)
    add = study.add_argument
    add("--nets", nargs="+", choices=list(TITLES), default=["lenet"],
        help="default: lenet")
    add("--seeds", nargs="+", type=cli.seed_number, default=[0, 1, 2],
        help="three or more give intervals (default: 0 1 2)")
    add("--steps", type=cli.positive_int, default=4000, help="default: 4000")
    add("--rounds", type=cli.positive_int, default=17,
        help="rounds of 20 %% (default: 17, to 2.3 %%)")
    add("--rewind", type=cli.fraction, default=0.0, metavar="SHARE",
        help="go back to this share of the steps (default: 0, as the paper)")
    add("--data-dir", default=os.environ.get("LTH_DATA") or "data", type=cli.path,
        help="folder of MNIST (default: $LTH_DATA or data)")
    with study.arguments(argv) as args:
        sets, seeds = load(args.data_dir), cli.once(args.seeds)
        for net in cli.once(args.nets):
            k = round(args.rewind * args.steps)
            path, rows = os.path.join(args.out, f"positive_control_{net}{f'_k{k}' * (k > 0)}"), []
            for seed in seeds:
                rows += find_tickets(net, seed, sets, args.steps, args.rounds, k)
                study.save(path, Row._fields, rows, steps=args.steps,
                           seeds=seeds, k=k)
                print(f"{net}, seed {seed}: done", flush=True)
            said = conclude(rows, args.steps)
            study.save(path, Row._fields, rows, steps=args.steps, seeds=seeds, k=k, said=said)
            draw(rows, "accuracy", f"{path}_accuracy.png", "test accuracy", k)
            draw(rows, "stop_step", f"{path}_speed.png", "early stop at step", k)
            print(*said, f"{path}.csv, .json, and charts", sep="\n")


if __name__ == "__main__":
    main()
