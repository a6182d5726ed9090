"""Are tickets weaker or stronger than dense networks when their input is not what they were trained on?

    python -m studies.robustness                        # makes a small run on digits first: minutes
    python -m studies.robustness --from runs/mnist      # the networks of a finished run

Three kinds of trouble, each for the dense network, its twin, tickets and controls of a finished run:

noise     x_t + s * n with fresh Gaussian n: the mean squared error on eps over held-out images.
attack    an L-infinity budget b on x_t that makes this error as large as it can: FGSM (1412.6572), one signed
          gradient step, and PGD (1706.06083), ten steps of b / 4 that begin at FGSM's answer and keep the
          best found, so that PGD is never the weaker one. Budget 0 is the clean error.
start     sampling from a * x_T + m instead of x_T: fid_domain.

Every network meets the same images, t, noise and budgets. What would change our mind about 'pruning makes
diffusion models more fragile': a ticket whose error grows by a larger factor than dense in every seed, while
the controls of its density do not. Factors over each network's own clean error are shown beside the errors,
since a worse network has less to lose.
"""
import functools
import os

import numpy as np
import torch

import lth_diffusion as lth
import metrics
from ddpm import denoiser, positive_int, to_float

NOISE = (0.0, 0.1, 0.2, 0.4)  # s, in units of x_t, whose pixels have about unit variance
BUDGETS = (0.0, 0.02, 0.05, 0.1)
STARTS = ((1.0, 0.0), (0.9, 0.0), (1.1, 0.0), (1.0, 0.1), (1.0, -0.1))  # (a, m)
TIMES = (50, 150, 300, 500, 800)  # where the input is still an image, and where it is nearly noise
HEADER = ["seed", "round", "arm", "sparsity", "trouble", "size", "error", "over its clean", "n"]


def held_out(exp, n):
    """(x_t, t, eps) of n test images, each at a fixed t of TIMES and with fixed noise."""
    generator = torch.Generator().manual_seed(lth.EVAL_SEED)
    x0 = to_float(metrics.random_draw(exp.test, n))
    t = torch.tensor(TIMES)[torch.arange(len(x0)) % len(TIMES)] * (exp.diffusion.T // 1000)
    eps = torch.randn(x0.shape, generator=generator)
    return tuple(v.to(exp.device) for v in (exp.diffusion.q_sample(x0, t, eps).float(), t, eps))


def error(predict, x, t, eps):
    """Mean squared error on eps of every image, (N,); predict is a callable (x, t) -> eps."""
    return (predict(x, t) - eps).square().flatten(1).mean(1)


def ascend(predict, x, t, eps, step):
    """(x moved by step along the sign of its error's gradient, its error before)."""
    moved = x.clone().requires_grad_()
    found = error(predict, moved, t, eps)
    gradient, = torch.autograd.grad(found.sum(), moved)
    return x + step * gradient.sign(), found.detach()


def fgsm(predict, x, t, eps, budget):
    """One step of the whole budget."""
    return ascend(predict, x, t, eps, budget)[0]


def pgd(predict, x, t, eps, budget, steps=10):
    """The worst x within the budget that ascent from FGSM's answer finds, image by image."""
    now, worst = fgsm(predict, x, t, eps, budget), torch.full_like(t, -torch.inf, dtype=torch.float32)
    best = now
    for _ in range(steps):
        moved, found = ascend(predict, now, t, eps, budget / 4)
        best = torch.where((found > worst)[:, None, None, None], now, best)
        worst, now = torch.maximum(worst, found), x + (moved - x).clamp(-budget, budget)
    last = error(predict, now, t, eps).detach() > worst
    return torch.where(last[:, None, None, None], now, best)


def attacked(attack, predict, batch, budget):
    """Mean error under an attack, in batches of 100, in float32: gradients through bf16 would be weaker."""
    errors = []
    for x, t, eps in zip(*(v.split(100) for v in batch)):
        errors.append(error(predict, attack(predict, x, t, eps, budget), t, eps).detach())
    return torch.cat(errors).mean().item()


def measure(exp, job, args):
    """Pairs (trouble, size, value) of one network."""
    model, _ = exp.rebuild(exp.load(job), "ema")
    model.eval().requires_grad_(False)
    predict = functools.partial(exp.diffusion.predict, model)
    x, t, eps = batch = held_out(exp, args.images)
    for size in NOISE:
        more = torch.randn(x.shape, generator=torch.Generator().manual_seed(7)).to(x.device)
        quiet = functools.partial(exp.diffusion.predict, denoiser(model, "fp32"))
        yield "noise", size, torch.cat([error(quiet, *part) for part in zip(
            (x + size * more).split(250), t.split(250), eps.split(250))]).mean().item()
    for name, attack in (("FGSM", fgsm), ("PGD", pgd)):
        for budget in BUDGETS:
            yield name, budget, attacked(attack, predict, batch, budget)
    for scale, shift in STARTS:
        samples = exp.draw(model, x_T=scale * exp.x_T(args.samples) + shift, label=f"{job}: x_T")
        yield "start", f"{scale:g} x_T {shift:+g}", exp.quality(samples)["fid_domain"]


def check(values):
    """The attacks are attacks: no budget changes nothing, PGD is at least as strong as FGSM."""
    clean = values["noise", 0.0]
    for budget in BUDGETS:
        weak, strong = values["FGSM", budget], values["PGD", budget]
        if strong < weak * (1 - 1e-6) or budget == 0 and abs(weak - clean) > 1e-4 * clean:
            raise AssertionError(f"budget {budget}: clean {clean}, FGSM {weak}, PGD {strong}")


def lines(exp, rows, args):
    """Lists of rows of HEADER, one for each network asked for."""
    rounds = args.rounds or sorted({0, *exp.args.control_rounds})
    jobs = [job for job in rows if job.round in rounds and job.arm not in ("transform", "probe")]
    lth.check_rounds(rounds, rows)
    images = min(args.images, len(exp.test))
    for job in jobs:
        values = {(trouble, size): value for trouble, size, value in measure(exp, job, args)}
        check(values)
        first = {trouble: value for (trouble, _), value in reversed(values.items())}  # each one's clean
        yield [[job.seed, job.round, job.arm, rows[job]["sparsity"], trouble, size, value,
                value / first[trouble], args.samples if trouble == "start" else images]
               for (trouble, size), value in values.items()]
        print(f"{job}: clean {values['noise', 0.0]:.4f}, PGD at {BUDGETS[-1]} "
              f"{values['PGD', BUDGETS[-1]]:.4f}", flush=True)


def factors(table):
    """{arm and sparsity: {(trouble, size): {seed: factor over the network's own clean value}}}."""
    found = {}
    for seed, _, arm, sparsity, trouble, size, _, factor, _ in table:
        label = f"{arm} {100 * sparsity:.1f} %"
        found.setdefault(label, {}).setdefault((trouble, size), {})[seed] = factor
    return found


def draw(table, path, note):
    """The error under PGD over each network's own clean error, against the budget."""
    series = [dict(label=label, x=BUDGETS,
                   y=[np.mean(list(values["PGD", budget].values())) for budget in BUDGETS],
                   style="solid" if label.startswith(("dense", "rewind")) else "dashed")
              for label, values in factors(table).items()]
    lth.line_chart(series, path, "How much an attack on x_t hurts", "L-infinity budget on x_t",
                   "error on eps over the clean one (log)", log_y=True, note=note)


def conclude(table):
    """How much the strongest attack hurts each network, and in how many seeds more than it hurts dense."""
    found = {label: values["PGD", BUDGETS[-1]] for label, values in factors(table).items()}
    dense, parts = found.pop("dense 0.0 %", {}), []
    for label, by_seed in found.items():
        more = sum(factor > dense[seed] for seed, factor in by_seed.items() if seed in dense)
        parts.append(f"{label} {np.mean(list(by_seed.values())):.2f} (more than dense in {more} of "
                     f"{len(by_seed)} seeds)")
    seeds = len({line[0] for line in table})
    return (f"Under PGD with budget {BUDGETS[-1]} the error on eps grows by these factors: dense "
            f"{np.mean(list(dense.values())) if dense else np.nan:.2f}, {', '.join(parts)}. n={seeds} "
            f"seed{'s' * (seeds > 1)}" + ("; fewer than 3: no verdict." if seeds < 3 else "."))


def main(argv=None):
    """The command line."""
    study = lth.Study("robustness", __doc__)
    add = study.add_argument
    add("--from", dest="run", metavar="runs/NAME", help="a finished run (default: a small one on digits)")
    add("--rounds", nargs="+", type=int, help="which rounds (default: 0 and those with controls)")
    add("--images", type=positive_int, default=500, help="held-out images behind an error (default: 500)")
    add("--samples", type=positive_int, default=250, help="samples behind a fid_domain (default: 250)")
    with study.arguments(argv) as args:
        exp, rows = lth.open_run(args.run)
        table, path = [], os.path.join(args.out, f"robustness_{exp.args.dataset}")
        for found in lines(exp, rows, args):
            table += found
            study.save(path, HEADER, table, exp.device, times=TIMES)
        draw(table, path + ".png", f"{exp.args.dataset}, {args.images} held-out images at t of {TIMES}. "
             f"Percentages: weights pruned. Seeds: {len({line[0] for line in table})}.")
    print(f"\n{lth.text_table(HEADER, table)}\n\n{conclude(table)}\n{path}.csv, .json, .png")


if __name__ == "__main__":
    main()
