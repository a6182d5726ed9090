"""What a run prints and draws, from its rows, samples and losses."""
import os
import time

import numpy as np
import torch

from support import charts, classifier, cli, own, page, ranks, runs
from support.claims import HELPER
from support.quality import ENOUGH
from support.verdict import verdicts
from support.words import ARMS, QUALITY, clock, counted, legend, seeds_of

COLUMNS = """seed round arm sparsity live_weights total_weights layers_at_minimum
    fid_domain precision_domain recall_domain classes_domain mean_pixel
    fid kid kid_error inception_score precision recall n_samples
    val_loss val_loss_t0 val_loss_t1 val_loss_t2 val_loss_t3 val_loss_t4 train_loss
    steps train_steps_total train_macs_total macs_dense macs_live ticket_bytes train_seconds
    seconds_per_1000 train_memory sample_memory""".split()
FROM_START = "dense", "reinit", "small"  # arms that train from step 0
FORMS = dict(val_loss="{:.4f}", kid="{:.4f}", mean_pixel="{:.1f}")
FAR = 4  # times the fid_domain of real images: from here on a network counts as undertrained
ROWS = 9  # of samples in one picture, where some can be left out
FRAMES, NOISES = 28, 4  # of the animation: pictures in time, starting noises
SAME = "experiment", "data_hash", "classifier_hash", "threads"  # may not change in a folder


def write_config(exp, method, margins):
    """config.json: the flags, and where the figures come from."""
    a = exp.args
    facts = runs.provenance(
        runs.typed(), exp.device, precision=a.precision, method=method,
        margins=margins, ranks=ranks.ranks()[1], experiment=type(exp).__name__,
        reference=exp.reference, reference_n=len(exp.real), **exp.hashes)
    runs.write_config(a, facts, SAME if exp.device.type == "cpu" else SAME[:-1])


def begin(exp, plan, method, margins, free, reasons, train, denoiser):
    """Before the first training run: config.json; what will be done, and how long it will take.
    free: flags that may differ from those of the folder; reasons: why this device; train,
    denoiser: of ddpm, to be timed."""
    a = exp.args
    ranks.wait_for_all()
    if ranks.first():
        with runs.one_at_a_time(a.out):  # another process may have begun meanwhile
            runs.check_config(a, free, method)
            if HELPER not in os.environ:  # the command is that of the process it helps
                write_config(exp, method, margins)
    exp.planned = plan(a)
    done = {job for job in exp.planned if os.path.exists(job.path(a.out))}
    if len(done) < len(exp.planned):
        model = exp.new_model(0)
        exp.cost = measure_speed(exp, model, train, denoiser(model, a.precision))
    announce(exp, done, reasons)


def end(exp, sizes, margins, to_uint8):
    """After the last: the pictures, the table with its verdicts, and the page that holds them all.
    sizes: {layer: weights}; to_uint8: of ddpm, makes images of the sampler's x."""
    if ranks.first() and HELPER not in os.environ:
        draw_run(exp, sizes, to_uint8)
        header, table, said = write_table(exp, margins)
        if not any(job.round for job in exp.planned):  # dense networks alone: nothing is compared
            return
        path = page.write(exp, rows_of(exp), header, table, said)
        print(f"\nPictures and tables: {exp.args.out}/; the page to read or hand in: {path}")


def rows_of(exp):
    """{job: row} of the training runs planned, in their order."""
    return {job: exp.rows[job] for job in exp.planned}


def announce(exp, done, reasons):
    """Print device, data, network and plan, and how long it will take here."""
    a, n, model = exp.args, len(exp.real), exp.new_model(0)
    left = seconds_of(exp, [job for job in exp.planned if job not in done])
    sparsity = 100 * (1 - (1 - a.prune_rate) ** a.rounds)
    lines = reasons | dict(
        data=f"{a.dataset}: {len(exp.images):,} training and {len(exp.test):,} test images; domain "
             f"classifier {exp.hashes['classifier_hash']}{own_images(exp)}",
        real=f"fid_domain of {n:,} real test images: {exp.reference['fid_domain']:.2f}",
        fid=exp.why_inception,
        model=f"U-Net {a.preset}: {sum(p.numel() for p in model.parameters()):,} parameters"
              + ("; on a GPU the default is cifar" if a.preset == "cifar-small" else ""),
        plan=f"{seeds_of(a.seeds)}; {counted(a.rounds, 'round')} "
             f"of {100 * a.prune_rate:.1f} %, to {sparsity:.1f} % sparsity; {a.scope} ranking "
             f"({a.score}); "
             f"back to step {exp.k:,} of {a.steps:,}; controls: {controls_of(a)}",
        jobs=f"{len(exp.planned)} training runs, {len(done)} of them done"
             + (f"; about {clock(left)} to go here" if left else ""))
    for name, text in lines.items():
        print(f"{name:<8} {text}", flush=True)


def controls_of(args):
    """reinit, random mask in rounds 5, 10; none."""
    if not args.controls:
        return "none"
    rounds = ", ".join(map(str, args.control_rounds))
    return (f"{', '.join(ARMS[arm] for arm in args.controls)} in round"
            f"{'s' * (len(args.control_rounds) > 1)} {rounds}")


def own_images(exp):
    """What to say of --images beside their number: their size, and what the features know."""
    if getattr(exp.args, "images", None) is None:
        return ""
    return f"; {own.says(exp.args, exp.classifier, classifier.accuracy)}"


def progress(exp, job):
    """Log a finished training run: its row, the table so far, one line on the screen."""
    if not ranks.first():
        return
    row, planned, out = exp.rows[job], exp.planned, exp.args.out
    runs.append_line(os.path.join(out, "log.jsonl"), row)
    with runs.one_at_a_time(out):
        write_results(out, planned, exp.rows)
    left = [other for other in planned if not os.path.exists(other.path(out))]
    togo = f" | about {clock(seconds_of(exp, left))} to go" if left and exp.cost[0] else ""
    number = f"{len(planned) - len(left)}/{len(planned)}"
    print(f"[{number}] seed {job.seed} round {job.round} {ARMS[job.arm]}: "
          f"{100 * row['sparsity']:.1f} % pruned, {row['live_weights']:,} live weights | "
          f"fid_domain {row['fid_domain']:.2f} ({row['n_samples']:,} samples) | "
          f"val_loss {row['val_loss']:.4f} | train "
          f"{row['train_seconds']:.0f} s{togo}", flush=True)


def write_results(out, planned, rows):
    """results.csv, one line per training run, in the order of the plan."""
    table = [[rows[job].get(name) for name in COLUMNS] for job in planned if job in rows]
    runs.write_table(os.path.join(out, "results.csv"), COLUMNS, table)


def summarise(rows, reference, n):
    """(header, table): mean and standard deviation over seeds by round and arm; real images."""
    shown, groups = [name for name in QUALITY if name in reference] + ["val_loss"], {}
    for row in rows.values():
        groups.setdefault((row["round"], row["arm"]), []).append(row)
    table = []
    for (number, arm), group in groups.items():
        one = group[0]
        line = [number, ARMS[arm], f"{100 * one['sparsity']:.1f} %", f"{one['live_weights']:,}",
                len(group), *(spread(group, name) for name in shown)]
        seconds = (np.mean([row[name] for row in group])
                   for name in ("train_seconds", "seconds_per_1000"))
        table.append([*line, f"{one['macs_live'] / 1e6:.1f}", f"{one['ticket_bytes'] / 1e3:,.0f}",
                      *(f"{value:.{digits}f}" for value, digits in zip(seconds, (0, 1)))])
    header = ["round", "arm", "pruned", "live weights", "seeds",
              *(QUALITY.get(name, name) for name in shown), "live MMACs", "ticket kB", "train s",
              "s/1000"]
    scores = [FORMS.get(name, "{:.2f}").format(reference[name]) if name in reference else ""
              for name in shown]
    return header, [*table, ["", "real images", f"{n:,} images", "", "", *scores, *[""] * 4]]


def spread(group, name):
    """Mean, and standard deviation where there are several seeds, of a column."""
    values, form = [row.get(name, np.nan) for row in group], FORMS.get(name, "{:.2f}")
    deviation = f" ± {form.format(np.std(values, ddof=1))}" if len(values) > 1 else ""
    return form.format(np.mean(values)) + deviation


def arms_of(rows, number, metric="fid_domain"):
    """{"dense", "ticket", "reinit", "random": {seed: value}} at a round: what a verdict needs."""
    arms = dict(dense=0, ticket=number, reinit=number, random=number)
    return {arm: {job.seed: row[metric] for job, row in rows.items()
                  if (job.round, job.arm) == (its_round, arm)} for arm, its_round in arms.items()}


def conclude(args, rows, found, reference):
    """The figures and the verdict of each control round by each metric, a line each with what was
    and was not shown below it; where metrics disagree; what to keep in mind. found: {metric:
    {round: Verdict}}."""
    said = []
    for metric, by_round in found.items():
        for number, verdict in by_round.items():
            arms = arms_of(rows, number, metric)
            if all(arms.values()):
                figures = figures_of(arms, metric, reference)
                said.append(f"At {sparsity_of(rows, number)} sparsity, {metric}: {figures}: "
                            f"{verdict.answer}.")
                said += [f"    {line}." for line in verdict.details]
    for number in next(iter(found.values())):
        answers = {metric: by_round[number].winning for metric, by_round in found.items()}
        if set(answers.values()) == {True, False}:
            won = [metric for metric, winning in answers.items() if winning]
            said.append(f"At {sparsity_of(rows, number)} the metrics DISAGREE: winning by "
                        f"{won[0]} alone.")
    return "\n".join([*said, *remarks(args, rows, reference)])


def figures_of(arms, metric, reference):
    """dense 8.7, ticket 10.5, .. (real images 0.7): means over seeds of arms_of()."""
    form = FORMS.get(metric, "{:.1f}").format
    means = {ARMS[arm]: np.mean(list(values.values())) for arm, values in arms.items()}
    figures = ", ".join(f"{name} {form(mean)}" for name, mean in means.items())
    real = f" (real images {form(reference[metric])})" if metric in reference else ""
    return figures + real


def without_verdict(rows, number, reference):
    """A line for a round that lacks what a verdict needs: its figures, and what is missing."""
    arms = {arm: values for arm, values in arms_of(rows, number).items() if values}
    missing = [ARMS[arm] for arm in ("reinit", "random") if arm not in arms]
    missing += [] if len(arms["dense"]) > 2 else ["three seeds (--seeds 0 1 2)"]
    return (f"At {sparsity_of(rows, number)} sparsity, fid_domain: "
            f"{figures_of(arms, 'fid_domain', reference)}: no verdict; it needs "
            f"{page.listed(missing)}.")


def remarks(args, rows, reference):
    """What holds for the whole table. FID is a squared distance: at FAR = 4 times the figure of
    real images, samples are twice as far from the training images as real ones are."""
    dense = [row["fid_domain"] for row in rows.values() if row["arm"] == "dense"]
    mean, real = np.mean(dense), reference["fid_domain"]
    if mean > FAR * real:
        yield (f"The dense network is undertrained: fid_domain {mean:.1f}, real images {real:.1f}. "
               "Compare arms, not absolute values.")
    if args.samples < ENOUGH:
        yield (f"Precision and recall are left out: below {ENOUGH} samples noise can score high.")
    if args.samples < 10_000:
        yield (f"FID from {args.samples:,} samples: not comparable with papers, only within this "
               "table.")


def sparsity_of(rows, number):
    """How much the ticket of a round has lost, as text."""
    found = [row["sparsity"] for job, row in rows.items()
             if (job.round, job.arm) == (number, "ticket")]
    return f"{100 * found[0]:.1f} %"


def write_table(exp, margins):
    """Write results.csv and table.md; print the table, its legend and the verdicts at these
    margins, {metric: share of dense} -> (header, table, what was said)."""
    a, n, rows = exp.args, len(exp.real), rows_of(exp)
    compared = a.control_rounds if {"reinit", "random"} <= set(a.controls) else ()
    found = {metric: verdicts({r: arms_of(rows, r, metric) for r in compared}, margin=margin,
                              metric=metric) for metric, margin in margins.items()}
    write_results(a.out, exp.planned, rows)
    header, table = summarise(rows, exp.reference, n)
    said = conclude(a, rows, found, exp.reference)
    if not compared and any(job.arm == "ticket" for job in rows):
        last = max(job.round for job in rows if job.arm == "ticket")
        said = f"{without_verdict(rows, last, exp.reference)}\n{said}"
    explained = legend(header)
    wide = max(len(name) for name, _ in explained)
    lines = "\n".join(f"{name:<{wide}}  {text}" for name, text in explained)
    runs.write_text(os.path.join(a.out, "table.md"), in_markdown(header, table, said, explained))
    print(f"\n{charts.text_table(header, table)}\n\n{lines}\n\n{said}")
    return header, table, said


def in_markdown(header, table, said, explained):
    """table.md: the table, what was said as a list, indented lines below theirs, and the legend."""
    lines = [line.replace("    ", "    - ", 1) if line.startswith(" ") else f"- {line}"
             for line in said.split("\n")]
    columns = [f"- {name}: {text}" for name, text in explained]
    blocks = [charts.markdown_table(header, table)], lines, ["The columns:", "", *columns]
    return "\n\n".join("\n".join(block) for block in blocks)


def measure_speed(exp, model, train, predict, batch=256, repeats=5):
    """Median seconds (per training step, per network evaluation of one image) on this machine."""
    marks, device = [], exp.device
    x, t = exp.x_T(batch).to(device), torch.zeros(batch, dtype=torch.int64, device=device)
    sampling = runs.seconds_in_turns([lambda: predict(x, t)], 3, device=device)
    options = cli.training_options(exp.args) | dict(steps=repeats + 2, lr=0.0, label="timing")
    train(model, exp.diffusion, exp.images, **options,  # rate 0: it cannot diverge
          after_step=lambda *_: marks.append(time.monotonic()))
    return float(np.median(np.diff(marks)[1:])), float(np.median(sampling)) / batch


def seconds_of(exp, jobs):
    """How long training runs take in all, by exp.cost, what measure_speed returned."""
    a, (step, evaluation), total = exp.args, exp.cost, 0.0
    for job in jobs:
        steps = a.steps - (0 if job.arm in FROM_START else exp.k)
        total += steps * step + a.samples * a.nfe * evaluation
    return total


# --------------------------------------------------------------------------- pictures

def draw_run(exp, sizes, to_uint8):
    """The pictures of a run: samples, quality, layers, losses, and the animation of sampling.
    sizes: {layer: its weights}; to_uint8: of ddpm."""
    a, rows = exp.args, rows_of(exp)
    states = {job: runs.load_state(job.path(a.out)) for job in rows if job.seed == a.seeds[0]}
    note = (f"Data: {a.dataset}. U-Net {a.preset}, {a.steps:,} steps of {a.batch}, back to step "
            f"{exp.k:,}; {a.sampler} with {a.nfe} network evaluations; {a.samples:,} samples; "
            f"{seeds_of(a.seeds)}.")
    draw_sample_rows(a, rows, states, note)
    if any(job.round for job in rows):  # dense networks alone have no sparsity to show
        draw_quality(a, rows, exp.reference, len(exp.real), note)
        draw_layers(a, rows, states, sizes, note)
    draw_losses(a, rows, states, note)
    draw_denoising(exp, states, to_uint8, note)


def draw_sample_rows(args, rows, states, note):
    """A row of samples per network; columns share the starting noise. Of many networks, those of
    rounds with controls."""
    tiles, few = [], [job for job in states if job.round in (0, *args.control_rounds)]
    for job in states if len(states) <= ROWS or len(few) < 2 else few:
        state = states[job]
        label = (f"{ARMS[job.arm]}\n{100 * rows[job]['sparsity']:.1f} % pruned\n"
                 f"fid_domain {rows[job]['fid_domain']:.1f}")
        tiles.append((label, state["pictures"][:12]))
    charts.sample_rows(tiles, os.path.join(args.out, "samples_by_sparsity.png"),
                       "The same starting noise, network by network",
                       f"Each column starts from the same noise.{shown_of(args)} {note}")


def shown_of(args):
    """Which seed a picture shows, where there are several."""
    return f" Shown: seed {args.seeds[0]}." if len(args.seeds) > 1 else ""


def draw_denoising(exp, states, to_uint8, note):
    """From noise to image: the networks of the last round of the first seed beside the dense one,
    from the same starting noise, as a GIF."""
    last = max(job.round for job in states)
    shown = [job for job in states if job.arm == "dense" or job.round == last]
    x_T, blocks = exp.x_T(exp.args.samples, exp.args.seeds[0])[:NOISES], []
    for job in shown:
        model, _ = exp.rebuild(states[job], "ema")
        label = f"{ARMS[job.arm]}\n{100 * exp.rows[job]['sparsity']:.1f} % pruned"
        blocks.append((label, frames_of(exp, model, x_T, job.seed, to_uint8)))
    # the sampler draws its noise by batch, and this is a smaller one
    other = (" Sampler noise differs from that of samples_by_sparsity.png."
             if exp.args.sampler == "ddpm" else "")
    times = [f"{k} of {exp.args.nfe} evaluations" for k in moments(exp.args.nfe)]
    charts.animation(blocks, times, os.path.join(exp.args.out, "denoising.gif"),
                     "From noise to image", "The same starting noise for every network."
                     f"{shown_of(exp.args)}{other} {note}")


def moments(evaluations):
    """After how many evaluations the frames of the animation are taken: 0 is noise. Later ones
    lie closer together, for on most of the way there is little to see."""
    left = np.linspace(1, 0, FRAMES) ** 1.5
    return sorted({round(evaluations * (1 - share)) for share in left})


def frames_of(exp, model, x_T, seed, to_uint8):
    """uint8 [frames, n, C, H, W]: what the run's sampler holds at moments(), on the way from the
    noise x_T [n, C, H, W] to images; decoded where the run's images are."""
    states = []
    model.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].clone()))
    images = exp.draw(model, seed, x_T=x_T, share=None)  # rank 0 alone draws
    held = [(exp.decode or to_uint8)(states[k]).cpu() for k in moments(exp.args.nfe)[:-1]]
    return torch.stack([*held, images]).numpy()


def draw_losses(args, rows, states, note):
    """Training loss of the dense network and of the rounds that have controls."""
    series = []
    for job, state in states.items():
        if job.round in (0, *args.control_rounds):
            steps, losses = zip(*state["losses"])
            style = "solid" if job.round in (0, args.control_rounds[-1]) else "dashed"
            pruned = f" {100 * rows[job]['sparsity']:.0f} %" if job.round else ""
            label = ARMS[job.arm] + pruned
            series.append(dict(label=label, x=steps, y=losses, style=style) | look_of(job.arm))
    charts.line_chart(series, os.path.join(args.out, "losses.png"), "Training loss", "step",
                      f"mean squared error on {args.prediction}", log_y=True,
                      note="Percentages: weights pruned. Means over 1 % of the steps. "
                           f"{note}")


def look_of(arm):
    """The colour and marker of an arm, the same in every picture of a run."""
    if arm == "dense":
        return dict(colour="#555555", shape=None)
    place = [name for name in ARMS if name != "dense"].index(arm)
    shapes = list(charts.SHAPES)
    return dict(colour=charts.PALETTE[place % len(charts.PALETTE)],
                shape=shapes[place % len(shapes)])


def draw_layers(args, rows, states, sizes, note):
    """Density of every layer by round, * where it is at its minimum; a channel ticket is compared
    with the dense network."""
    live = {job: live_by_layer(state["masks"]) for job, state in states.items()
            if job.arm in ("dense", "ticket")}
    matrix = [[counts[name] / size for counts in live.values()] for name, size in sizes.items()]
    marked = {(i, j) for i, name in enumerate(sizes) for j, job in enumerate(live)
              if name in rows[job]["at_minimum"]}
    charts.heat_map(matrix, [name.removesuffix(".weight") for name in sizes],
                    [str(job.round) for job in live], os.path.join(args.out, "layers.png"),
                    "Where the ticket lives: density of every layer by round",
                    f"*: the layer is at the minimum that pruning leaves it. {note}", log=True,
                    x_label="round", bar_label="live / all", marked=marked)


def live_by_layer(bits):
    """{layer: live weights} from packed masks, one bit per weight."""
    return {name: int(np.unpackbits(packed.numpy()).sum()) for name, packed in bits.items()}


def draw_quality(args, rows, reference, n, note):
    """fid_domain against sparsity: arms as lines, dense dashed, real images dotted."""
    def values_of(arm):
        found = {}
        for job, row in rows.items():
            if job.arm == arm:
                found.setdefault(job.round, []).append(row["fid_domain"])
        return found

    levels = [("dense", float(np.mean(values_of("dense")[0])), "dashed"),
              (f"real: {n:,} test images", reference["fid_domain"], "dotted")]
    series = []
    for arm, label in ARMS.items():
        if arm != "dense" and (by_round := values_of(arm)):
            groups = list(by_round.values())
            means, seeds = [np.mean(group) for group in groups], max(map(len, groups))
            error = [np.std(group, ddof=1) if len(group) > 1 else np.nan for group in groups]
            series.append(dict(label=label, x=list(by_round), y=means,
                               dots=groups if seeds > 1 else [],
                               y_low=np.subtract(means, error), y_high=np.add(means, error),
                               style="solid" if arm == "ticket" else "points",
                               **look_of(arm)))
    ticks = [(job.round, f"{100 * row['sparsity']:.0f} %") for job, row in rows.items()
             if job.arm in ("dense", "ticket") and job.seed == args.seeds[0]]
    bars = " Bars: standard deviation over seeds." if len(args.seeds) > 1 else ""
    charts.line_chart(series, os.path.join(args.out, "quality_vs_sparsity.png"),
                      finding(rows), "weights pruned", "fid_domain (lower is better)",
                      hlines=levels, x_ticks=ticks, note=note + bars)


def finding(rows):
    """The title of a picture: fid_domain of dense and of all arms of the last round, means."""
    last, found = max(job.round for job in rows), {}
    for job, row in rows.items():
        if job.round == last or job.arm == "dense":
            found.setdefault(job.arm, []).append(row["fid_domain"])
    figures = ", ".join(f"{ARMS[arm]} {np.mean(values):.1f}" for arm, values in found.items())
    return f"fid_domain at {sparsity_of(rows, last)} sparsity: {figures}"
