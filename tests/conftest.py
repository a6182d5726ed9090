"""What several test files need: real runs, as small as they can be."""
import collections

import pytest

import lth_diffusion as lth
from studies import methods

lth.VAL_IMAGES = 200  # in every run of these processes: 2,000 would take most of the tests' time
SMALL = "--rounds 2 --steps 16 --batch 8 --samples 16 --nfe 2 --control-rounds 1 2".split()


@pytest.fixture(scope="session")
def compared(tmp_path_factory):
    """A folder in which studies.methods has compared imp, oneshot and random, random also at equal cost."""
    folder = tmp_path_factory.mktemp("methods")
    with pytest.MonkeyPatch.context() as patch:  # seconds, not minutes
        patch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
        patch.setattr(lth, "draw_everything", lambda *_: None)
        patch.setattr(lth, "announce", lambda *_: collections.defaultdict(float))
        methods.main([*SMALL, "--only", "oneshot", "random", "--longer", "random", "--runs",
                      str(folder / "runs"), "--out", str(folder)])
    return folder
