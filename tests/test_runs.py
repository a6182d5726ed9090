"""support/runs.py: hashes, weights from files, seconds and bytes."""
import mmap
import os
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from support import runs


class Bomb:
    """Writes a file where it is unpickled by somebody who lets it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_hashes_tell_weights_and_images_apart():
    torch.manual_seed(0)
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    assert runs.weights_hash(a) != runs.weights_hash(b) and len(runs.weights_hash(a)) == 8
    b.load_state_dict(a.state_dict())
    assert runs.weights_hash(a) == runs.weights_hash(b)
    images = torch.arange(48, dtype=torch.uint8).view(3, 1, 4, 4)
    names = {runs.images_hash(x) for x in (images, images.clone(), images.flip(0), images.view(3, 1, 2, 8))}
    assert len(names) == 3  # the same bytes in another shape are other images


def test_load_weights(tmp_path):
    model, path = nn.Linear(3, 2), tmp_path / "weights.pt"
    torch.save(model.state_dict(), path)
    found = runs.load_weights(path, lambda state: nn.Linear(3, len(state["bias"])), "a hint")
    assert runs.weights_hash(found) == runs.weights_hash(model) and not found.training


def test_load_weights_refuses(tmp_path):
    path, trace = tmp_path / "weights.pt", tmp_path / "ran"
    torch.save(nn.Linear(3, 2).state_dict(), path)
    whole = path.read_bytes()
    torch.save({"weight": torch.zeros(2, 3)}, path)
    cases = {whole[:len(whole) // 2]: "damaged", b"": "damaged", path.read_bytes(): "does not fit",
             pickle.dumps(Bomb(str(trace)), 2): "damaged or holds more than plain weights"}
    for content, said in cases.items():
        path.write_bytes(content)
        with pytest.raises(OSError, match=f"weights.pt.*{said}.*: a hint$") as caught:
            runs.load_weights(path, lambda state: nn.Linear(3, 2), "a hint")
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    with pytest.raises(OSError, match="SHA-256 does not begin 00000000"):
        runs.load_weights(path, lambda state: nn.Linear(3, 2), "a hint", "00000000")
    with pytest.raises(OSError, match="none.pt cannot be read"):
        runs.load_weights(tmp_path / "none.pt", lambda state: nn.Linear(3, 2), "a hint")
    assert not trace.exists()


def test_cached_computes_once_and_survives_a_damaged_file(tmp_path, capsys):
    calls, folders = [], [str(tmp_path / "first"), str(tmp_path / "second")]

    def compute():
        calls.append(0)
        return dict(a=torch.arange(3))
    for _ in range(2):
        assert torch.equal(runs.cached("x.pt", compute, folders)["a"], torch.arange(3))
    assert len(calls) == 1 and os.listdir(folders[0]) == ["x.pt"] and not os.path.exists(folders[1])
    (tmp_path / "first" / "x.pt").write_bytes(b"half")
    assert torch.equal(runs.cached("x.pt", compute, folders)["a"], torch.arange(3))
    assert len(calls) == 2 and "x.pt is not used" in capsys.readouterr().out
    runs.cached("x.pt", compute, folders)
    assert len(calls) == 2  # it was replaced


def test_cache_folders_follow_xdg(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert runs.cache_folders() == [os.path.join("runs", "cache"), "/elsewhere/lth_diffusion"]


def test_seconds_are_taken_in_turns():
    calls = []
    seconds = runs.seconds_in_turns([lambda: calls.append(0), lambda: calls.append(1)], n=3, warmup=2)
    assert calls == [0, 1] * 5 and seconds.shape == (3, 2) and (seconds >= 0).all()


def test_peak_memory_sees_a_block_that_is_gone():
    with runs.PeakMemory() as low:
        pass
    with runs.PeakMemory() as high:
        with mmap.mmap(-1, 120_000_000) as block:  # not malloc, which may reuse what it kept resident
            block.write(bytes(1) * 120_000_000)
    assert low.bytes is None or high.bytes > 50e6
    if high.kind == "resident":  # where the mark can be reset
        assert high.bytes - low.bytes > 100e6


@pytest.mark.parametrize("spec, argv, said", [
    (None, ["lth_diffusion.py", "--rounds", "3"], "python lth_diffusion.py --rounds 3"),
    (types.SimpleNamespace(name="methods.channels", origin="/a/channels.py"), ["/a/channels.py", "--out", "my runs"],
     "python -m methods.channels --out 'my runs'"),
    (types.SimpleNamespace(name="cProfile", origin="/b/cProfile.py"), ["lth_diffusion.py", "--demo"],
     "python lth_diffusion.py --demo"),
    ("none", ["lth_diffusion.py"], "python lth_diffusion.py")])  # python -m pdb lth_diffusion.py
def test_the_command_is_kept_as_it_was_typed(spec, argv, said, monkeypatch):
    main = types.SimpleNamespace() if spec == "none" else types.SimpleNamespace(__spec__=spec)
    monkeypatch.setitem(sys.modules, "__main__", main)
    monkeypatch.setattr(sys, "argv", argv)
    assert runs.typed() == said
