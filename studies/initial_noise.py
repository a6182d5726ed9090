"""Are there tickets in the initial noise, and do dense networks and tickets share them?

    python -m studies.initial_noise                       # makes a small run on digits first: minutes
    python -m studies.initial_noise --from runs/mnist
    python -m studies.initial_noise --from runs/mnist --full

Source: 2312.08872, whose winning tickets are no weights but small blocks of the initial noise that lean
towards a concept of the prompt, found through cross-attention. There is no text here: this is an analogue. A
concept is a digit, and what a block leans towards is what the domain classifier sees in the finished image.
DDIM without noise makes that a function of x_T alone.

agreement   the share of x_T from which two networks draw the same class, over what the frequencies of their
            classes give by chance: every arm with dense, and dense networks of different seeds.
transplant  a square block of the x_T of a donor, whose image is of class c with confidence above 0.9, is
            put at the same place of the x_T of recipients whose image is of another class. How many become c,
            against fresh noise in the same square? The whole of x_T must make all of them c.
search      of the donors' blocks of the smaller sizes take the quarter that does best, over fresh noise, on
            one half of the recipients ('chosen on'), and look at the other half ('tested on'). The first
            figure carries the winner's curse, the second is the answer.

Intervals are of 90 %, over x_T for the agreement, over donors for the rest; they say nothing of other
training runs. Donors are what one network draws confidently, not any x_T. Places are random.

What would change our mind about 'no patch of noise is a ticket': chosen blocks that on the recipients they
were not chosen on turn more into c than fresh noise does, by an interval that leaves out 0, in every seed.
"""
import os

import numpy as np
import torch

import lth_diffusion as lth
import metrics
from ddpm import evaluations, positive_int

CONFIDENCE = 0.9
SIDES = 4, 8, 14, 20, 28  # of the block, for images 28 wide; wider ones have them in proportion
SEARCHED = 2  # the smallest sizes are searched: 4x4 is that of 2312.08872
DONORS, RECIPIENTS = 32, 16
HEADER = ["part", "seed", "network", "compared with", "side", "n", "rate", "by chance", "difference", "low",
          "high"]


def classes(exp, model, x_T, args, label):
    """(class, confidence) of the image that a network makes of every x_T (N, C, H, W)."""
    images = exp.draw(model, x_T=x_T, sampler="ddim", steps=args.nfe, label=label)
    logits = metrics.features(exp.classifier, images, logits=True)[1]
    confidence, found = logits.softmax(1).max(1)
    return found, confidence


def line(part, seed, network, other, side, rate, chance):
    """A row of HEADER from the rates of independent units, x_T or donors, and what chance gives each."""
    rate, chance = (np.asarray(v, float) for v in (rate, chance))
    mean, low, high = metrics.t_test(rate - chance, 0.05)[1]
    return [part, seed, network, other, side, len(rate), rate.mean(), chance.mean(), mean, low, high]


def agreement(a, b, number):
    """(1 where two networks' classes agree, the chance of it from their frequencies), each (N,)."""
    one, two = (torch.bincount(v, minlength=number).double() / len(v) for v in (a, b))
    return (a == b).double().numpy(), np.full(len(a), float(one @ two))


def pick(found, confidence, generator, donors, recipients):
    """Donors (D,) and for each of them recipients (D, R), as indices of x_T. ValueError where there are too
    few."""
    sure = torch.nonzero(confidence > CONFIDENCE).flatten()
    sure = sure[torch.randperm(len(sure), generator=generator)][:donors]
    if len(sure) < 2:
        raise ValueError(f"{len(sure)} images have a confidence above {CONFIDENCE}: a better network, or "
                         "more --images")
    chosen = []
    for donor in sure:
        others = torch.nonzero(found != found[donor]).flatten()
        if len(others) < recipients:
            raise ValueError(f"{len(found) - len(others)} of {len(found)} images are of one class: too few "
                             "recipients; a better network, or more --images")
        chosen.append(others[torch.randperm(len(others), generator=generator)[:recipients]])
    return sure, torch.stack(chosen)


def paste(x_T, block, top, left):
    """A copy of x_T (N, C, H, W) with block (C, S, S) or (N, C, S, S) in it."""
    x_T, side = x_T.clone(), block.shape[-1]
    x_T[:, :, top:top + side, left:left + side] = block
    return x_T


def transplant(exp, model, x_T, donors, recipients, targets, side, args, label):
    """Two bool arrays (D, R): which recipients become of their donor's class with its block, and with fresh
    noise in the same place. The places depend on the side only: every network meets the same."""
    generator = torch.Generator().manual_seed(lth.EVAL_SEED + side)
    patched, fresh, room = [], [], x_T.shape[-1] - side + 1
    for donor, mine in zip(donors, recipients):
        top, left = torch.randint(room, (2,), generator=generator).tolist()
        noise = torch.randn(len(mine), x_T.shape[1], side, side, generator=generator)
        patched.append(paste(x_T[mine], x_T[donor, :, top:top + side, left:left + side], top, left))
        fresh.append(paste(x_T[mine], noise, top, left))
    for starts in (patched, fresh):
        found = classes(exp, model, torch.cat(starts), args, f"{label}, {side} wide")[0]
        yield (found.view(recipients.shape) == targets[:, None]).numpy()


def search(patched, fresh):
    """The quarter of donors that did best on the first half of the recipients: two pairs (rate, by chance)
    over these donors, on that half and on the other."""
    half = patched.shape[1] // 2
    halves = [[v[:, :half].mean(1), v[:, half:].mean(1)] for v in (patched, fresh)]  # [2][2] of (D,)
    gain = halves[0][0] - halves[1][0]
    best = np.argsort(-gain, kind="stable")[:max(2, len(gain) // 4)]
    return [(halves[0][k][best], halves[1][k][best]) for k in (0, 1)]


def noise_lines(exp, seed, name, model, found, confidence, args):
    """Rows of transplant and search; AssertionError if a whole x_T does not carry its class."""
    x_T, width = exp.x_T(args.images), exp.images.shape[-1]
    generator = torch.Generator().manual_seed(lth.EVAL_SEED)
    donors, recipients = pick(found, confidence, generator, args.donors, args.recipients)
    for number, side in enumerate(round(s * width / 28) for s in SIDES):
        patched, fresh = transplant(exp, model, x_T, donors, recipients, found[donors], side, args,
                                    f"seed {seed} {name}")
        yield line("transplant", seed, name, "fresh noise", side, patched.mean(1), fresh.mean(1))
        if side == width and patched.mean() < 0.99:  # batches may differ in the last bit, no more
            raise AssertionError(f"a whole x_T gave its class to {patched.mean():.3f} of the recipients")
        if number < SEARCHED:
            for part, pair in zip(("search, chosen on", "search, tested on"), search(patched, fresh)):
                yield line(part, seed, name, "fresh noise", side, *pair)


def lines(exp, rows, seed, dense, args):
    """Rows of HEADER of one seed; dense: {seed: classes of the dense network}, which grows."""
    last = max(job.round for job in rows if job.arm == "rewind")
    x_T, found, number = exp.x_T(args.images), {}, exp.classifier.head.out_features
    wanted = "dense", "twin", *lth.ARMS
    for job in [job for job in rows if job.seed == seed and job.round in (0, last) and job.arm in wanted]:
        model, _ = exp.rebuild(exp.load(job), "ema")
        name = f"{job.arm} {100 * rows[job]['sparsity']:.0f} %"
        found[name] = classes(exp, model, x_T, args, str(job))
        if job.arm == "dense":
            for other, theirs in dense.items():
                yield line("agreement", seed, name, f"dense of seed {other}", None,
                           *agreement(found[name][0], theirs, number))
            dense[seed] = found[name][0]
        else:
            pair = agreement(found[name][0], dense[seed], number)
            yield line("agreement", seed, name, "dense", None, *pair)
        if job.arm in ("dense", "rewind"):
            yield from noise_lines(exp, seed, name, model, *found[name], args)
        print(f"{job}: done", flush=True)


def draw(table, path, note):
    """The share of recipients that become of the donor's class against the size of the block."""
    series = []
    for name in dict.fromkeys(row[2] for row in table if row[0] == "transplant"):
        mine = [row for row in table if row[0] == "transplant" and row[2] == name]
        sides = sorted({row[4] for row in mine})
        for label, k, style in ((name, 6, "solid"), (f"{name}, fresh noise", 7, "dotted")):
            groups = [[row for row in mine if row[4] == side] for side in sides]  # a row a seed
            y = np.array([np.mean([100 * row[k] for row in group]) for group in groups])
            half = np.array([np.mean([50 * (row[10] - row[9]) for row in group]) for group in groups])
            bars = dict(y_low=np.maximum(y - half, 0), y_high=y + half) if k == 7 else {}
            series.append(dict(label=label, x=sides, y=y, style=style, **bars))
    lth.line_chart(series, path, "How much of x_T decides the class?", "side of the transplanted block, in "
                   "pixels", "recipients that become of the donor's class, %", note=note)


def conclude(table):
    """What was and was not shown."""
    said = []
    for part, words in (("agreement", "the same class as {3} from {6:.0%} of x_T, by chance {7:.0%}"),
                        ("search, tested on", "chosen {4} pixel blocks turn {6:.1%} of unseen recipients, "
                         "fresh noise {7:.1%} ({8:+.1%} [{9:+.1%}, {10:+.1%}])")):
        said += [f"Seed {row[1]}, {row[2]}: {words.format(*row)}." for row in table if row[0] == part]
    n = len({row[1] for row in table})
    return "\n".join([*said, f"n={n} seed{'s' * (n > 1)}{'; fewer than 3: no verdict.' if n < 3 else '.'}"])


def main(argv=None):
    """The command line."""
    study = lth.Study("initial_noise", __doc__)
    add = study.add_argument
    add("--from", dest="run", metavar="runs/NAME", help="a finished run (default: a small one on digits)")
    add("--images", type=positive_int, default=400, help="x_T to start from (default: 400)")
    add("--nfe", type=evaluations, default=20, help="network evaluations a sample (default: 20)")
    add("--full", action="store_true", help="four times the donors, three times the recipients, 1,200 x_T")
    with study.arguments(argv) as args:
        args.donors, args.recipients = DONORS, RECIPIENTS
        if args.full:
            args.donors, args.recipients, args.images = 4 * DONORS, 3 * RECIPIENTS, 3 * args.images
        exp, rows = lth.open_run(args.run)
        path, table, dense = os.path.join(args.out, f"initial_noise_{exp.args.dataset}"), [], {}
        for seed in dict.fromkeys(job.seed for job in rows):
            table += lines(exp, rows, seed, dense, args)
            study.save(path, HEADER, table, exp.device, nfe=args.nfe, recipients=args.recipients)
        draw(table, path + ".png", f"{exp.args.dataset}, DDIM with {args.nfe} evaluations; up to "
             f"{args.donors} donors with {args.recipients} recipients each, {len(dense)} seed(s). "
             "Percentages: weights pruned. Bars: 90 % intervals of the two lines' difference, over donors.")
    print(f"\n{lth.text_table(HEADER, table)}\n\n{conclude(table)}\n{path}.csv, .json, .png")


if __name__ == "__main__":
    main()
