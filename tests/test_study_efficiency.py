"""studies/efficiency.py: bytes, weights and multiply-accumulates of the three kinds, by count; one run."""
import csv
import types

from prune import prunable
from studies import efficiency
from studies.common import open_run

FLAGS = "--rounds 1 --steps 8 --batch 8 --samples 8 --nfe 4 --prune-rate 0.5 --controls"


class Here:
    """A ProcessPoolExecutor of this process."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, work, *args):
        return types.SimpleNamespace(result=lambda: work(*args))


def test_counts_of_the_kinds(finished, tmp_path):
    exp, _ = open_run(str(finished / "run"))
    found = {(one.kind, one.cut): (one, efficiency.counts(one, tmp_path)) for one in efficiency.networks(exp, 0)}
    dense, (weights, kilobytes, live, done) = found["dense", 0.0]
    assert weights == sum(p.numel() for p in prunable(dense.model).values()) and live == done
    for cut in efficiency.CUTS:
        masked, channels, small = (found[kind, cut][1] for kind in ("masked", "channels", "small"))
        assert masked[0] == weights - round(cut * weights)
        assert masked[3] == done and masked[2] < live  # a mask leaves the work as it is
        assert channels[2] == channels[3] < done and small[2] == small[3] < done
        assert masked[1] < kilobytes and channels[1] < kilobytes
    more = [found["masked", cut][1][1] for cut in efficiency.CUTS]
    assert more == sorted(more, reverse=True)


def test_a_run(finished, capsys, monkeypatch):
    monkeypatch.setattr(efficiency, "CUTS", (0.9,))
    monkeypatch.setattr(efficiency, "ProcessPoolExecutor", Here)  # a process of its own takes seconds to start
    efficiency.main(["--from", str(finished / "run"), "--turns", "2", "--steps", "2", "--batch", "4",
                     "--out", str(finished)])
    assert "efficiency_digits.csv" in capsys.readouterr().out
    with open(finished / "efficiency_digits.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1 + 3 * len(efficiency.CUTS) and rows[0]["network"] == "dense"
    assert all(float(rows[0][name]) == 1 for name in ("step ratio", "step low", "evaluation ratio", "evaluation high"))
    assert all(0 < float(row["step low"]) <= float(row["step ratio"]) <= float(row["step high"]) for row in rows)
    assert (finished / "efficiency_digits.png").stat().st_size > 5_000
