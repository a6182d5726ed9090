"""The lottery ticket hypothesis on a diffusion model: train, prune, rewind, repeat, and compare.

    python lth_diffusion.py --demo                            # one ticket on drawn digits: minutes
    python lth_diffusion.py                                   # drawn digits, two tickets
    python lth_diffusion.py --dataset mnist --rounds 10       # the main job
    python lth_diffusion.py --dataset mnist --seeds 0 1 2     # three seeds: a verdict
    python lth_diffusion.py --dataset cifar10 --preset paper  # Ho et al.'s network: needs a GPU
    python lth_diffusion.py --images photos --rounds 2        # a folder of your own images

The same command goes on where it stopped. --out receives report.html (all in one page), table.md,
results.csv, config.json, the pictures, the weights and ticket of every run. More: methods/.
"""
if __name__ == "__main__":  # before torch is imported
    from support import early

import copy
import os
import time
from typing import NamedTuple

import torch

import ddpm
import metrics
from ddpm import Diffusion, as_input, denoiser, draw_samples, to_uint8, train
from prune import (SCORES, apply_masks, at_minimum, dense_masks, least_kept, live_counts,
                   live_total, mask_hooks, pack_masks, prunable, prune_magnitude, random_masks,
                   rewind, save_ticket, unpack_masks)
from support import claims, cli, data, quality, ranks, report, runs
from unet import PRESETS, UNet, narrower

VAL_IMAGES = 2000  # held-out images behind val_loss, each with one fixed t and noise
RANGES = 5  # of t, equally long, that val_loss is split into
EVAL_SEED = 1234  # of val_loss's noise: the same for every network
X_T_SEED = 3_000_000  # added to the seed for the noise that its networks are sampled from
MARGINS = dict(fid_domain=0.10, val_loss=0.03)  # so far above dense a ticket counts as equal
REINIT_SEED = 500_000  # added to the seed for the control's new initialisation
MASK_SEED = 700_000  # of masks drawn or shuffled at random
FINETUNE_LR = 0.1  # `finetune` trains at this share of --lr, since a decaying schedule ends near 0
STEP_K = ".step_k.pt"  # ends the name of the dense network's training state at step k
FINISHED = "row", "config", "model", "ema", "masks", "losses"  # in a finished job's file
CONTROLS = "reinit", "random", "finetune", "small"
FREE = "device data_dir out inception seeds images dense_from workers".split()  # may change later


class Job(NamedTuple):
    """One training run. Round 0 holds the dense network."""
    seed: int
    round: int
    arm: str

    def __str__(self):
        return f"seed {self.seed} round {self.round} {self.arm}"

    def path(self, out, ending=".pt"):
        return os.path.join(out, f"seed{self.seed}", f"round{self.round:02d}_{self.arm}{ending}")


# --------------------------------------------------------------------------- the method
def find_tickets(args, exp):
    """Iterative magnitude pruning with rewinding (Frankle, Dziugaite, Roy and Carbin, Linear Mode
    Connectivity and the Lottery Ticket Hypothesis, 2020, 1912.05671)."""
    for seed in args.seeds:
        # Train the dense network; keep its whole training state at step k: tickets go back there.
        dense = last = exp.train_dense(seed)
        masks = dense.masks
        for r in range(1, args.rounds + 1):
            # 1. Prune the smallest of the trained weights that are left.
            masks = prune_magnitude(last.model, masks, args.prune_rate, args.scope,
                                    score=args.score)
            # 2. Rewind: each weight that is left returns to its state at step k, moments included.
            ticket = exp.new_model(seed)
            start = rewind(ticket, masks, dense.checkpoint)
            # 3. Retrain from there; the next round prunes what comes out.
            pruned, job = last, Job(seed, r, "ticket")
            last = exp.train(job, ticket, masks, start, after=pruned.spent)
            # What the ticket is compared with.
            for arm, model, its_masks, options in controls(exp, job, masks, dense, pruned):
                exp.train(Job(seed, r, arm), model, its_masks, **options)


def controls(exp, job, masks, dense, pruned, after=None):
    """(arm, network, masks, options of Experiment.train) of each control of a ticket's round.

    pruned: the run whose weights were ranked. after: (steps, MACs) that finding the mask took.
    """
    arms, after = controls_at(exp.args, job.round), after or pruned.spent
    if "reinit" in arms:  # the same mask on new weights: do the early weights matter?
        model = exp.new_model(REINIT_SEED + job.seed)
        yield "reinit", model, masks, dict(after=after)
    if "random" in arms:  # as many weights per layer, elsewhere: does the choice matter?
        model, shuffled = exp.new_model(job.seed), random_masks(masks, generator_of(job))
        state = rewind(model, shuffled, dense.checkpoint)
        yield "random", model, shuffled, dict(state=state, after=after)
    if "finetune" in arms:  # the trained weights kept: does going back matter?
        model, late = copy.deepcopy(pruned.model), max(after, pruned.spent)
        yield "finetune", model, masks, exp.finetuning(model, pruned.ema, masks) | dict(after=late)
    if "small" in arms:  # a narrower dense network of as many weights: does sparsity matter?
        yield "small", exp.narrower_model(job.seed, live_total(masks)), None, {}


def jobs(args):
    """Every training run, exactly those of find_tickets, in its order."""
    planned = []
    for seed in args.seeds:
        planned.append(Job(seed, 0, "dense"))
        for r in range(1, args.rounds + 1):
            planned += [Job(seed, r, arm) for arm in ("ticket", *controls_at(args, r))]
    return planned


def controls_at(args, r):
    """The controls of round r, in the order in which they run."""
    here = args.controls if r in args.control_rounds else ()
    return [arm for arm in CONTROLS if arm in here]


def generator_of(job):
    """The generator of masks drawn at random for a job's seed and round."""
    return torch.Generator().manual_seed(MASK_SEED + 1000 * job.round + job.seed)


# --------------------------------------------------------------------------- one training run
class Trained(NamedTuple):
    """What a training run ended with. checkpoint: the state at step k, of a dense run."""
    model: UNet
    ema: UNet
    masks: dict
    row: dict
    checkpoint: dict = None

    @property
    def spent(self):
        """(steps, MACs) of training it took to get here, earlier runs included."""
        return self.row["train_steps_total"], self.row["train_macs_total"]


class Experiment:
    """What all training runs share (data, noise schedule, extractors), and how one is done."""

    def __init__(self, args, guard=None):
        self.args, self.guard, self.rows = args, guard or runs.Guard(), {}
        self.planned, self.cost, self.decode, self.claims = [], (0.0, 0.0), None, None
        self.device, _ = cli.pick_device(args.device)
        (self.images, labels), (self.test, _) = data.splits(args)
        self.diffusion = Diffusion(1000, args.schedule, args.prediction, args.weighting)
        self.k = round(args.rewind * args.steps)  # the step that tickets go back to
        self.classifier = metrics.load_classifier(args.dataset, self.images, labels)
        self.hashes = dict(data_hash=data.hash_of(args, self.images, self.test),
                           classifier_hash=runs.weights_hash(self.classifier))
        self.quality = quality.Quality(metrics, args, self.images, self.test)
        self.real, self.reference = self.quality.real, self.quality.reference
        self.quality.add("_domain", self.classifier, data.shares_of(labels))
        self.why_inception = self.quality.find_inception(self.device)
        self.images = self.images.to(self.device)

    def new_model(self, seed, **config):
        """A U-Net as the seed initialises it; the caller's random state is left alone."""
        shape = dict(channels=self.images.shape[1], image_size=self.images.shape[-1])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = UNet(**shape | PRESETS[self.args.preset] | config)
        return model.to(self.device)

    def narrower_model(self, seed, live):
        """A dense U-Net with about as many parameters as one with `live` weights has left."""
        model = self.new_model(seed)
        total = sum(p.numel() for p in model.parameters()) - live_total(dense_masks(model)) + live
        return self.new_model(seed, **narrower(model.config, total))

    def options(self, job, **changed):
        """Keyword arguments of ddpm.train: the arms of a seed share batches, t and noise."""
        rank, world = ranks.ranks()
        shared = dict(seed=job.seed, label=str(job), rank=rank, world=world)
        return cli.training_options(self.args) | shared | changed

    def train_dense(self, seed):
        """The dense network of a seed, with its checkpoint of step k."""
        return self.train(Job(seed, 0, "dense"), self.new_model(seed), keep_step=self.k)

    def finetuning(self, model, ema, masks):
        """Options of train() that go on from trained weights and their average, from step k on:
        Adam starts anew, behind a warm-up, at a tenth of the rate."""
        state = dict(step=self.k, model=model.state_dict(), ema=ema.state_dict(), optimizer=None,
                     ema_updates=self.args.steps, losses=[], window=(0.0, 0))
        low = dict(start=self.k, lr=FINETUNE_LR * self.args.lr, lr_schedule="constant")
        return low | dict(state=rewind(model, masks, state))

    def train(self, job, model, masks=None, state=None, **options):
        """What the job's file holds, after training (see fit) where there is none -> Trained, or
        None where another process is at it."""
        path, claims = job.path(self.args.out), self.claims
        if not os.path.exists(path) and (not claims or claims.mine(job, job.arm in CONTROLS)):
            self.fit(job, model, masks, state, **options)
            report.progress(self, job)
        if not os.path.exists(path):
            return None
        trained = self.load(job)
        runs.remove(job.path(self.args.out, ".partial.pt"))  # only now is it not needed any more
        return trained

    def fit(self, job, model, masks=None, state=None, *, hooks=None, after=(0, 0), each=None,
            keep_step=None, **changed):
        """Train `model` in place, measure it, and write the job's files.

        state: what training goes on from; None: step 0. hooks(model, masks): the hooks of
        ddpm.train, if not those that keep masks. after: (steps, MACs) spent before. each(dense,
        live): MACs per image and step, if not three evaluations. keep_step: the step whose state
        is kept, as checkpoint. changed: options of ddpm.train.
        """
        out, options = self.args.out, self.options(job, **changed)
        if masks is not None:
            apply_masks(model, masks)

        def checkpoint(step, get_state):
            if step == keep_step:
                runs.save_state(job.path(out, STEP_K), **get_state())
            self.guard(step, get_state)

        def packed():
            return dict(masks=None if masks is None else pack_masks(masks))
        partial = job.path(out, ".partial.pt")
        with runs.resumable(partial, self.guard, packed) as (saved, seconds), \
                runs.PeakMemory(self.device) as memory, cli.training_memory():
            if saved and saved["masks"] is not None:
                masks = unpack_masks(model, saved["masks"])  # a score need not come out equal twice
            if masks is not None or hooks is not None:
                options |= (hooks or mask_hooks)(model, masks)
            ema, losses = train(model, self.diffusion, self.images, state=saved or state,
                                checkpoint=checkpoint, **options)
        ranks.same_on_all(packed()["masks"])
        row = dict(train_loss=losses[-1][1], train_seconds=seconds(), train_memory=memory.bytes,
                   steps=options["steps"] - (state["step"] if state else 0))
        masks = masks or dense_masks(model)
        pictures, row = self.measure(job, ema.model, masks, row, after, each)
        self.rows[job] = row
        runs.save_state(job.path(out), config=model.config, model=model.state_dict(), row=row,
                        ema=ema.model.state_dict(), masks=pack_masks(masks), losses=losses,
                        pictures=pictures, facts=self.facts(job))
        ranks.wait_for_all()

    def load(self, job):
        """What a finished job ended with -> Trained; its row joins the table."""
        state, checkpoint = runs.load_state(job.path(self.args.out), FINISHED), None
        model, masks = self.rebuild(state)
        if job.arm == "dense":
            path = job.path(self.args.out, STEP_K)
            checkpoint = runs.load_state(path, ["step", "model", "ema", "optimizer"])
        self.rows[job] = state["row"]
        return Trained(model, self.rebuild(state, "ema")[0], masks, state["row"], checkpoint)

    def rebuild(self, state, weights="model"):
        """(model, masks) of a finished state: online weights, or weights="ema"."""
        model = UNet(**state["config"]).to(self.device)
        model.load_state_dict(state[weights])
        return model, unpack_masks(model, state["masks"])

    def measure(self, job, model, masks, row, after, each):
        """(first samples, row of the table) of a trained model, the EMA, with its masks."""
        a, live, least = self.args, live_total(masks), at_minimum(masks)
        total = live_total(dense_masks(self.new_model(0)))
        with runs.PeakMemory(self.device) as memory:
            began = time.monotonic()
            samples = self.draw(model, job.seed, label=f"{job}: sample")
            seconds = time.monotonic() - began
        x = torch.zeros(1, *self.images.shape[1:], device=self.device)
        macs = metrics.count_macs(model, x, torch.zeros(1, device=self.device), masks).values()
        dense, alive = (sum(one[i] for one in macs) for i in (0, 1))
        per_image = each(dense, alive) if each else 3 * alive  # forward, and twice backward
        row = row | self.quality(samples) | self.errors(model) | dict(
            seed=job.seed, round=job.round, arm=job.arm, sparsity=1 - live / total,
            live_weights=live, total_weights=total, n_samples=a.samples, macs_dense=dense,
            at_minimum=least, layers_at_minimum=len(least), macs_live=alive,
            train_steps_total=after[0] + row["steps"],
            train_macs_total=round(after[1] + per_image * a.batch * row["steps"]),
            seconds_per_1000=1000 * seconds / a.samples, sample_memory=memory.bytes)
        if ranks.first():
            with runs.atomic(job.path(a.out, ".ticket")) as temporary:
                save_ticket(temporary, model, masks, self.facts(job))
                row["ticket_bytes"] = os.path.getsize(temporary)
        return samples[:16], row

    def facts(self, job):
        """What the files of a network say of how it was drawn from."""
        return runs.facts(self.args, self.diffusion, job.seed, X_T_SEED, self.decode is not None)

    def draw(self, model, seed=0, n=None, x_T=None, **changed):
        """n samples uint8 (n, C, H, W), from the noise that the seed's networks share or x_T."""
        a, x_T = self.args, self.x_T(n or self.args.samples, seed) if x_T is None else x_T
        options = dict(precision=a.precision, sampler=a.sampler, steps=a.nfe, seed=seed,
                       decode=self.decode, share=ranks.share) | changed
        with cli.sampling_memory():
            return draw_samples(model, self.diffusion, x_T, **options)

    def x_T(self, n, seed=0):
        """The starting noise (n, C, H, W) that every network of a seed is sampled from."""
        generator = torch.Generator().manual_seed(X_T_SEED + seed)
        return torch.randn(n, *self.images.shape[1:], generator=generator)

    def errors(self, model, images=None):
        """val_loss, the mean squared error on eps of held-out (or other) images; val_loss_t0 to t4,
        by ranges of t from little noise to much. t is spread evenly, the noise is fixed."""
        x0 = as_input((self.test if images is None else images)[:VAL_IMAGES])
        predict = denoiser(model, self.args.precision)
        t = torch.linspace(0, self.diffusion.T - 1, len(x0)).round().long()
        noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(EVAL_SEED))
        parts = list(zip(*(v.to(self.device).split(250) for v in (x0, t, noise))))

        def squared(part):
            x0, t, noise = part
            eps = self.diffusion.predict(predict, self.diffusion.q_sample(x0, t, noise), t)
            return (eps - noise).square().flatten(1).mean(1).tolist()
        errors = torch.tensor(sum(ranks.share(squared, parts), [])).double()  # (N,), by t
        found = {f"val_loss_t{i}": part.mean().item()
                 for i, part in enumerate(errors.tensor_split(RANGES))}
        return dict(val_loss=errors.mean().item()) | found


# --------------------------------------------------------------------------- command line
def make_parser(**options):
    """The flags of the main job, which the methods share."""
    parser = cli.Parser(**options)
    cli.add_training_flags(parser, PRESETS)
    cli.add_pruning_flags(parser, CONTROLS, SCORES)
    return parser


def parse_args(argv=None, parser=None, name="", **fixed):
    """(flags, checked and completed; parser). name: of a method's folder. fixed: {flag: the only
    value that the method takes}."""
    parser = parser or make_parser(prog="lth_diffusion.py", description=__doc__.split("\n")[0])
    return cli.parse(parser, argv, name, fixed, check_args), parser


def check_args(args):
    """Refuse, with the flag named, what follows from the flags and the architecture alone."""
    sizes = [p.numel() for p in prunable(cli.check_model(args, ddpm)).values()]
    live, flag = sum(sizes), "prune-rate" if args.final_sparsity is None else "final-sparsity"
    for r in range(1, args.rounds + 1):
        live -= round(args.prune_rate * live)
        if live < sum(least_kept(n, live / sum(sizes)) for n in sizes):
            cli.refuse(flag, f"round {r} would leave {live:,} weights, fewer than the "
                       f"{len(sizes)} layers need: prune less, or lower --rounds")


# --------------------------------------------------------------------------- the run
def run(args, parser, find=find_tickets, plan=jobs, experiment=Experiment):
    """Do each training run that is not done yet; print and draw what came out -> experiment."""
    claims.share_out_threads(args.workers)
    with runs.open_folder(args, parser, FREE, shared=True) as (guard, reasons):
        dense = [Job(seed, 0, "dense") for seed in args.seeds]
        files = [job.path("", end) for job in dense for end in (".pt", STEP_K)]
        runs.take_over(args, files, experiment.__name__)
        exp = experiment(args, guard)
        report.begin(exp, plan, parser.prog, MARGINS, FREE, reasons, train, denoiser)
        claims.work(find, exp, plan, parser)
        report.end(exp, live_counts(dense_masks(exp.new_model(0))), MARGINS, to_uint8)
    return exp


def main(argv=None):
    """The command line -> rows of the table; exit code 2: mistake, 1: diverged, 130: Ctrl-C."""
    return list(run(*parse_args(argv)).rows.values())


if __name__ == "__main__":
    main()
