"""For all tests: real runs, as small as they can be, and no cache outside of temporary folders."""
import os
import tempfile

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lth_tests_")

import lth_diffusion as lth

lth.VAL_IMAGES = 200  # 2,000 would take most of the tests' time
