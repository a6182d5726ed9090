"""Files that survive crashes: atomic writes, state files, locking, resuming, provenance.

A file that cannot be read or written is one OSError that names it and what to do. A file that may
be good is never deleted, and no message advises deleting one.
"""
import contextlib
import csv
import errno
import functools
import hashlib
import io
import json
import os
import platform
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import timeit
import zipfile

import numpy as np
import PIL
import scipy
import torch

from support import cli, ranks
from support.cli import Mistake, cpu_capabilities, first_line
from support.ranks import any_rank, first

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the repository
FORMAT = 4  # of state files; a file of another version is refused
# Names that atomic() gives to files which it has not finished, of files that a run makes.
UNFINISHED = re.compile(
    r"(config\.json|results\.csv|table\.md|report\.html|denoising\.gif|model(\.partial)?\.pt"
    r"|[a-z_]+\.png|round\d{2,}_[a-z]+(\.partial|\.step_k)?\.(pt|ticket))\.[0-9a-f]{16}\.part")
# What a run writes: other people's files of these names are not overwritten.
WRITTEN = re.compile(
    r"results\.csv|table\.md|log\.jsonl|model(\.partial)?\.pt|samples(_by_sparsity)?\.png"
    r"|(quality_vs_sparsity|layers|losses)\.png|denoising\.gif|report\.html"
    r"|round\d{2,}_[a-z]+(\.partial|\.step_k)?\.(pt|ticket)")
# Flags that a dense network does not depend on.
PRUNING = ("rounds prune_rate final_sparsity scope score controls control_rounds dense_from demo "
           "oneshot grow seeds device data_dir out inception workers").split()
MARK = "This folder was made by a run of lth_diffusion.py or ddpm.py.\n"
ABSENT = errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES,
              errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


# --------------------------------------------------------------------------- files, whole or none

@contextlib.contextmanager
def atomic(path):
    """A temporary name beside `path`, renamed to it when the block ends well, else removed.

    Nobody ever reads half a file. The folder is made. The name is random: containers that share a
    volume share process numbers too. OSError when the file cannot be written.
    """
    path = os.fspath(path)
    temporary = f"{path}.{secrets.token_hex(8)}.part"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # torch.save raises a class of its own; what the disk said lies below it
        cause = error if isinstance(error, OSError) else error.__context__
        if getattr(cause, "errno", None) not in UNWRITABLE:
            raise
        raise OSError(f"{path} could not be written: {reason(cause)}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)


def to_disk(path):
    """Have a file's bytes on the disk: else a power cut may leave its new name on an empty file."""
    with open(path, "r+b") as file:
        try:
            os.fsync(file.fileno())
        except OSError as error:
            if error.errno not in ABSENT:
                raise


def reason(error):
    """What went wrong, on one line; 'the disk is full' only where the system says so."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full"
    text = getattr(error, "strerror", None) or error
    return " ".join(str(text).split()) or type(error).__name__


def write_text(path, text):
    """Write a text file, in one piece or not at all."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text + "\n")


def write_table(path, header, rows):
    """Write a CSV file, in one piece or not at all."""
    with atomic(path) as temporary:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])


def write_torch(path, state):
    """torch.save, in one piece or not at all."""
    with atomic(path) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)


def read_torch(path):
    """What torch.save left at path: plain tensors and containers only, checksums compared.

    FileNotFoundError and PermissionError as they are; ValueError for a damaged file.
    """
    with open(path, "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                if archive.testzip() is not None:  # torch.load does not compare checksums
                    raise ValueError("a flipped bit")
            file.seek(0)
            return torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:  # torch.load fails in a dozen ways on a damaged file
            raise ValueError(f"{type(error).__name__}: {first_line(error)}") from error


def load_weights(path, make, hint, sha=""):
    """The network make(state), eval mode, with the state that torch.save left at path.

    Weights only: no code in a pickle is run. OSError in one line: path, what is wrong, hint.
    """
    what = "cannot be read"
    try:
        with open(path, "rb") as file:
            content = file.read()
        what = f"is cut short or another file (SHA-256 does not begin {sha})"
        if not hashlib.sha256(content).hexdigest().startswith(sha):
            raise ValueError("wrong checksum")
        what = "is damaged or holds more than plain weights"
        state = torch.load(io.BytesIO(content), "cpu", weights_only=True)
        what, model = "does not fit", make(state).eval()
        model.load_state_dict(state, strict=True)
        return model
    except Exception as error:  # torch raises half a dozen unrelated classes for a bad file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise OSError(f"{path} {what} ({reason}): {hint}") from error


def writable(folders, flag="--data-dir"):
    """The first folder that can be written to, or made (not here). OSError names the flag."""
    for folder in folders:
        parent = os.path.abspath(folder)
        while not os.path.lexists(parent):  # a link to nowhere counts as there
            parent = os.path.dirname(parent)
        with contextlib.suppress(OSError):
            # The superuser may write where permissions say that nobody should.
            root = getattr(os, "geteuid", int)() == 0 and os.name == "posix"
            if not root or os.stat(parent).st_mode & 0o222:
                with tempfile.TemporaryFile(dir=parent):  # permissions say nothing of mounts: try
                    return folder
    tried = " nor to ".join(map(str, folders))
    raise OSError(f"argument {flag}: cannot write to {tried}; choose another folder")


# --------------------------------------------------------------------------- caches

def cache_folders():
    """Where what is costly to compute may be kept, in the order in which folders are tried."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return [os.path.join("runs", "cache"), os.path.join(home, "lth_diffusion")]


def cached(name, compute, folders=None, least=0.0):
    """compute(), a state for torch.save, from the cache where `name` is there; else computed, kept.

    least: seconds that it must take to be kept. A cache that cannot be read or written costs time,
    never the run, and says so in one line.
    """
    folders = folders or cache_folders()
    for path in (os.path.join(folder, name) for folder in folders):
        try:
            return read_torch(path)
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            print(f"cached file {path} is not used: {reason(error)}")
    began, value = time.monotonic(), compute()
    if time.monotonic() - began < least:
        return value
    try:
        write_torch(os.path.join(writable(folders), name), value)
    except OSError as error:
        print(f"{name} is not cached: {reason(error)}")
    return value


# --------------------------------------------------------------------------- state files of a run

def save_state(path, **state):
    """Write a state file, on rank 0."""
    if first():
        write_torch(path, dict(format=FORMAT, **state))


def load_state(path, needed=()):
    """The dict that save_state wrote. OSError for a file that is damaged, old or incomplete."""
    try:
        state = read_torch(path)
        version, _ = state["format"], [state[name] for name in needed]
    except FileNotFoundError:
        raise OSError(f"{path} is missing and needed by later training runs: put it back, or "
                      "choose a new --out") from None
    except OSError as error:
        raise OSError(f"{path} cannot be read: {reason(error)}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is damaged ({reason(error)}): move it away and run again, or choose "
                      "a new --out") from error
    if version != FORMAT:
        raise OSError(f"{path} is of another version (format {version}, not {FORMAT}): choose a "
                      "new --out")
    return state


def facts(args, diffusion, seed, x_T_seed=0, latent=False):
    """What a network's file says of how it was trained and drawn from: plain values.

    x_T_seed: what is added to the seed for the starting noise. latent: it denoises codes, not
    images.
    """
    return dict(dataset=args.dataset, T=diffusion.T, schedule=diffusion.schedule,
                prediction=diffusion.prediction, sampler=args.sampler, nfe=args.nfe, seed=seed,
                x_T_seed=x_T_seed, latent=latent)


def remove(path):
    """Delete a file that the run made, if it is there and this is rank 0."""
    if first():
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def append_line(path, row):
    """Add a dict to a log of JSON lines."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def alone_in(out, shared=False):
    """Make the folder and hold it for this block; whether others hold it too.

    A second run on it is refused, unless both are `shared`: then they share the work. The lock
    ends with its process, however that ends. Where the file system has no locks the run goes on
    after a line of warning.
    """
    if not first():  # rank 0 holds it for all
        yield False
        return
    claim(out)
    path = os.path.join(out, "lock")
    if not has_locks(out):
        if not shared:
            print(f"warning: no file locks under {out}: start no second run on it meanwhile")
        yield shared
        return
    lock = try_lock(path)
    others = lock is None
    if not others:
        remove_unfinished(out)
    if shared:
        lock = try_lock(path, shared=True, file=lock)
    if lock is None:
        raise OSError(f"{out} is in use by another run: wait for it, or choose another --out")
    with lock:
        yield others


def has_locks(folder):
    """Whether files in the folder can be locked."""
    try:
        import fcntl
        with open(os.path.join(folder, "lock"), "a") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (ImportError, BlockingIOError) as error:  # Windows has no fcntl
        return not isinstance(error, ImportError)
    except OSError as error:
        if error.errno not in ABSENT:
            raise
        return False
    return True


def try_lock(path, shared=False, file=None):
    """The open file at path, locked until it is closed; None where another process has it."""
    import fcntl
    file = file or open(path, "a")
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextlib.contextmanager
def one_at_a_time(out):
    """A block that one process in the folder is in at a time, where files can be locked."""
    with open(os.path.join(out, "lock.config"), "a") as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def seeds_of(out, seeds):
    """Seeds, and those that other processes have added to the folder since."""
    with contextlib.suppress(OSError):
        seeds = [*read_config(out)["args"]["seeds"], *seeds]
    return list(dict.fromkeys(seeds))


def claim(out):
    """Make the folder; OSError when it holds others' files of the names that a run writes."""
    os.makedirs(out, exist_ok=True)
    lock, config = os.path.join(out, "lock"), os.path.join(out, "config.json")
    if os.path.exists(lock):
        with open(lock, errors="replace") as file:
            if file.read(len(MARK)) == MARK:
                return
    if os.path.exists(config):  # which check_config looks into
        return
    for folder in [out, *seed_folders(out)]:
        for name in filter(WRITTEN.fullmatch, os.listdir(folder)):
            raise OSError(f"argument --out: {os.path.join(folder, name)} is there, but not of a "
                          "run (no config.json): choose another --out")
    if not os.path.exists(lock):
        with open(lock, "w") as file:
            file.write(MARK)


def seed_folders(out):
    """The folders seed0, seed1, .. of a run that are no links."""
    paths = [os.path.join(out, name) for name in os.listdir(out)
             if re.fullmatch(r"seed\d+", name)]
    return [path for path in paths if os.path.isdir(path) and not os.path.islink(path)]


def remove_unfinished(out):
    """Delete what a killed process was writing: only our own names, only in our own folders."""
    for folder in [out, *seed_folders(out)]:
        for name in filter(UNFINISHED.fullmatch, os.listdir(folder)):
            path = os.path.join(folder, name)
            if os.path.isfile(path) and not os.path.islink(path):
                remove(path)


class Guard:
    """Decides when a training state is saved: every minute, and at once on Ctrl-C or SIGTERM.

        with Guard() as guard, guard.training(save):     # save(state) writes a file
            train(..., checkpoint=guard)

    Signal handlers are set while it lasts, where Python allows it (the main thread), and put back.
    """
    EVERY = 60.0  # seconds

    def __init__(self):
        self.save, self.stop, self.last, self.before = None, False, 0.0, {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.handle)
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def handle(self, number, frame):
        if self.save is None or self.stop:  # nothing to save, or asked twice
            raise KeyboardInterrupt
        self.stop = True

    @contextlib.contextmanager
    def training(self, save):
        self.save, self.last = save, time.monotonic()
        try:
            yield self
        finally:
            self.save = None

    def __call__(self, step, get_state):
        self.stop = any_rank(self.stop)  # else the others would wait for a rank that has gone
        if self.stop or time.monotonic() - self.last > self.EVERY:
            self.save(get_state())
            self.last = time.monotonic()
        if self.stop:
            raise KeyboardInterrupt


@contextlib.contextmanager
def resumable(path, guard, extra=dict):
    """(saved state or None, seconds so far) of a training run that goes on where it stopped.

    extra(): what its file keeps beside the state of ddpm.train.
    """
    state, began = None, time.monotonic()
    if os.path.exists(path):
        state = load_state(path, ("step", "model", "seconds"))
        print(f"going on at step {state['step']} of {os.path.basename(path).split('.')[0]}")
    before = state["seconds"] if state else 0.0

    def seconds():
        return before + time.monotonic() - began

    def save(now):
        save_state(path, **now, **extra(), seconds=seconds())
    with guard.training(save):
        yield state, seconds


@contextlib.contextmanager
def open_folder(args, parser, free, shared=False):
    """(Guard, {"device": what is used and why}) for a run on the folder args.out.

    Errors end in one line; ranks join; the folder is created and locked; changed flags are refused,
    except those in `free`. shared: other processes may do the same; guard.others says whether.
    """
    with cli.one_line(parser, args.out), ranks.together():
        if args.batch % ranks.ranks()[1]:
            cli.refuse("batch", f"{args.batch} images cannot be shared by {ranks.ranks()[1]} ranks")
        cli.check_memory(args)
        writable([args.out], "--out")
        reasons = cli.settle_device(args)
        with alone_in(args.out, shared and ranks.ranks()[1] == 1) as others, Guard() as guard:
            guard.others = others
            check_config(args, free, parser.prog)
            yield guard, reasons


# --------------------------------------------------------------------------- config and provenance

def read_config(out):
    """config.json of a run's folder. OSError where there is none, or another file of that name."""
    path = os.path.join(out, "config.json")
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
        if not (isinstance(found["args"]["dataset"], str) and "commit" in found):
            raise ValueError("it is not a run's")
    except OSError as error:
        raise OSError(f"{path} cannot be read: {reason(error)}; name a run's folder") from error
    except (ValueError, KeyError, TypeError) as error:
        raise OSError(f"{path} is not of a run of this code, or damaged ({reason(error)}): choose "
                      "another --out") from error
    return found


def check_config(args, free, method):
    """Mistake that names the flag when the folder was made with other settings than args.

    free: the flags that may differ later. method: the program that runs now. Seeds add up: none
    that has begun may leave the table.
    """
    if not os.path.exists(os.path.join(args.out, "config.json")):
        return
    found = read_config(args.out)
    then = found["args"]
    if found.get("method") != method:
        raise Mistake(f"argument --out: {args.out} was made by {found.get('method')}, this is "
                      f"{method}: choose another --out")
    if getattr(args, "images", None) and then.get("images"):
        args.dataset = then["dataset"]  # their folder may have moved; what it holds is hashed
    for name, value in vars(args).items():
        if name not in free and then.get(name) != value:
            raise Mistake(f"argument --{name.replace('_', '-')}: {args.out} was made with "
                          f"{then.get(name)}, not {value}; choose another --out, or the same "
                          "flags to go on")
    if "seeds" in then:
        args.seeds = list(dict.fromkeys([*then["seeds"], *args.seeds]))


def take_over(args, names, experiment):
    """Copy files of the finished run args.dense_from, if it is given, into args.out, unless they
    are there. Mistake where it was made with other settings of what a dense network depends on, or
    by another kind of experiment (on codes in place of images, say)."""
    source = args.dense_from
    if source is None:
        return
    found = read_config(source)
    then = found["args"]
    if found.get("experiment") != experiment:
        raise Mistake(f"argument --dense-from: {source} was made by {found.get('experiment')}, "
                      f"this run is {experiment}, whose dense networks differ: name another run")
    for name, value in vars(args).items():
        if name not in PRUNING and then.get(name) != value:
            raise Mistake(f"argument --dense-from: {source} was made with --"
                          f"{name.replace('_', '-')} {then.get(name)}, not {value}")
    there = [copy_once(os.path.join(source, name), os.path.join(args.out, name)) for name in names]
    if not any(there):
        raise Mistake(f"argument --dense-from: {source} has no dense network of these seeds")


def copy_once(old, new):
    """Copy a file unless it is there; whether it is there now."""
    if os.path.exists(old) and not os.path.exists(new):
        with atomic(new) as temporary:
            shutil.copyfile(old, temporary)
    return os.path.exists(new)


def write_config(args, facts, same=()):
    """Write config.json: args and where the figures come from.

    same: the names of facts that must not change when a run goes on. Mistake where one does.
    """
    path = os.path.join(args.out, "config.json")
    if os.path.exists(path):
        then = read_config(args.out)
        for name in same:
            if then.get(name) != facts[name]:
                again = f"set OMP_NUM_THREADS={then[name]}, or " if name == "threads" else ""
                raise Mistake(f"{args.out} was made with {name} {then.get(name)}, here it is "
                              f"{facts[name]}: {again}choose another --out")
        commits = [*str(then["commit"]).split(", then "), str(facts["commit"])]
        facts = facts | dict(commit=", then ".join(dict.fromkeys(commits)))
    write_text(path, json.dumps(dict(args=vars(args), **facts), indent=1))


@functools.lru_cache(maxsize=None)
def commit():
    """`git describe` of this code, read before results make the tree dirty; None without git."""
    command = ["git", "-C", HERE, "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError):  # no git here
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None


def processor_name(device):
    """What the processor calls itself."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        lines = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        if lines:
            return lines[0]
    return cpu_capabilities().get("cpu_name") or platform.processor() or platform.machine()


def typed():
    """The command as it was typed: a module, started with -m, by its name."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec and spec.origin == sys.argv[0]  # otherwise a script, perhaps under a debugger
    start = ["-m", spec.name.removesuffix(".__main__")] if module else sys.argv[:1]
    return shlex.join(["python", *start, *sys.argv[1:]])


def provenance(command, device="cpu", **facts):
    """Where figures come from: command, commit, machine, versions, and what the caller adds."""
    versions = dict(python=platform.python_version(), torch=torch.__version__,
                    numpy=np.__version__, scipy=scipy.__version__, pillow=PIL.__version__)
    return dict(command=command, commit=commit(), device=str(device),
                processor=processor_name(device), threads=torch.get_num_threads(),
                versions=versions) | facts


def digest(*parts):
    """First 8 hex digits of SHA-256 over bytes."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:8]


def weights_hash(model):
    """digest of a state in the order of its keys: a model's name."""
    return digest(*(value.cpu().numpy().tobytes()
                    for _, value in sorted(model.state_dict().items())))


def images_hash(images):
    """digest of shape and pixels of images uint8 [N, C, H, W]."""
    return digest(str(tuple(images.shape)).encode(), images.cpu().numpy().tobytes())


# --------------------------------------------------------------------------- seconds and bytes

def seconds_in_turns(works, n, warmup=1, device="cpu"):
    """Seconds [n, len(works)] of calling each of works, functions, in turn, after the warm-up.

    What slows the machine for a while slows all of them, so that ratios in a row can be trusted.
    """
    wait = getattr(torch, torch.device(device).type).synchronize

    def once(work):
        return timeit.timeit(lambda: (work(), wait()), setup=wait, number=1)
    return np.array([[once(work) for work in works] for _ in range(warmup + n)])[warmup:]


class PeakMemory:
    """`with PeakMemory(device) as peak: ...`, then peak.bytes (None where unknown) and peak.kind.

    CUDA: the most the allocator held in the block. CPU (Linux): the most resident memory in the
    block, or ever where its mark cannot be reset. Do not nest: the inner one resets the mark.
    """

    def __init__(self, device="cpu"):
        self.device, self.bytes, self.kind = torch.device(device), None, "unknown"

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.kind = "cuda allocated"
        elif self.device.type == "cpu":
            self.kind = "resident since the process began"
            with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets the peak, proc(5)
                self.kind = "resident"
        return self

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        elif self.device.type == "cpu":
            with contextlib.suppress(OSError, StopIteration), open("/proc/self/status") as file:
                peak = next(line for line in file if line.startswith("VmHWM"))
                self.bytes = int(peak.split()[1]) * 1024
