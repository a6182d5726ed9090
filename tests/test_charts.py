"""Figures and tables: odd data, what is drawn where, and files that are whole or not there."""
import errno
import os
import textwrap

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from support import charts

NAN = float("nan")


def pixels_of(path):
    return np.asarray(Image.open(path).convert("RGB"))


def share_of(colour, picture):
    """The share of a picture's pixels that are near a colour; charts have few colours."""
    distance = np.abs(picture.astype(int) - ImageColor.getrgb(colour)).max(-1)
    return np.mean(distance < 8)


def test_the_example_in_the_docstring_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    example = [line for line in charts.__doc__.splitlines() if line.startswith("    ")]
    exec(textwrap.dedent("\n".join(example)), {})
    assert os.listdir() == ["quality.png"]
    assert capsys.readouterr().out.splitlines()[-1] == "ticket         4.8"


# --------------------------------------------------------------------------- line charts

@pytest.mark.parametrize("log_y", [False, True])
@pytest.mark.parametrize("series", [
    [],
    [dict(label="one", x=[1], y=[2.0])],
    [dict(label="none", x=[0, 1], y=[NAN, None])],
    [dict(label="no points", x=[], y=[])],
    [dict(label="zero", x=[0, 0], y=[0, 0])],
    [dict(label="infinite", x=[0, 1, 2], y=[np.inf, 1, -np.inf])],
    [dict(label="flat " * 20, x=[0, 1, 2], y=[3] * 3, y_low=[2, NAN, 2], y_high=[4, NAN, 4])],
    [dict(label=str(n), x=[0, 1], y=[1, 1]) for n in range(40)]])
def test_line_charts_survive_odd_data(series, log_y, tmp_path):
    chart = tmp_path / "chart.png"
    charts.line_chart(series, chart, "title", "x", "y", hlines=[("floor", NAN, "dotted")],
                      log_y=log_y)
    assert pixels_of(chart).shape[1] == charts.WIDTH * charts.SHRINK
    assert chart.stat().st_size > 500


def test_colours_in_turn_gaps_and_styles(tmp_path):
    chart = tmp_path / "chart.png"
    share = {}
    for style in charts.DASHES:
        line = dict(label="a", x=range(5), y=[1, 2, 3, 2, 1], style=style, shape=None)
        gap = line | dict(label="b", y=[4, 4, NAN, 4, 4], colour="#ff0000")
        charts.line_chart([line, gap], chart, "", "", "")
        picture = pixels_of(chart)
        share[style] = share_of(charts.PALETTE[0], picture)
        red = np.abs(picture[:, 200:1200].astype(int) - (255, 0, 0)).max(-1) < 8
        assert not red[:, 400:600].any()  # around x = 2, the middle of the plotting area
        assert red.any()
    assert 0 < share["dotted"] < share["dashed"] < share["solid"]
    assert share["points"] > 0  # points without a shape are circles: nothing else would show them


def test_marks_at_the_same_x_stand_side_by_side(tmp_path):
    marks = [dict(label=name, x=[1, 2], y=[1, 1], style="points", shape="square", colour=colour)
             for name, colour in (("a", "#ff0000"), ("b", "#0000ff"))]
    charts.line_chart(marks, tmp_path / "chart.png", "", "", "")
    picture = pixels_of(tmp_path / "chart.png")
    assert share_of("#ff0000", picture) == pytest.approx(share_of("#0000ff", picture), rel=0.05)


@pytest.mark.parametrize("values, log, labels", [
    ([0, 1], False, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
    ([-20, 30], False, ["-20", "-10", "0", "10", "20", "30"]),
    ([1, 10_000], True, ["1", "10", "100", "1,000", "10,000"]),
    ([1, 100], True, ["1", "2", "5", "10", "20", "50", "100"]),
    ([1.0, 1.4], True, ["1", "1.1", "1.2", "1.3", "1.4"]),
    ([NAN, None, 0], True, ["1", "2", "5", "10"])])
def test_axes_have_round_ticks(values, log, labels):
    axis = charts._Axis(values, 0, 100, log)
    assert [label for _, label in axis.ticks()] == labels


def test_axes_clip_and_keep_gaps():
    axis = charts._Axis([1, 100], 200, 0, log=True, pad=0)
    assert np.allclose(axis([0, 1, 10, 100, 1e9]), [200, 200, 100, 0, 0])
    assert np.isnan(axis([None, NAN])).all()
    assert charts._Axis([1, 10], 0, 1, from_zero=True)(0) == 0
    assert charts._Axis([9, 10], 0, 1, from_zero=True).low > 8


# --------------------------------------------------------------------------- heat maps and samples

@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("matrix", [
    [[NAN, 0.0], [1.0, 0.5]], [[NAN, None]] * 2, [[3, 3]] * 2, [[np.inf, -np.inf], [0, 1]]])
def test_heat_maps_survive_odd_data(matrix, log, tmp_path):
    path = tmp_path / "map.png"
    charts.heat_map(matrix, ["a", "b" * 80], ["0", "1"], path, "title", log=log)
    assert path.stat().st_size > 500


def test_heat_map_colours(tmp_path):
    path = tmp_path / "map.png"
    charts.heat_map([[0, 1, None]], ["row"], ["0", "1", "none"], path, "")
    picture = pixels_of(path)
    cell = 100 * charts.ROW * charts.SHRINK ** 2 / picture[..., 0].size
    for colour in charts.VIRIDIS[0], charts.VIRIDIS[-1], charts.EMPTY:
        assert 0.5 * cell < share_of(colour, picture) < 1.5 * cell


def test_sample_rows_show_every_pixel(tmp_path):
    path = tmp_path / "rows.png"
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255]], dtype=torch.uint8)
    images = colours[:, :, None, None].expand(3, 3, 8, 8)
    empty = np.zeros((0, 1, 8, 8), np.uint8)
    rows = [("one\nrow", images), ("empty", empty), ("none", None), ("grey", images[:1, 1:2])]
    charts.sample_rows(rows, path, "title", "note")
    picture = pixels_of(path)
    counts = [(picture == colour.numpy()).all(-1).sum() for colour in colours]
    side = int(counts[0] ** 0.5)
    assert counts == [side ** 2] * 3 and side % 8 == 0 and side > 100


def test_sample_rows_survive_without_images(tmp_path):
    charts.sample_rows([("none", None)], tmp_path / "rows.png", "title")
    assert pixels_of(tmp_path / "rows.png").size


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_save_grid(tmp_path, channels, mode):
    images = torch.arange(5 * channels * 4 * 6).reshape(5, channels, 4, 6).to(torch.uint8)
    path = tmp_path / "new" / "grid.png"
    charts.save_grid(images, path, columns=3, scale=2)
    picture = Image.open(path)
    assert picture.mode == mode and picture.size == (3 * 13 + 1, 2 * 9 + 1)
    pixels = np.asarray(picture).reshape(19, 40, channels)
    tile = images[4].permute(1, 2, 0).numpy()  # the last one: second row, second column
    assert np.array_equal(pixels[10:18:2, 14:26:2], tile)
    assert np.array_equal(pixels[11:18:2, 15:26:2], tile)
    for grey in pixels[[0, 9, 18]], pixels[:, ::13], pixels[10:, 27:]:
        assert (grey == 96).all()


def test_save_grid_of_few_images_is_no_wider_than_they_are(tmp_path):
    charts.save_grid(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").size == (19, 10)


# --------------------------------------------------------------------------- files

@pytest.mark.parametrize("draw", [
    lambda path: charts.save_grid(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), path),
    lambda path: charts.line_chart([], path, "", "", ""),
    lambda path: charts.heat_map([[1]], ["a"], ["b"], path, ""),
    lambda path: charts.sample_rows([("none", None)], path, "")])
def test_a_full_disk_leaves_the_figure_of_before(draw, tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    draw(path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")

    def half(image, name, *_, **__):
        with open(name, "wb") as file:
            file.write(before[:20])
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(OSError, match="figure.png could not be written: the disk is full"):
        draw(path)
    assert os.listdir(tmp_path) == ["figure.png"] and path.read_bytes() == before


# --------------------------------------------------------------------------- tables

def test_tables_align():
    text = charts.text_table(["name", "value"], [["a", 1.5], ["long name", None]])
    assert len({len(line) for line in text.splitlines()[:3]}) == 1
    assert text.splitlines()[3].endswith("-")
    assert charts.markdown_table(["a|b"], [["x"]]).splitlines()[0] == "| a\\|b |"


def test_tables_take_any_rows():
    rows = [("imp", np.float32(0.123456), "35.7M", NAN), ("two\nlines", 12345678.9, 4, True)]
    assert charts.text_table(["arm", "fid", "size", "wins"], iter(rows[:1])).splitlines() == [
        "arm     fid   size  wins", "---  ------  -----  ----", "imp  0.1235  35.7M     -"]
    assert charts.markdown_table(["arm", "fid", "size", "wins"], iter(rows)).splitlines() == [
        "| arm | fid | size | wins |", "| --- | ---: | ---: | --- |",
        "| imp | 0.1235 | 35.7M | - |", "| two<br>lines | 1.235e+07 | 4 | True |"]
    assert charts.text_table(["a", "bc"], []) == "a  bc\n-  --"
