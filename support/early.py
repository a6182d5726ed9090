"""What a program does before it imports torch: how its threads wait, and a first line.

Idle OpenMP threads spin for the next piece of work. On a busy machine they take the processor away
from the thread that they wait for, so that they should spin for a bounded while only. What that
gains on a busy machine, and costs on an idle one, is measured by: python -m checks.workers busy
"""
import os
import sys

# Turns of waiting before a thread sleeps (GNU), milliseconds (Intel's and LLVM's OpenMP: macOS).
WAITING = dict(GOMP_SPINCOUNT="10000", KMP_BLOCKTIME="1")


def begin(argv):
    """Set how threads wait, unless the user has, and say that the program is there."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in WAITING.items():
            os.environ.setdefault(name, value)
    quiet = {"-h", "--help"} & set(argv) or os.environ.get("RANK", "0") != "0"
    if not quiet:
        print("starting: loading torch", flush=True)


if "torch" not in sys.modules:
    begin(sys.argv)
