"""Do tickets transfer, to another data set and to a network of another depth?

    python -m studies.transfer --from runs/A runs/B           # part one too: two runs of one --preset
    python -m studies.transfer                                # part two, digits: half an hour
    python -m studies.transfer --part depth --seeds 0 1 2 --steps 560

data   Both ways between two finished runs. On B's images, with B's batches and schedule from its step k: B's
       own ticket and its controls (B's mask shuffled, B's mask on a new initialisation: the run's rows), A's
       mask on B's theta_k, A's mask and A's theta_k (the whole ticket), A's mask shuffled in each layer,
       which keeps A's layer densities only. Runs of one seed share theta_0, so that a place means the same
       in both; beside their masks' overlap stands that of A's and B's masks of different seeds, and chance.
depth  Elastic tickets (2103.16547), here in a U-Net: from 2 residual blocks a level to 3 (stretch) and to 1
       (squeeze). A block on the way up reads a skip, so the unit is a block on the way down with the one on
       the way up that reads it. Units are copied, theta_k and mask together, between places of a level with
       equal shapes: B1 B1 B2 where there are more places than units, the first ones where there are fewer.
       All else (stem, head, time, middle, changes of resolution and what reads them) goes one to one.
       Beside it: the target's own IMP ticket, the dense target, the elastic mask on a new initialisation
       and the elastic theta_k under the mask shuffled in each layer.

All train on from the same step k with the same batches, but dense and new initialisations, which train from
step 0 and so are spared the fresh optimizer that costs the dense network's rewound twin so much. Paired by
seed. Each data set has its own ruler: compare fid_domain within a target. The target's own ticket has cost
its dense run and every round, a foreign one none of that; copied units move the density a little: see
`sparsity`. Only depth, one family, one source; nothing on which unit should go where.

What would change our mind about 'a ticket is more than its layer densities': shuffled foreign masks that do
as well as the foreign mask; about 'it is made for its data': foreign masks that do as well as the own.
"""
import os

import numpy as np
import torch

import lth_diffusion as lth
import metrics
from ddpm import DATASETS, positive_int, seed_number
from prune import density, overlap, random_masks
from unet import PRESETS, ResBlock

HEADER = ["seed", "from", "to", "network", "sparsity", "steps", "fid_domain", "val_loss", "n"]
MASKS = ["from", "to", "seed", "other seed", "layer", "IoU", "by chance", "times chance"]
OWN, SHUFFLED = "own ticket", "own mask, shuffled"
ROWS = {OWN: "rewind", SHUFFLED: "random", "own mask, new init": "reinit", "dense": "dense",
        "dense, rewound": "twin"}  # of a run
ALIKE = "preset rounds prune_rate granularity schedule prediction".split()  # in a pair
SOURCE, TARGETS = 2, (3, 1)  # residual blocks a level
RUN = "--rounds 2 --final-sparsity 0.9 --arms rewind".split()  # flags of the runs of part two


# ---------------------------------------------------------------------------------- what goes where, by depth

def partners(model):
    """{block on the way up: the layer whose output it reads as its skip}, as UNet.forward stacks them."""
    stack = ["conv_in"]
    for i, level in enumerate(model.down):
        stack += [f"down.{i}.blocks.{j}" for j in range(len(level.blocks))]
        stack += [f"down.{i}.resample"] if level.resample is not None else []
    return {f"up.{k}.blocks.{j}": stack.pop() for k, level in enumerate(model.up)
            for j in range(len(level.blocks))}


def units(model):
    """{(level and shapes, or the layer that is read): [unit, ..]}, in the order of the way down. A unit is
    (block down, block up), or (block up,) where what it reads changes the resolution or is the stem."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, ResBlock)}
    found = {}
    for up, read in reversed(partners(model).items()):
        unit = (read, up) if read in blocks else (up,)
        shapes = tuple(tuple(p.shape) for name in unit for p in blocks[name].parameters())
        place = read.split(".")[1] if read in blocks else read
        found.setdefault((place, shapes), []).append(unit)
    return found


def block_map(source, target):
    """{block of target: block of source}. ValueError where the source has no unit of a place's shapes."""
    there, found = units(source), {}
    for key, places in units(target).items():
        if key not in there:
            raise ValueError(f"no unit of the source fits {' and '.join(places[0])} of the target")
        for q, place in enumerate(places):
            found |= zip(place, there[key][q * len(there[key]) // max(len(places), len(there[key]))])
    return found


def elastic(source, masks, target):
    """(state, masks) of `target` from the weights and masks of `source`, place by place."""
    blocks = block_map(source, target)
    # a block's attention stands beside it: down.0.attention.1 goes with down.0.blocks.1
    blocks |= {name.replace("blocks", "attention"): old.replace("blocks", "attention")
               for name, old in blocks.items()}
    state, old_name = source.state_dict(), {}
    for name in target.state_dict():
        block = ".".join(name.split(".")[:4])
        old_name[name] = blocks.get(block, block) + name[len(block):]
    new_masks = {name: masks[old].clone() for name, old in old_name.items() if old in masks}
    return {name: state[old].clone() for name, old in old_name.items()}, new_masks


# -------------------------------------------------------------------------------------------- what is trained

def measure(exp, seed, names, model, masks, start=None):
    """A row of HEADER: (from, to, network) trained on exp's data from step `start`, k unless given."""
    start = exp.k if start is None else start
    label = "_".join(["transfer", *names, f"seed{seed}"]).replace(",", "").replace(" ", "-")
    ema = exp.fit(label, seed, model, masks, start=start)
    fid = exp.quality(exp.draw(ema, label=f"{names[2]}: sample"))["fid_domain"]
    print(f"seed {seed}, {names[0]} to {names[1]}, {names[2]}: fid_domain {fid:.2f}", flush=True)
    return [seed, *names, 1 - density(masks), exp.args.steps - start, fid, exp.val_loss(ema.eval()),
            exp.args.samples]


def of_run(exp, rows, seed, start, end):
    """Rows of HEADER that the target's run has already."""
    for network, arm in ROWS.items():
        job = lth.Job(seed, 0 if arm in ("dense", "twin") else exp.args.rounds, arm)
        if job in rows:
            row = rows[job]
            yield [seed, start, end, network, row["sparsity"], row["steps"], row["fid_domain"],
                   row["val_loss"], row["n_samples"]]


def ticket(exp, seed):
    """The masks of the last round."""
    return exp.rebuild(exp.load(lth.Job(seed, exp.args.rounds, "rewind")))[1]


def shuffled(masks, seed):
    """As many live weights in every layer, elsewhere."""
    return random_masks(masks, torch.Generator().manual_seed(lth.MASK_SEED + seed))


# ---------------------------------------------------------------------------------------------- the two parts

def open_pair(folders):
    """{name: (exp, rows)} of two runs, and their common seeds. ValueError where they cannot be compared."""
    found = {}
    for folder in folders:
        exp, rows = lth.open_run(folder)
        found[os.path.basename(os.path.normpath(exp.args.out))] = exp, rows
    if len(found) < 2:
        raise ValueError("--from: name two runs, in folders of different names")
    (a, rows_a), (b, rows_b) = found.values()
    what = {"--" + name.replace("_", "-"): (getattr(a.args, name), getattr(b.args, name)) for name in ALIKE}
    what |= {"image shapes": (tuple(a.images.shape[1:]), tuple(b.images.shape[1:])), "step k": (a.k, b.k)}
    if differ := [f"{name} {one} and {other}" for name, (one, other) in what.items() if one != other]:
        raise ValueError(f"--from: these runs differ in {', '.join(differ)}")
    if a.args.granularity == "channel":
        raise ValueError("--from: channel tickets have no masks over the dense network's weights")
    both = [{job.seed for job in rows if (job.round, job.arm) == (a.args.rounds, "rewind")}
            for rows in (rows_a, rows_b)]
    if not both[0] & both[1]:
        raise ValueError("--from: these runs have no finished ticket of a common seed")
    return found, sorted(both[0] & both[1])


def foreign(name_a, a, name_b, b, rows, seed):
    """Rows of HEADER of one way, A's ticket on B's data, and B's own beside it."""
    yield from of_run(b, rows, seed, name_a, name_b)
    masks, whole = ticket(a, seed), b.new_model(seed)
    whole.load_state_dict(a.theta(seed).state_dict())
    for network, model, mask in (("foreign mask", b.theta(seed), masks), ("foreign ticket", whole, masks),
                                 ("foreign mask, shuffled", b.theta(seed), shuffled(masks, seed))):
        yield measure(b, seed, (name_a, name_b, network), model, mask)


def overlaps(name_a, a, name_b, b, seeds):
    """Rows of MASKS of every pair of seeds; by layer for those of one seed."""
    one, other = ({seed: ticket(exp, seed) for seed in seeds} for exp in (a, b))
    for seed in seeds:
        for its in seeds:
            layers = {"all": one[seed]} | ({name: {name: mask} for name, mask in one[seed].items()}
                                           if its == seed else {})
            for layer, masks in layers.items():
                iou, chance = overlap(masks, other[its])
                yield [name_a, name_b, seed, its, layer.removesuffix(".weight"), iou, chance, iou / chance]


def across_data(study, args):
    """Part one."""
    found, seeds = open_pair(args.runs_from)
    (name_a, (a, _)), (name_b, (b, _)) = found.items()
    path, table = os.path.join(args.out, f"transfer_data_{name_a}_{name_b}"), []
    pairs = list(overlaps(name_a, a, name_b, b, seeds))
    study.save(path + "_masks", MASKS, pairs, a.device)
    for seed in seeds:
        for start, end in ((name_a, name_b), (name_b, name_a)):
            for row in foreign(start, found[start][0], end, *found[end], seed):
                table.append(row)
            study.save(path, HEADER, table, a.device, k={name: exp.k for name, (exp, _) in found.items()})
    whole = [row for row in pairs if row[4] == "all"]
    finish(table, path, "Tickets of another data set",
           f"Preset {a.args.preset}. Each data set has a ruler of its own: compare marks of one shape.")
    print(f"{lth.text_table(MASKS, whole)}\n{path}_masks.csv, .json")
    for same in (True, False):
        ratio = [row[7] for row in whole if (row[2] == row[3]) == same]
        if ratio:
            print(f"Masks of {'one seed' if same else 'different seeds'} overlap {np.mean(ratio):.2f} times "
                  f"as much as by chance, n={len(ratio)} pairs.")


def run_of(blocks, args):
    """The finished run, (exp, rows), of a network of so many blocks a level; made where it is not there."""
    preset = f"tiny-{blocks}-blocks"
    PRESETS.update({preset: PRESETS["tiny"] | dict(blocks=blocks)})
    flags = ["--dataset", args.dataset, "--preset", preset, "--steps", str(args.steps), "--seeds",
             *map(str, args.seeds), "--out", os.path.join(args.runs, 
                                              f"transfer_{args.dataset}_{args.steps}_{blocks}_blocks")]
    return lth.run_alone(*lth.parse_args([*RUN, *flags]))


def stretched(source, target, rows, seed, names):
    """Rows of HEADER of one target: its own, and what came from the source."""
    yield from of_run(target, rows, seed, *names)
    theta, masks = elastic(source.theta(seed), ticket(source, seed), target.new_model(seed))
    for network, mask, start in (("elastic ticket", masks, None), ("elastic mask, new init", masks, 0),
                                 ("elastic theta_k, shuffled mask", shuffled(masks, seed), None)):
        model = target.new_model(lth.REINIT_SEED + seed)
        if start is None:
            model.load_state_dict(theta)
        yield measure(target, seed, (*names, network), model, mask, start)


def across_depth(study, args):
    """Part two."""
    path, table = os.path.join(args.out, f"transfer_depth_{args.dataset}"), []
    source, _ = run_of(SOURCE, args)
    for blocks in TARGETS:
        target, rows = run_of(blocks, args)
        for seed in args.seeds:
            names = [f"{n} block{'s' * (n > 1)}" for n in (SOURCE, blocks)]
            table += stretched(source, target, rows, seed, names)
            study.save(path, HEADER, table, target.device, k=target.k, steps=args.steps)
    finish(table, path, "Elastic tickets: stretched and squeezed", f"{args.dataset}, {args.steps:,} steps.")


# ------------------------------------------------------------------------------------------------- the report

def conclude(table):
    """For each way, each network's fid_domain and how far it lies from the own ticket's, paired by seed."""
    for way in dict.fromkeys((row[1], row[2]) for row in table):
        values, mine = {}, [row for row in table if (row[1], row[2]) == way]
        for row in mine:
            values.setdefault(row[3], {})[row[0]] = row[6]
        whole = dict.fromkeys(row[3] for row in mine if row[5] == max(row[5] for row in mine))
        own, parts = values.pop(OWN), []
        for network, found in values.items():
            gap = np.array([found[seed] - own[seed] for seed in found])
            ends = " [{:+.2f}, {:+.2f}]".format(*metrics.t_test(gap, 0.05)[1][1:]) if len(gap) > 2 else ""
            parts.append(f"{network} {gap.mean():+.2f}{ends}")
        seeds = f"n={len(own)} seed{'s' * (len(own) > 1)}, "
        seeds += "90 % intervals" if len(own) > 2 else "no verdict"
        yield (f"{way[0]} to {way[1]}: own ticket {np.mean(list(own.values())):.2f}; from it "
               f"{', '.join(parts)} (fid_domain, {seeds}). From step 0, all others from step k with a fresh "
               f"optimizer: {'; '.join(whole)}.")


def finish(table, path, title, note):
    """Figure, table and conclusion."""
    networks, series = list(dict.fromkeys(row[3] for row in table)), []
    for way in dict.fromkeys((row[1], row[2]) for row in table):
        dots = [[row[6] for row in table if (row[1], row[2], row[3]) == (*way, name)] for name in networks]
        series.append(dict(label=" to ".join(way), x=range(len(networks)), style="points",
                           y=[np.mean(v) if v else np.nan for v in dots],
                           dots=dots if max(map(len, dots)) > 1 else ()))
    lth.line_chart(series, path + ".png", title, "", "fid_domain (lower is better)",
                   x_ticks=[(n, name.replace(" ", "\n")) for n, name in enumerate(networks)],
                   note=f"{note} n={' or '.join(f'{n:,}' for n in sorted({row[8] for row in table}))} "
                        f"samples a figure, {len({row[0] for row in table})} seed(s).")
    print("", lth.text_table(HEADER, table), "", *conclude(table), f"{path}.csv, .json, .png\n", sep="\n")


def main(argv=None):
    """The command line."""
    study = lth.Study("transfer", __doc__)
    add = study.add_argument
    add("--from", dest="runs_from", nargs=2, metavar="runs/NAME", help="part one: two finished runs")
    add("--part", choices=["data", "depth"], help="only this one (default: both)")
    add("--dataset", choices=list(DATASETS), default="digits", help="of part two (default: digits)")
    add("--seeds", nargs="+", type=seed_number, default=[0], help="of part two (default: 0)")
    add("--steps", type=positive_int, default=400, help="of a training of part two (default: 400)")
    add("--runs", default="runs", help="folder of part two's runs (default: runs)")
    with study.arguments(argv) as args:
        if args.runs_from:
            if args.part != "depth":
                across_data(study, args)
        elif args.part == "data":
            raise ValueError("argument --part: data needs two finished runs: --from runs/A runs/B")
        else:
            print("part one is left out: across data sets needs two finished runs, --from runs/A runs/B")
        if args.part != "data":
            across_depth(study, args)


if __name__ == "__main__":
    main()
