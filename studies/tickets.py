"""What do tickets look like? Pictures of the masks that finished runs left behind.

    python -m studies.tickets runs/mnist                          # the last tickets of one run, all its seeds
    python -m studies.tickets runs/methods_mnist/* --round 10     # methods side by side

Density by layer and ticket; how much tickets agree (intersection over union of two masks, over what random
masks of the same layer densities have); CKA by block of the weights they end with; and which weights survive:
figure 15 of 1803.03635 as a rate, of each tenth of a layer's |w| at the start, how many live, for the first
ticket. Where the start said nothing of the ticket, that rate is the layer's density.
"""
import os

import numpy as np
import torch

import lth_diffusion as lth
import metrics
from ddpm import positive_int
from prune import density, overlap, prunable, unpack_masks
from unet import UNet

TENTHS = 10


class Ticket:
    """One ticket of a finished run: its masks and the networks it comes from."""

    def __init__(self, out, seed, round):
        job = lth.Job(seed, round, "rewind")
        state, theta = lth.load_state(job.path(out)), lth.load_state(lth.theta_path(out, seed))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.theta_0 = UNet(**state["config"])  # as lth_diffusion.py initialises it
        self.theta_k, self.end = UNet(**state["config"]), UNet(**state["config"])
        self.theta_k.load_state_dict(theta["model"])
        self.end.load_state_dict(state["model"])
        self.masks, self.seed = unpack_masks(self.end, state["masks"]), seed
        self.start = metrics.weights_hash(self.theta_k)  # two tickets from one start share it
        name = os.path.basename(os.path.normpath(out))
        self.name = f"{name}, seed {seed}, {100 * density(self.masks):.0f} %"


def tickets_of(folders, round):
    """The tickets of one round, or of each run's last, of every folder and seed; what is not there is named.
    OSError, in one line, where nothing is."""
    found = []
    for out in folders:
        args = lth.read_config(out)["args"]
        for seed in args["seeds"]:
            job = lth.Job(seed, round or args["rounds"], "rewind")
            if args["granularity"] == "channel":
                print(f"left out: {out}, channel tickets have no weight masks")
            elif not os.path.exists(job.path(out)):
                print(f"left out: {out}, {job}: not there, or not finished")
            else:
                found.append(Ticket(out, seed, job.round))
    if not found:
        raise OSError(f"no tickets in {', '.join(folders)}: name finished runs, and a --round that they have")
    shapes = {tuple(mask.shape for mask in ticket.masks.values()) for ticket in found}
    if len(shapes) > 1:
        raise OSError("these runs are of different networks: name runs of one --preset and image size")
    return found


def survival(masks, start):
    """{layer: of each tenth of its |w| in `start` the share that lives, over the layer's density}; NaN for a
    layer that is all 0 there."""
    rates = {}
    for name, p in prunable(start).items():
        live = masks[name].flatten()[p.detach().abs().flatten().argsort()].double()
        known = bool(p.any()) and len(live) >= TENTHS
        rates[name] = [float(part.mean() / live.mean()) if known else np.nan
                       for part in live.tensor_split(TENTHS)]
    return rates


def draw(tickets, out):
    """The pictures; the overlap table's rows (ticket, ticket, same start, IoU, chance)."""
    names, layers = [t.name for t in tickets], list(tickets[0].masks)
    short = [layer.removesuffix(".weight") for layer in layers]
    note = "Percentages are densities. " + " | ".join(f"{k}: {name}" for k, name in enumerate(names))
    columns = [str(k) for k in range(len(tickets))]
    lth.heat_map([[float(t.masks[layer].float().mean()) for t in tickets] for layer in layers], short,
                 columns, os.path.join(out, "tickets_density.png"), "Where tickets live: density by layer",
                 note, log=True, x_label="ticket", bar_label="live / all")
    pairs = {(i, j): overlap(a.masks, b.masks) for i, a in enumerate(tickets) for j, b in enumerate(tickets)}
    lth.heat_map([[pairs[i, j][0] / pairs[i, j][1] if i != j else np.nan for j in range(len(tickets))]
                  for i in range(len(tickets))], [f"{k}: {name}" for k, name in enumerate(names)], columns,
                 os.path.join(out, "tickets_overlap.png"), "How much two tickets agree: IoU over that of "
                 "random masks", "Percentages are densities.", log=True, x_label="ticket",
                 bar_label="times chance")
    tenths = [f"{10 * k + 10}" for k in range(TENTHS)]
    for start, title in (("theta_0", "the initial"), ("theta_k", "the rewound")):
        rates = survival(tickets[0].masks, getattr(tickets[0], start))
        lth.heat_map(list(rates.values()), short, tenths, os.path.join(out, f"tickets_{start}.png"),
                     f"Which weights survive, by their size in {title} network",
                     f"Share that lives in each tenth of a layer's |w|, over the layer's density: 1 is "
                     f"chance. Grey: all weights begin at 0. {names[0]}.",
                     x_label="per cent of the layer's |w|, smallest to largest", bar_label="times chance")
    return [[names[i], names[j], tickets[i].start == tickets[j].start, *pairs[i, j]]
            for i, j in pairs if i < j]


def draw_similarity(tickets, out):
    """CKA by block of the weights that each ticket ends with and those of the first."""
    curves = []
    for k, other in enumerate(tickets[1:], 1):
        by_block = lth.block_similarity(tickets[0].end, other.end)
        first = tickets[0]
        same = ("same start" if other.start == first.start else
                "another start" if other.seed == first.seed else "other seed")
        curves.append(dict(label=f"{k}, {same}", x=range(len(by_block)), y=list(by_block.values())))
    lth.line_chart(curves, os.path.join(out, "tickets_cka.png"), "How alike tickets' weights end, by block",
                   "", "CKA with ticket 0", hlines=[("independent", 0.0, "dotted")],
                   x_ticks=list(enumerate(by_block)), note=" | ".join(
                       f"{k}: {t.name}" for k, t in enumerate(tickets)) + ". CKA of convolutions' weights, "
                   "unbiased; networks of other seeds have no channels in common and are the null.")


def main(argv=None):
    """The command line; exit code 2 and one line for a mistake of the user's."""
    study = lth.Study("tickets", __doc__)
    add = study.add_argument
    add("folders", nargs="+", metavar="runs/NAME", help="finished runs of one network")
    add("--round", type=positive_int, help="which round's tickets (default: each run's last)")
    with study.arguments(argv) as args:
        tickets = tickets_of(args.folders, args.round)
        table, header = draw(tickets, args.out), ["ticket", "other", "same start", "IoU", "by chance"]
        if len(tickets) > 1:
            draw_similarity(tickets, args.out)
        study.save(os.path.join(args.out, "tickets_overlap"), header, table, n=len(tickets))
    print(lth.text_table(header, table) if table else "one ticket: nothing to compare it with")


if __name__ == "__main__":
    main()
