"""Can different denoising steps get by with different sparsities?

    python -m studies.timesteps                               # a small run on digits: minutes
    python -m studies.timesteps --from runs/mnist --pairs 0:10 5:10

Jiang et al., Successfully Applying Lottery Ticket Hypothesis to Diffusion Model, 2023 (2310.18823),
leave this open. Two nested tickets of one seed share the sampling chain: one denoises while t is at
least the switch step ('early'), the other below it ('late'). Both directions are tried. The switch
moves from one end of the chain, where one network does everything, to the other. Work is counted in
live multiply-accumulates per evaluation, averaged over the chain. The two directions do equal work
when the sparser network does as many evaluations in both. There they are compared with each other
and with a single ticket of that much work, interpolated linearly between the measured ones. The
sampler is DDIM without noise, always from the same x_T, so that only the networks differ.

own      The two tickets as they were trained. Both have to be stored.
shared   The sparser mask on the trained weights of the denser ticket, without further training.
         One ticket and a second mask have to be stored.

All networks were trained on all t. This does not show what training each on its own range of t
would give.

What would change our mind about 'one mask for all steps is enough': a direction that in every seed
is better than the other one and than the single ticket at equal work.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.timesteps")

import copy

import numpy as np
from torch import nn

from prune import apply_masks
from studies.common import Study, add_run_flag, open_run, over_seeds
from support import charts, cli
from support.words import counted

SHARES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the evaluations, done by the sparser network
DIRECTIONS = "sparse early", "dense early"
PAIR = "denser", "sparser"
NOTE = ("own: each ticket as it was trained; shared: the sparser mask on the "
        "weights of the denser ticket; single ticket: interpolated.")


class Switch(nn.Module):
    """Two networks as one: `early` for t >= switch, `late` below; all t (B,) are equal."""

    def __init__(self, early, late, switch):
        super().__init__()
        self.early, self.late = early, late
        self.switch = switch

    def forward(self, x, t):
        early = t[0] >= self.switch
        return (self.early if early else self.late)(x, t)


def inherit(dense, sparse):
    """The sparser ticket with the weights of the denser one (both lth.Trained)."""
    model = copy.deepcopy(dense.ema)
    apply_masks(model, sparse.masks)
    return sparse._replace(ema=model)


def score(exp, model, n, label):
    """fid_domain of n samples by DDIM."""
    samples = exp.draw(model, n=n, sampler="ddim", label=label)
    return exp.quality(samples)["fid_domain"]


def sweep(exp, dense, sparse, ends, n):
    """The rows of all switch steps and both directions, without what they have in common.

    ends: fid_domain of the denser network alone and of the sparser one alone.
    """
    nfe = exp.args.nfe
    stride = exp.diffusion.T // nfe
    macs = [net.row["macs_live"] for net in (dense, sparse)]
    for m in sorted({round(share * nfe) for share in SHARES}):
        work = ((nfe - m) * macs[0] + m * macs[1]) / nfe
        for direction in DIRECTIONS:
            if direction == "sparse early":
                early, late, below = sparse, dense, nfe - m
            else:
                early, late, below = dense, sparse, m
            switch = below * stride  # of t = i * stride, so many lie below it
            if m in (0, nfe):
                fid = ends[m > 0]
            else:
                model = Switch(early.ema, late.ema, switch)
                fid = score(exp, model, n, f"{direction}, {m} of {nfe}")
            yield dict(direction=direction, switch=switch, sparse_evaluations=m,
                       mmacs=work / 1e6, fid_domain=fid)


def measure(exp, rows, seed, pairs, n):
    """The rows of one seed: fid_domain and mmacs, millions of live MACs per evaluation."""
    nets, alone = {}, {}
    for job in rows:
        if job.seed == seed and job.arm in ("dense", "ticket"):
            net = nets[job.round] = exp.load(job)
            alone[job.round] = score(exp, net.ema, n, str(job))
    singles = sorted((net.row["macs_live"] / 1e6, alone[r]) for r, net in nets.items())
    for a, b in pairs:
        cut = inherit(nets[a], nets[b])
        cut_alone = score(exp, cut.ema, n, f"seed {seed}, shared")
        both = dict(own=(nets[b], alone[b]), shared=(cut, cut_alone))
        for weights, (sparse, end) in both.items():
            for row in sweep(exp, nets[a], sparse, (alone[a], end), n):
                single = float(np.interp(row["mmacs"], *zip(*singles)))
                yield dict(seed=seed, denser=a, sparser=b, weights=weights,
                           **row, single_ticket=single, n=n)


def select(table, **values):
    """The rows with these values."""
    return [row for row in table if row.items() >= values.items()]


def means(table, keys, column):
    """{values of the keys: mean of the column}, in order."""
    groups = {}
    for row in table:
        key = tuple(row[name] for name in keys)
        groups.setdefault(key, []).append(row[column])
    return {key: float(np.mean(group)) for key, group in groups.items()}


def differences(table):
    """{comparison: differences of fid_domain at equal work, one per seed} of one pair of networks.

    Each is a mean over the inner switch steps.
    """
    nfe = table[-1]["sparse_evaluations"]
    inner = [row for row in table if 0 < row["sparse_evaluations"] < nfe]

    def by_seed(rows, column):
        return np.array(list(means(rows, ["seed"], column).values()))
    single = by_seed(inner, "single_ticket")
    early, late = (by_seed(select(inner, direction=name), "fid_domain")
                   for name in DIRECTIONS)
    return {"sparse early - dense early": early - late,
            "sparse early - single ticket": early - single,
            "dense early - single ticket": late - single}


def conclude(table):
    """What was and was not shown."""
    said = []
    for a, b, weights in means(table, [*PAIR, "weights"], "n"):
        mine = select(table, denser=a, sparser=b, weights=weights)
        parts = []
        for name, values in differences(mine).items():
            mean, low, high = over_seeds(values)
            interval = "" if low is None else f" [{low:+.2f}, {high:+.2f}]"
            parts.append(f"{name} {mean:+.2f}{interval}")
        said.append(f"Rounds {a} and {b}, {weights} weights, fid_domain at equal work: "
                    f"{', '.join(parts)}.")
    n = len(means(table, ["seed"], "n"))
    ending = "brackets: 90 % intervals over seeds"
    if n < 3:
        ending = "fewer than 3: no verdict"
    return "\n".join([*said, f"Seeds: {n}; {ending}."])


def draw(table, path, note):
    """fid_domain of one pair against work: a line per direction, beside the single tickets."""
    place = ["sparse_evaluations"]  # the work there differs a little by seed
    x = list(means(table, place, "mmacs").values())
    y = list(means(table, place, "single_ticket").values())
    series = [dict(label="single ticket", x=x, y=y, style="dotted",
                   shape=None, colour="#555555")]
    for weights, style in ("own", "solid"), ("shared", "dashed"):
        for direction in DIRECTIONS:
            mine = select(table, weights=weights, direction=direction)
            y = list(means(mine, place, "fid_domain").values())
            label = f"{direction}, {weights}"
            series.append(dict(label=label, x=x, y=y, style=style))
    charts.line_chart(
        series, path, "Which denoising steps can be sparse?",
        "millions of live multiply-accumulates per evaluation, on average",
        "fid_domain (log)", log_y=True, note=note)


a_pair = cli.checked(lambda text: tuple(map(int, text.split(":"))),
                     lambda pair: len(pair) == 2 and pair[0] < pair[1],
                     "two rounds, the denser one first, as in 0:10")


def choose_pairs(pairs, rows):
    """The pairs asked for; or dense and the first ticket, each with the last ticket."""
    rounds = {}
    for job in rows:
        if job.arm in ("dense", "ticket"):
            rounds.setdefault(job.seed, set()).add(job.round)
    there = sorted(set.intersection(*rounds.values()))
    pairs = pairs or [(a, there[-1]) for a in there[:-1][:2]]
    if not pairs or set().union(*pairs) - set(there):
        cli.refuse("pairs", f"two of {there}, the rounds that all seeds have")
    return pairs


def main(argv=None):
    """The command line."""
    study = Study("studies.timesteps", __doc__)
    add_run_flag(study)
    add = study.add_argument
    add("--pairs", nargs="+", type=a_pair, metavar="A:B",
        help="rounds of the denser and the sparser ticket, 0 for dense (default: dense and the "
             "first ticket, each with the last)")
    add("--samples", type=cli.checked(int, lambda n: n >= 4, "4 or more"),
        help="samples behind a fid_domain (default: the run's)")
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run)
        a, n = exp.args, args.samples or exp.args.samples
        pairs, table = choose_pairs(args.pairs, rows), []
        seeds = cli.once(job.seed for job in rows)
        path = f"{args.out}/timesteps_{a.dataset}"
        for seed in seeds:
            table += measure(exp, rows, seed, pairs, n)
            header = list(table[0])
            cells = [list(row.values()) for row in table]
            study.save(path, header, cells, exp.device, nfe=a.nfe)
            print(f"seed {seed}: done", flush=True)
        first = dict(zip(PAIR, pairs[0]))
        note = (f"{a.dataset}, rounds {pairs[0][0]} and {pairs[0][1]}; DDIM with "
                f"{a.nfe} evaluations; FID from {n:,} samples; "
                f"means over {counted(len(seeds), 'seed')}; {NOTE}")
        draw(select(table, **first), path + ".png", note)
    print(f"\n{charts.text_table(header, cells)}\n\n{conclude(table)}")
    print(f"{path}.csv, .json, .png")


if __name__ == "__main__":
    main()
