"""For all tests: real runs, as small as they can be, and no cache outside of temporary folders."""
import os
import tempfile

# before torch: beside other work, 57 tests took over ten minutes with two threads, 35 s with one
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="lth_tests_")

import pytest

import lth_diffusion as lth
from support import data, report

lth.VAL_IMAGES = 200  # 2,000 would take most of the tests' time


def shrink(patch):
    """The preset `tiny` as small as can be; runs draw no pictures and time nothing."""
    patch.setitem(lth.PRESETS, "tiny", dict(base=16, mults=(1,), patch=4))
    patch.setattr(report, "draw_run", lambda *_: None)
    patch.setattr(report, "measure_speed", lambda *_: (0.0, 0.0))


@pytest.fixture
def tiny(monkeypatch):
    """Small networks, see shrink, and 800 images of each part of a data set."""
    whole = data.load_images
    monkeypatch.setattr(data, "load_images", lambda *args: tuple(part[:800] for part in whole(*args)))
    shrink(monkeypatch)


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory):
    """A folder with run/, the finished run of a small network that the module's FLAGS ask for.

    The network stays as small while the module's tests last, and runs draw no pictures.
    """
    folder = tmp_path_factory.mktemp(request.module.__name__)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        patch.setattr(lth, "VAL_IMAGES", 50)
        lth.main([*request.module.FLAGS.split(), "--out", str(folder / "run")])
        yield folder
