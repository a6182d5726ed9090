"""Ways to find a ticket other than iterative magnitude pruning, a file each."""
import sys

if sys.argv[0] == "-m":  # python -m methods.NAME: before torch is imported
    from support import early  # noqa: F401
