"""Are tickets more fragile than dense networks when their input differs from the training data?

    python -m studies.robustness                        # a small run on digits first: minutes
    python -m studies.robustness --from results/replication/v --rounds 5   # MNIST, no training

The input of every network of a finished run is disturbed:

noise   Fresh Gaussian noise is added to x_t. Measured: the mean squared error on eps over held-out
        images.
FGSM    A change of x_t, at most b per pixel, that makes this error large: one step along the sign
        of the gradient (Goodfellow, Shlens and Szegedy, Explaining and Harnessing Adversarial
        Examples, 2014, 1412.6572).
PGD     Ten steps of b / 4 from the result of FGSM, of which the worst is kept (Madry et al.,
        Towards Deep Learning Models Resistant to Adversarial Attacks, 2017, 1706.06083).
start   Sampling begins at a * x_T + m instead of x_T. Measured: fid_domain.
sampler PGD through the whole sampler (DDIM): a change of x_T, at most b per value, that changes
        the image most. Measured: the change of the image, whose pixels lie in [-1, 1], root mean
        square, beside that of a random x_T as far away (chance); how many images change their
        class (flips). Pixels that are clipped have no gradient: a stronger attack may exist.

All networks meet the same images, t, noise and budgets. Figures are absolute: a ratio to its own
clean error makes the worst network look most robust. Margin, fixed before the run: a ticket is
more fragile where its value is shown to exceed that of dense by more than a tenth, as robust where
it is shown not to (90 % intervals over three or more seeds). A network with a smaller error to
begin with may keep it under attack for that reason alone: 'beyond clean' is the value less the one
that a straight line through dense, reinit and random mask of the seed gives for its clean error.

What would change our mind about what is printed: an attack not tried here.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.robustness")

import functools

import numpy as np
import torch

import lth_diffusion as lth
import metrics
from ddpm import ddim_step, sampling_times, to_float, to_uint8
from studies.common import Study, add_run_flag, check_rounds, open_run, over_seeds, rounded
from support import charts, cli, report
from support.words import ARMS, counted

NOISE = (0.0, 0.1, 0.2, 0.4)  # standard deviations; pixels of x_t have about unit variance
BUDGETS = (0.0, 0.02, 0.05, 0.1)
STARTS = ((1.0, 0.0), (0.9, 0.0), (1.1, 0.0), (1.0, 0.1), (1.0, -0.1))  # (a, m)
TIMES = (50, 150, 300, 500, 800)  # from almost an image to almost noise
NOISE_SEED = 7  # of the noise that is added
NFE = 10  # network evaluations of the sampler that is attacked
ASCENT = 10  # steps of PGD
MARGIN = 0.1  # of dense
CLEAN = dict(noise="0", FGSM="0", PGD="0", start="1 x_T +0")  # size of no disturbance, by trouble
HEADER = ["seed", "round", "arm", "sparsity", "trouble", "size", "value", "n"]
SUMMARY = ["round", "trouble", "size", "seeds", "dense", "ticket", "reinit", "random",
           "ticket - 1.1 dense", "low", "high", "answer", "beyond clean", "lowest", "highest"]


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


def pgd(predict, x, t, eps, budget, steps=ASCENT):
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


def images_of(diffusion, predict, x):
    """Images (N, C, H, W) in [-1, 1] from x_T by DDIM; gradients flow through all evaluations."""
    times, abar = sampling_times(diffusion, NFE), diffusion.alphas_bar.tolist()
    for t, after in zip(times, [*times[1:], None]):
        eps = predict(x, torch.full((len(x),), t, device=x.device))
        x = ddim_step(x, eps, abar[t], 1.0 if after is None else abar[after], clip=True)
    return x


def through_sampler(draw, x_T, budget, sign):
    """(image, attacked image, image of the change b * sign) of each x_T; draw(x_T) -> images."""
    with torch.no_grad():
        clean, chance = draw(x_T), draw(x_T + budget * sign)
    now = x_T + budget * sign  # without a change the gradient is 0
    worst, best = torch.zeros_like(x_T[:, 0, 0, 0]), clean
    for _ in range(ASCENT + 1):
        moved = now.clone().requires_grad_()
        out = draw(moved)
        found = (out - clean).square().flatten(1).mean(1)  # (N,)
        gradient, = torch.autograd.grad(found.sum(), moved)
        more = (found > worst)[:, None, None, None]
        best, worst = torch.where(more, out, best).detach(), torch.maximum(worst, found).detach()
        now = x_T + (now + budget / 4 * gradient.sign() - x_T).clamp(-budget, budget)
    return clean, best, chance


def attack_sampler(exp, predict, seed, n):
    """(trouble, size, value, n) of attacks through the sampler on n x_T."""
    x_T = exp.x_T(n, seed).to(exp.device)
    generator = torch.Generator().manual_seed(NOISE_SEED)
    sign = torch.randn(x_T.shape, generator=generator).sign().to(exp.device)
    draw = functools.partial(images_of, exp.diffusion, predict)
    for budget in BUDGETS[1:]:
        parts = [through_sampler(draw, *part) for part in
                 zip(x_T.split(32), [budget] * n, sign.split(32))]
        clean, *changed = (torch.cat(images) for images in zip(*parts))
        classes = [metrics.features(exp.classifier, to_uint8(images).cpu(), logits=True)[1]
                   .argmax(1) for images in (clean, changed[0])]
        rms = [(images - clean).square().flatten(1).mean(1).sqrt().mean().item()
               for images in changed]
        flips = (classes[0] != classes[1]).double().mean().item()
        for trouble, value in zip(("sampler", "chance", "flips"), (*rms, flips)):
            yield trouble, f"{budget:g}", value, n


def measure(exp, model, seed, args):
    """(trouble, size, value, n) of a network."""
    model.eval().requires_grad_(False)
    # in float32: the gradients of bfloat16 would make a weaker attack
    predict = functools.partial(exp.diffusion.predict, model)
    x, t, eps = batch = held_out(exp, args.images)
    generator = torch.Generator().manual_seed(NOISE_SEED)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    for size in NOISE:
        yield "noise", f"{size:g}", mean_error(predict, (x + size * noise, t, eps)), len(x)
    for name, attack in ("FGSM", fgsm), ("PGD", pgd):
        for budget in BUDGETS:
            found = mean_error(predict, batch, attack if budget else None, budget)
            yield name, f"{budget:g}", found, len(x)
    for a, m in STARTS:
        drawn = exp.draw(model, seed, x_T=a * exp.x_T(args.samples, seed) + m)
        yield "start", f"{a:g} x_T {m:+g}", exp.quality(drawn)["fid_domain"], args.samples
    yield from attack_sampler(exp, predict, seed, args.attacked)


# --------------------------------------------------------------------------- over seeds

def values_of(table, number, trouble, size):
    """{arm: {seed: value}} of a round, dense included."""
    found = {}
    for row in table:
        if (row["trouble"], row["size"]) == (trouble, size) and row["round"] in (0, number):
            found.setdefault(row["arm"], {})[row["seed"]] = row["value"]
    return found


def summarise(table):
    """Rows of SUMMARY: every trouble and size of every round that has a ticket."""
    kinds = dict.fromkeys((row["trouble"], row["size"]) for row in table)
    for number in sorted({row["round"] for row in table} - {0}):
        for trouble, size in kinds:
            arms = values_of(table, number, trouble, size)
            seeds = sorted(set(arms["dense"]) & set(arms.get("ticket", ())))
            if not seeds:
                continue
            means = [np.mean([arms[arm][seed] for seed in seeds])
                     if set(seeds) <= set(arms.get(arm, ())) else None
                     for arm in ("dense", "ticket", "reinit", "random")]
            more = over_seeds([arms["ticket"][seed] - (1 + MARGIN) * arms["dense"][seed]
                               for seed in seeds])
            clean = values_of(table, number, trouble, CLEAN.get(trouble))
            beyond = [beyond_clean(arms, clean, seed) for seed in seeds]
            beyond = (None,) * 3 if None in beyond else over_seeds(beyond)
            yield [number, trouble, size, len(seeds), *means, *more, answer(more), *beyond]


def answer(difference):
    """What the interval of ticket - 1.1 dense says."""
    _, low, high = difference
    if low is None:
        return "no verdict"
    return "more fragile" if low > 0 else "as robust" if high < 0 else "not shown"


def beyond_clean(arms, clean, seed):
    """The ticket's value less what a line through the other arms gives for its clean value; None
    without three arms, or where nothing is disturbed."""
    others = [arm for arm in ("dense", "reinit", "random") if seed in arms.get(arm, ())]
    if len(others) < 3 or not clean or arms == clean:
        return None
    x, y = ([values[arm][seed] for arm in others] for values in (clean, arms))
    slope, start = np.polyfit(x, y, 1)
    return arms["ticket"][seed] - (slope * clean["ticket"][seed] + start)


def last_round(table):
    """The last round that has controls, if one has; this one is drawn."""
    return max((row["round"] for row in table if row["arm"] in ("reinit", "random")),
               default=max(row["round"] for row in table))


def draw(table, path, note):
    """The error under PGD against the budget: a line for each arm, dots for seeds."""
    series, last = [], last_round(table)
    for arm in ARMS:
        found = [list(values_of(table, last, "PGD", f"{b:g}").get(arm, {}).values())
                 for b in BUDGETS]
        if not all(found):
            continue
        series.append(dict(label=ARMS[arm], x=BUDGETS, y=[np.mean(one) for one in found],
                           dots=found, style="solid", **report.look_of(arm)))
    said = {row[1]: row for row in summarise(table) if row[0] == last and row[1] == "PGD"}["PGD"]
    title = {"as robust": "Strongest attack: a ticket's error is at most 10 % above dense",
             "more fragile": "Strongest attack: a ticket's error is over 10 % above dense"}.get(
                 said[11], "Strongest attack: neither 'more fragile' nor 'as robust' is shown")
    charts.line_chart(series, path, title, "largest change of a pixel of x_t",
                      "mean squared error on eps", note=note)


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
    add("--attacked", type=cli.positive_int, default=64,
        help="samples that are attacked through the sampler (default: 64)")
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run, networks=True)
        rounds = {0, *(args.rounds or exp.args.control_rounds)}
        check_rounds(rounds, rows)
        try:
            sampling_times(exp.diffusion, NFE)
        except ValueError as error:
            cli.refuse("from", f"{exp.args.out}, through the sampler: {error}")
        path, table = f"{args.out}/robustness_{exp.args.dataset}", []
        for job in [job for job in rows if job.round in rounds]:
            trained = exp.load(job)
            table += [dict(zip(HEADER, (*job, trained.row["sparsity"], *found)))
                      for found in measure(exp, trained.ema, job.seed, args)]
            study.save(path, HEADER, [list(row.values()) for row in table], exp.device, times=TIMES)
            print(f"{job}: done", flush=True)
        summary = list(summarise(table))
        study.save(path + "_summary", SUMMARY, summary, exp.device, times=TIMES)
        seeds, last = len({row["seed"] for row in table}), last_round(table)
        draw(table, path + ".png",
             f"{exp.args.dataset}, PGD on one step, {table[0]['n']:,} held-out images at t = "
             f"{', '.join(map(str, TIMES))}; {counted(seeds, 'seed')}; tickets and controls of "
             f"{100 * max(row['sparsity'] for row in table if row['round'] == last):.0f} % "
             "sparsity.")
    print(f"\n{charts.text_table(SUMMARY, rounded(summary))}\n"
          f"{path}.csv, _summary.csv, .json, .png")


if __name__ == "__main__":
    main()
