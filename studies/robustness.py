"""Are tickets more fragile than dense networks when their input differs from the training data?

    python -m studies.robustness                        # a small run on digits first: minutes
    python -m studies.robustness --from runs/mnist --rounds 7 10

The input of every network of a finished run is disturbed in three ways:

noise   Fresh Gaussian noise is added to x_t. Measured: the mean squared error on eps over held-out
        images.
attack  A change of x_t, at most b per pixel, that makes this error large. FGSM (Goodfellow, Shlens
        and Szegedy, Explaining and Harnessing Adversarial Examples, 2014, 1412.6572) is one step
        along the sign of the gradient. PGD (Madry et al., Towards Deep Learning Models Resistant to
        Adversarial Attacks, 2017, 1706.06083) is here ten steps of b / 4 from the result of FGSM,
        of which the worst is kept: it is never weaker than FGSM.
start   Sampling begins at a * x_T + m instead of x_T. Measured: fid_domain.

All networks meet the same images, t, noise and budgets. A worse network has less to lose, so each
value is also divided by the same network's value without disturbance ('factor').

What would change our mind about 'pruning does not make diffusion models more fragile': a ticket
whose factor is larger than that of dense in every seed, while those of its controls are not.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.robustness")

import functools

import numpy as np
import torch

import lth_diffusion as lth
import metrics
from ddpm import to_float
from studies.common import Study, add_run_flag, check_rounds, open_run
from support import charts, cli
from support.words import counted

NOISE = (0.0, 0.1, 0.2, 0.4)  # standard deviations; pixels of x_t have about unit variance
BUDGETS = (0.0, 0.02, 0.05, 0.1)
STARTS = ((1.0, 0.0), (0.9, 0.0), (1.1, 0.0), (1.0, 0.1), (1.0, -0.1))  # (a, m)
TIMES = (50, 150, 300, 500, 800)  # from almost an image to almost noise
NOISE_SEED = 7  # of the noise that is added
HEADER = ["seed", "round", "arm", "sparsity", "trouble", "size", "value", "factor", "n"]


def held_out(exp, n):
    """(x_t, t, eps) of n test images, each at one t of TIMES, with fixed noise."""
    x0 = to_float(metrics.random_draw(exp.test, n))
    t = torch.tensor(TIMES)[torch.arange(len(x0)) % len(TIMES)]
    generator = torch.Generator().manual_seed(lth.EVAL_SEED)
    eps = torch.randn(x0.shape, generator=generator)
    x_t = exp.diffusion.q_sample(x0, t, eps)
    return tuple(v.to(exp.device) for v in (x_t, t, eps))


def error(predict, x, t, eps):
    """Mean squared error on eps of each image, (N,); predict(x, t) -> eps."""
    return (predict(x, t) - eps).square().flatten(1).mean(1)


def ascend(predict, x, t, eps, step):
    """(x moved by `step` along the sign of the gradient of its error, its error before)."""
    moved = x.clone().requires_grad_()
    found = error(predict, moved, t, eps)
    gradient, = torch.autograd.grad(found.sum(), moved)
    return x + step * gradient.sign(), found.detach()


def fgsm(predict, x, t, eps, budget):
    """One step of the whole budget."""
    return ascend(predict, x, t, eps, budget)[0]


def pgd(predict, x, t, eps, budget, steps=10):
    """The worst x within the budget that ascent from the result of FGSM finds, per image."""
    now = best = fgsm(predict, x, t, eps, budget)
    worst = torch.full_like(x[:, 0, 0, 0], -torch.inf)  # (N,), the error of best
    for _ in range(steps + 1):
        moved, found = ascend(predict, now, t, eps, budget / 4)
        more = (found > worst)[:, None, None, None]
        best = torch.where(more, now, best)
        worst = torch.maximum(worst, found)
        now = x + (moved - x).clamp(-budget, budget)
    return best


def mean_error(predict, batch, attack=None, budget=0.0):
    """Mean squared error on eps over a batch (x_t, t, eps), attacked or not, 100 at a time."""
    errors = []
    for x, t, eps in zip(*(v.split(100) for v in batch)):
        if attack is not None:
            x = attack(predict, x, t, eps, budget)
        with torch.no_grad():
            errors.append(error(predict, x, t, eps))
    return torch.cat(errors).mean().item()


def measure(exp, model, seed, images, samples):
    """(trouble, size, value, n) of a network; the first of each trouble is without disturbance."""
    model.eval().requires_grad_(False)
    # in float32: the gradients of bfloat16 would make a weaker attack
    predict = functools.partial(exp.diffusion.predict, model)
    x, t, eps = batch = held_out(exp, images)
    generator = torch.Generator().manual_seed(NOISE_SEED)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    for size in NOISE:
        moved = x + size * noise, t, eps
        yield "noise", size, mean_error(predict, moved), len(x)
    for name, attack in ("FGSM", fgsm), ("PGD", pgd):
        for budget in BUDGETS:
            yield name, budget, mean_error(predict, batch, attack, budget), len(x)
    for a, m in STARTS:
        drawn = exp.draw(model, seed, x_T=a * exp.x_T(samples, seed) + m)
        yield "start", f"{a:g} x_T {m:+g}", exp.quality(drawn)["fid_domain"], samples


def rows_of(exp, job, args):
    """Rows of HEADER, as dicts, of one network."""
    trained, clean = exp.load(job), {}
    for trouble, size, value, n in measure(exp, trained.ema, job.seed, args.images,
                                         args.samples):
        factor = value / clean.setdefault(trouble, value)
        row = *job, trained.row["sparsity"], trouble, size, value, factor, n
        yield dict(zip(HEADER, row))


def factors(table):
    """{arm and sparsity: {seed: factors under PGD, one per budget}}."""
    found = {}
    for row in table:
        if row["trouble"] == "PGD":
            label = f"{row['arm']} {100 * row['sparsity']:.1f} %"
            by_seed = found.setdefault(label, {})
            by_seed.setdefault(row["seed"], []).append(row["factor"])
    return found


def draw(table, path, note):
    """The factor by which the error grows under PGD, against the budget; means over seeds."""
    series = []
    for label, by_seed in factors(table).items():
        y = np.mean(list(by_seed.values()), axis=0)
        control = not label.startswith(("dense", "ticket"))
        style = "dashed" if control else "solid"
        series.append(dict(label=label, x=BUDGETS, y=y, style=style))
    charts.line_chart(series, path, "How much an attack on x_t hurts",
                      "largest change of a pixel of x_t",
                      "error on eps over that without attack (log)",
                      log_y=True, note=note)


def conclude(table):
    """How much the strongest attack hurts, and in how many seeds more than it hurts dense."""
    said, found = [], factors(table)
    dense = found["dense 0.0 %"]
    for label, by_seed in found.items():
        mean = np.mean([values[-1] for values in by_seed.values()])
        more = sum(values[-1] > dense[seed][-1] for seed, values in by_seed.items())
        than = "" if by_seed is dense else f" (larger than dense in {more} of {len(by_seed)} seeds)"
        said.append(f"{label} {mean:.2f}{than}")
    few = "; fewer than 3: no verdict" if len(dense) < 3 else ""
    return (f"Factors by which the error on eps grows under PGD with budget {BUDGETS[-1]}: "
            f"{', '.join(said)}. Seeds: {len(dense)}{few}.")


def main(argv=None):
    """The command line."""
    study = Study("studies.robustness", __doc__)
    add_run_flag(study)
    add = study.add_argument
    add("--rounds", nargs="+", type=int,
        help="rounds to compare with dense (default: those with controls)")
    add("--images", type=cli.positive_int, default=500,
        help="held-out images behind an error (default: 500)")
    add("--samples", type=cli.checked(int, lambda n: n >= 4, "4 or more"), default=250,
        help="samples behind a fid_domain (default: 250)")
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run)
        rounds = {0, *(args.rounds or exp.args.control_rounds)}
        check_rounds(rounds, rows)
        path, table = f"{args.out}/robustness_{exp.args.dataset}", []
        for job in rows:
            if job.round in rounds:
                table += rows_of(exp, job, args)
                cells = [list(row.values()) for row in table]
                study.save(path, HEADER, cells, exp.device, times=TIMES)
                print(f"{job}: done", flush=True)
        times, seeds = ", ".join(map(str, TIMES)), len({row["seed"] for row in table})
        draw(table, path + ".png",
             f"{exp.args.dataset}, PGD, {table[0]['n']:,} held-out images at t = {times}; "
             f"means over {counted(seeds, 'seed')}. Percentages: weights pruned.")
    print(f"\n{charts.text_table(HEADER, cells)}\n\n{conclude(table)}\n{path}.csv, .json, .png")


if __name__ == "__main__":
    main()
