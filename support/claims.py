"""Several processes at work in one folder: who does which training run.

The chain of a seed (its dense network and the tickets, each of which needs the one before) belongs
to one process at a time; controls are taken one by one, wherever the ticket that they are compared
with is done. A claim is a lock on a file, which ends with its process, however that ends; what a
dead process has left is done by the others.
"""
import argparse
import contextlib
import os
import subprocess
import sys
import threading
import time

import torch

from support import runs

STALE = 600.0  # seconds after which a claim without locks counts as left behind
POLL = 2.0  # seconds between looks at what others do


class Elsewhere(Exception):
    """A training run that others are needed for is being done by another process."""


class Claims:
    """The claims of this process on a folder: files of locks in its subfolder `claims`.

    Where the file system has no locks, a claim is a file that only one process can create; it is
    touched every minute, and taken over when it has not been for ten.
    """

    def __init__(self, out):
        self.folder, self.held, self.stopped = os.path.join(out, "claims"), {}, threading.Event()
        os.makedirs(self.folder, exist_ok=True)
        self.has_locks = runs.has_locks(self.folder)

    def take(self, name):
        """Whether this process holds the claim now."""
        if name not in self.held:
            path = os.path.join(self.folder, name)
            file = runs.try_lock(path) if self.has_locks else self.create(path)
            if file is None:
                return False
            self.held[name] = file
        return True

    def give(self, name):
        """Let others have it."""
        if (file := self.held.pop(name, None)) is not None:
            if not self.has_locks:
                runs.remove(file.name)
            file.close()

    def create(self, path):
        """The file, if no other process has one that it still touches."""
        if not self.held:
            threading.Thread(target=self.touch, daemon=True).start()
        with contextlib.suppress(FileNotFoundError):
            if time.time() - os.path.getmtime(path) > STALE:
                os.remove(path)
        with contextlib.suppress(FileExistsError):
            return open(path, "x")

    def touch(self):
        """Say every minute that the claims are alive."""
        while not self.stopped.wait(60):
            for file in list(self.held.values()):
                with contextlib.suppress(OSError):
                    os.utime(file.name)

    def close(self):
        """Give all of them."""
        self.stopped.set()
        for name in list(self.held):
            self.give(name)


def work(find, exp, plan, chains_first):
    """Call find(args, exp) seed by seed until every planned run is done, here or elsewhere.

    plan(args): the runs. chains_first: take the chains of all seeds before any control, which is
    quicker for several processes. Seeds that others have added to the folder are taken up too.
    """
    args, waiting = exp.args, False
    while left := [job for job in plan(args) if not exp.is_done(job)]:
        before = len(left)
        for exp.chains_only in ([True, False] if chains_first else [False]):
            for seed in args.seeds:
                one = argparse.Namespace(**vars(args) | dict(seeds=[seed]))
                exp.owns_chain = exp.claims.take(f"seed{seed}")
                if exp.owns_chain or not exp.chains_only:
                    with contextlib.suppress(Elsewhere):
                        find(one, exp)
                exp.claims.give(f"seed{seed}")
        exp.chains_only, left = False, [job for job in plan(args) if not exp.is_done(job)]
        args.seeds = runs.seeds_of(args.out, args.seeds)
        if len(left) == before:
            if not waiting:
                print(f"waiting for other processes on {args.out}: {len(left)} training runs are "
                      "theirs; if one of them dies, its work is done here", flush=True)
            waiting = True
            time.sleep(POLL)
    exp.owns_chain = True


@contextlib.contextmanager
def helpers(args, parser):
    """Start args.workers - 1 more processes of the same command for this block; GPUs are shared
    out. They have as many threads as this one; what they print goes to worker1.log and so on."""
    module, started = parser.prog.removesuffix(".py"), []
    for i in range(1, args.workers):
        environment = os.environ | dict(OMP_NUM_THREADS=str(torch.get_num_threads()))
        if torch.cuda.device_count() > 1:
            environment["CUDA_VISIBLE_DEVICES"] = str(i % torch.cuda.device_count())
        argv = [*parser.argv, "--workers", "1", "--out", args.out]
        with open(os.path.join(args.out, f"worker{i}.log"), "w") as log:
            code = f"import {module}; {module}.main({argv!r})"
            started.append(subprocess.Popen([sys.executable, "-c", code], stdout=log, stderr=log,
                                            env=environment | dict(PYTHONPATH=runs.HERE)))
    try:
        yield
    finally:
        for process in started:
            process.wait()
