"""Does the verdict depend on the rate of learning, or on that of pruning?

    python -m studies.tuning                                 # drawn digits, three seeds
    python -m studies.tuning --dataset mnist --preset tiny --steps 560 --parts rounds

Other flags go to lth_diffusion.py. With larger learning rates the advantage of tickets over new
weights can vanish (Liu et al., Rethinking the Value of Network Pruning, 2019, 1810.05270), and a
rate that suits one arm better than another makes false tickets (Ma et al., Sanity Checks for
Lottery Tickets, 2021, 2107.00166).

rates    dense, ticket, reinit and random mask at 90 % sparsity, trained at a quarter, once and four
         times the default peak rate. Last, each arm at the rate at which its mean over seeds is
         lowest: a search of the same size for every arm.
rounds   90 % sparsity reached in 2, 5 and 10 rounds, at the default rate; each ticket is also
         compared with that of 2 rounds.

Margin, fixed before the run: 10 % of dense (of the ticket of 2 rounds) in fid_domain; intervals of
90 % over seeds. A setting in which a run diverges has no verdict.

What would change our mind about 'the verdict is about the network, not its training': another
verdict where each arm has its own best rate, or with another number of rounds.
"""
if __name__ == "__main__" and not __package__:
    raise SystemExit("run it as a module:  python -m studies.tuning")

import os

import numpy as np

import lth_diffusion as lth
from studies.common import JUDGED, SHOWN as ARMS, Study, against, judged, rounded, rows_of
from support import charts, cli, report, runs, words

RATES = 0.25, 1, 4  # times the default peak rate
ROUNDS = 2, 5, 10  # to the same sparsity; the first is that of `rates`
SPARSITY = 0.9
MARGIN = lth.MARGINS["fid_domain"]
PARTS = "rates", "rounds"
OWN = "own best rate"
HEADER = ["part", "setting", "seed", "arm", "lr", "rounds", "val_loss", "fid_domain"]
SUMMARY = ["part", "setting", *JUDGED]


def settings(lr, parts=PARTS):
    """(part, name, peak rate, rounds) of every setting."""
    if "rates" in parts:
        for factor in RATES:
            yield "rates", f"{factor:g} x rate", float(f"{factor * lr:.3g}"), ROUNDS[0]
    if "rounds" in parts:
        for rounds in ROUNDS:
            yield "rounds", words.counted(rounds, "round"), lr, rounds


def run_setting(rest, lr, rounds, folder):
    """{job: row} of a run of lth_diffusion.py; without what diverged. Dense networks are those of
    the run of fewest rounds."""
    flags = [*rest, "--lr", f"{lr:g}", "--rounds", f"{rounds}", "--final-sparsity", f"{SPARSITY}",
             "--controls", "reinit", "random", "--control-rounds", f"{rounds}",
             "--out", f"{folder}_lr{lr:g}_rounds{rounds}"]
    if rounds != ROUNDS[0]:
        flags += ["--dense-from", f"{folder}_lr{lr:g}_rounds{ROUNDS[0]}"]
    args, parser = lth.parse_args(flags)
    try:
        return lth.run(args, parser).rows
    except SystemExit as stop:
        if stop.code != 1:  # 1: it diverged, as it has said itself
            raise
        return rows_of(args)


def measure(args, rest, folder, parts):
    """Rows of HEADER, as dicts."""
    for part, name, lr, rounds in settings(args.lr, parts):
        for job, row in run_setting(rest, lr, rounds, folder).items():
            if job.arm in ARMS and job.round in (0, rounds) and job.seed in args.seeds:
                values = job.seed, job.arm, lr, rounds, row["val_loss"], row["fid_domain"]
                yield dict(zip(HEADER, (part, name, *values)))


def arms_of(table):
    """{(part, setting): {arm: {seed: fid_domain}}}; with the part `rates`, the arms at their own
    best rates too."""
    parts = {row["part"] for row in table}
    found = {(part, name): {arm: {} for arm in ARMS} for part, name, *_ in settings(1.0, parts)}
    for row in table:
        found[row["part"], row["setting"]][row["arm"]][row["seed"]] = row["fid_domain"]
    if "rates" not in parts:
        return found
    best = {}
    for arm in ARMS:
        tried = [arms[arm] for (part, _), arms in found.items() if part == "rates"]
        most = max(map(len, tried), default=0)
        whole = [values for values in tried if values and len(values) == most]
        best[arm] = min(whole, key=lambda values: np.mean(list(values.values())), default={})
    return found | {("rates", OWN): best}


def summarise(table):
    """Rows of SUMMARY; no verdict on a setting in which an arm lacks a seed."""
    seeds = {row["seed"] for row in table}
    for (part, name), arms in arms_of(table).items():
        found = dict(zip(JUDGED, judged(arms)))
        if any(set(values) != seeds for values in arms.values()):
            found |= dict(p=None, answer="no verdict")
        yield [part, name, *found.values()]


def conclude(summary):
    """Whether the verdict depends on the settings; the first of ROUNDS is the run at the default
    rate, and counts once."""
    said = {row[1]: row[8] for row in summary}
    own = said.pop(OWN, None)
    if own:
        said.pop(words.counted(ROUNDS[0], "round"), None)
    ending = f"; with each arm at its own best rate: {own}." if own else "."
    won = list(said.values()).count("winning")
    if not any(answer in ("winning", "not shown") for answer in said.values()):
        return "No verdict: fewer than three seeds, or runs are missing."
    return f"Tickets win in {won} of {len(said)} settings{ending}"


def against_fewest(table):
    """A sentence for each number of rounds: its ticket against that of the first of ROUNDS."""
    tickets = {name: arms["ticket"] for (part, name), arms in arms_of(table).items()
               if part == "rounds"}
    first = tickets.pop(words.counted(ROUNDS[0], "round"), {})
    for name, ticket in tickets.items():
        if set(ticket) & set(first):
            n, mean, other, gap, low, high, said = against(ticket, first, MARGIN)
            ends = "" if low is None else f" [{low:+.2f}, {high:+.2f}]"
            yield (f"fid_domain of the ticket, {words.counted(n, 'seed')}: {name} {mean:.2f}, "
                   f"{words.counted(ROUNDS[0], 'round')} {other:.2f}; {gap:+.2f}{ends}: {said}")


def draw(table, title, path, note):
    """fid_domain of the arms in every setting, a dot for each seed."""
    found, series = arms_of(table), []
    for arm in ARMS:
        dots = [list(arms[arm].values()) for arms in found.values()]
        x = [i for i, values in enumerate(dots) if values]
        series.append(dict(label=words.ARMS[arm], x=x, y=[np.mean(dots[i]) for i in x],
                           dots=[dots[i] for i in x], style="points", **report.look_of(arm)))
    charts.line_chart(series, path, title, "", "fid_domain (lower is better)", log_y=True,
                      x_ticks=[(i, name) for i, (_, name) in enumerate(found)], note=note)


def main(argv=None):
    """The command line; other flags go to lth_diffusion.py."""
    study = Study("studies.tuning", __doc__)
    study.add_argument("--runs", default="runs", type=cli.path,
                       help="folder of the runs (default: runs)")
    study.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS),
                       help="default: both")
    owned = "--controls", "--control-rounds", "--rounds", "--final-sparsity", "--prune-rate", "--lr"
    with study.arguments(argv, owned) as args, cli.one_line(study, args.runs):
        rest = args.rest
        if not any(flag.startswith("--seeds") for flag in rest):
            rest = [*rest, "--seeds", "10", "11", "12"]
        common, _ = lth.parse_args(rest)  # a mistake in them ends here
        runs.writable([args.runs], "--runs")
        name = f"tuning_{common.dataset}"
        table = list(measure(common, rest, os.path.join(args.runs, name), args.parts))
        only = f"_{args.parts[0]}" if len(set(args.parts)) == 1 else ""
        path = os.path.join(args.out, name + only)
        summary, said = list(summarise(table)), list(against_fewest(table))
        device = cli.pick_device(common.device)[0]
        study.save(path, HEADER, [list(row.values()) for row in table], device, n=common.samples,
                   said=said)
        study.save(path + "_summary", SUMMARY, summary, device, n=common.samples)
        note = (f"{common.dataset}, {100 * SPARSITY:g} % sparsity; FID from {common.samples:,} "
                f"samples; {words.seeds_of(common.seeds)}.")
        draw(table, conclude(summary).rstrip("."), path + ".png", note)
    print(f"\n{charts.text_table(SUMMARY, rounded(summary))}\n\n{conclude(summary)}")
    print(*said, f"{path}.csv, _summary.csv, .json, .png", sep="\n")


if __name__ == "__main__":
    main()
