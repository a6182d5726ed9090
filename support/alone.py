"""The command line of ddpm.py: one dense DDPM, trained, saved and drawn from.

With --from it draws from a file instead: see support/draw.py.
"""
import os

import torch

from support import charts, cli, data, draw, ranks, runs

# may differ when a run goes on
FREE = "device", "data_dir", "out", "samples", "sampler", "nfe", "images"


def main(argv, ddpm, prune):
    """Train, or go on with it; save; draw a grid of samples. ddpm, prune: the modules of these
    names."""
    parser = cli.Parser(prog="ddpm.py", description="Train one dense DDPM; draw a grid of samples. "
                        "With --from: draw from a finished network.")
    cli.add_training_flags(parser, ddpm.PRESETS)
    parser.add_argument("--seed", type=cli.seed_number, default=0,
                        help="of the weights, the data order and the samples (default: 0)")
    parser.add_argument("--from", dest="source", metavar="FILE", type=cli.path,
                        help="train nothing: draw --samples images into --out from a model.pt, "
                             "a finished state of lth_diffusion.py or a .ticket file")
    parser.set_defaults(samples=100)
    args = parser.parse_args(argv)
    if args.source is not None:
        return draw.main(parser, argv, ddpm, prune)
    del args.source
    with cli.one_line(parser):
        cli.fill_defaults(args)
        args.out = args.out or f"runs/ddpm_{cli.folder_name(args)}"
        cli.check_model(args, ddpm)
    with runs.open_folder(args, parser, FREE) as (guard, reasons):
        print(f"{args.dataset}, U-Net {args.preset} on {reasons['device']}", flush=True)
        images, _ = data.load(args)
        torch.manual_seed(args.seed)
        shape = dict(channels=images.shape[1], image_size=images.shape[-1])
        model = ddpm.UNet(**shape | ddpm.PRESETS[args.preset])
        diffusion = ddpm.Diffusion(1000, args.schedule, args.prediction, args.weighting)
        train_and_draw(args, guard, model, diffusion, images, ddpm.train, ddpm.draw_samples)


def train_and_draw(args, guard, model, diffusion, images, train, draw_samples):
    """Train, save, draw. A finished model.pt is not trained again."""
    (rank, world), device = ranks.ranks(), cli.pick_device(args.device)[0]
    path, partial = f"{args.out}/model.pt", f"{args.out}/model.partial.pt"
    model = model.to(device)
    if rank == 0:
        facts = dict(method="ddpm.py")
        if args.images:  # they can change; what is drawn or downloaded cannot
            facts["data_hash"] = runs.images_hash(images)
        runs.write_config(args, runs.provenance(runs.typed(), device, **facts),
                          [name for name in facts if name == "data_hash"])
    if not os.path.exists(path):
        with runs.resumable(partial, guard) as (state, seconds), cli.training_memory():
            ema, losses = train(model, diffusion, images.to(device), seed=args.seed, state=state,
                                checkpoint=guard, rank=rank, world=world,
                                **cli.training_options(args))
        runs.save_state(path, config=model.config, model=model.state_dict(), losses=losses,
                        ema=ema.model.state_dict(), args=vars(args),
                        facts=runs.facts(args, diffusion, args.seed))
        runs.remove(partial)
        print(f"trained {args.steps} steps in {seconds():.0f} s, loss {losses[-1][1]:.4f}: {path}")
    ranks.wait_for_all()
    model.load_state_dict(runs.load_state(path, ["ema"])["ema"])
    x_T = torch.randn(args.samples, *images.shape[1:],
                      generator=torch.Generator().manual_seed(args.seed))
    with cli.sampling_memory():
        drawn = draw_samples(model, diffusion, x_T, args.precision, args.sampler, args.nfe,
                             share=ranks.share)
    if rank == 0:
        charts.save_grid(drawn, f"{args.out}/samples.png")
    print(f"drew {len(drawn)} images: {args.out}/samples.png")
