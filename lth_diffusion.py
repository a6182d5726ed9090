"""The lottery ticket hypothesis on a diffusion model: train, prune, rewind, repeat; say what happened.

    python lth_diffusion.py                                   # drawn digits, no download: minutes on a laptop
    python lth_diffusion.py --dataset mnist --rounds 10       # the main job
    python lth_diffusion.py --dataset mnist --seeds 0 1 2     # three seeds: a verdict
    python lth_diffusion.py --dataset cifar10 --preset paper  # Ho et al.'s network: bring a GPU

Running a command again goes on where it stopped. Results land in --out: results.csv, log.jsonl, config.json,
the pictures, and every run's weights and ticket.
"""
import argparse
import contextlib
import csv
import datetime
import functools
import glob
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from typing import NamedTuple

import numpy as np
import PIL
import scipy
import torch
import torch.distributed as dist
from PIL import Image, ImageColor, ImageDraw, ImageFont

import metrics
from ddpm import (DEFAULTS, Diffusion, Parser, add_training_flags, as_input, atomic, batch_at, check_finite,
                  denoiser, draw_samples, fill_defaults, fraction, load_images, one_line, pick_device,
                  pick_precision, positive_int, ranks, seed_number, train, writable)
from prune import (RigL, apply_masks, blocks_of, cka_rates, dense_channels, dense_masks, init_scores,
                   live_counts, mask_hooks, narrower, pack_masks, prunable, prune_channels, prune_scores,
                   ramp_rates, random_channels, random_masks, random_scores, rst_hooks, save_ticket, shrink,
                   taylor_scores, unpack_masks)
from unet import PRESETS, UNet

FORMAT = 2  # of the state files; a file of another version is refused
PARTIAL = "step", "model", "masks", "seconds"  # what is needed of a state within training, and of one after
FINISHED = "row", "config", "model", "ema", "masks", "losses"
METHODS = ("imp", "oneshot", "magnitude-init", "random", "rigl", "set", "rst")
BEFORE_TRAINING = METHODS[2:]  # these choose at theta_0, so that rewinding means step 0
SCOPES = {"magnitude-init": "layer", "rigl": "erk", "set": "erk", "rst": "layer"}  # prescribed by these
ARMS = ("rewind", "reinit", "random", "finetune", "small")
VAL_IMAGES = 2000  # held-out images behind val_loss, each with one fixed t and noise
EVAL_SEED = 1234  # of x_T and of val_loss's t and noise: the same for every ticket of every seed
MARGIN = 0.10  # of dense: how much worse a ticket may be and still count as its equal; fixed before the runs
REINIT_SEED = 500_000  # added to the seed for the control's new initialisation
MASK_SEED = 700_000  # for masks drawn or shuffled at random
PROBE_SEED = 4001  # added to the seed for the other data order that scope cka looks at
TAYLOR_STEPS = 100  # time steps, evenly spread, whose gradients make the Taylor score
RST_SHARE = 0.5  # the transformation's share of --steps, on top of them (2203.04248 spends longer on it)
FINETUNE_LR = 0.1  # `finetune` trains on at this share of --lr: the schedules end at or near 0
COLUMNS = """seed round arm sparsity live_weights total_weights fid_domain precision_domain recall_domain
    fid kid kid_error inception_score precision recall n_samples val_loss train_loss steps
    train_steps_total train_macs_total macs_dense macs_live ticket_bytes train_seconds seconds_per_1000
    train_memory sample_memory""".split()
# column -> its name in the table at the end
QUALITY = dict(fid_domain="fid_domain", precision_domain="prec.", recall_domain="recall", fid="fid",
               kid="kid", inception_score="IS", precision="prec. (I)", recall="recall (I)")
FORMS = dict(val_loss="{:.4f}", kid="{:.4f}")


class Job(NamedTuple):
    """One training run. Round 0 holds the dense network and its twin."""
    seed: int
    round: int
    arm: str

    def __str__(self):
        return f"seed {self.seed} round {self.round} {self.arm}"

    def path(self, out, ending=".pt"):
        return os.path.join(out, f"seed{self.seed}", f"round{self.round:02d}_{self.arm}{ending}")


# -------------------------------------------------------------------------------------------- command line

def parse_args(argv=None):
    """Flags, checked and completed; a mistake ends in one line and exit code 2."""
    parser = Parser(description="Find, restart and measure lottery tickets in a U-Net DDPM.")
    add_training_flags(parser)
    add = parser.add_argument
    add("--rounds", type=positive_int, default=10, help="prune-and-retrain rounds (default: 10)")
    add("--prune-rate", type=fraction, help="share of the live weights cut a round (default: 0.2)")
    add("--final-sparsity", type=fraction, help="choose the rate instead so that the last round ends here")
    add("--method", choices=METHODS, default="imp", help="how tickets are found; those that do not iterate "
        "make one run a control round, at the density of that round (default: imp)")
    add("--score", choices=["magnitude", "taylor"], default="magnitude", help="what imp and oneshot rank by")
    add("--scope", choices=["global", "layer", "ramp", "cka", "erk"], default="global",
        help="rank over the network, in each layer, or with layer rates by depth, similarity or shape")
    add("--granularity", choices=["weight", "channel"], default="weight", help="channel: truly smaller")
    add("--arms", nargs="+", choices=ARMS, default=["rewind", "reinit", "random"],
        help="how a ticket restarts (default: rewind reinit random)")
    add("--control-rounds", nargs="+", type=positive_int, metavar="R",
        help="rounds at which the other arms are run (default: the last)")
    add("--rewind", type=fraction, default=0.05,
        help="rewind to this share of the steps; 0 is the original hypothesis (default: 0.05)")
    add("--inception", metavar="PATH", help="the FID checkpoint, where it is not in the data folder")
    add("--seeds", nargs="+", type=seed_number, default=[0], help="3 or more give a verdict (default: 0)")
    args = parser.parse_args(argv)
    fill_defaults(args)
    if args.final_sparsity is not None:
        if args.prune_rate is not None:
            parser.error("argument --prune-rate: --final-sparsity sets it; give one of them")
        args.prune_rate = 1 - (1 - args.final_sparsity) ** (1 / args.rounds)
    elif args.prune_rate is None:
        args.prune_rate = 0.2  # 1803.03635, section 3
    args.control_rounds = sorted(set(args.control_rounds or [args.rounds]))
    args.out = args.out or f"runs/{args.dataset}" + ("" if args.method == "imp" else f"_{args.method}")
    check_args(args, parser)
    return args, parser


def check_args(args, parser):
    """Refuse, with the flag named, what no single flag's type can see."""
    if args.samples < 4:
        parser.error("argument --samples: precision and recall, by 3 neighbours, need 4 at least")
    if round(args.rewind * args.steps) >= args.steps:
        parser.error(f"argument --rewind: {args.rewind} of {args.steps} steps leaves none to train")
    if not 0 < args.prune_rate:
        parser.error("argument --prune-rate: 0 prunes nothing")
    if args.control_rounds[-1] > args.rounds:
        parser.error(f"argument --control-rounds: {args.control_rounds[-1]} is beyond --rounds {args.rounds}")
    if "rewind" not in args.arms:
        parser.error("argument --arms: rewind makes the tickets that the other arms restart; add it")
    if args.granularity == "channel" and (args.method not in ("imp", "oneshot") or args.score != "magnitude"
                                          or args.scope not in ("global", "layer")):
        parser.error("argument --granularity: channel goes with --method imp or oneshot, --score magnitude, "
                     "--scope global or layer")
    if args.compile and args.granularity == "channel":
        parser.error("argument --compile: every channel ticket has a shape of its own and would be compiled "
                     "anew; leave it out")
    if args.method in SCOPES and args.scope not in ("global", SCOPES[args.method]):
        parser.error(f"argument --scope: {args.method} prescribes {SCOPES[args.method]}")
    if args.score == "taylor" and args.method not in ("imp", "oneshot"):
        parser.error(f"argument --score: {args.method} chooses before there is anything to rank")
    if args.method == "rst" and round(RST_SHARE * args.steps) < 20:
        parser.error(f"argument --steps: {args.steps} are too few for rst, which needs 40")
    if len(set(args.seeds)) < len(args.seeds):
        parser.error("argument --seeds: each one once, please")


def rewind_step(args):
    """The step that tickets are rewound to; 0 for methods that choose before training."""
    return 0 if args.method in BEFORE_TRAINING else round(args.rewind * args.steps)


def plan(args):
    """Every job, in the order in which they can be done."""
    jobs = []
    for seed in args.seeds:
        jobs.append(Job(seed, 0, "dense"))
        if rewind_step(args) > 0 or args.scope == "cka":  # else the twin is the dense run again
            jobs.append(Job(seed, 0, "twin"))
        if args.scope == "cka":
            jobs.append(Job(seed, 0, "probe"))
        for round in range(1, args.rounds + 1):
            if args.method == "imp" or round in args.control_rounds:
                jobs += [Job(seed, round, "transform")] if args.method == "rst" else []
                jobs.append(Job(seed, round, "rewind"))
            if round in args.control_rounds:
                jobs += [Job(seed, round, arm) for arm in args.arms if arm != "rewind"]
    return jobs


# ------------------------------------------------------------------------------------------ the experiment

class Experiment:
    """What all jobs share: data, noise schedule, the ruler, device and precision."""

    def __init__(self, args):
        self.args = args
        self.device, self.why_device = pick_device(args.device)
        self.precision, self.why_precision = pick_precision(args.precision, self.device)
        self.images, labels = load_images(args.dataset, args.data_dir)
        self.test, _ = load_images(args.dataset, args.data_dir, "test")
        self.diffusion, self.decode = Diffusion(schedule=args.schedule, prediction=args.prediction), None
        self.classifier = metrics.load_classifier(args.dataset, self.images, labels)
        n = min(args.samples, len(self.test))
        self.real = metrics.random_draw(self.test, n)  # what samples meet where all training images are many
        self.rulers = {"_domain": self.ruler(self.classifier)}
        self.why_inception = self.find_inception()
        self.images = self.images.to(self.device)
        self.k = rewind_step(args)

    def ruler(self, model):
        """(extractor, its statistics of all training images, its features of n real ones, its floor at n)."""
        name, n = self.args.dataset, len(self.real)
        return (model, metrics.reference_statistics(model, self.images, name),
                metrics.features(model, self.real),
                metrics.floor(model, self.images, self.test, n, name))

    @property
    def floor(self):
        """{column: what n real test images score}; n is at most the number of samples."""
        return {column + name: value for name, (*_, floor) in self.rulers.items()
                for column, value in floor.items()}

    def find_inception(self):
        """Make Inception a ruler too; say so, or why its columns stay blank."""
        a = self.args
        if self.device.type == "cpu" and not a.inception:
            return f"blank: {len(self.images):,} images take long on a CPU; --inception PATH computes it"
        try:
            model = metrics.load_inception(a.inception, a.data_dir).to(self.device)
        except OSError as error:
            if a.inception:  # asked for by name: going on without it would hide the mistake
                raise
            return f"blank: {error}"
        self.rulers[""] = self.ruler(model)
        return f"Inception, floor {self.floor['fid']:.2f} at n={len(self.real):,}"

    # models and tickets

    def new_model(self, seed, **config):
        """A U-Net as seed initialises it; the caller's random state is left alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = dict(channels=self.images.shape[1], image_size=self.images.shape[-1],
                          **PRESETS[self.args.preset]) | config
            try:
                return UNet(**config).to(self.device)
            except ValueError as error:
                raise ValueError(f"argument --preset: {self.args.preset} does not fit {self.args.dataset}: "
                                 f"{error}") from error

    def load(self, job):
        """The finished state of a job."""
        return load_state(job.path(self.args.out), FINISHED)

    def rebuild(self, state, weights="model"):
        """(model, masks) of a finished state: online weights, or weights="ema"."""
        model = UNet(**state["config"]).to(self.device)
        model.load_state_dict(state[weights])
        return model, unpack_masks(model, state["masks"])

    def theta(self, seed):
        """The dense model at step k of its training, which tickets are rewound to."""
        model = self.new_model(seed)
        model.load_state_dict(load_state(theta_path(self.args.out, seed))["model"])
        return model

    def parent(self, job):
        """The run that this job's ticket comes from; None for methods that choose before any training."""
        method = self.args.method
        if job.arm in ("dense", "transform", "small"):
            return None
        if job.round == 0 or method == "oneshot":
            return Job(job.seed, 0, "dense")
        if method == "imp":
            return Job(job.seed, job.round - 1, "rewind" if job.round > 1 else "dense")
        if method == "rst" and job.arm == "rewind":
            return Job(job.seed, job.round, "transform")
        moved = method in ("rigl", "set") and job.arm != "rewind"  # their mask is known at the end only
        if moved:
            return Job(job.seed, job.round, "rewind")
        return Job(job.seed, 0, "dense") if job.arm == "finetune" else None

    def scores(self, job, model):
        """What weights are ranked by."""
        generator = torch.Generator().manual_seed(MASK_SEED + 1000 * job.round + job.seed)
        if self.args.method == "magnitude-init":
            return init_scores(model, generator)
        if self.args.method in ("random", "rigl", "set", "rst"):
            return random_scores(model, generator)
        model.eval()  # no dropout in what weights are ranked by
        if self.args.score == "magnitude":
            return {name: p.detach().abs() for name, p in prunable(model).items()}
        T, device = self.diffusion.T, self.device
        x0, _, noise = batch_at(self.images, 0, MASK_SEED // 1000 + job.seed, self.args.batch, False, T,
                                torch.Generator(device))
        times = (torch.full((len(x0),), t, device=device) for t in range(0, T, T // TAYLOR_STEPS))
        return taylor_scores(model, (self.diffusion.loss(model, x0, t, noise) for t in times))

    def find_masks(self, job):
        """The ticket of this round: from the weights that the parent ended with, or from theta_0."""
        a, iterates = self.args, self.args.method == "imp"
        if a.method in ("imp", "oneshot"):
            model, masks = self.rebuild(self.load(self.parent(job)))
        else:
            model = self.new_model(job.seed)
            masks = dense_masks(model)
        fraction = a.prune_rate if iterates else 1 - (1 - a.prune_rate) ** job.round
        scope, rates = SCOPES.get(a.method, a.scope), None
        if scope == "ramp":
            scope, rates = "global", ramp_rates(model, a.prune_rate)
        elif scope == "cka":
            scope, rates = "global", cka_rates(model, self.similarity(job.seed), a.prune_rate)
        return prune_scores(self.scores(job, model), masks, fraction, scope, rates)

    def similarity(self, seed):
        """block_similarity of two dense runs from one theta_k that saw the data in different orders."""
        return block_similarity(*(self.rebuild(self.load(Job(seed, 0, arm)))[0] for arm in ("twin", "probe")))

    def find_channels(self, job):
        """Which hidden channels of the dense network live in this round's channel ticket."""
        before, a = self.load(self.parent(job)), self.args
        model, _ = self.rebuild(before)
        channels = before["channels"] or dense_channels(model)
        fraction = a.prune_rate if a.method == "imp" else 1 - (1 - a.prune_rate) ** job.round
        left, found = prune_channels(model, dense_channels(model), fraction, a.scope), {}
        for block, old in channels.items():  # from positions in the smaller network to the dense one's
            found[block] = old.clone()
            found[block][old] = left[block]
        return found

    def ticket(self, job):
        """(masks, channels) of a job: one of them None, both for a dense network."""
        if job.arm in ("dense", "twin", "probe", "small"):
            return None, None
        channel = self.args.granularity == "channel"
        if job.arm in ("rewind", "transform"):
            return (None, self.find_channels(job)) if channel else (self.find_masks(job), None)
        state = self.load(Job(job.seed, job.round, "rewind"))  # a control restarts the ticket that was found
        generator = torch.Generator().manual_seed(MASK_SEED + 1000 * job.round + job.seed)
        if channel:
            return None, (random_channels(state["channels"], self.new_model(job.seed), generator)
                          if job.arm == "random" else state["channels"])
        masks = self.rebuild(state)[1]
        return (random_masks(masks, generator) if job.arm == "random" else masks), None

    def start(self, job):
        """(model, masks, channels, first step, changed training options): how this arm restarts."""
        masks, channels = self.ticket(job)
        first, changed = self.k, {}
        if job.arm in ("dense", "transform"):
            model, first = self.new_model(job.seed), 0
        elif job.arm == "small":
            row = self.load(Job(job.seed, job.round, "rewind"))["row"]
            model = self.new_model(job.seed)
            rest = sum(p.numel() for p in model.parameters()) - row["total_weights"]  # biases and norms
            model, first = self.new_model(job.seed, **narrower(model.config, row["live_weights"] + rest)), 0
        elif job.arm == "reinit":
            model, first = self.new_model(REINIT_SEED + job.seed), 0
        elif job.arm == "rewind" and self.args.method == "rst":
            model, _ = self.rebuild(self.load(self.parent(job)))
        elif job.arm == "finetune":
            before = self.load(self.parent(job))
            model, _ = self.rebuild(before)
            changed = dict(lr=FINETUNE_LR * self.args.lr, lr_schedule="constant", warmup=0)
            if channels is not None and before["channels"]:  # positions in the parent's smaller network
                channels_here = {block: channels[block][old] for block, old in before["channels"].items()}
                return shrink(model, channels_here), None, channels, first, changed
        else:
            model = self.theta(job.seed)
        if channels is not None:
            model = shrink(model, channels)
        elif masks is not None and job.arm != "transform":
            apply_masks(model, masks)
        return model, masks, channels, first, changed

    # one job

    def options(self, job, **changed):
        """Keyword arguments of ddpm.train: arms of one seed share them, and so their batches, t and noise."""
        a = self.args
        order = PROBE_SEED + job.seed if job.arm == "probe" else job.seed
        steps = round(RST_SHARE * a.steps) if job.arm == "transform" else a.steps
        return dict(steps=steps, batch=a.batch, lr=a.lr, lr_schedule=a.lr_schedule, optimizer=a.optimizer,
                    beta2=a.beta2, ema_decay=a.ema, flip=a.dataset.startswith("cifar"), seed=order,
                    precision=self.precision, warmup=max(1, a.steps // 20), label=str(job)) | changed

    def hooks(self, job, model, masks):
        """(hooks of ddpm.train, RigL or None) that keep, move or squeeze out this job's masks."""
        a = self.args
        if job.arm == "dense":
            return dict(after_step=self.keep_theta(job, model)), None
        if job.arm == "transform":
            return rst_hooks(model, masks, round(RST_SHARE * a.steps)), None
        if masks is None:
            return {}, None
        if a.method in ("rigl", "set") and job.arm == "rewind":
            moving = RigL(model, masks, a.steps, every=self.rigl_every(), seed=job.seed,
                          grow="gradient" if a.method == "rigl" else "random")
            return dict(after_backward=moving.after_backward, after_step=moving.after_step), moving
        return mask_hooks(model, masks), None

    def rigl_every(self):
        """Steps between two moves of the masks: 100 (1911.11134), less on short runs."""
        return max(1, min(100, self.args.steps // 50))

    def train(self, job, guard):
        """Train one job, going on from its partial state if there is one: (model, ema, masks, the rest)."""
        partial = job.path(self.args.out, ".partial.pt")
        model, masks, channels, start, changed = self.start(job)
        same_on_all_ranks(masks)
        state = load_state(partial, PARTIAL) if os.path.exists(partial) else None
        if state and state["masks"] is not None:  # as they were: a score need not come out equal twice
            masks = unpack_masks(model, state["masks"])
        hooks, moving = self.hooks(job, model, masks)
        before, began = (state["seconds"] if state else 0.0), time.monotonic()

        def save(state):
            now = moving.masks if moving else masks
            save_state(partial, state | dict(seconds=before + time.monotonic() - began,
                                             masks=None if now is None else pack_masks(now)))
        with guard.training(save):
            ema, losses = train(model, self.diffusion, self.images, start=start, state=state,
                                checkpoint=guard, **self.options(job, **changed), **hooks)
        same_on_all_ranks(moving and moving.masks)
        if job.arm == "transform" or masks is None:
            masks = dense_masks(model)  # nothing is cut yet, or what was cut is gone from the network
        return model, ema.model, moving.masks if moving else masks, dict(
            channels=channels, losses=losses, seconds=before + time.monotonic() - began,
            steps=self.options(job)["steps"] - start)

    def keep_theta(self, job, model):
        """A hook that saves theta_k, once, in the dense run; theta_0 is saved at once."""
        path = theta_path(self.args.out, job.seed)
        if self.k == 0:
            save_state(path, dict(model=model.state_dict()))

        def after_step(step, model, optimizer, ema):
            if step + 1 == self.k:
                check_finite(model, self.k, str(job))
                save_state(path, dict(model=model.state_dict()))
        return after_step

    def evaluate(self, job, model, masks):
        """The quality and cost columns of one trained model (the EMA), and its first samples as pictures."""
        a, shape = self.args, self.images.shape[1:]
        with metrics.PeakMemory(self.device) as memory:
            began = time.monotonic()
            samples = self.draw(model, label=f"{job}: sample")
            seconds = time.monotonic() - began
        macs = metrics.count_macs(model, torch.zeros(1, *shape, device=self.device),
                                  torch.zeros(1, dtype=torch.int64, device=self.device), masks)
        ticket, first = job.path(a.out, ".ticket"), ranks()[0] == 0
        if first:
            with atomic(ticket) as temporary:
                save_ticket(temporary, model, masks)
        return samples[:16], self.quality(samples) | dict(
            n_samples=a.samples, val_loss=self.val_loss(model), macs_dense=sum(d for d, _ in macs.values()),
            macs_live=sum(live for _, live in macs.values()),
            ticket_bytes=os.path.getsize(ticket) if first else None,
            seconds_per_1000=1000 * seconds / a.samples, sample_memory=memory.bytes)

    def draw(self, model, n=None, x_T=None, **changed):
        """n samples uint8 (n, C, H, W) of a model, from the x_T that all models share or the one given."""
        a = self.args
        options = dict(precision=self.precision, compile=a.compile, sampler=a.sampler, steps=a.nfe,
                       decode=self.decode) | changed
        x_T = self.x_T(n or a.samples) if x_T is None else x_T
        return draw_samples(model, self.diffusion, x_T, **options)

    def quality(self, samples):
        """The quality columns of uint8 samples: those in the domain classifier's features end in _domain."""
        measured = {name: metrics.quality(model, samples, real, reference, shared_features)
                    for name, (model, reference, real, _) in self.rulers.items()}
        return {key + name: value for name, columns in measured.items() for key, value in columns.items()}

    def x_T(self, n):
        """The starting noise (n, C, H, W) that every model is sampled from."""
        return torch.randn(n, *self.images.shape[1:], generator=torch.Generator().manual_seed(EVAL_SEED))

    def val_loss(self, model):
        """Held-out mean squared error on eps (or v), t spread evenly, noise fixed: paired across tickets."""
        predict = denoiser(model, self.precision, self.args.compile)
        generator = torch.Generator().manual_seed(EVAL_SEED)
        x0 = as_input(self.test[:VAL_IMAGES])
        t = torch.linspace(0, self.diffusion.T - 1, len(x0)).round().long()
        noise = torch.randn(x0.shape, generator=generator)
        parts, (rank, world) = list(zip(*(v.to(self.device).split(250) for v in (x0, t, noise)))), ranks()
        return over_ranks(sum(self.diffusion.loss(predict, *part).item() * len(part[0])
                              for part in parts[rank::world])) / len(x0)

    def spent(self, job, steps, macs_dense, macs_live):
        """What it took to get here, the runs before included: training steps, and MACs at 3 live network
        evaluations an image and step (forward, and twice backward): what a sparse machine would do."""
        parent, each = self.parent(job), 3 * macs_live
        if self.args.method == "rigl" and job.arm == "rewind":  # now and then a dense gradient (1911.11134)
            every = self.rigl_every()
            each = (3 * macs_live * every + 2 * macs_live + macs_dense) / (every + 1)
        before = dict(train_steps_total=0, train_macs_total=0)
        if job.round == 0 and parent:  # theta_k is all that it takes from the dense run
            before = dict(train_steps_total=self.k, train_macs_total=each * self.args.batch * self.k)
        elif parent:
            before = self.load(parent)["row"]
        macs = before["train_macs_total"] + each * self.args.batch * steps
        if self.args.scope == "cka" and parent and parent.round == 0 < job.round:  # two dense runs
            similar = 2 * (self.args.steps - self.k)
            steps, macs = steps + similar, macs + 3 * macs_dense * self.args.batch * similar
        return dict(train_steps_total=before["train_steps_total"] + steps, train_macs_total=round(macs))

    def fit(self, name, seed, model, masks=None, /, **changed):
        """For the studies: train a model, in place, as an arm of this seed is trained on from step k, and
        return its EMA. changed: options of ddpm.train, such as seed, the order of the data. The end is kept
        in the run's folder, and taken from there when all that went into it is the same."""
        if masks is not None:
            apply_masks(model, masks)
        options = self.options(Job(seed, 0, "rewind"), label=name, start=self.k) | changed
        path = f"{self.args.out}/studies/{name}.pt"
        key = f"{options} {metrics.weights_hash(model)} {masks and masks_hash(masks)}"
        if os.path.exists(path):
            state = load_state(path, ("key", "model", "ema"))
            if state["key"] == key:
                ema = UNet(**model.config).to(self.device)
                ema.load_state_dict(state["ema"])
                model.load_state_dict(state["model"])
                return ema
        hooks = {} if masks is None else mask_hooks(model, masks)
        ema = train(model, self.diffusion, self.images, **options, **hooks)[0].model
        save_state(path, dict(key=key, model=model.state_dict(), ema=ema.state_dict()))
        return ema

    def run(self, job, guard):
        """Do one job from start to its saved state; return its row of the table."""
        with metrics.PeakMemory(self.device) as memory:
            model, ema, masks, done = self.train(job, guard)
        live = sum(live_counts(masks).values())
        total = sum(p.numel() for p in prunable(self.new_model(0)).values())
        pictures, measured = self.evaluate(job, ema, masks)
        row = dict(seed=job.seed, round=job.round, arm=job.arm, sparsity=1 - live / total, live_weights=live,
                   total_weights=total, train_loss=done["losses"][-1][1], train_seconds=done["seconds"],
                   train_memory=memory.bytes, steps=done["steps"])
        row |= measured | self.spent(job, row["steps"], measured["macs_dense"], measured["macs_live"])
        save_state(job.path(self.args.out), dict(
            config=model.config, model=model.state_dict(), ema=ema.state_dict(), masks=pack_masks(masks),
            channels=done["channels"], losses=done["losses"], row=row, pictures=pictures))
        return row


def block_similarity(a, b):
    """{residual block: mean CKA of its convolutions' weights in two models of one shape} (2310.18823 compares
    tickets so); NaN where every row of a layer is alike."""
    other, by_block, owner = prunable(b), {}, blocks_of(a)
    for name, p in prunable(a).items():
        if p.dim() == 4 and len(p) > 3:
            value = metrics.cka(p.detach().cpu(), other[name].detach().cpu())
            by_block.setdefault(owner[name], []).append(value)
    return {block: float(np.mean(values)) for block, values in by_block.items()}


class Guard:
    """Decides when a training state is saved: every minute, and at once on Ctrl-C or SIGTERM."""
    EVERY = 60.0  # seconds

    def __init__(self):
        self.save, self.stop, self.last = None, False, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.save is None or self.stop:  # nothing to save, or asked twice
            raise KeyboardInterrupt
        self.stop = True

    @contextlib.contextmanager
    def training(self, save):
        self.save, self.last = save, time.monotonic()
        try:
            yield
        finally:
            self.save = None

    def __call__(self, get_state):
        self.stop = any_rank(self.stop)  # else the others would wait for a rank that has gone
        if self.stop or time.monotonic() - self.last > self.EVERY:
            self.save(get_state())
            self.last = time.monotonic()
        if self.stop:
            raise KeyboardInterrupt


# ------------------------------------------------------------------------------ several ranks, under torchrun

def join_ranks():
    """Under torchrun: meet the other ranks, over gloo on CPUs and NCCL on GPUs. Rank 0 alone speaks."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
                            timeout=datetime.timedelta(hours=4))  # rank 0 measures while the others wait
    if ranks()[0]:
        sys.stdout = open(os.devnull, "w")


def over_ranks(value):
    """The sum of a number over all ranks."""
    if ranks()[1] == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item()


def any_rank(flag):
    """Whether the flag is up on any rank."""
    return over_ranks(float(flag)) > 0


def shared_features(model, images, logits=True):
    """metrics.features, of which every rank computes a share and has the whole."""
    rank, world = ranks()
    shares = [None] * world
    mine = metrics.features(model, images.tensor_split(world)[rank], logits=logits)
    if world == 1:
        return mine
    dist.all_gather_object(shares, mine)
    return tuple(map(torch.cat, zip(*shares))) if logits else torch.cat(shares)


def wait_for_all():
    """Go on when every rank has come here: what rank 0 wrote before is there for all."""
    any_rank(False)


def masks_hash(masks):
    """SHA-256 of all bits of masks."""
    bits = b"".join(value.numpy().tobytes() for value in pack_masks(masks).values())
    return hashlib.sha256(bits).hexdigest()


def same_on_all_ranks(masks):
    """RuntimeError when the ranks have come to different masks."""
    found = [None] * ranks()[1]
    if masks is not None and len(found) > 1:
        dist.all_gather_object(found, masks_hash(masks))
        if len(set(found)) > 1:
            raise RuntimeError("the ranks have come to different masks: they do not share one --out folder")


# ------------------------------------------------------------------------------------------ files of a run

def theta_path(out, seed):
    return os.path.join(out, f"seed{seed}", "theta_k.pt")


def save_state(path, state):
    """Write a state file in one piece or not at all, on rank 0. OSError when the disk will not take it."""
    if ranks()[0]:
        return
    with atomic(path) as temporary:
        torch.save(dict(format=FORMAT, **state), temporary)


def load_state(path, needed=()):
    """A dict that save_state wrote. Raises OSError naming a file that is damaged, of another version or
    without what is needed of it."""
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:  # torch.load does not compare checksums
                raise ValueError("a flipped bit")
        state = torch.load(path, weights_only=True, map_location="cpu")
        version, _ = state["format"], [state[name] for name in needed]
    except FileNotFoundError:
        raise OSError(f"{path} is missing, though later runs build on it; delete {os.path.dirname(path)} and "
                      "run again, or use a new --out")
    except Exception as error:  # a damaged file fails in a dozen ways
        raise OSError(f"{path} is damaged ({type(error).__name__}); delete it and run again")
    if version != FORMAT:
        raise OSError(f"{path} is of another version (format {version}, not {FORMAT}); use a new --out")
    return state


@contextlib.contextmanager
def alone_in(out):
    """Hold the folder: a second run on it is refused. The lock goes with its process, however that ends."""
    if ranks()[0]:  # rank 0 holds it for all
        yield
        return
    with open(os.path.join(out, "lock"), "a") as file:
        with contextlib.suppress(ImportError):  # Windows has no such locks: there it is left to the user
            import fcntl
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OSError(f"{out} is in use by another run: wait for it, or choose another --out")
        for path in glob.glob(os.path.join(glob.escape(out), "**", "*.part"), recursive=True):
            remove(path)  # what a killed process was writing
        yield


def remove(path):
    """Delete a file, if it is there and this is rank 0."""
    if ranks()[0] == 0:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


FREE = ("device", "precision", "compile", "data_dir", "out", "inception", "seeds")  # may differ later
EARLIER = dict(beta2=0.999)  # what runs did before there was a flag, where today's default is another


def check_config(args, parser):
    """Refuse to mix two experiments in one folder; name the flag that differs. Seeds add up: none that has
    begun may be left out of the table."""
    now = vars(args)
    if os.path.exists(os.path.join(args.out, "config.json")):
        then = read_config(args.out)["args"]
        for name in now:
            if name not in FREE and then.get(name) != now[name]:
                flag = "--" + name.replace("_", "-")
                parser.error(f"argument {flag}: {args.out} was made with {then.get(name)}, not "
                             f"{now[name]}; choose another --out, or the same flags to go on")
        args.seeds = list(dict.fromkeys([*then["seeds"], *args.seeds]))
    return now


def read_config(out):
    """config.json of a run's folder, with flags that are newer than the run as it did without them. OSError
    where there is none, or another file of that name."""
    path = os.path.join(out, "config.json")
    way_out = "name a folder that lth_diffusion.py wrote, or a new --out"
    found = metrics.read_file(path, way_out)
    if not isinstance(found, dict) or not isinstance(found.get("args"), dict) or "commit" not in found \
            or found["args"].get("dataset") not in DEFAULTS or not found["args"].get("seeds") \
            or not isinstance(found["args"].get("rounds"), int):
        raise OSError(f"{path} is damaged: {way_out}")
    usual, _ = parse_args(["--dataset", found["args"]["dataset"]])
    return found | dict(args=vars(usual) | EARLIER | found["args"])


@functools.lru_cache(maxsize=None)
def commit():
    """What git says of this code when first asked, before results count as a change to it; or None."""
    with contextlib.suppress(OSError):  # no git here
        return subprocess.run(["git", "-C", metrics.HERE, "describe", "--always", "--dirty", "--abbrev=12"],
                              capture_output=True, text=True).stdout.strip() or None


def provenance(command, device="cpu", **facts):
    """Where figures come from: command, commit, machine, package versions, and what the caller adds."""
    return dict(command=command, commit=commit(), device=str(device), processor=processor_name(device),
                threads=torch.get_num_threads(),
                versions=dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                              scipy=scipy.__version__, pillow=PIL.__version__)) | facts


def check_rounds(rounds, jobs):
    """ValueError when --rounds, as the studies have it, names one that none of the jobs is of."""
    if absent := sorted(set(rounds) - {job.round for job in jobs}):
        there = sorted({job.round for job in jobs})
        raise ValueError(f"argument --rounds: no runs of round {absent[0]}, but of {there}")


def processor_name(device):
    """What the processor calls itself."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()


def read_rows(args):
    """{job: row} of the jobs that are done, from their state files."""
    done = [job for job in plan(args) if os.path.exists(job.path(args.out))]
    return {job: load_state(job.path(args.out), FINISHED)["row"] for job in done}


def write_results(args, rows):
    """results.csv, a line a job, in the order of the plan."""
    with atomic(os.path.join(args.out, "results.csv")) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows[job] for job in plan(args) if job in rows)


# ----------------------------------------------------------------------------------- what is said and shown

def announce(exp, jobs, rows):
    """Print device and why, model, plan, and how long it will take here; return seconds a job, by arm."""
    a, model, timing, cost = exp.args, exp.new_model(0), "", {}
    weights = sum(p.numel() for p in prunable(model).values())
    total = sum(p.numel() for p in model.parameters())
    if len(rows) < len(jobs):
        began = time.monotonic()
        network, took, gain = time_network(exp, model, a.compile), time.monotonic() - began, ""
        step = time_step(exp, model)
        if exp.precision == "bf16":
            gain += f"; {time_step(exp, model, precision='fp32') / step:.2f} times as fast as fp32"
        if a.compile:
            plain = time_network(exp, model)
            gain += f"; compiled in {took:.0f} s, sampling {plain / network:.2f} times as fast"
        share = 1 - exp.k / a.steps
        whole = dict.fromkeys(("dense", "reinit", "small"), 1.0) | {"transform": RST_SHARE}
        cost = {arm: a.steps * step * whole.get(arm, share) + (a.samples * a.nfe + VAL_IMAGES) * network
                for arm in ("dense", "twin", "probe", "transform", *ARMS)}
        left = sum(cost[job.arm] for job in jobs if job not in rows)
        timing = f"; about {clock(left)} to go here ({step:.3f} s a step of {a.batch}{gain})"
    print(f"device     {exp.device} ({exp.why_device}), {exp.precision} ({exp.why_precision})\n"
          f"data       {a.dataset}: {len(exp.images):,} training and {len(exp.test):,} test images; domain "
          f"classifier {metrics.weights_hash(exp.classifier)}, floor {exp.floor['fid_domain']:.2f} at n="
          f"{len(exp.real):,}\n"
          f"fid        {exp.why_inception}\n"
          f"model      U-Net {a.preset}: {total:,} parameters, {weights:,} of them prunable\n"
          f"plan       seeds {a.seeds}; {a.method} by {a.granularity}, {a.scope}, {a.rounds} rounds of "
          f"-{100 * a.prune_rate:.1f} %, down to {100 * (1 - a.prune_rate) ** a.rounds:.1f} % of the "
          f"{'weights' if a.granularity == 'weight' else 'hidden channels'}; rewind to "
          f"step {exp.k} of {a.steps}\n"
          f"           {len(jobs)} runs, {len(rows)} of them done{timing}", flush=True)
    return cost


def time_step(exp, model, repeats=5, **changed):
    """Median seconds of a training step, after two to warm up; at rate 0, so that it cannot diverge."""
    marks = []
    train(model, exp.diffusion, exp.images, after_step=lambda *_: marks.append(time.monotonic()),
          **exp.options(Job(0, 0, "dense"), steps=repeats + 2, lr=0.0, label="timing", **changed))
    return float(np.median(np.diff(marks)[1:]))


def time_network(exp, model, compile=False, batch=256):
    """Median seconds of one network evaluation of one image in a sampling batch."""
    predict, x = denoiser(model, exp.precision, compile), exp.x_T(batch).to(exp.device)
    t = torch.zeros(batch, dtype=torch.int64, device=exp.device)
    return float(np.median(metrics.seconds_in_turns([lambda: predict(x, t)], 3, device=exp.device))) / batch


def clock(seconds):
    """3 min, 1 h 05 min."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def summarise(rows, floor, n):
    """The table at the end: for every round and arm mean and standard deviation over seeds; the floor."""
    groups, shown = {}, [*filter(floor.__contains__, QUALITY), "val_loss"]
    for row in rows.values():
        groups.setdefault((row["round"], row["arm"]), []).append(row)
    table = []
    for (round, arm), group in groups.items():
        def spread(name):
            values, form = [row.get(name, np.nan) for row in group], FORMS.get(name, "{:.2f}")
            deviation = f" ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 else ""
            return form.format(np.mean(values)) + deviation
        one = group[0]
        table.append([round, arm, f"{100 * one['sparsity']:.1f} %", f"{one['live_weights']:,}", len(group),
                      *map(spread, shown), f"{one['macs_live'] / 1e6:.1f}",
                      f"{one['ticket_bytes'] / 1e3:,.0f}",
                      f"{np.mean([r['train_seconds'] for r in group]):.0f}",
                      f"{np.mean([r['seconds_per_1000'] for r in group]):.1f}"])
    header = ["round", "arm", "pruned", "live weights", "seeds", *(QUALITY.get(name, name) for name in shown),
              "live MMACs", "ticket kB", "train s", "s/1000"]
    floors = [FORMS.get(name, "{:.2f}").format(floor[name]) if name in floor else "" for name in shown]
    return header, [*table, ["", "floor", f"n={n:,}", "", "", *floors, *[""] * 4]]


def conclude(exp, rows):
    """One sentence a control round: the verdict, or without three seeds the figures and 'no verdict'."""
    a, said, tables = exp.args, [], {}
    for round in a.control_rounds if {"reinit", "random"} <= set(a.arms) else ():
        keys = dict(dense=(0, "dense"), ticket=(round, "rewind"), reinit=(round, "reinit"),
                    random=(round, "random"))
        tables[round] = {name: {job.seed: row["fid_domain"] for job, row in rows.items() if job[1:] == key}
                         for name, key in keys.items()}
    for round, verdict in metrics.verdicts(tables, margin=MARGIN).items():
        means = {name: np.mean(list(values.values())) for name, values in tables[round].items() if values}
        if len(means) == 4:
            pruned = 100 * next(row["sparsity"] for job, row in rows.items() if job[1:] == (round, "rewind"))
            figures = ", ".join(f"{name} {value:.1f}" for name, value in means.items())
            said.append(f"At {pruned:.1f} % sparsity fid_domain is {figures} "
                        f"(floor {exp.floor['fid_domain']:.1f}); {verdict}.")
    if a.samples < 10_000:
        said.append(f"{a.samples:,} samples a figure: not comparable with papers, only within this table.")
    return "\n".join(said)


def draw_everything(exp, rows):
    """The pictures of a run, from its state files: samples, quality, layers, loss curves."""
    a, seed = exp.args, exp.args.seeds[0]
    states = {job: exp.load(job) for job in rows if job.seed == seed}
    note = (f"{a.dataset}, U-Net {a.preset}, {a.steps:,} steps of {a.batch}, rewind to step {exp.k}; "
            f"{a.sampler} with {a.nfe} network evaluations; n={a.samples:,} samples; seeds {a.seeds}.")
    tiles = [(f"{job.arm}\n{100 * rows[job]['sparsity']:.1f} % pruned\nfid {rows[job]['fid_domain']:.1f}",
              state["pictures"][:12]) for job, state in states.items()]
    sample_rows(tiles, os.path.join(a.out, "samples_by_sparsity.png"),
                "The same starting noise at every sparsity",
                f"Columns share x_T. fid: fid_domain. Seed {seed}. {note}")
    draw_quality(exp, rows, note)
    draw_layers(exp, {job: state for job, state in states.items() if job.arm in ("dense", "rewind")}, note)
    line_chart([dict(label=f"{job.arm} {100 * (1 - rows[job]['sparsity']):.0f} %",
                     x=[s for s, _ in state["losses"]], y=[loss for _, loss in state["losses"]],
                     style="solid" if job.arm in ("dense", "rewind") else "dashed")
                for job, state in states.items() if job.round in (0, *a.control_rounds)],
               os.path.join(a.out, "losses.png"), "Training loss", "step", "mean squared error on eps",
               log_y=True, note=f"Percentages: live weights. Means of 1 % of the steps. Seed {seed}. {note}")


def draw_layers(exp, states, note):
    """Density of every layer by round; a channel ticket's layers are compared with the dense network's."""
    sizes = {name: p.numel() for name, p in prunable(exp.new_model(0)).items()}
    live = {job: live_counts(exp.rebuild(state)[1]) for job, state in states.items()}
    heat_map([[live[job][name] / size for job in states] for name, size in sizes.items()],
             [name.removesuffix(".weight") for name in sizes], [str(job.round) for job in states],
             os.path.join(exp.args.out, "layers.png"),
             "Where the ticket lives: density of every layer by round", note, log=True,
             x_label="round", bar_label="live / all")


def draw_quality(exp, rows, note):
    """fid_domain against sparsity: arms as lines, dense dashed, floor dotted, seeds as dots."""
    a, series = exp.args, []
    dense = float(np.mean([row["fid_domain"] for job, row in rows.items() if job.arm == "dense"]))
    levels = [("dense", dense, "dashed"),
              (f"floor: {len(exp.real):,} test images", exp.floor["fid_domain"], "dotted")]
    labels = {"twin": "dense, rewound (twin)", "rewind": "ticket (rewind)", "reinit": "same mask, new init",
              "random": "shuffled mask", "finetune": "same mask, fine-tuned", "small": "narrower, dense",
              "transform": "transformed, uncut", "probe": "other data order"}
    for arm in labels:
        by_round = {}
        for job, row in rows.items():
            if job.arm == arm:
                by_round.setdefault(job.round, []).append(row["fid_domain"])
        if by_round:
            means, n = [np.mean(v) for v in by_round.values()], max(map(len, by_round.values()))
            spread = [np.std(v, ddof=1) if len(v) > 1 else np.nan for v in by_round.values()]
            series.append(dict(label=labels[arm], x=list(by_round), y=means,
                               dots=list(by_round.values()) if n > 1 else [],
                               y_low=np.subtract(means, spread), y_high=np.add(means, spread),
                               style="solid" if arm == "rewind" else "points"))
    ticks = [(job.round, f"{100 * row['sparsity']:.0f} %") for job, row in rows.items()
             if job.arm in ("dense", "rewind") and job.seed == a.seeds[0]]
    line_chart(series, os.path.join(a.out, "quality_vs_sparsity.png"),
               "Quality of tickets and controls by sparsity", "weights pruned",
               "fid_domain (lower is better)",
               hlines=levels, x_ticks=ticks,
               note=note + " Bars: standard deviation over seeds." * (len(a.seeds) > 1))


# ------------------------------------------------------------------------------------------------- the job

def write_config(exp, settings):
    """config.json: the settings and the provenance of what is measured. ValueError where a run that goes on
    would mix two precisions, data sets or rulers in one table."""
    path, precision = os.path.join(exp.args.out, "config.json"), exp.precision
    source = provenance(
        " ".join(sys.argv), exp.device, precision=precision, ranks=ranks()[1], margin=MARGIN,
        experiment=type(exp).__name__, primary_metric="fid_domain", floor=exp.floor, floor_n=len(exp.real),
        data_hash=metrics.images_hash(exp.images), classifier_hash=metrics.weights_hash(exp.classifier))
    if os.path.exists(path):
        then = read_config(exp.args.out)
        for name, flag in (("precision", f"--precision {then.get('precision')}"),
                           ("data_hash", "the same data"), ("classifier_hash", "the same classifier")):
            if then.get(name) != source[name]:
                raise ValueError(f"{exp.args.out} was made with {name} {then.get(name)}, here it is "
                                 f"{source[name]}: use {flag}, or choose another --out")
        commits = str(then["commit"]).split(", then ")
        source["commit"] = ", then ".join(dict.fromkeys([*commits, str(source["commit"])]))
    with atomic(path) as temporary:
        metrics.write_text(temporary, json.dumps(dict(args=settings, **source), indent=1))


def run(args, parser, experiment=Experiment):
    """Do every job of the plan that is not done yet, then tell and draw what happened: (experiment, rows)."""
    settings = check_config(args, parser)
    guard, exp, jobs, rows = Guard(), experiment(args), plan(args), read_rows(args)
    wait_for_all()
    first = ranks()[0] == 0
    if first:
        write_config(exp, settings)
    cost = announce(exp, jobs, rows)
    for number, job in enumerate(jobs, 1):
        partial = job.path(args.out, ".partial.pt")
        if job in rows:
            remove(partial)  # left there when the process was killed just before it came to that
            continue
        if os.path.exists(partial):
            step = load_state(partial, PARTIAL)["step"]
            print(f"going on with {job} at step {step} of {args.steps}", flush=True)
        row = rows[job] = exp.run(job, guard)
        wait_for_all()
        if not first:
            rows[job] = exp.load(job)["row"]  # with rank 0's seconds
            continue
        remove(partial)
        write_results(args, rows)
        with open(os.path.join(args.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(row) + "\n")
        left = sum(cost[other.arm] for other in jobs if other not in rows)
        print(f"[{number}/{len(jobs)}] {job}: {100 * row['sparsity']:.1f} % pruned, {row['live_weights']:,} "
              f"live | fid_domain {row['fid_domain']:.2f} (n={row['n_samples']:,}) | val_loss "
              f"{row['val_loss']:.4f} | train {row['train_seconds']:.0f} s | about {clock(left)} to go",
              flush=True)
    if first:
        finish(exp, rows)
    return exp, rows


def run_alone(args, parser, source=None, experiment=Experiment):
    """run() for the studies: its folder made and held, the dense networks of another run's folder, source,
    taken over unless they are there: (experiment, rows)."""
    os.makedirs(args.out, exist_ok=True)
    with alone_in(args.out):
        for job in plan(args) if source not in (None, args.out) else ():
            if job.arm in ("dense", "twin"):
                theta = theta_path(source, job.seed), theta_path(args.out, job.seed)
                for old, new in ((job.path(source), job.path(args.out)), theta):
                    if os.path.exists(old) and not os.path.exists(new):
                        with atomic(new) as temporary:
                            shutil.copyfile(old, temporary)
        return run(args, parser, experiment)


def finish(exp, rows):
    """Tell and draw what happened."""
    args = exp.args
    write_results(args, rows)
    draw_everything(exp, rows)
    header, table = summarise(rows, exp.floor, len(exp.real))
    table_text, said = text_table(header, table), conclude(exp, rows)
    with atomic(os.path.join(args.out, "table.md")) as temporary:
        metrics.write_text(temporary, f"{markdown_table(header, table)}\n\n{said}")
    print(f"\n{table_text}\n\n{said}\n\nPictures and tables: {args.out}/")


def open_run(out=None):
    """(Experiment, {job: row}) of a finished run, for the studies; without a name, of the one on digits, of
    which a small one is made where there is none (minutes). OSError for a folder that holds no run."""
    args, parser = parse_args(["--rounds", "2", "--final-sparsity", "0.9"])
    small, out, rounds = out is None, out or args.out, args.rounds
    if not small or os.path.exists(os.path.join(out, "config.json")):
        found = read_config(out)
        if found.get("experiment", "Experiment") != "Experiment":  # its images are others, latents say
            raise OSError(f"{out} was made by a {found['experiment']}, which only its own study reads: name "
                          "another run")
        args = argparse.Namespace(**found["args"] | dict(out=out))
    if small and args.rounds == rounds and any(job not in read_rows(args) for job in plan(args)):
        run_alone(args, parser)
    rows = read_rows(args)
    if not rows:
        raise OSError(f"{out} holds no finished runs: name a folder that lth_diffusion.py wrote")
    return Experiment(args), rows


class Study(Parser):
    """The command line of a study: its own flags and --out; a table with its provenance at the end."""

    def __init__(self, name, doc):
        super().__init__(prog=f"studies.{name}", description=doc.split("\n")[0])
        self.add_argument("--out", default="results", help=f"folder of {name}* (default: results)")

    @contextlib.contextmanager
    def arguments(self, argv=None, owned=None):
        """The flags, for a block in which a mistake ends in one line. owned: the flags of lth_diffusion.py
        that the study sets itself; where it is given, others than the study's own are args.rest."""
        argv = sys.argv[1:] if argv is None else argv
        self.command, self.began = " ".join([f"python -m {self.prog}", *argv]), time.monotonic()
        commit()
        args, args.rest = self.parse_known_args(argv)
        if args.rest and owned is None:
            self.error(f"unrecognized arguments: {' '.join(args.rest)}")
        for flag in [word.split("=")[0] for word in args.rest]:
            if flag in owned:
                self.error(f"argument {flag}: this study sets it itself; leave it out")
        with one_line(self):
            writable([args.out], "--out")
            yield args

    def save(self, path, header, table, device="cpu", **facts):
        """path.csv, and path.json with where its figures come from."""
        cells = [[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in table]
        with atomic(path + ".csv") as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([header, *cells])
        seconds = round(time.monotonic() - self.began, 1)
        with atomic(path + ".json") as temporary:
            metrics.write_text(temporary, json.dumps(provenance(
                self.command, device, seconds=seconds, **facts), indent=1))


def main(argv=None):
    """The command line: exit code 2 for a mistake of the user's, 1 for a diverged run, 130 for Ctrl-C."""
    args, parser = parse_args(argv)
    with one_line(parser, args.out):
        join_ranks()
        if args.batch % ranks()[1]:
            raise ValueError(f"argument --batch: {args.batch} images cannot be shared by {ranks()[1]} ranks")
        writable([args.out], "--out")
        run_alone(args, parser)
        if ranks()[1] > 1:
            dist.destroy_process_group()


# ------------------------------------------------------------------------- pictures, drawn with Pillow alone

DRAW, SHRINK = 4, 2     # 4 drawn pixels a unit, averaged 2 by 2: smooth edges, sharp when shown at half size
WIDTH = 900             # units, the width of a README column
INK, MUTED, RULE, EMPTY = "#222222", "#5c5c5c", "#e4e4e4", "#dcdcdc"
PALETTE = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#444444"     # Okabe and Ito
SHAPES = dict(circle=(32, 0, 4.5), square=(4, 0, 5.7), diamond=(4, 45, 5.6), triangle=(3, 0, 5.8))
DASHES = {"solid": (1e9, 1), "points": (0, 1), "dashed": (8, 5), "dotted": (2, 4)}      # units on, off
VIRIDIS = [tuple(int(np.interp(u, range(0, 257, 32), c)) for c in zip(     # lightness rises, for every sight
    (68, 1, 84), (71, 44, 122), (59, 82, 139), (44, 113, 142), (33, 145, 140), (39, 173, 129), (92, 200, 99),
    (170, 220, 50), (253, 231, 37))) for u in range(257)]


def _size(text, size=14):
    """(width, height) of a block of text in units."""
    lines, font = text.split("\n"), ImageFont.load_default(size * DRAW)
    return max(map(font.getlength, lines)) / DRAW, 1.3 * size * len(lines) * bool(text)


def _wrap(text, size, width):
    """The words of the text in lines within width units; a longer word stands alone."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        lines[-1:] = [lines[-1], word] if lines[-1] and _size(longer, size)[0] > width else [longer]
    return "\n".join(lines)


class _Page:
    """White paper measured in units, with a title above and a note below the room asked for."""

    def __init__(self, width, height, title, note):
        title, note = _wrap(title, 19, width - 40), _wrap(note, 13, width - 40)
        self.top = round(30 + _size(title, 19)[1])
        bottom = self.top + height + 28 + _size(note, 13)[1]
        self.image = Image.new("RGB", (math.ceil(width) * DRAW, math.ceil(bottom) * DRAW), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.text(20, 16, title, 19, anchor="lt", bold=True)
        self.text(20, self.top + height + 12, note, 13, MUTED, "lt")

    def text(self, x, y, text, size=14, colour=INK, anchor="lm", bold=False, upright=False):
        """A block of lines; anchor: l, m or r, then t, m or b, of the whole block as it stands there."""
        font, share = ImageFont.load_default(size * DRAW), dict(l=0, t=0, m=0.5, r=1, b=1)
        mask = Image.new("L", [math.ceil(v * DRAW) + 2 for v in _size(text, size)])
        for n, line in enumerate(text.split("\n")):     # placed by baselines: a row of labels is level
            spot = mask.width * share[anchor[0]], (1.3 * n + 1) * size * DRAW
            ImageDraw.Draw(mask).text(spot, line, 255, font, anchor[0] + "s", stroke_width=int(bold))
        mask = mask.transpose(Image.Transpose.ROTATE_90) if upright else mask
        corner = [round(v * DRAW - share[a] * extent) for v, a, extent in zip((x, y), anchor, mask.size)]
        self.image.paste(colour, corner, mask)

    def line(self, points, colour, width=1.0, style="solid"):
        """A line with gaps at NaN; the pattern of a broken one runs on around corners."""
        points, (on, off) = np.array(points, float) * DRAW, DASHES[style]
        for piece in np.split(points, np.flatnonzero(np.isnan(points.sum(1)))) if on else ():
            x, y = piece[np.isfinite(piece.sum(1))].T
            along = np.append(0, np.cumsum(np.hypot(np.diff(x), np.diff(y))))
            for a in np.arange(0, along[-1], (on + off) * DRAW):
                at = np.unique(np.clip(along, a, a + on * DRAW))
                dash = [*zip(np.interp(at, along, x), np.interp(at, along, y))]
                self.pen.line(dash, colour, round(width * DRAW), joint="curve")

    def marker(self, x, y, shape, colour, scale=1.0):
        """A small figure, none at NaN; its white rim parts it from what is below."""
        sides, turn, radius = SHAPES.get(shape, (0, 0, 0))
        for r, fill in ((1.27 * radius, "white"), (radius, colour)) if sides and math.isfinite(x + y) else ():
            self.pen.regular_polygon((x * DRAW, y * DRAW, r * scale * DRAW), sides, turn, fill)

    def save(self, path, chart=True):
        """256 colours, too few for photographs, make a chart's file several times smaller."""
        image = self.image.reduce(DRAW // SHRINK)
        (image.quantize(256, Image.Quantize.MAXCOVERAGE) if chart else image).save(path, optimize=True)


class _Axis:
    """Data -> units, linear or log10; what lies beyond it (zero on a log axis) is put on its edge."""

    def __init__(self, values, start, end, log=False, pad=0.06, from_zero=False):
        self.scale = (lambda v: np.log10(np.maximum(v, 1e-300))) if log else np.array
        self.log, self.start, self.end = log, start, end
        values = [v for v in np.array(values, float) if (0 if log else -math.inf) < v < math.inf] or [1, 10]
        # zero costs little room here, and shows true proportions
        flush = from_zero and not log and 0 <= min(values) <= 0.4 * max(values) > 0
        low, high = self.scale(0 if flush else min(values)), self.scale(max(values))
        gap = pad * (high - low) if high > low else 0.2 if log else 0.1 * abs(low) or 1.0
        self.low, self.high = low if flush else low - gap, high + gap

    def __call__(self, values):
        share = (self.scale(np.array(values, float)) - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * np.clip(share, 0, 1)

    def ticks(self):
        """Some 3 to 8 pairs (value, label) at 1, 2 or 5 times a power of ten; evenly if the axis is short."""
        low, high = (10 ** v if self.log else v for v in (self.low, self.high))
        steps = (1,) if self.log and high > 500 * low else (1, 2, 5)
        values = [m * 10.0 ** k for k in range(-12, 16) for m in steps]
        if not self.log or high < 5 * low:
            step = next(v for v in values if high - low <= 7 * v)
            values = [k * step for k in range(math.floor(low / step), math.ceil(high / step) + 1)]
        return [(v, f"{v:,.6g}") for v in values if low <= v <= high]


def line_chart(series, path, title, x_label, y_label, hlines=(), log_x=False, log_y=False, x_ticks=None,
               note="", height=380):
    """Lines over x, each named beside its end.

    series: dicts with label, x, y and, at will, y_low and y_high (error bars), dots (for each x a list of
    single runs), style "solid", "dashed", "dotted" or "points", shape and colour. None and NaN leave a gap.
    hlines: (label, value, style). x_ticks: (value, label) pairs, thinned out where they would touch.
    """
    levels = [dict(label=label, x=[-math.inf, math.inf], y=[value] * 2, style=style, colour="#555555",
                   shape=None) for label, value, style in hlines]
    rows = [dict(colour=PALETTE[n % len(PALETTE)], shape=list(SHAPES)[n % len(SHAPES)], style="solid",
                 y_low=(), y_high=(), dots=()) | s for n, s in enumerate([*levels, *series], -len(levels))]
    below = max([50, *(_size(label)[1] + 14 for _, label in x_ticks or ())])    # the axis and its labels
    page = _Page(WIDTH, height + below, title, note)
    y_axis = _Axis([v for row in rows for part in (row["y"], row["y_low"], row["y_high"], *row["dots"])
                    for v in part], page.top + height, page.top, log_y, from_zero=True)
    x_axis = _Axis([x for row in rows for x in row["x"]] + [x for x, _ in x_ticks or ()],
                   52 + max((_size(label)[0] for _, label in y_axis.ticks()), default=0),
                   WIDTH - 82 - max((_size(row["label"])[0] for row in rows), default=0), log_x, pad=0.05)
    _frame(page, x_axis, y_axis, x_ticks or x_axis.ticks(), x_label, y_label)
    for row in rows:    # single marks at one x stand side by side
        beside = [other["label"] for other in rows if other["style"] == row["style"] == "points"
                  and set(other["x"]) & set(row["x"])]
        shifts = dict(zip(beside, np.linspace(-48, 48, len(beside) + 2)[1:])) if len(beside) > 1 else {}
        row["spots"] = [*zip(x_axis(row["x"]) + shifts.get(row["label"], 0), y_axis(row["y"]))]
        if len(row["spots"]) > 40 and row["style"] != "points":    # no markers on a long curve
            row["shape"] = None
    _legend(page, rows, x_axis.end, y_axis)
    for row in rows:
        _draw(page, row, y_axis)
    page.save(path)


def _frame(page, x_axis, y_axis, ticks, x_label, y_label):
    """Grid, ticks and what they mean."""
    left, right, top, bottom = x_axis.start, x_axis.end, y_axis.end, y_axis.start
    for value, label in y_axis.ticks():
        page.line([(left, y_axis(value)), (right, y_axis(value))], RULE)
        page.text(left - 8, y_axis(value), label, colour=MUTED, anchor="rm")
    every = max(1, math.ceil(sum(_size(label)[0] + 8 for _, label in ticks) / (right - left)))
    for value, label in ticks[::-every]:    # the last one always has its label
        page.line([(x_axis(value), top), (x_axis(value), bottom)], RULE)
        page.text(x_axis(value), bottom + 7, label, colour=MUTED, anchor="mt")
    page.line([(left, bottom), (right, bottom)], "#888888", 1.25)
    page.text((left + right) / 2, bottom + 38, x_label, anchor="mm")
    page.text(30, (top + bottom) / 2, y_label, anchor="mm", upright=True)


def _draw(page, row, y_axis):
    """One series: error bars, the line, markers, and faint dots for single runs."""
    colour, spots = row["colour"], row["spots"]
    for (x, _), a, b in zip(spots, y_axis(row["y_low"]), y_axis(row["y_high"])):
        for bar in ([(x, a), (x, b)], [(x - 4, a), (x + 4, a)], [(x - 4, b), (x + 4, b)]):
            page.line(bar, colour, 1.5)
    page.line(spots, colour, 2.25 if row["shape"] else 1.6, row["style"])
    for spot in spots:
        page.marker(*spot, row["shape"], colour)
    faint = tuple((c + 255) // 2 for c in ImageColor.getrgb(colour))
    for (x, _), values in zip(spots, row["dots"]):
        for y in y_axis(values):
            page.marker(x + 9, y, "circle", faint, 0.55)


def _legend(page, rows, x, y_axis):
    """A sample of each line and its name, from x on, as near to the line's end as the others allow."""
    for row in rows:
        row["end"] = max((s for s in row["spots"] if math.isfinite(sum(s))), default=(0, y_axis.start))
    step, y = min(24, (y_axis.start - y_axis.end) / max(1, len(rows))), -math.inf
    for n, row in enumerate(sorted(rows, key=lambda row: row["end"][1]), 1):
        y = min(max(row["end"][1], y + step), y_axis.start - (len(rows) - n) * step)
        if row["end"][0] > x - 60:      # from further away the lead would be taken for data
            page.line([row["end"], (x + 2, row["end"][1]), (x + 14, y)], "#bbbbbb")
        page.line([(x + 18, y), (x + 52, y)], row["colour"], 2.25, row["style"])
        page.marker(x + 35, y, row["shape"], row["colour"])
        page.text(x + 60, y, row["label"])


def sample_rows(rows, path, title, note=""):
    """A grid of samples: a row is (label, uint8 [n,C,H,W] or None), a column one starting noise x_T."""
    grids = [np.zeros((0, 1, 1, 1)) if images is None else np.asarray(images) for _, images in rows]
    n, side = max(1, *map(len, grids)), max(max(g.shape[2:]) for g in grids)
    left = math.ceil(34 + max(_size(label)[0] for label, _ in rows))
    zoom = max(1, int(SHRINK * min((WIDTH - 17 - left) / n - 3, 84) // side))     # whole: no blur
    tile, times = side * zoom / SHRINK, zoom * DRAW // SHRINK
    height = math.ceil(max(tile, *(_size(label)[1] + 6 for label, _ in rows))) + 3
    page = _Page(max(480, left + n * (tile + 3) + 17), len(rows) * height, title, note)
    for row, ((label, _), images) in enumerate(zip(rows, grids)):
        y = page.top + row * height
        page.text(left - 14, y + (height - 3) / 2, label, anchor="rm")
        for k, image in enumerate(images):
            pixels = np.broadcast_to(image.transpose(1, 2, 0), (*image.shape[1:], 3)).repeat(times, 0)
            corner = left + k * (tile + 3), y + (height - 3 - tile) // 2
            page.image.paste(Image.fromarray(pixels.repeat(times, 1)), [int(v * DRAW) for v in corner])
    page.save(path, chart=False)


def heat_map(matrix, row_labels, col_labels, path, title, note="", log=False, x_label="", bar_label=""):
    """A matrix [rows][columns] in colours, with its values where they fit; None and NaN are grey."""
    values, high, size = np.array(matrix, float), 20, 12
    left = 28 + max(_size(label, size)[0] for label in row_labels)
    wide = min(100, max(20, (WIDTH - left - 120) / len(col_labels)))
    right = left + len(col_labels) * wide
    page = _Page(max(480, right + 120), 44 + max(len(values) * high, 170), title, note)
    top, length = page.top + 44, min(240, max(len(values) * high, 140))
    page.text((left + right) / 2, page.top + 8, x_label, 13, MUTED, "mm")
    for j, label in enumerate(col_labels):
        page.text(left + (j + 0.5) * wide, top - 5, label, 13, anchor="mb")
    scale = _Axis(values.ravel(), 0, 1, log, pad=0)
    for i, label in enumerate(row_labels):
        y = top + (i + 0.5) * high
        page.text(left - 8, y, label, size, anchor="rm")
        for j, u in enumerate(scale(values[i])):
            x, text = left + j * wide, f"{values[i, j]:.2f}"
            colour = VIRIDIS[round(256 * u)] if math.isfinite(u) else EMPTY
            page.line([(x, y), (x + wide - 1, y)], colour, high - 1)
            if math.isfinite(u) and _size(text, size - 1)[0] < wide - 4:
                page.text(x + wide / 2, y, text, size - 1, "white" if u < 0.49 else INK, "mm")
    for y in np.arange(0, length, 1 / SHRINK):
        page.line([(right + 20, top + y), (right + 36, top + y)], VIRIDIS[round(256 * (1 - y / length))])
    for value, text in scale.ticks():
        page.text(right + 40, top + length * (1 - scale(value)), text, 13, MUTED)
    page.text(right + 86, top + length / 2, bar_label, 13, anchor="mm", upright=True)
    page.save(path)


def _cells(header, rows):
    """Header and cells as text, and for each column whether it holds numbers ("35.7M" too)."""
    table = [["-" if v is None or v != v else f"{v:.4g}" if isinstance(v, (float, np.floating)) else str(v)
              for v in row] for row in rows]
    letters = [max((sum(map(str.isalpha, row[k])) for row in table), default=0) for k in range(len(header))]
    return [str(h) for h in header], table, [most < 3 for most in letters]


def text_table(header, rows):
    """The table with aligned columns, numbers to the right, for a terminal."""
    head, table, right = _cells(header, rows)
    widths = [max(map(len, column)) for column in zip(head, *table)]
    lines = ([f"{t:{'>' if r else '<'}{w}}" for t, w, r in zip(line, widths, right)]
             for line in (head, ["-" * w for w in widths], *table))
    return "\n".join("  ".join(line).rstrip() for line in lines)


def markdown_table(header, rows):
    """The table as GitHub Markdown."""
    head, table, right = _cells(header, rows)
    lines = [head, ["---:" if r else "---" for r in right], *table]
    return "\n".join(f"| {' | '.join(line)} |" for line in (
        [t.replace("|", "\\|").replace("\n", "<br>") for t in line] for line in lines))


if __name__ == "__main__":
    main()
