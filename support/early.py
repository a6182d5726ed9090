"""What a program does before it imports torch: how its threads wait, typing errors, a first line.

Idle OpenMP threads spin for the next piece of work. On a busy machine they take the processor away
from the thread that they wait for, so that they should spin for a bounded while only. Measured by
python -m checks.workers busy (n=7 turns): no cost shown on an idle machine; beside two spinning
processes a step of 0.21 s in place of 0.43, which at worst were 3.9.
"""
import os
import sys

# Turns of waiting before a thread sleeps (GNU), milliseconds (Intel's and LLVM's OpenMP: macOS).
WAITING = dict(GOMP_SPINCOUNT="10000", KMP_BLOCKTIME="1")


class Unknown(list):
    """Choices of a flag that only the modules with torch in them know."""

    def __contains__(self, value):
        return True


def check_flags(argv):
    """End in one line at a flag of the main job that is mistyped: loading torch takes seconds."""
    from support import cli
    parser = cli.Parser(prog="lth_diffusion.py", add_help=False)
    cli.add_training_flags(parser, Unknown())
    cli.add_pruning_flags(parser, Unknown(), Unknown())
    parser.parse_args(argv)


def begin(argv):
    """Set how threads wait, unless the user has, and say that the program is there."""
    if "OMP_WAIT_POLICY" not in os.environ:
        for name, value in WAITING.items():
            os.environ.setdefault(name, value)
    if os.path.basename(argv[0]) == "lth_diffusion.py" and not {"-h", "--help"} & set(argv):
        check_flags(argv[1:])
    quiet = {"-h", "--help"} & set(argv) or os.environ.get("RANK", "0") != "0"
    if not quiet:
        print("starting: loading torch", flush=True)


if "torch" not in sys.modules:
    begin(sys.argv)
