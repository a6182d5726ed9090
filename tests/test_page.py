"""report.html and denoising.gif: one file that loads nothing, whatever was run; the words of a run."""
import csv
import html.parser
import io
import re
import shlex
import subprocess
import sys
import types
import time

import numpy as np
import pytest
import torch
from PIL import Image

import ddpm
import lth_diffusion as lth
from methods import channels, cka, rst
from support import charts, cli, page, report, runs, screen, words
from support.verdict import verdict, verdicts

SMALL = "--steps 12 --batch 4 --samples 8 --nfe 4 --precision fp32".split()
PICTURES = set(page.PICTURES)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
        patch.setattr(report, "measure_speed", lambda *_: (0.0, 0.0))
        yield


class Reader(html.parser.HTMLParser):
    """The tags of a page: which stay open or close wrongly, what is loaded, what is linked, the text."""
    ALONE = {"meta", "img", "source", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.wrong, self.loaded, self.linked, self.words, self.tags = [], [], [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.ALONE:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "srcset"):
                self.loaded.append(value)
            if name == "href":
                self.linked.append(value)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def read(out):
    """The Reader of a finished run's page, checked for what holds of every page."""
    text = (out / "report.html").read_text("utf-8")
    found = Reader(text)
    assert found.open == [] and found.wrong == []
    assert all(address.startswith("data:image/") for address in found.loaded)
    assert all(address.startswith("https://arxiv.org/abs/") for address in found.linked)
    assert not {"script", "link", "iframe", "object"} & set(found.tags) and "url(" not in text
    assert "@import" not in text and "prefers-color-scheme: dark" in text and "@media print" in text
    order = re.findall(r"<h2>([^<]*)</h2>", text)
    assert order == ["What was asked", "What came out", "The table", "Pictures", "What each network tests",
                     "What it cost", "Where the figures come from", "How to cite", "How to reproduce this run"]
    found.text = "\n".join(found.words)
    return found


def command_of(found):
    """The words after `python lth_diffusion.py` or the like in the page's last box."""
    line = next(line for line in reversed(found.text.splitlines()) if " python " in f" {line}")
    return shlex.split(line[line.index("python "):])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two seeds with every control; what it printed."""
    out = tmp_path_factory.mktemp("page") / "run & <co>"
    argv = [*"--rounds 2 --final-sparsity 0.9 --seeds 0 1 --rewind 0 --control-rounds 2 --controls".split(),
            *lth.CONTROLS, *SMALL, "--out", str(out)]
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", said)
        lth.main(argv)
    return argv, out, said.getvalue()


def test_the_page_holds_what_the_run_said(finished):
    _, out, said = finished
    found, table = read(out), (out / "table.md").read_text("utf-8")
    assert len(found.loaded) == len(PICTURES) + 1  # the animation's last frame once more, for paper
    cells = [cell.strip() for line in table.splitlines() if line.startswith("| 2")
             for cell in line.strip("|").split("|")]
    assert len(cells) > 50 and all(cell in found.words for cell in cells)
    verdict_lines = [line.strip() for line in said.split("\n\n")[3].splitlines()]
    assert len(verdict_lines) == 4 and all(line in found.words for line in verdict_lines)
    assert all(line in table for line in verdict_lines)
    for arm in ("dense", "ticket", *lth.CONTROLS):
        assert words.ARMS[arm] in found.words and words.ASKS[arm] in found.text
    assert "A mask saves no seconds on dense hardware" in found.text
    for number in ("1803.03635", "1912.05671", "2006.11239", "2310.18823"):
        assert f"eprint = {{{number}}}" in found.text and f"https://arxiv.org/abs/{number}" in found.linked
    facts = runs.read_config(str(out))
    for fact in (facts["commit"], facts["processor"], facts["data_hash"], facts["classifier_hash"],
                 facts["versions"]["torch"], "fp32"):
        assert str(fact) in found.text


def test_every_column_is_explained(finished):
    _, out, said = finished
    header = (out / "table.md").read_text("utf-8").splitlines()[0].strip("| ").split(" | ")
    found, legend = read(out), said.split("\n\n")[2].splitlines()
    assert [line.split("  ")[0] for line in legend] == header
    assert all(words.LEGEND[name] in found.words for name in header)
    everything = {*report.summarise({}, dict.fromkeys(words.QUALITY, 0.0), 9)[0]}
    assert everything <= set(words.LEGEND)  # Inception's columns too


def test_texts_are_escaped(finished):
    """The folder's name is part of the commands on the page."""
    _, out, _ = finished
    raw = (out / "report.html").read_text("utf-8")
    assert "run & <co>" not in raw and "run &amp; &lt;co&gt;" in raw


def test_the_command_on_the_page_makes_the_same_run(finished):
    argv, out, _ = finished
    found = command_of(read(out))
    assert found[:2] == ["python", "lth_diffusion.py"]
    assert lth.parse_args(found[2:])[0] == lth.parse_args(argv)[0]
    assert "--rewind" in found and "--lr" not in found  # 0.0 is not the default; what is, is left out


@pytest.mark.parametrize("module, flags, name", [
    (lth, "--controls", "lth_diffusion.py"), (channels, "--oneshot --controls random", "methods.channels"),
    (rst, "--controls random --steps 40", "methods.rst"), (cka, "--controls", "methods.cka"),
    (lth, "--precision bf16 --sampler dpm --controls reinit", "lth_diffusion.py")])
def test_every_kind_of_run_has_a_page_and_pictures(tmp_path, module, flags, name):
    """No controls, channel tickets, a transformation, a probe, bf16."""
    out = tmp_path / "run"
    argv = ["--rounds", "1", *SMALL, *flags.split(), "--out", str(out)]
    module.main(argv)
    found = read(out)
    assert len(found.loaded) == len(PICTURES) + 1 and "was not drawn" not in found.text
    assert (out / "denoising.gif").stat().st_size <= 2_000_000
    with open(out / "results.csv") as file:
        arms = {row["arm"] for row in csv.DictReader(file)}
    assert all(words.ASKS[arm] in found.words for arm in arms)
    assert ("No controls were trained" in found.text) == (arms == {"dense", "ticket"})
    again = command_of(found)
    start = ["python", name] if name.endswith(".py") else ["python", "-m", name]
    assert again[:len(start)] == start
    told = []

    def tell(args, *_, **__):
        told.append(args)
        return types.SimpleNamespace(rows={})
    with pytest.MonkeyPatch.context() as patch:  # the same method reads its own flags back
        patch.setattr(lth, "run", tell)
        patch.setattr(module, "run", tell, raising=False)
        module.main(again[len(start):])
        module.main(argv)
    assert told[0].precision in ("fp32", "bf16")
    assert told[0] == told[1]


def test_a_page_without_pictures_says_so_and_without_a_commit_too(finished, tmp_path, monkeypatch):
    _, out, _ = finished
    monkeypatch.setattr(report, "draw_run", lambda *_: None)
    monkeypatch.setattr(runs, "commit", lambda: None)
    lth.main(["--rounds", "1", "--controls", *SMALL, "--out", str(tmp_path / "plain")])
    found = read(tmp_path / "plain")
    assert found.loaded == [] and found.text.count("was not drawn") == len(PICTURES)
    assert "not in a git repository" in found.text and "git checkout" not in found.text


def test_the_page_is_fast(finished):
    _, out, _ = finished
    args, _ = lth.parse_args(finished[0])
    exp = lth.Experiment(args)
    rows = {job: exp.load(job).row for job in lth.jobs(args)}
    header, table = report.summarise(rows, exp.reference, len(exp.real))
    before, began = (out / "report.html").read_bytes(), time.process_time()
    page.write(exp, rows, header, table, "one\n    two")
    assert time.process_time() - began < 2
    (out / "report.html").write_bytes(before)


def test_others_files_of_these_names_are_not_overwritten(tmp_path, capsys):
    for name in ("report.html", "denoising.gif"):
        folder = tmp_path / name[:4]
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(SystemExit) as stop:
            lth.main(["--rounds", "1", *SMALL, "--out", str(folder)])
        assert stop.value.code == 2 and name in capsys.readouterr().err
        assert (folder / name).read_text() == "mine"
        assert runs.UNFINISHED.fullmatch(f"{name}.{16 * 'a'}.part")


# ----------------------------------------------------------------------------------- the animation

def test_the_animation_is_the_samplers_way(finished):
    """Its first frame is x_T, its last what draw() returns, those between what the network was given."""
    args, _ = lth.parse_args(finished[0])
    exp = lth.Experiment(args)
    dense, x_T = exp.load(lth.Job(0, 0, "dense")).ema, exp.x_T(args.samples, 0)[:3]
    frames = report.frames_of(exp, dense, x_T, 0, ddpm.to_uint8)
    assert frames.dtype == np.uint8 and frames.shape == (len(report.moments(4)), 3, 1, 28, 28)
    assert np.array_equal(frames[0], ddpm.to_uint8(x_T).numpy())
    assert np.array_equal(frames[-1], exp.draw(dense, 0, x_T=x_T).numpy())
    seen = []

    def told(x, t):
        seen.append(x)
        return ddpm.denoiser(dense)(x, t)
    generator = torch.Generator().manual_seed(ddpm.SAMPLER_SEED)
    ddpm.sample(told, exp.diffusion, x_T, args.sampler, args.nfe, generator=generator)
    assert report.moments(4) == [0, 1, 2, 3, 4]
    assert np.array_equal(frames[2], ddpm.to_uint8(seen[2]).numpy())
    exp.decode = lambda x: ddpm.to_uint8(x).repeat(1, 1, 2, 2)  # latents: frames are decoded
    assert report.frames_of(exp, dense, x_T, 0, ddpm.to_uint8).shape[3:] == (56, 56)


@pytest.mark.parametrize("n", [1, 4, 50, 1000])
def test_moments_go_from_noise_to_the_image(n):
    found = report.moments(n)
    assert found[0] == 0 and found[-1] == n and found == sorted(set(found))
    assert len(found) <= report.FRAMES and (n < 50 or len(found) >= 24)


@pytest.mark.parametrize("channels, networks", [(1, 1), (1, 4), (3, 6)])
def test_animation(tmp_path, channels, networks):
    """White stays white, greys stay grey, the last frame pauses, and 2 MB are kept even by noise."""
    rng = np.random.default_rng(0)
    blocks = [(f"network {k}", rng.integers(0, 256, (28, 4, channels, 32, 32), dtype=np.uint8))
              for k in range(networks)]
    for _, frames in blocks:
        frames[-1] = 128
    path = tmp_path / "a.gif"
    charts.animation(blocks, [str(k) for k in range(28)], path, "Title", "note")
    assert path.stat().st_size <= 2_000_000
    with Image.open(path) as image:
        assert 7 <= image.n_frames <= 28 and image.info["loop"] == 0
        image.seek(image.n_frames - 1)
        last = np.asarray(image.convert("RGB"), int)
        assert image.info["duration"] >= 2000
    assert (last[0, 0] == 255).all()
    flat = (np.abs(last - 128).max(2) <= 5).mean()
    assert flat > 0.05  # the tiles of the last frame, one even grey
    still = Image.open(io.BytesIO(charts.last_frame(path)))
    assert still.format == "PNG" and still.size == (last.shape[1], last.shape[0])


# ----------------------------------------------------------------------------------- words

def test_verdicts_are_laid_out_and_name_arms_alike():
    values = dict(dense=[10, 11, 12], ticket=[13, 14, 15.2], reinit=[14, 15, 16.5], random=[12, 11.5, 13])
    rows = {lth.Job(seed, r, arm): dict(fid_domain=one[seed], sparsity=0.9 if r else 0.0, arm=arm)
            for arm, one in values.items() for r in [0 if arm == "dense" else 2] for seed in range(3)}
    found = dict(fid_domain=verdicts({2: report.arms_of(rows, 2)}))
    args = cli.argparse.Namespace(samples=500)
    first, *rest = report.conclude(args, rows, found, dict(fid_domain=2.0)).splitlines()
    assert first.startswith("At 90.0 % sparsity, fid_domain: dense 11.0, ticket 14.1, reinit 15.2, random mask "
                            "12.2 (real images 2.0): not shown to win (3 seeds, p=")
    details, remarks = [line for line in rest if line[:4] == "    "], [line for line in rest if line[0] != " "]
    assert [line.split(":")[0].strip() for line in details] == [
        "ticket - dense", "ticket - reinit", "ticket - random mask", *["not shown"] * (len(details) - 3)]
    assert "not shown: better than random mask (p=" in "\n".join(details) and len(details) > 3
    assert all(len(line) < 130 for line in details)
    assert str(found["fid_domain"][2]) == "; ".join([found["fid_domain"][2].answer,
                                                     *found["fid_domain"][2].details])
    assert len(remarks) == 2 and "undertrained" in remarks[0] and "500 samples" in remarks[1]


def test_undertrained_begins_where_samples_are_twice_as_far_as_real_images():
    def said(dense):
        rows = {lth.Job(0, 0, "dense"): dict(arm="dense", fid_domain=dense)}
        return list(report.remarks(cli.argparse.Namespace(samples=20_000), rows, dict(fid_domain=2.0)))
    assert said(7.9) == [] and "Compare arms, not absolute values" in said(8.1)[0]


def test_counts_say_of_what():
    assert words.counted(1, "seed") == "1 seed" and words.counted(2000, "sample") == "2,000 samples"
    assert words.clock(1.2) == "1 s" and words.clock(65) == "65 s" and words.clock(3900) == "1 h 05 min"
    one = dict.fromkeys(("dense", "ticket", "reinit", "random"), [1.0])
    assert str(verdict(one)) == "no verdict (1 seed; it needs 3)"


# ----------------------------------------------------------------------------------- a log's lines

class Log(io.StringIO):
    encoding = "utf-8"


def test_bars_in_a_log_are_lines_now_and_then(monkeypatch):
    from tqdm import tqdm
    log = Log()
    stream = screen.Lines(log, every=0.15)
    stream.thread.start()
    monkeypatch.setattr(sys, "stderr", stream)
    for step in tqdm(range(30), "seed 0 round 1 ticket", disable=None, leave=False, mininterval=0.01):
        time.sleep(0.02)
        if step == 3:
            print("a warning", file=sys.stderr)
    time.sleep(0.2)
    after = len(log.getvalue().splitlines())
    time.sleep(0.4)
    stream.done.set()
    lines = log.getvalue().splitlines()
    assert "a warning" in lines and "\r" not in log.getvalue()
    bars = [line for line in lines if line != "a warning"]
    assert 2 <= len(bars) <= 5 and len(lines) == after  # silent when the bar has gone
    assert re.fullmatch(r"seed 0 round 1 ticket: +\d+% \d+/30 \[.*it/s\]", bars[-1]), bars


def test_lines_are_for_logs_alone_and_one_line_puts_them_there(monkeypatch):
    log = Log()
    monkeypatch.setattr(sys, "stderr", log)
    with cli.one_line(cli.Parser(prog="x")):
        inside = sys.stderr
        assert isinstance(inside, screen.Lines)
        with screen.lines():  # a run within a study
            assert sys.stderr is inside
    assert sys.stderr is log and inside.done.is_set()
    monkeypatch.setenv("RANK", "1")
    with screen.lines():
        assert sys.stderr is log
    monkeypatch.setenv("RANK", "0")
    log.isatty = lambda: True
    with screen.lines():
        assert sys.stderr is log
    monkeypatch.setattr(sys, "stderr", None)
    with screen.lines():
        assert sys.stderr is None


def test_a_run_in_a_log_tells_of_training_and_of_sampling(tmp_path):
    """As a program of its own, with the lines closer together."""
    code = ("import sys; from support import screen; screen.EVERY = 0.05; "
            "screen.Lines.__init__.__defaults__ = (0.05,); import lth_diffusion; "
            "lth_diffusion.VAL_IMAGES = 200; lth_diffusion.main()")
    argv = "--rounds 1 --controls --steps 20 --batch 8 --samples 256 --nfe 4 --out".split()
    done = subprocess.run([sys.executable, "-c", code, *argv, str(tmp_path / "run")], text=True,
                          capture_output=True, timeout=300, cwd=report.runs.HERE)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^seed 0 round 0 dense: +\d+% \d+/20 ", done.stderr, re.M), done.stderr
    assert re.search(r"^seed 0 round \d \w+: sample: +\d+% \d/2 ", done.stderr, re.M), done.stderr
    assert "\r" not in done.stderr
