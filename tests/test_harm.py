"""Nothing of the user's is lost, nothing is silently wrong, and where a service is missing it still runs."""
import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import ddpm
import lth_diffusion as lth
from support import cli, data, report, runs

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
DATA = os.path.join(HERE, "..", "shared", "data")
SMALL = "--steps 5 --batch 8 --samples 8 --nfe 10 --rounds 1 --control-rounds 1".split()
ALONE = "--steps 6 --batch 8 --samples 8 --nfe 10".split()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
    monkeypatch.setattr(report, "measure_speed", lambda *_: (0.0, 0.0))


def refusal(capsys, main, *argv):
    with pytest.raises(SystemExit) as stop:
        main(list(argv))
    return stop.value.code, capsys.readouterr().err


# ------------------------------------------------------------------------------------- data that is lost

def test_foreign_files_survive_in_the_folder_of_a_run(tmp_path):
    """Files that end as ours do, below and beside it, and through links: only our own names go."""
    ours, foreign = "0123456789abcdef.part", []
    outside = tmp_path / "outside"
    for path in ("out/Downloads/thesis.zip.part", "out/seed0/thesis.pt.part", "out/film.part",
                 f"out/thesis.zip.{ours}", f"out/Downloads/results.csv.{ours}",
                 f"outside/round00_dense.pt.{ours}", "out/seed0/notes.tmp"):
        foreign.append(tmp_path / path)
        foreign[-1].parent.mkdir(parents=True, exist_ok=True)
        foreign[-1].write_text("not yours")
    (tmp_path / "out" / "seed7").symlink_to(outside)
    (tmp_path / "out" / f"table.md.{ours}").symlink_to(outside / f"round00_dense.pt.{ours}")
    left = [tmp_path / "out" / f"results.csv.{ours}",
            tmp_path / "out" / "seed0" / f"round01_ticket.partial.pt.{ours}"]
    for path in left:
        path.write_text("what a killed run was writing")
    lth.main([*SMALL, "--controls", "--out", str(tmp_path / "out")])
    assert all(path.read_text() == "not yours" for path in foreign)
    assert not any(path.exists() for path in left)


def test_temporary_names_do_not_collide(tmp_path):
    """Two writers in one process, as in two containers that both are process 1 on one volume."""
    path = tmp_path / "file"
    with runs.atomic(path) as one, runs.atomic(path) as other:
        assert one != other
        for name, text in ((one, "one"), (other, "other")):
            with open(name, "w") as file:
                file.write(text)
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["file"]


def test_ddpm_saves_before_it_samples_and_draws_again(tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out")

    def interrupted(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(ddpm, "draw_samples", interrupted)
        code, said = refusal(capsys, ddpm.main, *ALONE, "--out", out)
    assert code == 130 and "goes on from here" in said and os.path.exists(f"{out}/model.pt")
    before = os.path.getmtime(f"{out}/model.pt")
    with monkeypatch.context() as patch:
        patch.setattr(ddpm, "train", lambda *_, **__: pytest.fail("trained again"))
        ddpm.main([*ALONE, "--out", out, "--samples", "5"])
    assert "drew 5 images" in capsys.readouterr().out
    assert os.path.exists(f"{out}/samples.png") and os.path.getmtime(f"{out}/model.pt") == before


def test_ddpm_stopped_in_training_goes_on_to_the_bit(tmp_path, monkeypatch, capsys):
    whole, stopped = str(tmp_path / "whole"), str(tmp_path / "stopped")
    ddpm.main([*ALONE, "--out", whole])
    steps = []
    with monkeypatch.context() as patch:
        patch.setattr(runs, "any_rank", lambda flag: flag or steps.append(0) or len(steps) == 4)
        code, said = refusal(capsys, ddpm.main, *ALONE, "--out", stopped)
    assert code == 130 and os.listdir(stopped).count("model.partial.pt") == 1
    ddpm.main([*ALONE, "--out", stopped])
    assert "going on at step 3" in capsys.readouterr().out
    one, two = (runs.load_state(f"{out}/model.pt") for out in (whole, stopped))
    assert all(torch.equal(one[part][key], two[part][key]) for part in ("model", "ema")
               for key in one[part])
    assert "model.partial.pt" not in os.listdir(stopped)


def test_ddpm_refuses_other_flags_on_a_trained_model(tmp_path, capsys):
    out = str(tmp_path / "out")
    ddpm.main([*ALONE, "--out", out])
    with open(f"{out}/model.pt", "rb") as file:
        before = file.read()
    for flags in (["--lr", "0.5"], ["--steps", "9"], ["--preset", "mnist"], ["--seed", "4"]):
        code, said = refusal(capsys, ddpm.main, *ALONE, "--out", out, *flags)
        assert code == 2 and f"argument {flags[0]}: {out} was made with" in said
    with open(f"{out}/model.pt", "rb") as file:
        assert file.read() == before


def test_main_job_and_ddpm_do_not_share_a_folder(tmp_path, capsys):
    out = str(tmp_path / "out")
    ddpm.main([*ALONE, "--out", out])
    code, said = refusal(capsys, lth.main, *SMALL, "--out", out)
    assert code == 2 and "was made by ddpm.py" in said and "choose another --out" in said


@pytest.mark.parametrize("main, name", [
    (lth.main, "results.csv"), (lth.main, "layers.png"), (lth.main, "seed0/round00_dense.pt"),
    (lth.main, "config.json"), (ddpm.main, "samples.png"), (ddpm.main, "model.pt")])
def test_files_of_others_are_not_overwritten(tmp_path, capsys, main, name):
    """A folder that no run made, with a file of a name that a run writes."""
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    code, said = refusal(capsys, main, *ALONE, "--out", str(tmp_path / "out"))
    assert code == 2 and str(path) in said and "choose another --out" in said
    assert path.read_text() == "mine" and os.listdir(tmp_path / "out") in ([name.split("/")[0]],
                                                                         ["config.json", "lock"],
                                                                         ["lock", "config.json"])


def test_a_link_to_nowhere_and_an_empty_path(tmp_path, capsys):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for out in (str(tmp_path / "loop"), ""):
        code, said = refusal(capsys, lth.main, *SMALL, "--out", out)
        assert code == 2 and "argument --out: " in said


def test_a_reader_that_goes_away(tmp_path):
    """`... | head -1`: said in one line, and the command goes on later."""
    command = f"{sys.executable} lth_diffusion.py {' '.join(SMALL)} --controls --out {tmp_path}/out"
    done = subprocess.run(["bash", "-c", f"({command}; echo code $? >&2) | head -1"], cwd=HERE,
                          capture_output=True, text=True, timeout=300)
    assert "stdout was closed." in done.stderr and "code 1" in done.stderr, done.stderr
    assert "goes on from here" in done.stderr and "Traceback" not in done.stderr


def test_no_message_advises_deleting_a_file_that_may_be_good(tmp_path):
    """A state that cannot be read for want of permission is kept, and said to be so."""
    path = str(tmp_path / "state.pt")
    runs.save_state(path, row=1)
    real = open

    def denied(name, *args, **options):
        if name == path:
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return real(name, *args, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", denied)
        with pytest.raises(OSError, match="cannot be read: Permission denied") as caught:
            runs.load_state(path)
    assert "delete" not in str(caught.value)
    assert runs.load_state(path)["row"] == 1


# ---------------------------------------------------------------------------------------- silently wrong

@pytest.mark.parametrize("main", [lth.main, ddpm.main])
@pytest.mark.parametrize("flags, smallest", [("--nfe 1", 4), ("--nfe 2", 4),
                                             ("--nfe 10 --schedule cosine", 18)])
def test_sampling_that_does_not_begin_at_noise_is_refused(tmp_path, capsys, main, flags, smallest):
    code, said = refusal(capsys, main, *flags.split(), "--out", str(tmp_path / "out"))
    assert code == 2 and "argument --nfe: " in said and f"at least {smallest}" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not os.path.exists(f"{DATA}/mnist"), reason="needs the official MNIST files")
def test_mnist_in_the_folder_of_fashion_is_refused(tmp_path, capsys):
    (tmp_path / "fashion").symlink_to(os.path.join(DATA, "mnist"))
    code, said = refusal(capsys, lth.main, "--dataset", "fashion", "--data-dir", str(tmp_path),
                         "--out", str(tmp_path / "out"))
    assert code == 2 and "mnist" in said and "fashion" in said


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed")
def test_torchrun_ddpm_joins_its_ranks(tmp_path):
    out = str(tmp_path / "out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "ddpm.py", *ALONE, "--out", out]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("drew 8 images") == 1 and done.stdout.count("trained 6 steps") == 1
    assert os.path.exists(f"{out}/samples.png")


# ------------------------------------------------------------------------------------------- does not run

@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, number):
    fcntl = pytest.importorskip("fcntl")

    def missing(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(fcntl, "flock", missing)
    lth.main([*SMALL, "--controls", "--out", str(tmp_path / "out")])
    assert os.path.exists(tmp_path / "out" / "results.csv") and os.listdir(tmp_path / "out" / "claims") == []
    capsys.readouterr()
    ddpm.main([*ALONE, "--out", str(tmp_path / "alone")])  # which shares its folder with nobody
    assert capsys.readouterr().out.count("no file locks") == 1


def test_a_file_system_without_fsync(tmp_path, monkeypatch):
    def missing(_):
        raise OSError(errno.EINVAL, "Invalid argument")
    monkeypatch.setattr(os, "fsync", missing)
    runs.write_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text\n"


def test_a_full_disk_is_named_as_such_and_nothing_else_is(tmp_path, monkeypatch):
    for number, said in ((errno.ENOSPC, "the disk is full"), (errno.EROFS, "Read-only file system"),
                         (errno.EFBIG, "File too large")):
        def fails(_, number=number):
            raise OSError(number, os.strerror(number))
        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(OSError, match=f"file could not be written: {said}"):
            runs.write_text(tmp_path / "file", "text")
    assert os.listdir(tmp_path) == []


def test_a_thread_of_another_program(tmp_path):
    """No handlers there; and in the main thread they are put back."""
    out, failed = str(tmp_path / "out"), []

    def job():
        try:
            lth.main([*SMALL, "--controls", "--out", out])
        except BaseException as error:
            failed.append(error)
    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert not failed and os.path.exists(f"{out}/results.csv")
    mine = [lambda *_: None, lambda *_: None]
    before = [signal.signal(n, f) for n, f in zip((signal.SIGINT, signal.SIGTERM), mine)]
    try:
        lth.main([*SMALL, "--controls", "--out", out])
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == mine
    finally:
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before):
            signal.signal(number, handler)


def test_a_read_only_working_folder(tmp_path, monkeypatch):
    """Caches go elsewhere, or nowhere; the run goes on."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    work.chmod(0o555)  # respected even by the superuser
    try:
        lth.main([*SMALL, "--controls", "--out", str(tmp_path / "out")])
        assert os.listdir(work) == [] and os.listdir(tmp_path / "home" / "lth_diffusion")
    finally:
        work.chmod(0o755)


def test_no_cache_anywhere(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "cache_folders", lambda: [str(tmp_path / "file" / "cache")])
    (tmp_path / "file").write_text("")
    assert runs.cached("value.pt", lambda: dict(x=1)) == dict(x=1)
    assert "value.pt is not cached" in capsys.readouterr().out


def test_a_damaged_cache_is_made_anew(tmp_path, capsys):
    folder = str(tmp_path)
    assert runs.cached("value.pt", lambda: dict(x=1), [folder]) == dict(x=1)
    assert runs.cached("value.pt", lambda: pytest.fail("computed again"), [folder]) == dict(x=1)
    (tmp_path / "value.pt").write_bytes(b"rubbish")
    assert runs.cached("value.pt", lambda: dict(x=2), [folder]) == dict(x=2)
    assert "is not used" in capsys.readouterr().out
    assert runs.cached("value.pt", lambda: dict(x=3), [folder]) == dict(x=2)


def test_paths_as_users_write_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MINE", str(tmp_path / "mine"))
    args, _ = lth.parse_args(["--out=~/x", "--data-dir=$MINE/data", "--inception=~/i.pth"])
    assert args.out == f"{tmp_path}/x" and args.data_dir == f"{tmp_path}/mine/data"
    assert args.inception == f"{tmp_path}/i.pth"
    monkeypatch.setenv("LTH_DATA", "~/elsewhere")
    assert lth.parse_args([])[0].data_dir == f"{tmp_path}/elsewhere"


def test_a_console_that_cannot_print_a_character(tmp_path):
    """cp1252 has no Japanese: the run ends well, and the table is there."""
    out = str(tmp_path / "r_日本")
    code = "import lth_diffusion; lth_diffusion.VAL_IMAGES = 200; lth_diffusion.main()"
    done = subprocess.run([sys.executable, "-c", code, *SMALL, "--controls", "--out", out],
                          cwd=HERE, capture_output=True, timeout=300,
                          env=os.environ | dict(PYTHONIOENCODING="cp1252"))
    assert done.returncode == 0, done.stderr
    assert b"Pictures and tables: " in done.stdout and os.path.exists(f"{out}/table.md")


def test_a_bug_is_no_mistake_of_the_user(tmp_path, monkeypatch):
    """A ValueError of our own code keeps its traceback."""
    monkeypatch.setattr(report, "draw_run", lambda *_: np.zeros(2) + np.zeros(3))
    with pytest.raises(ValueError, match="broadcast"):
        lth.main([*SMALL, "--controls", "--out", str(tmp_path / "out")])


def test_an_older_torch_trains_in_fp32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert cli.pick_precision("auto", torch.device("cpu"))[0] == "fp32"
    assert runs.processor_name("cpu")


def scripts():
    """Every file that is to be run with -m."""
    for folder in ("studies", "methods", "checks"):
        for name in sorted(os.listdir(os.path.join(HERE, folder))):
            text = open(os.path.join(HERE, folder, name)).read() if name.endswith(".py") else ""
            if "def main(" in text:
                yield f"{folder}/{name}"


@pytest.mark.parametrize("path", list(scripts()))
def test_a_module_run_as_a_script_says_how(path):
    done = subprocess.run([sys.executable, path], cwd=HERE, capture_output=True, text=True)
    module = path.removesuffix(".py").replace("/", ".")
    assert done.returncode == 1 and f"python -m {module}" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------- run_all.sh

def shell(tmp_path, *arguments, **variables):
    """run_all.sh in a copy of what it reads, with a python that only pretends to install."""
    (tmp_path / "support").mkdir(exist_ok=True)
    for name in ("run_all.sh", "requirements.txt", "support/cli.py"):
        (tmp_path / name).write_text(open(os.path.join(HERE, name)).read())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHON"} | variables
    return subprocess.run(["bash", "run_all.sh", *arguments], cwd=tmp_path, text=True,
                          capture_output=True, env=environment)


def fake_python(folder, old=False):
    """An interpreter that reports its age, and makes environments of itself without a network."""
    path = folder / ("old" if old else "new")
    path.write_text(f"""#!/usr/bin/env bash
case "$*" in
    *version_info*10*) {'exit 1' if old else 'exit 0'} ;;
    "--version") echo "Python {'3.9.0' if old else '3.11.0'}" ;;
    "-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip"*) echo "$@" >> pip.log; [ ! -e no-network ] ;;
    *lth_diffusion.py*) echo "ran $*" ;;
    *) exec {sys.executable} "$@" ;;
esac
""")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_run_all_says_an_old_python_first_and_remakes_a_half_made_environment(tmp_path):
    old, new = fake_python(tmp_path, old=True), fake_python(tmp_path)
    done = shell(tmp_path, PYTHON=old)
    assert done.returncode == 2 and "Python 3.9.0 is too old, 3.10 is needed" in done.stderr
    assert not (tmp_path / ".venv").exists()
    (tmp_path / "no-network").write_text("")
    assert shell(tmp_path, PYTHON=new).returncode != 0  # left half made
    (tmp_path / "no-network").unlink()
    done = shell(tmp_path, "mnist", "--seeds", "1", PYTHON=new)
    assert done.returncode == 0, done.stderr
    assert "ran lth_diffusion.py --dataset mnist --seeds 1" in done.stdout
    count = len((tmp_path / "pip.log").read_text().splitlines())
    assert count == 2 and shell(tmp_path, PYTHON=new).returncode == 0
    assert len((tmp_path / "pip.log").read_text().splitlines()) == count  # made once


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_run_all_knows_every_data_set(tmp_path):
    new = fake_python(tmp_path)
    for name in cli.DATASETS:
        done = shell(tmp_path, name, PYTHON=new)
        assert done.returncode == 0 and f"--dataset {name}" in done.stdout, done.stderr
    done = shell(tmp_path, "mnits", PYTHON=new)
    assert done.returncode == 2 and "'mnits' is none of: digits mnist fashion" in done.stderr


@pytest.mark.parametrize("flags, said", [("--datset mnist", "unrecognized arguments: --datset"),
                                         ("--rounds 0", "--rounds: 0 is not a positive"), ("--seeds", "--seeds")])
def test_a_typing_error_is_answered_before_torch_is_loaded(tmp_path, flags, said):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    done = subprocess.run([sys.executable, "lth_diffusion.py", *flags.split()], cwd=runs.HERE, text=True,
                          capture_output=True, env=os.environ | dict(PYTHONPATH=str(tmp_path)))
    assert done.returncode == 2 and said in done.stderr and not done.stdout
    done = subprocess.run([sys.executable, "lth_diffusion.py", "--preset", "mnist"], cwd=runs.HERE, text=True,
                          capture_output=True, env=os.environ | dict(PYTHONPATH=str(tmp_path)))
    assert "torch was imported" in done.stderr and done.stdout.startswith("starting")
