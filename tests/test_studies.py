"""The studies, each through its command line."""
import csv
import json
import os
import subprocess
import sys
import time

import pytest

from studies import parity

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_parity_with_every_peer(tmp_path):
    missing = parity.missing_peers()
    if missing:
        pytest.skip(f"needs  pip install {' '.join(missing)} ({'; '.join(missing.values())})")
    done = subprocess.run([sys.executable, "-m", "studies.parity", "--out", str(tmp_path)], cwd=HERE,
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    with open(tmp_path / "parity.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 27 and {row["verdict"] for row in rows} == {"ok", "for information"}
    source = json.load(open(tmp_path / "parity.json"))
    assert source["rows"] == len(rows) and set(parity.PEERS) < set(source["versions"])
    assert (tmp_path / "parity.md").read_text().count("\n| ") == len(rows) + 1


def test_parity_without_peers_names_them_and_writes_nothing(monkeypatch, capsys, tmp_path):
    for module in parity.PEERS.values():
        monkeypatch.setitem(sys.modules, module, None)  # import fails as if it were not installed
    assert parity.main(["--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "pip install pytorch-fid torch-fidelity diffusers" in said and "MACs" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ours, theirs, verdict", [
    (1.0, 1.0, "ok"), (1.0, 1.0005, "ok"), (1.0, 1.1, "DIFFERS"), (float("nan"), 1.0, "DIFFERS"),
    ([1.0, 2.0], [1.0, 2.0], "ok"), ([1.0, 2.0], [1.0, 2.1], "DIFFERS"), (1.0, 0.0, "DIFFERS"),
    ([1.0, float("nan")], [1.0, 2.0], "DIFFERS"), (0.0, 0.0, "ok"),
])
def test_parity_verdict(ours, theirs, verdict):
    assert parity.compare("x", ours, theirs, 1e-3).verdict == verdict


def test_parity_exits_1_on_a_difference(monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "missing_peers", dict)
    monkeypatch.setattr(parity, "write", lambda *_: None)
    monkeypatch.setattr(parity, "SECTIONS", ((lambda: [parity.compare("x", 1.0, 2.0, 0.1)], None),))
    assert parity.main([]) == 1


def test_parity_race_counts_ratios_and_calls():
    calls = []
    slow = lambda: (calls.append("theirs"), time.sleep(0.02))
    row = parity.race("x", lambda: calls.append("ours"), slow, 5, n=2)
    assert calls == ["ours", "theirs"] * 3 and row.verdict == "ok" and "n=2" in row.quantity
    assert parity.race("x", lambda: time.sleep(0.01), lambda: time.sleep(0.01), 50, n=2).verdict == "SLOWER"
