"""Can different denoising steps do with different sparsity?

    python -m studies.timesteps                               # makes a small run on digits first: minutes
    python -m studies.timesteps --from runs/mnist --pairs 0:10 5:10

The open question of 2310.18823. Two nested tickets of one seed share the chain: one denoises while t >= the
switch step ('early'), the other below it ('late'), in both directions, the switch swept from one end, where
one network does everything, to the other. Work is counted by evaluation, so that m of the evaluations done by
the sparser network cost the same whichever end of the chain they are at: there the two directions are
compared, and with a single ticket of that much work, read off a straight line between the measured ones.
The sampler is DDIM without noise from the same x_T: what differs is the networks' doing.

weights own: the two tickets as they were trained, each by itself: both have to be stored.
weights shared: the sparser mask on the denser one's trained weights, without any training of its own: stored
are the denser ticket and one more mask.

Beside it, without sampling and so with less noise: the error on eps by range of t, of every ticket and
control over that of dense. The networks were trained on all t, so this cannot show what training each on its
own range would give.

What would change our mind about 'one mask for all steps is enough': a direction that in every seed is better
than the other and than the single ticket at equal work.
"""
import copy
import os
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

import lth_diffusion as lth
import metrics
from ddpm import as_input, denoiser, positive_int
from prune import apply_masks, pack_masks

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the evaluations, done by the sparser network
BUCKETS = 10  # ranges of t
DIRECTIONS = "sparse early", "dense early"
HEADER = ["seed", "denser", "sparser", "weights", "direction", "switch at t", "sparse evaluations",
          "MMACs an evaluation", "GMACs a sample", "bytes", "fid_domain", "single ticket", "n"]
ERRORS = ["seed", "round", "arm", "sparsity", "t from", "t below", "error", "over dense", "n"]


class Network(NamedTuple):
    model: nn.Module
    masks: dict
    macs: int  # live multiply-accumulates of an evaluation
    bytes: int  # of its ticket file


class Switch(nn.Module):
    """Two networks as one: `early` for t >= switch, `late` below; t as networks are told it, 0 to 1,000."""

    def __init__(self, early, late, switch):
        super().__init__()
        self.early, self.late, self.switch = early, late, switch

    def forward(self, x, t):
        noisy = t >= self.switch  # (B,)
        if bool(noisy.all()) or not bool(noisy.any()):  # in sampling all t are one
            return (self.early if bool(noisy[0]) else self.late)(x, t)
        return torch.where(noisy[:, None, None, None], self.early(x, t), self.late(x, t))


def inherit(dense, sparse):
    """`sparse`'s mask on `dense`'s trained weights. ValueError unless it lies within the denser mask."""
    if any(bool((mask & ~dense.masks[name]).any()) for name, mask in sparse.masks.items()):
        raise ValueError("these tickets are not nested: take a run of --method imp or oneshot")
    model = copy.deepcopy(dense.model)
    apply_masks(model, sparse.masks)
    return sparse._replace(model=model)


def storage(dense, sparse, m, nfe, shared):
    """Bytes to keep: of the one network where it does everything, else of both; shared weights are kept once,
    with a second mask."""
    if m in (0, nfe):
        return (sparse if m else dense).bytes
    bits = sum(len(packed) for packed in pack_masks(sparse.masks).values())
    return dense.bytes + (bits if shared else sparse.bytes)


def score(exp, model, args, label):
    """fid_domain of n samples by DDIM without noise."""
    return exp.quality(exp.draw(model, args.samples, sampler="ddim", label=label))["fid_domain"]


def sweep(exp, dense, sparse, ends, args, shared):
    """(direction, switch, m, MACs an evaluation, bytes, fid_domain) for m sparse evaluations; ends: the
    fid_domain of the dense and of the sparse network alone."""
    nfe, stride = exp.args.nfe, exp.diffusion.T // exp.args.nfe
    for m in sorted({round(share * nfe) for share in SHARES}):
        macs, size = (m * sparse.macs + (nfe - m) * dense.macs) / nfe, storage(dense, sparse, m, nfe, shared)
        for direction in DIRECTIONS:
            first = direction == "sparse early"
            switch = exp.diffusion.clock((nfe - m if first else m) * stride)  # t = i * stride: so many below
            early, late = (sparse, dense) if first else (dense, sparse)
            value = ends[m > 0] if m in (0, nfe) else score(
                exp, Switch(early.model, late.model, switch), args, f"{direction}, {m} of {nfe}")
            yield direction, switch, m, macs, size, value


def lines(exp, rows, seed, pairs, args):
    """Rows of HEADER of one seed."""
    jobs = {job.round: job for job in rows if job.seed == seed and job.arm in ("dense", "rewind")}
    nets = {round: Network(*exp.rebuild(exp.load(job), "ema"), rows[job]["macs_live"],
                           rows[job]["ticket_bytes"]) for round, job in jobs.items()}
    cut = {pair: inherit(nets[pair[0]], nets[pair[1]]) for pair in pairs}
    alone = {round: score(exp, net.model, args, str(jobs[round])) for round, net in nets.items()}
    singles = sorted((net.macs, alone[round]) for round, net in nets.items())
    for a, b in pairs:
        for weights, sparse in (("own", nets[b]), ("shared", cut[a, b])):
            shared = weights == "shared"
            ends = alone[a], score(exp, sparse.model, args, "shared, alone") if shared else alone[b]
            for direction, switch, m, macs, size, value in sweep(exp, nets[a], sparse, ends, args, shared):
                yield [seed, a, b, weights, direction, switch, m, macs / 1e6, macs * exp.args.nfe / 1e9, size,
                       value, float(np.interp(macs, *zip(*singles))), args.samples]


def eps_error(diffusion, predict, x0, t, noise):
    """Mean squared error on eps of images (N, C, H, W), whatever the network says, in batches of 250."""
    squares = []
    for part, times, eps in zip(*(v.split(250) for v in (x0, t, noise))):
        found = diffusion.predict(predict, diffusion.q_sample(part, times, eps), times)
        squares.append((found - eps).square().flatten(1).mean(1))
    return torch.cat(squares).mean().item()


def error_lines(exp, rows, seed, rounds, n):
    """Rows of ERRORS of one seed: every network meets the same n images and noise in every range of t."""
    jobs = [job for job in rows if job.seed == seed and (
        job.arm == "dense" or job.round in rounds and job.arm in ("twin", *lth.ARMS))]
    x0 = as_input(metrics.random_draw(exp.test, n)).to(exp.device)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(lth.EVAL_SEED)).to(exp.device)
    edges, dense = [exp.diffusion.T * k // BUCKETS for k in range(BUCKETS + 1)], {}
    for job in jobs:
        predict = denoiser(exp.rebuild(exp.load(job), "ema")[0], exp.precision)
        for low, high in zip(edges, edges[1:]):
            t = torch.linspace(low, high - 1, len(x0)).round().long().to(exp.device)
            value = eps_error(exp.diffusion, predict, x0, t, noise)
            yield [seed, job.round, job.arm, rows[job]["sparsity"], exp.diffusion.clock(low),
                   exp.diffusion.clock(high), value, value / dense.setdefault(low, value), len(x0)]


def means(rows, key, value):
    """{key(row): mean of value(row)}, in order."""
    groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(value(row))
    return {name: np.mean(values, axis=0) for name, values in groups.items()}


def over_seeds(values):
    """Mean of one value a seed, and its 90 % interval where there are three."""
    mean, low, high = metrics.over_seeds(values)
    return f"{mean:+.2f}" + ("" if low is None else f" [{low:+.2f}, {high:+.2f}]")


def conclude(table, errors):
    """What was and was not shown; of the sweep a mean over the inner switch steps for every seed."""
    said, n = [], len({row[0] for row in table})
    for pair in dict.fromkeys(tuple(row[1:4]) for row in table):
        inner = [row for row in table if tuple(row[1:4]) == pair and 0 < row[6] < table[-1][6]]
        both = means(inner, lambda row: (row[4], row[0]), lambda row: (row[10], row[11]))
        early, late = (np.array([v for key, v in both.items() if key[0] == d]) for d in DIRECTIONS)
        said.append(f"Rounds {pair[0]} and {pair[1]}, {pair[2]} weights: at equal work sparse early less "
                    f"dense early {over_seeds(early[:, 0] - late[:, 0])} fid_domain; less the single ticket "
                    f"(interpolated) sparse early {over_seeds(early[:, 0] - early[:, 1])}, dense early "
                    f"{over_seeds(late[:, 0] - late[:, 1])}.")
    last = [row for row in errors if row[2] == "rewind" and row[1] == max(row[1] for row in errors)]
    ratio = means(last, lambda row: f"{row[4]:g} to {row[5]:g}", lambda row: row[7])
    low, high = min(ratio, key=ratio.get), max(ratio, key=ratio.get)
    said.append(f"The last ticket's error on eps over dense's is smallest, {ratio[low]:.3f}, for t from "
                f"{low}, and largest, {ratio[high]:.3f}, from {high}.")
    ending = "; fewer than 3: no verdict." if n < 3 else "; brackets: 90 % over seeds."
    return "\n".join([*said, f"n={n} seed{'s' * (n > 1)}{ending}"])


def draw(table, path, note):
    """fid_domain of the first pair against work: a line a direction, beside the single tickets."""
    table, series = [row for row in table if row[1:3] == table[0][1:3]], []
    for weights, style in (("own", "solid"), ("shared", "dashed")):
        for direction in DIRECTIONS:
            mine = means([row for row in table if row[3:5] == [weights, direction]], lambda row: row[6],
                         lambda row: (row[7], row[10]))  # the work of a share differs a little by seed
            x, y = zip(*mine.values())
            series.append(dict(label=f"{direction}, {weights}", x=x, y=y, style=style))
    x, y = zip(*means(table, lambda row: row[6], lambda row: (row[7], row[11])).values())
    series.append(dict(label="single ticket", x=x, y=y, style="dotted", shape=None, colour="#555555"))
    lth.line_chart(series, path, "Which steps can be sparse?", "millions of live multiply-accumulates an "
                   "evaluation, on average", "fid_domain (log)", log_y=True, note=note)


def draw_errors(errors, path, note):
    """The error on eps over dense's by range of t, a line a network."""
    series = []
    for name in dict.fromkeys(tuple(row[1:3]) for row in errors if row[2] != "dense"):
        mine = [row for row in errors if tuple(row[1:3]) == name]
        ratio = means(mine, lambda row: (row[4] + row[5]) / 2, lambda row: row[7])
        series.append(dict(label=f"{name[1]} {100 * mine[0][3]:.0f} %", x=list(ratio), y=list(ratio.values()),
                           style="solid" if name[1] == "rewind" else "dashed"))
    lth.line_chart(series, path, "At which noise levels is sparsity cheap?", "t", "error on eps over dense's",
                   hlines=[("dense", 1.0, "dotted")], note=note)


def choose_pairs(texts, rows):
    """[(0, 10), ...] from ["0:10", ...], the denser one first; dense and the first ticket with the last."""
    there = sorted({job.round for job in rows if job.arm in ("dense", "rewind")})
    pairs = [tuple(map(int, text.split(":"))) for text in texts or ()] or [
        (a, there[-1]) for a in there[:min(2, len(there) - 1)]]
    if any(len(pair) != 2 or not set(pair) <= set(there) or pair[0] >= pair[1] for pair in pairs):
        raise ValueError(f"argument --pairs: two rounds each, as in 0:{there[-1]}, of {there}")
    return pairs


def main(argv=None):
    """The command line."""
    study = lth.Study("timesteps", __doc__)
    add = study.add_argument
    add("--from", dest="run", metavar="runs/NAME", help="a finished run (default: a small one on digits)")
    add("--pairs", nargs="+", metavar="A:B",
        help="rounds of the denser and the sparser ticket, 0 for dense (default: 0 and first with last)")
    add("--samples", type=positive_int, help="samples behind a fid_domain (default: the run's)")
    add("--images", type=positive_int, default=400, help="held-out images a range of t (default: 400)")
    with study.arguments(argv) as args:
        exp, rows = lth.open_run(args.run)
        if exp.args.granularity == "channel":
            raise ValueError(f"{exp.args.out} has channel tickets, which are no masks of one network")
        args.samples = args.samples or exp.args.samples
        pairs = choose_pairs(args.pairs, rows)
        path, table, errors = os.path.join(args.out, f"timesteps_{exp.args.dataset}"), [], []
        for number, seed in enumerate(dict.fromkeys(job.seed for job in rows), 1):
            errors += error_lines(exp, rows, seed, {round for pair in pairs for round in pair}, args.images)
            study.save(path + "_errors", ERRORS, errors, exp.device, n=args.images)
            table += lines(exp, rows, seed, pairs, args)
            study.save(path, HEADER, table, exp.device, n=args.samples, nfe=exp.args.nfe)
            draw(table, path + ".png", f"{exp.args.dataset}, DDIM, {exp.args.nfe} evaluations, n="
                 f"{args.samples:,} samples from one x_T, means over {number} seed(s). Rounds "
                 f"{pairs[0][0]} and {pairs[0][1]}. Own: each as it was trained; shared: the sparser mask on "
                 "the denser one's weights. Single: on a straight line between measured tickets.")
            draw_errors(errors, path + "_errors.png", f"{exp.args.dataset}, {args.images} held-out images a "
                        f"range of t, {number} seed(s). Percentages: weights pruned.")
            print(f"seed {seed}: done", flush=True)
    print(f"\n{lth.text_table(HEADER, table)}\n\n{lth.text_table(ERRORS, errors)}\n\n"
          f"{conclude(table, errors)}\n{path}.csv, .json, .png, {path}_errors.csv, .json, .png")


if __name__ == "__main__":
    main()
