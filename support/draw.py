"""`ddpm.py --from FILE`: images of a finished network, and how sparse it is.

FILE is model.pt of ddpm.py, a finished training run of the main job (seed0/round10_ticket.pt) or a
.ticket file. It says how its network was trained and sampled: these are the defaults. --out then
holds 00000.png .., samples.png (a grid), samples.npz (uint8 [N, H, W, C], key images), drawn.json.
"""
import argparse
import json
import os
import re
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from support import charts, cli, ranks, runs

# The flags that have a meaning beside --from.
FLAGS = ("source", "samples", "out", "sampler", "nfe", "seed", "device", "precision", "schedule",
         "prediction")
TRAINED = "schedule", "prediction"  # with which a network was trained: no choice is left
PICTURES = ".png", ".jpg", ".jpeg"
GRID = 100  # images in the grid, at most
RECORD = "drawn.json"  # what this command has written to a folder
UNFINISHED = re.compile(r"(\d{5,}\.png|samples\.(png|npz)|drawn\.json)\.[0-9a-f]{16}\.part")
FINISHED = ("name model.pt of ddpm.py, a finished run such as seed0/round10_ticket.pt, or a "
            ".ticket file")


class Network(NamedTuple):
    """What a file holds. masks: None where nothing is pruned. facts: those of runs.facts."""
    model: torch.nn.Module
    masks: dict
    facts: dict


def main(parser, argv, ddpm, prune):
    """Draw. parser: that of ddpm.py; ddpm, prune: the modules of these names."""
    with cli.one_line(parser), ranks.together():
        args = parse(parser, argv)
        device, why = cli.pick_device(args.device)
        args.precision, _ = cli.pick_precision(args.precision, device)
        found = read(args.source, ddpm, prune)
        diffusion = settle(args, found.facts, ddpm)
        config = found.model.config
        shape = config["channels"], config["image_size"], config["image_size"]
        cli.check_fits("samples", args.samples, int(np.prod(shape)), cli.SAMPLE)
        if ranks.first():
            check_folder(args.out, args.samples)
        print(f"{args.source} on {device} ({why})\n{sparsity(found.masks, prune)}", flush=True)
        with cli.sampling_memory():
            generator = torch.Generator().manual_seed(args.seed + found.facts.get("x_T_seed", 0))
            x_T = torch.randn(args.samples, *shape, generator=generator)
            drawn = ddpm.draw_samples(found.model.to(device), diffusion, x_T, args.precision,
                                      args.sampler, args.nfe, seed=args.seed, share=ranks.share)
        if ranks.first():
            facts = runs.provenance(runs.typed(), device, method="ddpm.py --from")
            write(args.out, drawn, vars(args) | facts)
        print(summary(args, found.facts))


# --------------------------------------------------------------------------- flags

def parse(parser, argv):
    """The flags, those left out None. Mistake that names one without a meaning beside --from."""
    names = vars(parser.parse_args([]))
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names)))
    for name, value in list(vars(args).items()):
        if name in FLAGS:
            continue
        if value is not None:
            cli.refuse(name.replace("_", "-"), "has no meaning beside --from, which trains "
                       "nothing: leave one of them out")
        delattr(args, name)
    if args.out is None:
        cli.refuse("out", "name a folder for the images")
    for name in ("samples", "device", "precision"):
        if getattr(args, name) is None:
            setattr(args, name, names[name])
    return args


def settle(args, facts, ddpm):
    """Complete the flags by what the file says -> its Diffusion. Mistake for what is missing."""
    for name in TRAINED:
        given, known = getattr(args, name), facts.get(name)
        if given and known and given != known:
            cli.refuse(name, f"{args.source} was trained with {known}: leave it out")
    for name in (*TRAINED, "sampler", "nfe", "seed"):
        if getattr(args, name) is None:
            setattr(args, name, facts.get(name, 0 if name == "seed" else None))
    missing = [name for name in (*TRAINED, "sampler", "nfe") if getattr(args, name) is None]
    if missing:
        raise cli.Mistake(f"{args.source} does not say how it was trained and sampled: give "
                          + " ".join(f"--{name}" for name in missing))
    if facts.get("latent"):
        raise cli.Mistake(f"{args.source} makes codes, not images: studies.latent decodes them")
    try:
        diffusion = ddpm.Diffusion(facts.get("T", 1000), args.schedule, args.prediction)
    except (ValueError, TypeError) as error:
        raise cli.Mistake(f"{args.source} cannot be drawn from by ddpm.py: {error}") from error
    if args.sampler not in cli.SAMPLERS:
        cli.refuse("sampler", f"{args.sampler}: choose from {', '.join(cli.SAMPLERS)}")
    try:
        ddpm.sampling_times(diffusion, args.nfe)
    except (ValueError, TypeError) as error:
        cli.refuse("nfe", error)
    return diffusion


# --------------------------------------------------------------------------- reading

def read(path, ddpm, prune):
    """The Network of a file: the averaged weights. OSError, in one line, for any other file."""
    if os.path.isdir(path):
        raise OSError(f"argument --from: {path} is a folder: {FINISHED}")
    try:
        content = runs.read_torch(path)
    except OSError as error:
        raise OSError(f"argument --from: {path} cannot be read: {runs.reason(error)}") from error
    except ValueError as error:
        raise OSError(f"argument --from: {path} is damaged or no file of this code "
                      f"({runs.reason(error)}): {FINISHED}") from error
    kind = set(content) if isinstance(content, dict) else set()
    if not ({"bits", "values", "config"} <= kind or {"format", "ema", "config"} <= kind):
        raise OSError(f"argument --from: {path} holds no finished network: {FINISHED}")
    facts = content.get("facts") or {}
    if not isinstance(facts, dict):
        raise OSError(f"argument --from: {path} has facts that are no dict")
    if "bits" in kind:
        return ticket(path, content, prune, facts)
    if content["format"] != runs.FORMAT:
        raise OSError(f"argument --from: {path} is of another version (format "
                      f"{content['format']}, not {runs.FORMAT})")
    try:
        model, masks = ddpm.UNet(**content["config"]), None
        model.load_state_dict(content["ema"])
        if "masks" in content:
            masks = prune.unpack_masks(model, content["masks"])
    except Exception as error:  # whatever a file of another program may hold
        raise OSError(f"argument --from: {path} is damaged or of another program "
                      f"({type(error).__name__}: {cli.first_line(error)})") from error
    return Network(model, masks, facts)


def ticket(path, content, prune, facts):
    """The Network of a .ticket file."""
    if "mults" not in (content["config"] or {}):
        raise OSError(f"argument --from: {path} is a ticket of another network than unet.py's: "
                      "read it with prune.load_ticket(path, model)")
    return Network(*prune.load_ticket(path), facts)


# --------------------------------------------------------------------------- what is said

def sparsity(masks, prune):
    """Live weights by layer, as text; layers on the minimum that pruning leaves are marked."""
    if masks is None or prune.density(masks) == 1:
        return "dense: no weight is pruned"
    least, live = prune.at_minimum(masks), prune.live_counts(masks)
    sizes = {name: mask.numel() for name, mask in masks.items()}
    rows = [[name, sizes[name], live[name], pruned(live[name], sizes[name]),
             "minimum" if name in least else ""] for name in masks]
    total, left = sum(sizes.values()), sum(live.values())
    rows.append(["all layers", total, left, pruned(left, total), ""])
    return charts.text_table(["layer", "weights", "live", "pruned", ""], rows)


def pruned(live, size):
    """The share of weights that is gone, as text."""
    return f"{100 * (1 - live / size):.2f}%"


def summary(args, facts):
    """What was drawn, how, and what of it differs from what the network was measured with."""
    changed = [f"{name} {facts[name]}" for name in ("sampler", "nfe", "seed")
               if name in facts and facts[name] != getattr(args, name)]
    measured = f" (measured with {', '.join(changed)})" if changed else ""
    dataset = f" of {facts['dataset']}" if "dataset" in facts else ""
    return (f"drew {args.samples} images{dataset}: sampler {args.sampler}, {args.nfe} evaluations, "
            f"seed {args.seed}{measured}, schedule {args.schedule}, prediction {args.prediction}, "
            f"{args.precision}: {args.out}")


# --------------------------------------------------------------------------- writing

def names(n):
    """The files of n images."""
    return [f"{i:05d}.png" for i in range(n)] + ["samples.png", "samples.npz"]


def recorded(out):
    """How many images this command has written to a folder; None: it was not here."""
    path = os.path.join(out, RECORD)
    if not os.path.lexists(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
        return int(record["samples"]) if record["source"] else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OSError(f"argument --out: {path} is not of ddpm.py --from, or damaged "
                      f"({runs.reason(error)}): choose another folder") from error


def check_folder(out, n):
    """OSError where files are in the way that an earlier call of this command did not make."""
    runs.writable([out], "--out")
    before = recorded(out)
    ours = set() if before is None else set(names(before))
    for name in names(n):
        path = os.path.join(out, name)
        if name not in ours and os.path.lexists(path):
            raise OSError(f"argument --out: {path} is there, but not of ddpm.py --from: choose "
                          "another folder")
    if before is None and os.path.isdir(out):
        if others := [name for name in os.listdir(out) if name.lower().endswith(PICTURES)]:
            raise OSError(f"argument --out: {out} holds images of another source "
                          f"({sorted(others)[0]}): drawn ones would mix with them; choose another "
                          "folder")


def write(out, drawn, record):
    """All files, each whole or not at all; those of an earlier call are replaced or removed."""
    n, before = len(drawn), recorded(out) or 0
    os.makedirs(out, exist_ok=True)
    for name in filter(UNFINISHED.fullmatch, os.listdir(out)):
        runs.remove(os.path.join(out, name))  # of a call that was killed

    def note(samples):  # at any moment it covers every file that is there
        text = json.dumps(record | dict(samples=samples), indent=1)
        runs.write_text(os.path.join(out, RECORD), text)
    note(max(n, before))
    pixels = drawn.permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C)
    for name, image in zip(names(n), pixels):
        with runs.atomic(os.path.join(out, name)) as temporary:
            grey = image.shape[2] == 1
            Image.fromarray(image[..., 0] if grey else image).save(temporary, "PNG")
    for name in sorted(set(names(before)) - set(names(n))):
        runs.remove(os.path.join(out, name))
    charts.save_grid(drawn[:GRID], os.path.join(out, "samples.png"))
    with runs.atomic(os.path.join(out, "samples.npz")) as temporary:
        with open(temporary, "wb") as file:
            np.savez(file, images=pixels)
    note(n)
