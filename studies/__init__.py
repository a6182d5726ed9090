"""Questions about tickets, a file each."""
import sys

if sys.argv[0] == "-m":  # python -m studies.NAME: before torch is imported
    from support import early  # noqa: F401
