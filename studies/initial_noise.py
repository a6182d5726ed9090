"""Are there tickets in the initial noise, and do dense networks and tickets share them?

    python -m studies.initial_noise                       # a small run on digits first: minutes
    python -m studies.initial_noise --from results/replication/v --rounds 5  # MNIST, no training

In Mao, Wang and Aizawa, The Lottery Ticket Hypothesis in Denoising, 2023 (2312.08872), winning
tickets are not weights but small blocks of the initial noise that lean towards a concept of the
prompt. They are found through cross-attention. There is no text here, so this is an analogue: the
concept is the class that the domain classifier sees in the finished image. DDIM without noise makes
the image a function of x_T alone.

agreement   The share of x_T from which a network draws the same class as the dense one, and what
            chance alone would give, from how often each draws each class.
transplant  The image of a donor is of class c with confidence above 0.9. A square block of its x_T
            is put at the same place of the x_T of recipients whose images are of other classes. How
            many become c, compared with fresh noise in the same square? A block as large as x_T
            turns them all.
search      The quarter of the donors whose small blocks do best, over fresh noise, on one half of
            the recipients is tried on the other half. On the first half the choice would flatter.

Intervals are at 90 %, over x_T for the agreement, over donors for the rest. They say nothing about
other training runs. Donors are what one network draws with confidence. Places are random.

What would change our mind about 'no block of noise is a ticket': in every seed, the blocks of the
search turn more recipients than fresh noise does, by an interval above 0.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.initial_noise")

import functools

import numpy as np
import torch

import lth_diffusion as lth
import metrics
from studies.common import Study, add_run_flag, check_rounds, open_run
from support import charts, cli, data
from support.verdict import t_test
from support.words import counted

CONFIDENCE = 0.9
SIDES = 4, 8, 14, 20, 28  # of the block, for images 28 wide; in proportion for others
SEARCHED = 2  # the smallest sizes are searched; 4x4 is that of 2312.08872
DONORS, RECIPIENTS = 32, 16  # at most; for each donor
NFE = 20  # network evaluations per image
KEYS = ["part", "network", "side"]
MEANS = ["rate", "by chance", "difference"]
HEADER = ["seed", *KEYS, "n", *MEANS, "low", "high"]
SUMMARY = [*KEYS, *MEANS, "seeds", "interval above 0"]


def classes(exp, model, x_T):
    """(class, confidence) of the image that a network makes of each x_T (N, C, H, W)."""
    images = exp.draw(model, x_T=x_T, sampler="ddim", steps=NFE)
    _, logits = metrics.features(exp.classifier, images, logits=True)
    confidence, found = logits.softmax(1).max(1)
    return found, confidence


def agreement(a, b):
    """(1 where two networks draw the same class, the chance of it), each (N,)."""
    number = 1 + int(max(a.max(), b.max()))
    one, two = (torch.bincount(v, minlength=number).double() for v in (a, b))
    chance = float(one @ two) / len(a) ** 2
    return (a == b).double().numpy(), np.full(len(a), chance)


def pick(found, confidence, generator):
    """Donors (D,) and the recipients of each (D, R), as indices of x_T."""
    def some(indices, n):
        order = torch.randperm(len(indices), generator=generator)
        return indices[order[:n]]
    sure = torch.nonzero(confidence > CONFIDENCE).flatten()
    if len(sure) < 2:
        cli.refuse("images", f"{len(sure)} of {len(found)} images have a confidence above "
                   f"{CONFIDENCE}: take more, or a better network")
    donors, chosen = some(sure, DONORS), []
    for donor in donors:
        others = torch.nonzero(found != found[donor]).flatten()
        if len(others) < RECIPIENTS:
            cli.refuse("images", f"{len(others)} images are of another class than a donor: "
                       "take more, or a better network")
        chosen.append(some(others, RECIPIENTS))
    return donors, torch.stack(chosen)


def paste(x_T, block, top, left):
    """A copy of x_T (N, C, H, W) with block (C, S, S) or (N, C, S, S) in it."""
    x_T, side = x_T.clone(), block.shape[-1]
    x_T[:, :, top:top + side, left:left + side] = block
    return x_T


def transplant(look, x_T, donors, recipients, targets, side):
    """Bool arrays (D, R): which recipients turn with the donor's block, which with fresh noise.

    look(x_T): (class, confidence). The places depend on the side only, not on the network.
    """
    generator = torch.Generator().manual_seed(lth.EVAL_SEED + side)
    patched, fresh, room = [], [], x_T.shape[-1] - side + 1
    for donor, mine in zip(donors, recipients):
        top, left = torch.randint(room, (2,), generator=generator).tolist()
        block = x_T[donor, :, top:top + side, left:left + side]
        noise = torch.randn(len(mine), *block.shape, generator=generator)
        patched.append(paste(x_T[mine], block, top, left))
        fresh.append(paste(x_T[mine], noise, top, left))
    for starts in (patched, fresh):
        found, _ = look(torch.cat(starts))
        found = found.view(recipients.shape)
        yield (found == targets[:, None]).numpy()


def search(patched, fresh):
    """(rates, chances) on one half of the recipients, of the donors that do best on the other."""
    half = patched.shape[1] // 2
    gain = patched[:, :half].mean(1) - fresh[:, :half].mean(1)  # (D,)
    number = max(2, len(gain) // 4)
    best = np.argsort(-gain, kind="stable")[:number]
    return [turned[best, half:].mean(1) for turned in (patched, fresh)]


def noise_rates(look, x_T, found, confidence):
    """(part, side, rates by donor, chances) of transplant and search of one network."""
    generator = torch.Generator().manual_seed(lth.EVAL_SEED)
    donors, recipients = pick(found, confidence, generator)
    targets, scale = found[donors], x_T.shape[-1] / 28
    for number, side in enumerate(SIDES):
        side = round(side * scale)
        both = list(transplant(look, x_T, donors, recipients, targets, side))
        yield "transplant", side, *(turned.mean(1) for turned in both)
        if number < SEARCHED:
            yield "search", side, *search(*both)


def measure(exp, jobs, x_T):
    """Rows of HEADER, as dicts."""
    for job in jobs:
        trained, parts = exp.load(job), []
        name = f"{job.arm} {100 * trained.row['sparsity']:.0f} %"
        look = functools.partial(classes, exp, trained.ema)
        found, confidence = look(x_T)
        if job.arm == "dense":  # the first job of a seed
            dense = found
        else:
            parts.append(("agreement", None, *agreement(found, dense)))
        if job.arm in ("dense", "ticket"):
            parts += noise_rates(look, x_T, found, confidence)
        for part, side, rate, chance in parts:
            difference, low, high = t_test(rate - chance, 0.05)[1]
            row = (job.seed, part, name, side, len(rate), float(rate.mean()),
                   float(chance.mean()), difference, low, high)
            yield dict(zip(HEADER, row))
        print(f"{job}: done", flush=True)


def summarise(table):
    """Rows of SUMMARY, as dicts: means over seeds, and in how many the interval is above 0."""
    groups = {}
    for row in table:
        key = tuple(row[name] for name in KEYS)
        groups.setdefault(key, []).append(row)
    for key, rows in sorted(groups.items(), key=lambda item: item[0][0]):
        line = dict(zip(KEYS, key))
        for name in MEANS:
            values = [row[name] for row in rows]
            line[name] = float(np.mean(values))
        line["seeds"] = len(rows)
        line["interval above 0"] = sum(row["low"] > 0 for row in rows)
        yield line


def draw(summary, path, note):
    """The share of recipients that turn, against the size of the block."""
    lines = {}
    for row in summary:
        if row["part"] == "transplant":
            name = row["network"]
            for label, column, style in ((name, "rate", "solid"),
                                         (f"{name}, fresh noise", "by chance", "dotted")):
                line = lines.setdefault(label, dict(label=label, x=[], y=[], style=style))
                line["x"].append(row["side"])
                line["y"].append(100 * row[column])
    most = [row["side"] for row in summary if row["part"] == "transplant" and row["rate"] > 0.5]
    title = (f"A block of x_T carries its class into most images from a side of {min(most)} pixels "
             "on" if most else "At no size does a block of x_T carry its class into most images")
    charts.line_chart(lines.values(), path, title,
                      "side of the transplanted block, pixels",
                      "recipients that become of the donor's class, %", note=note)


def main(argv=None):
    """The command line."""
    study = Study("studies.initial_noise", __doc__)
    add_run_flag(study)
    study.add_argument("--images", type=cli.positive_int, default=400,
                       help="x_T to start from (default: 400)")
    study.add_argument("--rounds", nargs="+", type=cli.positive_int,
                       help="rounds to compare with dense (default: the last)")
    with study.arguments(argv) as args:
        exp, rows = open_run(args.run, networks=True)
        if data.unlabelled(exp.args):
            cli.refuse("from", f"the images of {exp.args.out} have no classes to look for")
        rounds = args.rounds or [max(job.round for job in rows)]
        check_rounds(rounds, rows)
        jobs = [job for job in rows if job.round in (0, *rounds)]
        path = f"{args.out}/initial_noise_{exp.args.dataset}"
        table = list(measure(exp, jobs, exp.x_T(args.images)))
        summary, n = list(summarise(table)), len({job.seed for job in jobs})
        cells = [list(row.values()) for row in table]
        study.save(path, HEADER, cells, exp.device, nfe=NFE, recipients=RECIPIENTS)
        draw(summary, path + ".png",
             f"{exp.args.dataset}, DDIM with {NFE} evaluations; up to {DONORS} donors, "
             f"{RECIPIENTS} recipients each; means over {counted(n, 'seed')}. "
             "Percentages: weights pruned.")
    few = "; fewer than 3: no verdict" if n < 3 else ""
    cells = [list(row.values()) for row in summary]
    print(f"\n{charts.text_table(SUMMARY, cells)}\n\nSeeds: {n}{few}.")
    print(f"{path}.csv, .json, .png")


if __name__ == "__main__":
    main()
