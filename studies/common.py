"""What studies share: their command line, finished runs, further training, figures over seeds."""
import argparse
import contextlib
import copy
import json
import math
import os
import shlex
import sys
import time

import numpy as np
import torch
from scipy import stats
from torch import nn

import lth_diffusion as lth
from ddpm import Diffusion, train
from prune import (apply_masks, blocks_of, dense_masks, load_ticket, mask_hooks, pack_masks,
                   prunable, rewind)
from support import cli, runs
from support.verdict import t_test, verdict
from support.words import ARMS

SMALL = ["--rounds", "2", "--final-sparsity", "0.9"]  # the run on digits that studies make
SHOWN = "dense", "ticket", "reinit", "random"  # the arms of a verdict
JUDGED = ["seeds", *SHOWN, "p", "answer", "ticket - dense", "low", "high", "ticket - reinit",
          "lowest", "highest"]


class Study(cli.Parser):
    """The command line of a study: its own flags and --out; a table with provenance at the end."""

    def __init__(self, name, doc):
        super().__init__(prog=name, description=doc.split("\n")[0])
        short = name.split(".")[-1]
        self.add_argument("--out", default=os.path.join("runs", "studies"), type=cli.path,
                          help=f"folder of {short}* (default: runs/studies; committed: results)")

    @contextlib.contextmanager
    def arguments(self, argv=None, owned=None):
        """The flags, for a block in which a mistake ends in one line.

        owned: the flags of lth_diffusion.py that the study sets itself; where it is given, flags
        other than the study's own are args.rest.
        """
        argv = sys.argv[1:] if argv is None else argv
        self.command = shlex.join(["python", "-m", self.prog, *argv])
        self.began = time.monotonic()
        runs.commit()
        args, args.rest = self.parse_known_args(argv)
        if args.rest and owned is None:
            self.error(f"unrecognized arguments: {' '.join(args.rest)}")
        for flag in [word.split("=")[0] for word in args.rest]:
            if flag in owned:
                self.error(f"argument {flag}: this study sets it itself; leave it out")
        with cli.one_line(self):
            runs.writable([args.out], "--out")
            yield args

    def save(self, path, header, table, device="cpu", **facts):
        """path.csv, and path.json with where its figures come from."""
        cells = [[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in table]
        runs.write_table(path + ".csv", header, cells)
        seconds = round(time.monotonic() - self.began, 1)
        facts = runs.provenance(self.command, device, seconds=seconds, **facts)
        runs.write_text(path + ".json", json.dumps(facts, indent=1))


def add_run_flag(study):
    """--from: the finished run that a study asks."""
    study.add_argument("--from", dest="run", metavar="runs/NAME", type=cli.path,
                       help="a finished run (default: a small one on digits)")


def open_run(out=None, methods=False, networks=False):
    """(Experiment, {job: row}) of a finished run; without a name, of the one on digits.

    Where that is not there a small one is made (minutes). methods: whether a run of another method
    will do. networks: whether averaged weights are enough: then a folder of .ticket files will do
    (see Networks). OSError for a folder without a run.
    """
    args, parser = lth.parse_args(SMALL)
    small, out, rounds = out is None, out or args.out, args.rounds
    if not small or os.path.exists(os.path.join(out, "config.json")):
        found = runs.read_config(out)
        args = argparse.Namespace(**found["args"] | dict(out=out))
        if networks and not rows_of(args) and (rows := rows_of_tickets(out)):
            args.data_dir, args.device = os.environ.get("LTH_DATA") or args.data_dir, "auto"
            return Networks(args, rows), rows
        fits = methods or found.get("method") == "lth_diffusion.py"
        if not fits or found.get("experiment") != "Experiment":
            raise OSError(f"{out} was made by {found.get('method')}: name a run of "
                          "lth_diffusion.py")
    done = rows_of(args)
    if small and args.rounds == rounds and len(done) < len(lth.jobs(args)):
        return (exp := lth.run(args, parser)), exp.rows
    if not done:
        raise OSError(f"{out} holds no finished runs: name a folder that lth_diffusion.py wrote")
    return lth.Experiment(args), done


class Networks(lth.Experiment):
    """Finished networks of which .ticket files are left, such as those of results/replication/v:
    averaged weights and masks, without the state of training."""

    def __init__(self, args, rows):
        super().__init__(args)
        self.rows = rows

    def load(self, job):
        """As ever; `model`, too, has the averaged weights."""
        model, masks = load_ticket(job.path(self.args.out, ".ticket"))
        return lth.Trained(model.to(self.device), model, masks, self.rows[job])


def rows_of_tickets(out):
    """{job: row} of log.jsonl, of the jobs whose .ticket file is there."""
    with contextlib.suppress(FileNotFoundError), \
            open(os.path.join(out, "log.jsonl"), encoding="utf-8") as file:
        order = list(ARMS)
        rows = {lth.Job(row["seed"], row["round"], row["arm"]): row
                for row in map(json.loads, file)}
        there = sorted(rows, key=lambda job: (*job[:2], order.index(job.arm)))
        return {job: rows[job] for job in there if os.path.exists(job.path(out, ".ticket"))}
    return {}


def rows_of(args):
    """{job: row} of the training runs that are done, from their files."""
    paths = {job: job.path(args.out) for job in lth.jobs(args)}
    return {job: runs.load_state(path, lth.FINISHED)["row"]
            for job, path in paths.items() if os.path.exists(path)}


def take_dense(source, args):
    """Take over the dense networks of another run's folder, unless they are there already."""
    if source not in (None, args.out):
        runs.claim(args.out)
    for seed in args.seeds if source not in (None, args.out) else ():
        for ending in ".pt", lth.STEP_K:
            job = lth.Job(seed, 0, "dense")
            runs.copy_once(job.path(source, ending), job.path(args.out, ending))


def checkpoint(exp, seed):
    """The training state of a finished run's dense network at step k: where tickets go back to."""
    path = lth.Job(seed, 0, "dense").path(exp.args.out, lth.STEP_K)
    return runs.load_state(path, ("step", "model", "ema", "optimizer"))


def ticket_masks(exp, seed, r=None, arm="ticket"):
    """The masks of a finished run's ticket, of its last round unless told otherwise."""
    return exp.load(lth.Job(seed, r or exp.args.rounds, arm)).masks


def fit(exp, name, seed, model, masks=None, state=None, /, **changed):
    """Train a model in place as an arm of this seed is trained; return its EMA.

    state: of checkpoint, which training goes on from under the masks; None: from step 0, with the
    model's weights. changed: options of ddpm.train, such as seed, the order of the data. The result
    is kept in the run's folder, and taken from there when all that went into it is the same.
    """
    if state is not None:
        state = rewind(model, masks or dense_masks(model), state)
    elif masks is not None:
        apply_masks(model, masks)
    options = exp.options(lth.Job(seed, 0, "ticket"), label=name) | changed
    path = f"{exp.args.out}/studies/{name}.pt"
    bits = masks and [packed.numpy().tobytes() for packed in pack_masks(masks).values()]
    noise = {name: value for name, value in vars(exp.diffusion).items()
             if isinstance(value, (int, float, str))}  # a Region's too
    key = (f"{options} {exp.hashes['data_hash']} {noise} {runs.weights_hash(model)} "
           f"{bits and runs.digest(*bits)} {digest_of(state)}")
    if os.path.exists(path):
        kept = runs.load_state(path, ("key", "model", "ema"))
        if kept["key"] == key:
            ema = exp.new_model(seed, **model.config)
            ema.load_state_dict(kept["ema"])
            model.load_state_dict(kept["model"])
            return ema.eval()
    hooks = {} if masks is None else mask_hooks(model, masks)
    ema = train(model, exp.diffusion, exp.images, state=state, **options, **hooks)[0].model
    runs.save_state(path, key=key, model=model.state_dict(), ema=ema.state_dict())
    return ema


def digest_of(state):
    """A name for a training state: step, average and optimizer; the weights are hashed apart."""
    if state is None:
        return None
    moments = (state["optimizer"] or dict(state={}))["state"].values()
    found = [*state["ema"].values(), *(v for one in moments for v in one.values())]
    return state["step"], runs.digest(*(v.cpu().numpy().tobytes() for v in found))


def check_rounds(rounds, jobs):
    """Mistake when --rounds, as studies have it, names one that no job is of."""
    there = sorted({job.round for job in jobs})
    if absent := sorted(set(rounds) - set(there)):
        cli.refuse("rounds", f"no runs of round {absent[0]}, but of {there}")


# --------------------------------------------------------------------------- regions of t

REGIONS = {"upper half": (0.5, 1.0), "lower half": (0.0, 0.5)}  # of t: much noise, little noise
ALL = "all t"


class Region(Diffusion):
    """The same diffusion, trained on t from low * T up to high * T only."""

    def __init__(self, whole, low, high):
        super().__init__(whole.T, whole.schedule, whole.prediction, whole.weighting)
        self.first, self.share = round(low * whole.T), high - low

    def loss(self, model, x0, t, noise):
        """As ever, at t drawn from the region: t, which is uniform over all steps, is squeezed."""
        return super().loss(model, x0, self.first + (self.share * t).long(), noise)


class Joined(nn.Module):
    """Two networks as one: `upper` where t is in the upper half, `lower` elsewhere."""

    def __init__(self, upper, lower, switch):
        super().__init__()
        self.upper, self.lower, self.switch = upper, lower, switch

    def forward(self, x, t):
        is_upper = t >= self.switch  # (B,)
        if bool(is_upper.all()) or not bool(is_upper.any()):  # sampling: all t are equal
            return (self.upper if bool(is_upper[0]) else self.lower)(x, t)
        return torch.where(is_upper[:, None, None, None], self.upper(x, t), self.lower(x, t))


def at_region(exp, region):
    """The experiment as it is for one of REGIONS: half of the steps, on its half; or for ALL."""
    if region == ALL:
        return exp
    mine = copy.copy(exp)
    steps = exp.args.steps // 2
    mine.args = argparse.Namespace(**vars(exp.args) | dict(
        steps=steps, warmup=max(1, exp.args.warmup // 2)))
    mine.diffusion, mine.k = Region(exp.diffusion, *REGIONS[region]), exp.k // 2
    return mine


# --------------------------------------------------------------------------- figures over seeds

def over_seeds(values, alpha=0.05):
    """(mean, low, high) at 1 - 2 alpha of one value per seed; no interval below three seeds."""
    values = np.array(values, float)
    if len(values) < 3:
        return float(values.mean()), None, None
    return t_test(values, alpha)[1]


def better_or_worse(gap, margin):
    """What the interval of a difference (mean, low, high), of which lower is better, says."""
    _, low, high = gap
    if low is None:
        return "no verdict"
    return ("better" if high < -margin else "worse" if low > margin else
            "as good" if -margin < low and high < margin else "not shown")


def against(mine, other, share):
    """[seeds, mean of mine, of the other, difference, low, high, answer] of two {seed: value},
    paired; the margin is a share of the other's mean."""
    seeds = sorted(set(mine) & set(other))
    means = [float(np.mean([one[seed] for seed in seeds])) for one in (mine, other)]
    gap = over_seeds([mine[seed] - other[seed] for seed in seeds])
    return [len(seeds), *means, *gap, better_or_worse(gap, share * means[1])]


def judged(arms, metric="fid_domain"):
    """Cells of JUDGED from {arm: {seed: value}}: means, the verdict at the metric's margin, and
    differences with their 90 % intervals."""
    found = verdict(arms, lth.MARGINS[metric], metric=metric)
    means = [float(np.mean(list(arms[arm].values()))) if arms[arm] else None for arm in SHOWN]
    gaps = [end for arm in ("dense", "reinit")
            for end in found.effects.get(arm, (None, None, None))]
    answer = {True: "winning", False: "not shown", None: "no verdict"}[found.winning]
    return [found.n, *means, found.p, answer, *gaps]


def rounded(table):
    """Its cells as a reader wants them: four digits."""
    return [[f"{v:.4g}" if isinstance(v, float) else v for v in row] for row in table]


def deviation(values):
    """Standard deviation over seeds; None of one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def slope(values):
    """(slope, its standard error) of a straight line through values in the order of the blocks,
    from place 0, the first, to 1, the last; NaN is left out."""
    place, values = np.linspace(0, 1, len(values)), np.array(values, float)
    known = np.isfinite(values)
    if known.sum() < 3:
        return math.nan, math.nan
    line = stats.linregress(place[known], values[known])
    return float(line.slope), float(line.stderr)


# --------------------------------------------------------------------------- figures of masks

def images_to_pay_back(steps, training, saved):
    """Samples after which a search has paid for itself. steps: training steps that it took, over
    those of dense; training: multiply-accumulates of training dense; saved: live ones that a sample
    saves. A step costs what one of dense does: zeros are skipped in sampling, not in training."""
    return max(steps - 1, 0) * training / saved



def overlap(a, b):
    """(IoU of two masks over the layers of `a`, that of random masks of the same densities)."""
    both, by_chance, either = 0, 0.0, 0
    for name, mask in a.items():
        live, others = int(mask.sum()), int(b[name].sum())
        both, either = both + int((mask & b[name]).sum()), either + live + others
        by_chance += live * others / mask.numel()
    return both / (either - both), by_chance / (either - by_chance)


def density_by_block(model, live):
    """{residual block: live weights over all} from {layer: live weights}, of this model or of what
    is left of it when its channels have been cut."""
    left, size, weights = {}, {}, prunable(model)
    for name, block in blocks_of(model).items():
        left[block] = left.get(block, 0) + live[name]
        size[block] = size.get(block, 0) + weights[name].numel()
    return {block: left[block] / size[block] for block in size}
