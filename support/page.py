"""report.html: a finished run on one page that opens offline, to be read, printed or handed in."""
import argparse
import base64
import html
import os
import shlex

import numpy as np
from PIL import Image

from support import charts, cli, runs
from support.words import ARMS, ASKS, clock, counted, legend

# file -> how it is read
PICTURES = {
    "denoising.gif":
        "From noise to image: the same place holds the same starting noise in every network, so "
        "whatever differs there was changed by pruning and training again.",
    "samples_by_sparsity.png":
        "Samples: every row is one network, every column one starting noise; read down a column "
        "to see when an image changes or breaks.",
    "quality_vs_sparsity.png":
        "Quality by sparsity, lower is better: a winning ticket stays near or below the dashed "
        "line of the dense network where its controls rise above it.",
    "layers.png":
        "Where the remaining weights are: a row per layer, a column per round; dark layers are "
        "nearly empty, and * marks those at the minimum that pruning leaves them.",
    "losses.png":
        "Training losses: the early part of a ticket's curve is that of the dense network; equal "
        "final losses do not imply equal samples.",
}
STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #5c5c5c; --rule: #dcdcdc; --back: #fff;
  --box: #f5f5f3; --link: #0059a1; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a8a8a8; --rule: #444;
  --back: #181818; --box: #242424; --link: #7db8ec; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1rem 1.2rem 3rem; color: var(--ink);
  background: var(--back); font: 1rem/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem;
  border-bottom: 1px solid var(--rule); padding-bottom: .2rem; }
a { color: var(--link); } .soft, figcaption, dd { color: var(--soft); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .82rem;
  font-variant-numeric: tabular-nums; } th, td { padding: .3rem .38rem; white-space: nowrap;
  text-align: right; border-bottom: 1px solid var(--rule); } .text { text-align: left; }
th { white-space: normal; vertical-align: bottom; }
ul { padding-left: 1.2rem; } ul ul { color: var(--soft); font-size: .92rem; }
dl { display: grid; grid-template-columns: minmax(6rem, max-content) 1fr; gap: .25rem 1rem;
  font-size: .92rem; } dt { font-weight: 600; } dd { margin: 0; min-width: 0; }
figure { margin: 1.4rem 0; } img { max-width: 100%; height: auto; background: #fff;
  border-radius: 4px; } pre { background: var(--box); padding: .8rem; border-radius: 4px;
  font-size: .82rem; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; } }
.still { display: none; }
@media (prefers-reduced-motion: reduce) { .film { display: none; } .still { display: block; } }
@media print { @page { margin: 15mm; } html { font-size: 9.5pt; }
  :root { --ink: #000; --soft: #333; --rule: #bbb; --back: #fff; --box: #fff; --link: #000; }
  body { max-width: none; padding: 0; } .wide { overflow: visible; }
  table { font-size: 7pt; } th, td { padding: .1rem .25rem; white-space: normal; }
  figure, tr, li { break-inside: avoid; } h2 { break-after: avoid; } img { max-height: 12cm;
  width: auto; } .film { display: none; } .still { display: block; max-width: 60%; } }
"""
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>"""
# arXiv number -> (key, authors, title, where, year)
PAPERS = {
    "1803.03635": ("frankle2019", "Frankle, Jonathan and Carbin, Michael",
                   "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
                   "International Conference on Learning Representations", 2019),
    "1912.05671": ("frankle2020", "Frankle, Jonathan and Dziugaite, Gintare Karolina and "
                   "Roy, Daniel M. and Carbin, Michael",
                   "Linear Mode Connectivity and the Lottery Ticket Hypothesis",
                   "International Conference on Machine Learning", 2020),
    "2006.11239": ("ho2020", "Ho, Jonathan and Jain, Ajay and Abbeel, Pieter",
                   "Denoising Diffusion Probabilistic Models",
                   "Advances in Neural Information Processing Systems", 2020),
    "2310.18823": ("jiang2023", "Jiang, Chao and Hui, Bo and Liu, Bohan and Yan, Da",
                   "Successfully Applying Lottery Ticket Hypothesis to Diffusion Model",
                   "NeurIPS 2023 Workshop on Diffusion Models", 2023),
}


def write(exp, rows, header, table, said):
    """Write report.html into the folder of a run whose config.json is there; return its path.

    exp: the run's Experiment. rows: {job: row}. header, table, said: what the run printed.
    """
    a, facts = exp.args, runs.read_config(exp.args.out)
    title = f"Lottery tickets in a diffusion model of {a.dataset}"
    sections = {
        "What was asked": paragraph(asked(exp, rows, facts)),
        "What came out": nested(said),
        "The table": html_table(header, table) + definitions(legend(header)),
        "Pictures": "".join(figure(a.out, name, text) for name, text in PICTURES.items()),
        "What each network tests": definitions((ARMS[arm], ASKS[arm]) for arm in arms_in(rows)),
        "What it cost": cost(rows),
        "Where the figures come from": definitions(provenance(exp, facts)),
        "How to cite": cite(facts),
        "How to reproduce this run": again(exp, facts),
    }
    body = "\n".join(f"<h2>{escape(name)}</h2>\n{text}" for name, text in sections.items())
    path = os.path.join(a.out, "report.html")
    runs.write_text(path, PAGE.format(title=escape(title), style=STYLE, body=body))
    return path


# --------------------------------------------------------------------------- parts of HTML

def escape(value):
    """Any value as text of HTML."""
    return html.escape(str(value))


def paragraph(text, kind="plain"):
    """A <p> of plain text; kind: its class in STYLE."""
    return f'<p class="{kind}">{escape(text)}</p>\n'


def nested(said):
    """Lines as a list; indented lines as a list below the line before them."""
    items = []
    for line in said.split("\n"):
        if line.startswith(" "):
            items[-1][1].append(line.strip())
        else:
            items.append((line, []))
    parts = []
    for line, below in items:
        inner = "".join(f"<li>{escape(one)}</li>" for one in below)
        parts.append(f"<li>{escape(line)}{inner and f'<ul>{inner}</ul>'}</li>")
    return f"<ul>{''.join(parts)}</ul>\n"


def html_table(header, rows):
    """A table that scrolls sideways where it is too wide; numbers to the right."""
    head, columns = [], list(charts.typed_columns(header, rows))
    kinds = ["" if numbers else ' class="text"' for _, _, numbers in columns]
    for kind, (name, _, _) in zip(kinds, columns):
        head.append(f"<th{kind}>{escape(name)}</th>")
    lines = ["".join(head)]
    for cells in zip(*(texts for _, texts, _ in columns)):
        lines.append("".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, cells)))
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="wide"><table>\n{body}</table></div>\n'


def definitions(pairs):
    """(name, text) pairs as a list of definitions."""
    lines = [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in pairs]
    return "<dl>\n" + "\n".join(lines) + "\n</dl>\n"


def code(text):
    """Text as it is, in a box."""
    return f"<pre>{escape(text)}</pre>\n"


def figure(out, name, text):
    """A picture of the run, inside the page, with the sentence that says how it is read."""
    path = os.path.join(out, name)
    if not os.path.exists(path):
        return paragraph(f"{name} was not drawn.", "soft")
    with open(path, "rb") as file:
        content = file.read()
    kind = os.path.splitext(name)[1][1:]
    with Image.open(path) as image:
        size = f'width="{image.width // charts.SHRINK}" height="{image.height // charts.SHRINK}"'
    shown = image_of(content, kind, text, size, "film" if kind == "gif" else "drawn")
    if kind == "gif":  # for paper, and for readers who want no motion, the last frame
        shown += image_of(charts.last_frame(path), "png", text, size, "still")
    return f"<figure>{shown}<figcaption>{escape(text)}</figcaption></figure>\n"


def image_of(content, kind, text, size, name):
    """The bytes of a picture as an <img> that loads nothing; name: its class in STYLE."""
    inside = base64.b64encode(content).decode()
    return (f'<img class="{name}" src="data:image/{kind};base64,{inside}" alt="{escape(text)}" '
            f"{size}>")


# --------------------------------------------------------------------------- what the page says

def arms_in(rows):
    """The arms of a run, in the order of ARMS."""
    found = {job.arm for job in rows}
    return [arm for arm in ARMS if arm in found]


def listed(words):
    """a; a and b; a, b and c."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def asked(exp, rows, facts):
    """The question, in one paragraph."""
    a, dense = exp.args, next(iter(rows.values()))
    levels = {job.round: f"{100 * row['sparsity']:.1f} %" for job, row in rows.items()
              if job.arm == "ticket"}
    controls = [ARMS[arm] for arm in arms_in(rows) if arm not in ("dense", "ticket")]
    rounds = sorted({job.round for job in rows if ARMS[job.arm] in controls})
    where = f"round{'s' * (len(rounds) > 1)} {listed([str(r) for r in rounds])}" if rounds else ""
    compared = (f"They are compared with {listed(controls)} in {where}" if controls else
                "No controls were trained: whatever comes out, it may not be the ticket's doing")
    return (f"Does a diffusion model of {a.dataset} contain winning tickets, sparse networks that "
            "draw as well as the whole one and better than their controls? The dense network is "
            f"the U-Net {a.preset} with {dense['total_weights']:,} prunable weights, trained for "
            f"{counted(a.steps, 'step')} of {counted(a.batch, 'image')}. {facts['method']} pruned "
            f"it in {counted(a.rounds, 'round')}; the tickets have {listed(levels.values())} "
            f"sparsity (ranking: {a.scope}) and go back to step {exp.k:,}. {compared}. "
            f"{counted(len(a.seeds), 'seed')} {'was' if len(a.seeds) == 1 else 'were'} run. "
            "Every network is measured by "
            f"{counted(a.samples, 'sample')}, drawn by the {a.sampler} sampler in "
            f"{counted(a.nfe, 'network evaluation')}; {len(exp.real):,} test images serve as the "
            "reference.")


COSTS = {"steps": ("steps", 1, ",.0f"), "train_steps_total": ("steps in all", 1, ",.0f"),
         "train_macs_total": ("training TMACs in all", 1e12, ",.3f"),
         "macs_live": ("live MMACs", 1e6, ",.1f"), "train_seconds": ("train s", 1, ",.0f"),
         "seconds_per_1000": ("s/1000", 1, ",.1f"), "train_memory": ("train MB", 1e6, ",.0f"),
         "sample_memory": ("sampling MB", 1e6, ",.0f"),
         "ticket_bytes": ("ticket kB", 1e3, ",.0f")}


def cost(rows):
    """What was spent by round and arm, means over seeds, and how to read it."""
    groups, total = {}, sum(row["train_seconds"] for row in rows.values())
    for job, row in rows.items():
        groups.setdefault((job.round, job.arm), []).append(row)
    table = []
    for (number, arm), group in groups.items():
        line = [number, ARMS[arm]]
        for name, (_, unit, form) in COSTS.items():
            known = [row[name] for row in group if row.get(name) is not None]
            line.append(f"{np.mean(known) / unit:{form}}" if known else "-")
        table.append(line)
    header = ["round", "arm", *(name for name, _, _ in COSTS.values())]
    read = [
        "A mask saves no seconds on dense hardware, which multiplies zeros like any other number; "
        "only channel tickets, which are smaller networks, do. MACs (multiply-accumulates) count "
        "what a network that skipped its zeros would have to do.",
        "'In all' includes the training runs that this network was derived from. A training step "
        "counts as three evaluations per image. Memory is the peak; on a CPU it includes the "
        "program itself. "
        f"All {counted(len(rows), 'training run')} together trained for {clock(total)}."]
    return html_table(header, table) + "".join(map(paragraph, read))


def provenance(exp, facts):
    """(name, text) of where the figures come from."""
    a, versions = exp.args, facts["versions"].items()
    yield "command", facts["command"]
    yield "commit", facts["commit"] or "unknown: not in a git repository"
    yield "machine", f"{facts['processor']}, {facts['device']}"
    yield "threads", facts["threads"]
    yield "processes", facts["ranks"]
    yield "precision", facts["precision"]
    yield "versions", ", ".join(f"{name} {number}" for name, number in versions)
    yield "seeds", ", ".join(map(str, a.seeds))
    yield "data", f"{a.dataset}, hash {facts['data_hash']}"
    yield "classifier", f"of the domain metrics, hash {facts['classifier_hash']}"
    yield "margins", "; ".join(f"{metric} up to {100 * share:g} % above dense counts as equal"
                               for metric, share in facts["margins"].items())


def cite(facts):
    """BibTeX of this code and of the papers it stands on, and links to them."""
    commit = f", commit {facts['commit']}" if facts["commit"] else ""
    entries = ["@misc{lthdiffusion,\n  title = {The Lottery Ticket Hypothesis on Diffusion Models},"
               "\n  author = {{The authors of lth-diffusion}},\n  year = {2026},\n"
               f"  note = {{Software, MIT license{commit}}},\n}}"]
    links = []
    for number, (key, authors, title, where, year) in PAPERS.items():
        entries.append(f"@article{{{key},\n  title = {{{title}}},\n  author = {{{authors}}},\n"
                       f"  journal = {{{where}}},\n  year = {{{year}}},\n"
                       f"  eprint = {{{number}}},\n  archivePrefix = {{arXiv}},\n}}")
        links.append(f'<li><a href="https://arxiv.org/abs/{number}">{escape(title)}</a>, '
                     f"{year}</li>")
    return f"<ul>{''.join(links)}</ul>\n" + code("\n\n".join(entries))


# --------------------------------------------------------------------------- the command

def again(exp, facts):
    """What to type to make the run once more."""
    known = facts["commit"] and not set(facts["commit"]) & set("-, ")
    lines = [f"git checkout {facts['commit']}"] if known else []
    text = ("The same folder is not trained again; choose another --out to start anew. Figures "
            "are equal to the bit on the same machine, versions and threads; elsewhere they are "
            "close.")
    return code("\n".join([*lines, command(exp.args, facts)])) + paragraph(text, "soft")


def command(args, facts):
    """The command line of a run: the flags that differ from their defaults. A study's run is made
    by the study."""
    method = facts["method"]
    threads = f"OMP_NUM_THREADS={facts['threads']} " if facts["device"] == "cpu" else ""
    start = "python " + (method if method.endswith(".py") else f"-m {method}")
    if method.startswith("studies."):
        return threads + facts["command"]
    default, words = vars(defaults(args)), []
    derived = {"prune_rate"} if args.final_sparsity is not None else set()
    for name, value in vars(args).items():
        known = name in default and default[name] == value
        if known or value is None or value is False or name in derived:
            continue
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words += map(str, value if isinstance(value, (list, tuple)) else [value])
    return f"{threads}{start} {shlex.join(words)}".strip()


def defaults(args):
    """The flags of lth_diffusion.py as they are when only the data set and preset are given."""
    parser = argparse.ArgumentParser()
    cli.add_training_flags(parser, [args.preset])
    cli.add_pruning_flags(parser, None, [args.score])
    given = ["--images", args.images] if args.images else ["--dataset", args.dataset]
    plain = parser.parse_args(given)
    cli.complete(plain)
    return plain
