"""Questions about this code, a file each."""
import sys

if sys.argv[0] == "-m":  # python -m checks.NAME: before torch is imported
    from support import early  # noqa: F401
