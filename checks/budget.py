"""What does a second of training buy? The dense network's quality against seconds, in two settings.

    python -m studies.budget --data-dir data                  # MNIST: 40 minutes on two cores
    python -m studies.budget --dataset digits --steps 140 280 560

Each point is a training of its own, since the rate decays to 0 at its end: --steps of --batch in the setting
`plain` (batches of 64 at 2e-3, Adam's usual 0.999), and as many images in smaller and bolder steps in `tuned`
(batches of 32 at 4e-3, 0.95; the EMA forgets as fast per step, so twice as fast per image). Each network is
then drawn from with DDIM and with the ancestral sampler, in as many evaluations. Seconds are of training
alone: steps times the median seconds of a step, both settings timed in turns beforehand, so that a slow
minute of the machine bends no curve.

What would change our mind about a setting: a curve that lies below it at every number of seconds.
"""
import os

import numpy as np

import lth_diffusion as lth
import metrics
from ddpm import DATASETS, positive_int, seed_number, train

SETTINGS = {"plain": dict(batch=64, lr=2e-3, beta2=0.999), "tuned": dict(batch=32, lr=4e-3, beta2=0.95)}
TURNS, STEPS = 9, 20  # of timing
SAMPLERS = {"ddim": "DDIM", "ddpm": "ancestral"}
HEADER = ["setting", "seed", "steps", "batch", "seconds", "val_loss", *(f"fid_domain, {s}" for s in
                                                                        SAMPLERS.values())]


def seconds_a_step(exp):
    """{setting: median seconds of a training step}, of TURNS turns of STEPS steps each."""
    models = {name: exp.new_model(0) for name in SETTINGS}
    works = [lambda name=name: train(models[name], exp.diffusion, exp.images, **exp.options(
        lth.Job(0, 0, "dense"), steps=STEPS, label="timing") | SETTINGS[name]) for name in SETTINGS]
    seconds = np.median(metrics.seconds_in_turns(works, TURNS, device=exp.device), axis=0)
    return dict(zip(SETTINGS, seconds / STEPS))


def point(exp, name, steps, seed, seconds):
    """One row of HEADER: `steps` steps of 64 images in this setting, from step 0; seconds: of one step."""
    setting = SETTINGS[name]
    steps = steps * 64 // setting["batch"]
    model = exp.new_model(seed)
    options = exp.options(lth.Job(seed, 0, "dense"), steps=steps, warmup=max(1, steps // 20),
                          label=f"{name}, {steps} steps") | setting
    ema, _ = train(model, exp.diffusion, exp.images, **options)
    fids = [exp.quality(exp.draw(ema.model, sampler=sampler))["fid_domain"] for sampler in SAMPLERS]
    return [name, seed, steps, setting["batch"], steps * seconds, exp.val_loss(ema.model), *fids]


def means(table, name, column):
    """(seconds, values, deviations) of a setting's curve, means over seeds."""
    found = {}
    for row in table:
        if row[0] == name:
            found.setdefault(row[2], []).append((row[4], row[column]))
    seconds, values = np.array([np.mean(v, axis=0) for v in found.values()]).T
    return seconds, values, [np.std([y for _, y in v], ddof=1) if len(v) > 1 else np.nan
                             for v in found.values()]


def draw(table, path, note):
    """fid_domain against seconds of training, a line a setting and sampler."""
    series = []
    for name in dict.fromkeys(row[0] for row in table):
        for column, sampler in enumerate(SAMPLERS.values(), 6):
            x, y, spread = means(table, name, column)
            series.append(dict(label=f"{name}, {sampler}", x=x, y=y, y_low=y - spread, y_high=y + spread,
                               style="solid" if name == "tuned" else "dashed"))
    lth.line_chart(series, path, "What a second of training buys", "seconds of training (log)",
                   "fid_domain (log)", log_x=True, log_y=True, note=note)


def conclude(table):
    """For every point of the tuned curve: after how many seconds the plain one is as good, if ever."""
    said = []
    for column, sampler in enumerate(SAMPLERS.values(), 6):
        (x, y, _), (slow, worse, _) = means(table, "tuned", column), means(table, "plain", column)
        for seconds, value in zip(x, y):
            there = np.flatnonzero(worse <= value)  # in order of seconds; 0: from its first point on
            way = f"not within {slow[-1]:.0f} s" if not len(there) else (
                f"between {slow[there[0] - 1] if there[0] else 0:.0f} and {slow[there[0]]:.0f} s")
            said.append(f"{sampler}: tuned has {value:.2f} after {seconds:.0f} s, plain {way}")
    return "; ".join(said) + f". n={len({row[1] for row in table})} seed(s)."


def main(argv=None):
    """The command line."""
    study = lth.Study("budget", __doc__)
    add = study.add_argument
    add("--dataset", choices=list(DATASETS), default="mnist", help="default: mnist")
    add("--steps", nargs="+", type=positive_int, default=[375, 750, 1500, 3000],
        help="steps of 64 images, a training each (default: 375 750 1500 3000)")
    add("--seeds", nargs="+", type=seed_number, default=[0], help="default: 0")
    with study.arguments(argv, ("--batch", "--lr", "--beta2", "--sampler")) as args:
        exp = lth.Experiment(lth.parse_args(["--dataset", args.dataset, *args.rest])[0])
        args.steps, args.seeds = sorted(set(args.steps)), list(dict.fromkeys(args.seeds))
        table, path = [], os.path.join(args.out, f"budget_{args.dataset}")
        seconds = seconds_a_step(exp)
        for seed in args.seeds:
            for steps in args.steps:
                table += [point(exp, name, steps, seed, seconds[name]) for name in SETTINGS]
                study.save(path, HEADER, table, exp.device, n=exp.args.samples, precision=exp.precision,
                           seconds_a_step=seconds)
                print(f"seed {seed}, {steps} steps of 64: " + ", ".join(
                    f"{row[0]} {row[4]:.0f} s {row[6]:.2f} {row[7]:.2f}" for row in table[-2:]), flush=True)
        draw(table, path + ".png", f"{args.dataset}, U-Net {exp.args.preset}, {exp.args.nfe} evaluations a "
             f"sample, n={exp.args.samples:,} samples a figure, seeds {args.seeds}.")
    print(f"\n{lth.text_table(HEADER, table)}\n\n{conclude(table)}\n{path}.csv, .json, .png")


if __name__ == "__main__":
    main()
