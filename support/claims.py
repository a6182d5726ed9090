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

from support import ranks, runs

STALE = 600.0  # seconds after which a claim without locks counts as left behind
POLL = 2.0  # seconds between looks at what others do
HELPER = "LTH_HELPER"  # set for processes whose table another one prints


class Elsewhere(Exception):
    """A training run that others are needed for is being done by another process."""


class Claims:
    """The claims of this process on a folder: files of locks in its subfolder `claims`.

    Where the file system has no locks, a claim is a file that only one process can create; it is
    touched every minute, and taken over when it has not been for ten.
    """

    def __init__(self, out):
        self.out, self.folder = out, os.path.join(out, "claims")
        self.held, self.stopped = {}, threading.Event()
        self.chains_only, self.owns_chain = False, True
        os.makedirs(self.folder, exist_ok=True)
        self.has_locks = runs.has_locks(out)

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


    def mine(self, job, is_control):
        """Whether this process is to train a run now. Elsewhere for one of another's chain.

        A control that is claimed belongs to this process until it ends.
        """
        if not is_control and not self.owns_chain:
            raise Elsewhere
        if is_control and (self.chains_only or not self.take(str(job))):
            return False
        return not os.path.exists(job.path(self.out))  # done between the look and the claim


def work(find, exp, plan, parser):
    """Call find(args, exp) until every run of plan(args) is done, by this process or by others;
    then take up the rows of all. Under torchrun the ranks work as one."""
    args = exp.args
    if ranks.ranks()[1] > 1:
        find(args, exp)
        return
    exp.claims = Claims(args.out)
    with contextlib.closing(exp.claims), helpers(args, parser):
        by_seed(find, exp, plan, exp.guard.others or args.workers > 1)
    exp.planned, exp.claims = plan(args), None
    for job in exp.planned:
        if job not in exp.rows:
            exp.load(job)


def by_seed(find, exp, plan, several):
    """find(args, exp), a seed at a time, until no run of the plan is left.

    several: other processes are there, and it is quicker to do the chains of all seeds before any
    control. Seeds that others have added to the folder meanwhile are taken up too.
    """
    args, claims, waits = exp.args, exp.claims, False
    while left := undone(plan(args), args.out):
        for claims.chains_only in [True, False] if several else [False]:
            for seed in args.seeds:
                claims.owns_chain = claims.take(f"seed{seed}")
                if claims.owns_chain or not claims.chains_only:
                    one = argparse.Namespace(**vars(args) | dict(seeds=[seed]))
                    with contextlib.suppress(Elsewhere):
                        find(one, exp)
                claims.give(f"seed{seed}")
        args.seeds = runs.seeds_of(args.out, args.seeds)
        if len(undone(plan(args), args.out)) == len(left):
            if not waits:
                print(f"waiting: {len(left)} training runs of {args.out} are claimed by other "
                      "processes, or stand on one; if one of them dies, its work is done here",
                      flush=True)
            waits = True
            time.sleep(POLL)


def share_out_threads(workers):
    """Give this process its share of the threads."""
    if workers > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def undone(jobs, out):
    """The training runs that have no file yet."""
    return [job for job in jobs if not os.path.exists(job.path(out))]


@contextlib.contextmanager
def helpers(args, parser):
    """Start args.workers - 1 more processes of the same command for this block; GPUs are shared
    out. They have as many threads as this one; what they print goes to worker1.log and so on."""
    module, started = parser.prog.removesuffix(".py"), []
    for i in range(1, args.workers):
        environment = os.environ | {HELPER: "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
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
