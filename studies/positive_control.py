"""Does this code find the tickets that everybody knows? Without that a negative result says nothing.

    python -m studies.positive_control --data-dir data     # LeNet on MNIST, one seed: ten minutes
    python -m studies.positive_control --data-dir data --nets lenet conv --seeds 0 1 2 --steps 6000

Source: 1803.03635, sections 2 and 3 and appendices F to H. A LeNet-300-100 and a small convolutional network
classify MNIST; prune.py prunes them a round at a time, 20 % of every layer and half of that in the last one,
and rewinds to theta_0. Beside each ticket stand its mask on new weights (reinit), a shuffled mask on theta_0
(random) and one cut of the dense network at the same density (oneshot). Training is early-stopped by the loss
on 5,000 held-out images, as in the paper: its step says how fast a network learns, its accuracy how well.

What would change our mind: tickets that at 10 to 20 % of the weights are no better than reinit and random.
"""
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import lth_diffusion as lth
import metrics
from ddpm import load_images, positive_int, seed_number
from prune import (apply_masks, dense_masks, density, live_counts, mask_hooks, prunable, prune_magnitude,
                   random_masks)

LR, BATCH, HELD_OUT = 1.2e-3, 60, 5000  # 1803.03635, figure 2
LATE = 0.9  # of all steps: a lowest loss after this is the end of the steps, not of learning
RATE = 0.2  # of every layer a round, half of it in the output layer
CONTROLS = (3, 7, 10, 13, 17)  # 51, 21, 11, 5.5 and 2.3 % of the weights left, but for the output layer
HEADER = ["net", "seed", "round", "arm", "weights left", "early stop at step", "test accuracy"]
ARMS = dict(rewind="ticket (rewind)", reinit="same mask, new init", random="shuffled mask",
            oneshot="one cut, rewound")


def build(net, seed):
    """LeNet-300-100 (266,200 weights), or two convolutions and two dense layers (206,736), new weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if net == "lenet":
            return nn.Sequential(nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(),
                                 nn.Linear(100, 10))
        return nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(),
                             nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(),
                             nn.Linear(32 * 7 * 7, 128), nn.ReLU(), nn.Linear(128, 10))


def rates(model):
    """{name: share of the layer's weights that a round cuts}."""
    names = list(prunable(model))
    return {name: RATE / 2 if name == names[-1] else RATE for name in names}


def cut(model, masks, rounds=1):
    """Masks after so many rounds' worth of one cut in every layer."""
    live = live_counts(masks)
    gone = {name: 1 - (1 - rate) ** rounds for name, rate in rates(model).items()}
    fraction = sum(gone[name] * n for name, n in live.items()) / sum(live.values())
    return prune_magnitude(model, masks, fraction, layer_fractions=gone)


@torch.no_grad()
def measure(model, x, y):
    """(mean cross-entropy, accuracy) of floats (N, 1, 28, 28), labels (N,)."""
    logits = torch.cat([model(part) for part in x.split(2500)])
    return F.cross_entropy(logits, y).item(), (logits.argmax(1) == y).double().mean().item()


def fit(model, masks, data, steps, seed, label):
    """Train in place under the masks; (step of the lowest held-out loss, test accuracy there)."""
    (x, y), held_out, test = data
    apply_masks(model, masks)
    optimizer, hooks = torch.optim.Adam(model.parameters(), LR, fused=True), mask_hooks(model, masks)
    generator, best = torch.Generator().manual_seed(seed), (np.inf, 0, 0.0)
    for step in tqdm(range(steps), desc=label, unit="step", leave=False, disable=None):
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
    return best[1:]


def lines(net, seed, data, steps, rounds, controls):
    """Rows of HEADER of one network and seed: the dense network, then round after round with its controls."""
    theta = build(net, seed).state_dict()

    def run(arm, round, masks, start):
        model = build(net, seed)
        model.load_state_dict(start)
        early, accuracy = fit(model, masks, data, steps, seed, f"{net} seed {seed} round {round} {arm}")
        return model, [net, seed, round, arm, density(masks), early, accuracy]

    masks = dense_masks(build(net, seed))
    model, row = run("dense", 0, masks, theta)
    yield row
    dense = model
    for round in range(1, rounds + 1):
        masks = cut(model, masks)
        model, row = run("rewind", round, masks, theta)
        yield row
        if round in controls:
            shuffled = random_masks(masks, torch.Generator().manual_seed(lth.MASK_SEED + 1000 * round + seed))
            yield run("reinit", round, masks, build(net, lth.REINIT_SEED + seed).state_dict())[1]
            yield run("random", round, shuffled, theta)[1]
            yield run("oneshot", round, cut(dense, dense_masks(dense), round), theta)[1]


def load(data_dir):
    """(training, held-out, test) pairs of floats (N, 1, 28, 28) in [0, 1] and labels of MNIST."""
    (x, y), test = (load_images("mnist", data_dir, split) for split in ("train", "test"))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))  # the file has an order
    x, y = x[order].float() / 255, y[order]
    return (x[HELD_OUT:], y[HELD_OUT:]), (x[:HELD_OUT], y[:HELD_OUT]), (test[0].float() / 255, test[1])


def draw(table, column, path, y_label):
    """One quantity against the share of weights left, an arm a line, means and deviations over seeds."""
    dense = np.mean([row[column] for row in table if row[3] == "dense"])
    series = []
    for arm, label in ARMS.items():
        rounds = sorted({row[2] for row in table if row[3] == arm})
        groups = [[row for row in table if row[3] == arm and row[2] == round] for round in rounds]
        y = np.array([np.mean([row[column] for row in group]) for group in groups])
        sd = np.array([np.std([row[column] for row in group], ddof=1) if len(group) > 1 else np.nan
                       for group in groups])
        x = [group[0][4] for group in groups]
        series.append(dict(label=label, x=x, y=y, y_low=y - sd, y_high=y + sd))
    seeds = len({row[1] for row in table})
    name = dict(lenet="LeNet-300-100", conv="Small conv net")[table[0][0]]
    lth.line_chart(series, path, f"{name} on MNIST", "weights left (log scale)", y_label,
                   hlines=[("dense", dense, "dashed")], log_x=True,
                   note=f"Means over {seeds} seed(s), bars: standard deviation. Early stop by held-out loss.")


def conclude(table, steps):
    """A sentence a control round: the ticket's accuracy less each other arm's, paired by seed; and when each
    stopped early, at least that late where it was still learning when its steps were over."""
    said = []
    for round in sorted({row[2] for row in table if row[3] == "reinit"}):
        arms = {}
        for row in table:
            if row[2] == round or row[3] == "dense":
                arms.setdefault(row[3], {})[row[1]] = row
        parts, stops = [], {arm: [row[5] for row in rows.values()] for arm, rows in arms.items()}
        for other in ("dense", "reinit", "random", "oneshot"):
            gain = np.array([100 * (arms["rewind"][seed][6] - row[6]) for seed, row in arms[other].items()])
            ends = metrics.t_test(gain, 0.05)[1][1:] if len(gain) > 2 else ()
            low_high = " [{:+.2f}, {:+.2f}]".format(*ends) if ends else ""
            parts.append(f"{other} {gain.mean():+.2f}{low_high}")
        fastest = ", ".join(f"{arm} {'>= ' * (max(found) > LATE * steps)}{np.mean(found):,.0f}"
                            for arm, found in stops.items())
        left, n = 100 * np.mean([row[4] for row in arms["rewind"].values()]), len(gain)
        said.append(f"{table[0][0]}, {left:.1f} % of the weights, n={n} seed{'s' * (n > 1)}: ticket less "
                    f"{', '.join(parts)} points of test accuracy, "
                    f"{'90 % intervals' if n > 2 else 'no verdict'}. Early stop at step: {fastest}.")
    return "\n".join(said)


def main(argv=None):
    """The command line."""
    study = lth.Study("positive_control", __doc__)
    add = study.add_argument
    add("--nets", nargs="+", choices=["lenet", "conv"], default=["lenet"], help="default: lenet")
    add("--seeds", nargs="+", type=seed_number, default=[0], help="3 or more give intervals (default: 0)")
    add("--steps", type=positive_int, default=4000, help="training steps of a run (default: 4000)")
    add("--rounds", type=positive_int, default=17, help="rounds of -20 %% (default: 17, to 2.3 %%)")
    add("--data-dir", default=os.environ.get("LTH_DATA", "data"), help="default: $LTH_DATA or data")
    with study.arguments(argv) as args:
        data, controls = load(args.data_dir), [r for r in CONTROLS if r < args.rounds] + [args.rounds]
        for net in args.nets:
            path, table = os.path.join(args.out, f"positive_control_{net}"), []
            for seed in args.seeds:
                table += lines(net, seed, data, args.steps, args.rounds, controls)
                study.save(path, HEADER, table, steps=args.steps, seeds=args.seeds)
                print(f"{net}, seed {seed}: done", flush=True)
            draw(table, 6, f"{path}_accuracy.png", "test accuracy")
            draw(table, 5, f"{path}_speed.png", "early stop at step")
            print(f"{conclude(table, args.steps)}\n{path}.csv, .json, and figures")


if __name__ == "__main__":
    main()
