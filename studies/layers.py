"""Where in the U-Net do tickets live, and does a sparsity that varies with depth help?

    python -m studies.layers                                 # digits, one seed: under ten minutes
    python -m studies.layers --from runs/mnist               # a finished run of imp or oneshot, all its seeds
    python -m studies.layers --from runs/mnist --no-scopes   # without part 3, which trains most

2310.18823 has it that two winning tickets agree more upstream than downstream, and prunes later blocks more.
It compares weights by HSIC with an RBF kernel and no normalisation, and names no bandwidth. Here:

1 agreement  Two networks grow from one theta_k on different data orders, dense ones and tickets of one mask.
             By residual block: unbiased, normalised CKA of the weights of each convolution; and 1 - R2, the
             share of the variance of the second network's activations (channels at a position, held-out x_t)
             that ridge regression on the first's misses, fitted on one half of the images and measured on the
             other. Nulls: another seed's network, the mask on new weights and, for 1 - R2, a network never
             trained. Slope over place in the U-Net, 0 for the first block and 1 for the last. The claim is
             a CKA that falls, and a 1 - R2 that rises, where the nulls' do not.
2 survivors  Density by block; by layer, the chance that a surviving weight began larger than a pruned one
             (AUC of |theta_0| and |theta_k|; 0.5 says nothing; null: |theta_0| of another seed). Layers that
             begin at 0 stand apart: their theta_0 has no order.
3 scopes     Tickets whose rates are uniform (layer), grow with depth (ramp), follow CKA (cka) or come of one
             ranking (global), from one dense run, equal density, rewound alike: fid_domain and val_loss.

Intervals are 95 %: over seeds from three on, else over blocks, whose values are no replicates: no verdict.
What would change our mind about 'depth needs no schedule': ramp or cka better than both layer and global,
with intervals over seeds that leave out 0. Width, resolution and depth change together in a U-Net: a slope
here does not say which of them made it.
"""
import argparse
import os

import numpy as np
import torch
from scipy import stats

import lth_diffusion as lth
import metrics
from ddpm import as_input, positive_int, seed_number
from prune import density_by_block, live_counts, prunable
from unet import ResBlock

SCOPES = ("layer", "global", "ramp", "cka")
TIMES = (50, 150, 300, 500, 800)  # where the input is still an image, and where it is nearly noise
NEVER = "dense, never trained"
RIDGE = 1e-6  # of the mean squared activation: only against channels that are dead or copies of others
HEADER = ["seed", "quantity", "pair", "block", "value"]
SUMMARY = ["quantity", "pair", "seeds", "value", "low", "high", "interval over"]
AGAINST = (("global", "layer"), ("ramp", "layer"), ("ramp", "global"), ("cka", "layer"), ("cka", "global"))


def check(exp, rows, seeds):
    """ValueError for a run that holds no weight tickets of these seeds, or was made in another precision."""
    a, made = exp.args, lth.read_config(exp.args.out).get("precision")
    if a.method not in ("imp", "oneshot") or a.granularity != "weight":
        raise ValueError(f"argument --from: {a.out} has no weight tickets of imp or oneshot")
    if made != exp.precision:
        raise ValueError(f"argument --from: {a.out} was made in {made}, here it is {exp.precision}")
    for seed in seeds:
        if lth.Job(seed, a.rounds, "rewind") not in rows:
            raise ValueError(f"{a.out} has no ticket of seed {seed} in round {a.rounds}: finish it first")


def finished(exp, rows, seed, arm):
    """(EMA, masks) of the run's dense twin or of an arm of its last round; (None, None) without such."""
    job = lth.Job(seed, exp.args.rounds, arm)
    if arm == "dense":  # without rewinding the dense run is its own twin
        job = next(job for arm in ("twin", "dense") if (job := lth.Job(seed, 0, arm)) in rows)
    return exp.rebuild(exp.load(job), "ema") if job in rows else (None, None)


def pairs(exp, rows, seed, other):
    """{name: two networks of one shape}; other: the seed of the null, None where there is but one."""
    (dense, _), (ticket, masks) = (finished(exp, rows, seed, arm) for arm in ("dense", "rewind"))
    order, found = lth.PROBE_SEED + seed, {}
    found["dense, two orders"] = dense, exp.fit(f"layers_dense_seed{seed}", order, exp.theta(seed))
    found["ticket, two orders"] = ticket, exp.fit(f"layers_ticket_seed{seed}", order, exp.theta(seed), masks)
    if other is not None:
        found["dense, other seed"] = dense, finished(exp, rows, other, "dense")[0]
        found["ticket, other seed"] = ticket, finished(exp, rows, other, "rewind")[0]
    found["ticket, new weights"] = ticket, finished(exp, rows, seed, "reinit")[0]
    found[NEVER] = dense, exp.new_model(lth.REINIT_SEED + seed)
    return {name: pair for name, pair in found.items() if pair[1] is not None}


# --------------------------------------------------------------------------------------------- 1 agreement

@torch.no_grad()
def activations(model, x, t):
    """{residual block: its output as float64 (B * H * W, C)}."""
    found, model = {}, model.eval()
    hooks = [module.register_forward_hook(lambda _, __, out, name=name: found.update(
        {name: out.movedim(1, -1).flatten(0, -2).cpu().double()}))
        for name, module in model.named_modules() if isinstance(module, ResBlock)]
    model(x, t)
    for hook in hooks:
        hook.remove()
    return found


def missed(fitted, held_out, width):
    """1 - R2 on held-out rows of B's channels, predicted from `width` - 1 channels of A's and a constant.

    Both: second moments Z'Z of rows Z = [A, 1, B]. All that least squares needs, and no row is kept.
    """
    xx, xy = fitted[:width, :width], fitted[:width, width:]
    ridge = RIDGE * xx.diagonal()[:-1].mean() * torch.eye(width, dtype=torch.float64)
    w = torch.linalg.solve(xx + ridge, xy)
    xx, xy, yy = held_out[:width, :width], held_out[:width, width:], held_out[width:, width:].diagonal()
    one = width - 1  # the constant's row: counts and sums
    left = yy.sum() - 2 * (w * xy).sum() + (w * (xx @ w)).sum()
    return float(left / (yy.sum() - xy[one].square().sum() / xx[one, one]))


def reconstruction(exp, a, b, images):
    """{block: 1 - R2 of b's activations from a's}; both see the same images, t and noise."""
    x0 = as_input(metrics.random_draw(exp.test, images))
    generator, moments, widths = torch.Generator().manual_seed(lth.EVAL_SEED), ({}, {}), {}
    for t in (time * (exp.diffusion.T // 1000) for time in TIMES):
        eps = torch.randn(x0.shape, generator=generator)
        x_t = exp.diffusion.q_sample(x0, torch.full((len(x0),), t), eps)
        for half, sums in zip(x_t.chunk(2), moments):  # an image stays in its half at every t
            for part in half.float().split(100):
                x, now = part.to(exp.device), torch.full((len(part),), t, device=exp.device)
                first, second = (activations(model, x, exp.diffusion.clock(now)) for model in (a, b))
                for block, y in first.items():
                    z = torch.cat([y, torch.ones(len(y), 1, dtype=torch.float64), second[block]], 1)
                    sums[block], widths[block] = sums.get(block, 0) + z.T @ z, y.shape[1] + 1
    return {block: missed(*(sums[block] for sums in moments), width) for block, width in widths.items()}


# --------------------------------------------------------------------------------------------- 2 survivors

def began_larger(mask, start):
    """Chance that a random survivor began larger than a random pruned weight, ties a half; NaN without both
    kinds, or where all weights begin at 0."""
    live, size = mask.flatten().cpu().numpy(), start.detach().abs().flatten().cpu().numpy()
    many, few = int(live.sum()), int((~live).sum())
    if not many or not few or not size.any():
        return float("nan")
    return float((stats.rankdata(size)[live].sum() - many * (many + 1) / 2) / many / few)


def survivors(exp, seed, masks):
    """Rows of HEADER, the seed apart: the AUC of every layer and start."""
    theta_0, known = exp.new_model(seed), {"theta_k": exp.theta(seed)} if exp.k else {}
    starts = {"theta_0": theta_0, **known, "other theta_0": exp.new_model(lth.REINIT_SEED + seed)}
    for start, model in starts.items():
        for name, p in prunable(model).items():
            kind = "layers drawn at random" if bool(prunable(theta_0)[name].any()) else "layers begun at 0"
            value = began_larger(masks[name], p)
            if value == value:
                yield [f"AUC {start}", kind, name.removesuffix(".weight"), value]


# ------------------------------------------------------------------------------------------------ 3 scopes

def run_scope(study, exp, scope, seeds, runs):
    """Rows of HEADER of one scope's tickets, trained from the run's dense networks unless it has them."""
    a, out = exp.args, exp.args.out
    if scope != a.scope:
        out = os.path.join(runs, f"layers_{a.dataset}_{scope}")
        changed = dict(scope=scope, arms=["rewind"], control_rounds=[a.rounds], out=out, seeds=seeds)
        lth.run_alone(argparse.Namespace(**vars(a) | changed), study, a.out)
    for seed in seeds:
        state = lth.load_state(lth.Job(seed, a.rounds, "rewind").path(out), lth.FINISHED)
        for column in ("fid_domain", "val_loss", "sparsity"):
            yield [seed, column, scope, "", state["row"][column]]
        if scope != a.scope:
            model, masks = exp.rebuild(state)
            for block, value in density_by_block(model, live_counts(masks)).items():
                yield [seed, "density", scope, block, value]


# ----------------------------------------------------------------------------------------------- the report

def curves(table, quantity):
    """{pair: {seed: {block: value}}} of one quantity."""
    found = {}
    for seed, name, pair, block, value in table:
        if name == quantity:
            found.setdefault(pair, {}).setdefault(seed, {})[block] = value
    return found


def line_of(values):
    """(slope over place from 0 to 1, low, high) at 95 % over the blocks."""
    value, error = metrics.slope(values)
    half = error * float(stats.t.ppf(0.975, max(1, int(np.isfinite(values).sum()) - 2)))
    return value, value - half, value + half


def over_seeds(values):
    """(mean, low, high at 95 %, "seeds") of a number a seed; no interval below three."""
    return *metrics.over_seeds(values, 0.025), "seeds" if len(values) > 2 else ""


def summarise(table):
    """Rows of SUMMARY: slopes over blocks, means over blocks or layers, differences of scopes by seed."""
    for quantity in dict.fromkeys(row[1] for row in table):
        found = curves(table, quantity)
        grids = {pair: np.array([list(values.values()) for values in by_seed.values()], float)
                 for pair, by_seed in found.items()}  # (seeds, blocks) each
        for pair, grid in grids.items():
            if quantity in ("CKA", "1 - R2", "density"):
                ends = (over_seeds([metrics.slope(values)[0] for values in grid]) if len(grid) > 2 else
                        (*line_of(grid.mean(0)), "blocks"))
                yield [f"slope of {quantity}", pair, len(grid), *ends]
            if quantity != "density":  # blocks differ in size: their mean density is not the ticket's
                yield [quantity, pair, len(grid), *over_seeds(np.nanmean(grid, 1))]
        for scope, other in AGAINST if quantity in ("fid_domain", "val_loss") else ():
            if {scope, other} <= set(found):
                gaps = [found[scope][seed][""] - value[""] for seed, value in found[other].items()]
                yield [quantity, f"{scope} - {other}", len(gaps), *over_seeds(gaps)]


def conclude(summary):
    """Sentences on the claim and on the scopes, as far as the intervals carry them."""
    rows, n = {tuple(row[:2]): row[3:] for row in summary}, max(row[2] for row in summary)
    said = []
    for quantity in ("CKA", "1 - R2"):
        value, low, high, _ = rows[f"slope of {quantity}", "ticket, two orders"]
        way = "falls" if high < 0 else "rises" if low > 0 else "shows no slope"
        nulls = ", ".join(f"{name} {rows[key][0]:+.3f}" for name in (
            "ticket, new weights", "ticket, other seed") if (key := (f"slope of {quantity}", name)) in rows)
        said.append(f"{quantity} of two tickets of one theta_k {way} with depth ({value:+.3f}, 95 % interval "
                    f"{low:+.3f} to {high:+.3f}; the nulls' slopes: {nulls or 'none to be had'})")
    for pair in (f"{scope} - {other}" for scope, other in AGAINST):
        if ("fid_domain", pair) in rows:
            value, low, high, _ = rows["fid_domain", pair]
            ends = "" if low is None else f" [{low:+.2f}, {high:+.2f}]"
            said.append(f"fid_domain {pair} {value:+.2f}{ends}")
    return "; ".join(said) + (f". n={n}, no verdict." if n < 3 else f". n={n} seeds.")


def draw(table, path, note):
    """CKA and 1 - R2 by block, a line a pair, means over seeds; density by block and scope as a heat map."""
    for quantity, name, label in (("CKA", "cka", "CKA of weights"), ("1 - R2", "error", "1 - R2, held out")):
        grids = {pair: np.array([list(values.values()) for values in by_seed.values()], float)
                 for pair, by_seed in curves(table, quantity).items()}
        blocks = list(dict.fromkeys(row[3] for row in table if row[1] == quantity))
        lth.line_chart([dict(label=pair, x=range(len(blocks)), y=grid.mean(0), style="solid" if "orders" in
                             pair else "dashed", dots=grid.T.tolist() if len(grid) > 1 else ())
                        for pair, grid in grids.items()], f"{path}_{name}.png",
                       f"How alike two networks are, by block: {label}", "", label, note=note,
                       x_ticks=[(k, block.replace(".blocks", "")) for k, block in enumerate(blocks)])
    density = {scope: np.mean([list(values.values()) for values in by_seed.values()], 0)
               for scope, by_seed in curves(table, "density").items()}
    lth.heat_map(np.array(list(density.values())).T, blocks, list(density), f"{path}_density.png",
                 "Where tickets live: density by block and scope", note.split(" Orders")[0], x_label="scope",
                 bar_label="live / all")


def main(argv=None):
    """The command line."""
    study = lth.Study("layers", __doc__)
    add = study.add_argument
    add("--from", dest="run", metavar="runs/NAME", help="a finished run (default: a small one on digits)")
    add("--seeds", nargs="+", type=seed_number, help="which of its seeds (default: all)")
    add("--images", type=positive_int, default=200, help="held-out images behind a 1 - R2 (default: 200)")
    add("--no-scopes", action="store_true", help="leave out part 3, which trains tickets of other scopes")
    add("--runs", default="runs", help="folder for the runs of part 3, layers_DATASET_SCOPE (default: runs)")
    with study.arguments(argv) as args:
        exp, rows = lth.open_run(args.run)
        seeds, table = args.seeds or list(dict.fromkeys(job.seed for job in rows)), []
        check(exp, rows, seeds)
        if args.images < 2:
            raise ValueError("argument --images: one half fits, the other measures; give 2 at least")
        path = os.path.join(args.out, f"layers_{exp.args.dataset}")
        facts = dict(seeds=seeds, times=TIMES, images=args.images, run=exp.args.out)
        for k, seed in enumerate(seeds):
            other = seeds[(k + 1) % len(seeds)] if len(seeds) > 1 else None
            for pair, (a, b) in pairs(exp, rows, seed, other).items():
                found = {"1 - R2": reconstruction(exp, a, b, args.images)}
                if pair != NEVER:  # half of its convolutions are still 0: no CKA
                    found["CKA"] = lth.block_similarity(a, b)
                for quantity, values in found.items():
                    table += [[seed, quantity, pair, *item] for item in values.items()]
            model, masks = finished(exp, rows, seed, "rewind")
            density = density_by_block(model, live_counts(masks))
            table += [[seed, "density", exp.args.scope, *item] for item in density.items()]
            table += [[seed, *row] for row in survivors(exp, seed, masks)]
            study.save(path, HEADER, table, exp.device, **facts)
            print(f"seed {seed}: agreement and survivors done", flush=True)
        for scope in () if args.no_scopes else SCOPES:
            table += run_scope(study, exp, scope, seeds, args.runs)
            study.save(path, HEADER, table, exp.device, **facts)
        draw(table, path, f"{exp.args.dataset}, round {exp.args.rounds}, seeds {seeds}. Orders: two data "
             f"orders from one theta_k. {args.images} held-out images at t of {TIMES}.")
        summary = list(summarise(table))
    print(f"\n{lth.text_table(SUMMARY, summary)}\n\n{conclude(summary)}\n{path}.csv, .json, _cka.png, "
          "_error.png, _density.png")


if __name__ == "__main__":
    main()
