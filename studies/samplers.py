"""Prune the network, or take fewer sampling steps? Quality against the cost of a sample.

    python -m studies.samplers                                          # a small run on digits
    python -m studies.samplers --from results/replication/v --rounds 5  # MNIST, no training
    python -m studies.samplers --from runs/channels     # a run of methods.channels, for the seconds

The dense network and the tickets draw equally many samples from the same noise, by ancestral
sampling (Ho, Jain and Abbeel, Denoising Diffusion Probabilistic Models, 2020, 2006.11239), DDIM
(Song, Meng and Ermon, Denoising Diffusion Implicit Models, 2020, 2010.02502), DPM-Solver++(2M) (Lu
et al., DPM-Solver++, 2022, 2211.01095) and Heun's method on the noise levels of EDM (Karras et al.,
Elucidating the Design Space of Diffusion-Based Generative Models, 2022, 2206.00364, algorithm 1,
eq. 5), with several numbers of network evaluations. The work of a sample is evaluations times live
multiply-accumulates: what a machine that skips zeros would do. The seconds are those of this
machine, which skips none, but runs a network with channels cut out faster; each setting is timed
once a seed, so leave the machine alone. Heun's x_0 is not clipped, that of the others is. A setting
is on the Pareto front if no other is at least as good at no higher cost.

Margin, fixed before the run: a sampler favours ticket or dense where their fid_domain is shown to
differ by more than a tenth of dense's (90 % intervals over three or more seeds). What would change
our mind about 'pruning and fewer steps add up': a sampler with few steps where the ticket is shown
to be worse by more than that; about 'fewer steps save seconds better than cutting channels': a
channel ticket, slower than the fastest setting of dense, on the front of seconds (means, no test).
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.samplers")

import time

import numpy as np
import torch

from ddpm import NOISE, denoiser, to_uint8
from studies.common import Study, add_run_flag, check_rounds, open_run, over_seeds, rounded
from support import charts, cli
from support.words import counted

STEPS = dict(ddpm=(10, 25, 50, 100), ddim=(5, 10, 20, 50), dpm=(5, 10, 20, 50), heun=(9, 19, 39))
STYLES = {  # line and marker of each sampler; colours tell networks apart
    "ddpm": dict(style="dotted", shape="circle"), "ddim": dict(style="solid", shape="square"),
    "dpm": dict(style="dashed", shape="diamond"), "heun": dict(style="points", shape="triangle")}
RHO = 7  # of EDM's noise levels, 2206.00364, section 3
MARGIN = 0.1  # of dense
SETTING = "round", "arm", "sampler", "evaluations"
COSTS = {"work": "GMACs per sample", "seconds": "s/1000"}
LABELS = {"work": "billions of live multiply-accumulates per sample (log)",
          "seconds": "seconds for 1,000 samples on this machine (log)"}
MEANS = "sparsity", *COSTS.values(), "fid_domain"
HEADER = ["seed", *SETTING, *MEANS, "front of work", "front of seconds"]
PAIRED = ["round", "sampler", "evaluations", "seeds", "dense", "ticket", "ticket - dense", "low",
          "high", "answer"]


def heun_levels(diffusion, evaluations):
    """t, descending: EDM's noise levels (2206.00364, eq. 5) for 2 n - 1 evaluations, rounded
    to steps of the chain; sigma = sqrt((1 - abar) / abar)."""
    sigmas, n = sigmas_of(diffusion), (evaluations + 1) // 2
    ends = sigmas[[-1, 0]] ** (1 / RHO)
    wanted = (ends[0] + torch.linspace(0, 1, n, dtype=ends.dtype) * (ends[1] - ends[0])) ** RHO
    return [int((sigmas - one).abs().argmin()) for one in wanted]


def sigmas_of(diffusion):
    """sigma of each t, float64 (T,), ascending."""
    return ((1 - diffusion.alphas_bar) / diffusion.alphas_bar).sqrt()


@torch.no_grad()
def heun(model, diffusion, x_T, evaluations):
    """Images from x_T: second-order steps on x / sqrt(abar) = x0 + sigma eps, whose change with
    sigma is eps. model: any callable (x, t)."""
    levels, sigmas = heun_levels(diffusion, evaluations), sigmas_of(diffusion).tolist()
    scales = diffusion.alphas_bar.sqrt().tolist()

    def slope(y, t):
        return diffusion.predict(model, scales[t] * y, torch.full((len(y),), t, device=y.device))
    y = x_T / scales[levels[0]]
    for t, after in zip(levels, [*levels[1:], None]):
        first, h = slope(y, t), (0 if after is None else sigmas[after]) - sigmas[t]
        if after is None:  # to sigma = 0, where no slope is defined: Euler
            return y + h * first
        y = y + h / 2 * (first + slope(y + h * first, after))


def draw_samples(exp, model, seed, n, sampler, steps, label):
    """uint8 (n, C, H, W); as the run draws them, or by heun."""
    if sampler != "heun":
        return exp.draw(model, seed, n, sampler=sampler, steps=steps, label=label)
    predict, x_T = denoiser(model, exp.args.precision), exp.x_T(n, seed)
    parts = [heun(predict, exp.diffusion, part.to(exp.device), steps) for part in x_T.split(128)]
    return torch.cat([(exp.decode or to_uint8)(part).cpu() for part in parts])


def measure(exp, rows, jobs, n):
    """Rows of HEADER, as dicts, without the fronts: each job sampled in each way."""
    for job in jobs:
        model, row = exp.load(job).ema, rows[job]
        draw_samples(exp, model, job.seed, 4, "ddim", 50, "warm-up")  # the first is slow
        for sampler, steps in settings(exp.diffusion):
            began = time.monotonic()
            samples = draw_samples(exp, model, job.seed, n, sampler, steps,
                                   f"{job}: {sampler} {steps}")
            seconds = 1000 * (time.monotonic() - began) / n
            fid = exp.quality(samples)["fid_domain"]
            work = steps * row["macs_live"] / 1e9
            values = row["sparsity"], work, seconds, fid
            yield dict(zip(HEADER, [*job, sampler, steps, *values]))
        print(f"{job}: done", flush=True)


def settings(diffusion):
    """(sampler, evaluations) of STEPS that begin at noise with this noise schedule; Heun's only
    where no two levels are the same step of the chain."""
    for sampler, counts in STEPS.items():
        for steps in counts:
            start = (steps - 1) * (diffusion.T // steps)
            if sampler == "heun":
                levels = heun_levels(diffusion, steps)
                fits = len(set(levels)) == len(levels)
            else:
                fits = diffusion.alphas_bar[start] <= NOISE
            if fits:
                yield sampler, steps


def paired(table):
    """Rows of PAIRED: ticket against dense, sampler by sampler."""
    values = {(row["round"], row["arm"], row["sampler"], row["evaluations"], row["seed"]):
              row["fid_domain"] for row in table}
    for number, arm, sampler, steps in dict.fromkeys(key[:4] for key in values):
        if arm != "ticket":
            continue
        both = [(values[0, "dense", sampler, steps, seed], value) for (*key, seed), value in
                values.items() if key == [number, arm, sampler, steps]]
        dense, ticket = (float(np.mean(one)) for one in zip(*both))
        found = over_seeds([b - a for a, b in both])
        yield [number, sampler, steps, len(both), dense, ticket, *found, answer(found, dense)]


def answer(found, dense):
    """Which of the two is shown to be better by more than the margin."""
    _, low, high = found
    if low is None:
        return "no verdict"
    return ("ticket" if high < -MARGIN * dense else "dense" if low > MARGIN * dense
            else "not shown")


def setting_of(row):
    """What the seeds share."""
    return tuple(row[name] for name in SETTING)


def means_of(table):
    """{setting: row with the means over seeds}."""
    groups, means = {}, {}
    for row in table:
        groups.setdefault(setting_of(row), []).append(row)
    for setting, rows in groups.items():
        means[setting] = dict(rows[0])
        for name in MEANS:
            means[setting][name] = float(np.mean([row[name] for row in rows]))
    return means


def front(means, cost):
    """The settings on the Pareto front of fid_domain and a column of costs, cheapest first."""
    points = {setting: (row[cost], row["fid_domain"]) for setting, row in means.items()}

    def beaten(x, y):
        return any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())
    best = [setting for setting, point in points.items() if not beaten(*point)]
    return sorted(best, key=points.get)


def name_of(row):
    """The network and its sampler."""
    pruned = f" {100 * row['sparsity']:.1f} %" * (row["round"] > 0)
    return f"{row['arm']}{pruned}, {row['sampler']}"


def draw(means, cost, title, path, note):
    """fid_domain against a cost of COSTS: one line per network and sampler."""
    lines, networks = {}, cli.once((row["round"], row["arm"]) for row in means.values())
    for row in means.values():
        network = networks.index((row["round"], row["arm"])) % len(charts.PALETTE)
        new = dict(label=name_of(row), x=[], y=[], colour=charts.PALETTE[network],
                   **STYLES[row["sampler"]])
        line = lines.setdefault(name_of(row), new)
        line["x"].append(row[COSTS[cost]])
        line["y"].append(row["fid_domain"])
    charts.line_chart(lines.values(), path, title, LABELS[cost], "fid_domain (log)",
                      log_x=True, log_y=True, height=520, note=note)


def title_of(pairs):
    """What the pairs say, for the picture."""
    n, said = len(pairs), [row[-1] for row in pairs]
    if "no verdict" in said:
        return "Fewer sampling steps, or a sparser network?"
    return (f"With equal sampling a ticket is better in {said.count('ticket')} of {n} settings, "
            f"dense in {said.count('dense')}")


def title_of_front(means, pairs):
    """Whose the front of seconds is, for the picture."""
    best = front(means, COSTS["seconds"])
    if "no verdict" in [row[-1] for row in pairs]:
        return "Fewer sampling steps, or a faster network?"
    mine = sum(arm == "ticket" for _, arm, *_ in best)
    return f"Of {len(best)} settings that no other beats in seconds and FID, {mine} are tickets"


def mark_front(table, means, name):
    """Mark the rows on a front; return what it shows."""
    cost, shown = COSTS[name], []
    best = front(means, cost)
    for row in table:
        row[f"front of {name}"] = "yes" if setting_of(row) in best else ""
    for row in map(means.get, best):
        shown.append(f"{name_of(row)} {row['evaluations']} ({row[cost]:.3g}, "
                     f"{row['fid_domain']:.1f})")
    return f"Front of {name} ({cost}, fid_domain), cheapest first: {'; '.join(shown)}."


def main(argv=None):
    """The command line."""
    study = Study("studies.samplers", __doc__)
    add_run_flag(study)
    add = study.add_argument
    add("--rounds", nargs="+", type=cli.positive_int,
        help="rounds of the tickets (default: those with controls)")
    # Precision and recall, by 3 neighbours, need 4.
    add("--samples", default=500, type=cli.checked(int, lambda n: n >= 4, "4 or more"),
        help="samples per setting (default: 500)")
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run, methods=True, networks=True)
        rounds = args.rounds or exp.args.control_rounds
        check_rounds(rounds, rows)
        jobs = [job for job in rows
                if job.arm == "dense" or job.arm == "ticket" and job.round in rounds]
        table = list(measure(exp, rows, jobs, args.samples))
        means = means_of(table)
        said = [mark_front(table, means, name) for name in COSTS]
        cells = [list(row.values()) for row in table]
        path = f"{args.out}/samplers_{exp.args.dataset}"
        study.save(path, HEADER, cells, exp.device, n=args.samples, said=said)
        pairs = list(paired(table))
        study.save(path + "_paired", PAIRED, pairs, exp.device, n=args.samples)
        seeds = counted(len({job.seed for job in jobs}), "seed")
        note = (f"{exp.args.dataset}: means over {seeds}, FID "
                f"from {args.samples:,} samples from the same noise")
        pictures = {"work": (path + ".png", title_of(pairs)),
                    "seconds": (path + "_seconds.png", title_of_front(means, pairs))}
        for cost, (file, title) in pictures.items():
            draw(means, cost, title, file, note + ". Percentages: weights pruned.")
    print(f"\n{charts.text_table(PAIRED, rounded(pairs))}\n")
    print(*said, note, f"{path}.csv, _paired.csv, .json, .png, _seconds.png", sep="\n")


if __name__ == "__main__":
    main()
