"""Charts, heat maps, grids of images and tables from plain arrays, drawn with Pillow alone.

    from support import charts
    curve = dict(label="ticket", x=[0, 20, 36], y=[4.9, 4.8, 5.1])
    charts.line_chart([curve], "quality.png", "Quality", "weights pruned (%)", "fid_domain")
    print(charts.text_table(["arm", "fid_domain"], [["dense", 4.9], ["ticket", 4.8]]))

Every figure is written as a PNG or GIF, whole or not at all. Lengths are in units: in the file, a
unit is SHRINK pixels.
"""
import io
import math
from dataclasses import dataclass
from itertools import chain, cycle

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from support.runs import atomic

# A unit is drawn as 4 pixels and written as 2: averaging smooths edges, and a figure with 2 pixels
# per unit stays sharp when a page shows it at half its size.
DRAW, SHRINK = 4, 2
WIDTH = 900  # units, the width of a README column
INK, MUTED, RULE, EMPTY = "#222222", "#5c5c5c", "#e4e4e4", "#dcdcdc"
# The colours of Okabe and Ito, which colour-blind readers can tell apart, and a grey.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7",
           "#E69F00", "#56B4E9", "#444444")
# name -> sides, turn in degrees, radius in units
SHAPES = dict(circle=(32, 0, 4.5), square=(4, 0, 5.7),
              diamond=(4, 45, 5.6), triangle=(3, 0, 5.8))
# name -> units drawn, units skipped
DASHES = dict(solid=(1e9, 1), points=(0, 1), dashed=(8, 5), dotted=(2, 4))
# Viridis grows steadily lighter, so it can also be read without colour vision.
VIRIDIS = ("#440154", "#472c7a", "#3b528b", "#2c718e", "#21918c",
           "#27ad81", "#5cc863", "#aadc32", "#fde725")
ANCHORS = dict(l=0, t=0, m=0.5, r=1, b=1)  # shares of a block's width or height
ROW = 20  # units, the height of a heat map's row


def _size(*blocks, size=14):
    """The (width, height) in units of the smallest box that each of these texts fits into."""
    font = ImageFont.load_default(size * DRAW)
    split = [text.split("\n") for text in blocks if text]
    widths = map(font.getlength, chain(*split))
    lines = max(map(len, split), default=0)
    return max(widths, default=0) / DRAW, 1.3 * size * lines


def _wrap(text, size, width):
    """The text broken into lines of at most `width` units; a longer word gets its own line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and _size(longer, size=size)[0] > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _viridis(share):
    """The colour (r, g, b) of a number from 0 to 1."""
    level, steps = round(256 * share), range(0, 257, 32)
    channels = zip(*map(ImageColor.getrgb, VIRIDIS))
    return tuple(int(np.interp(level, steps, c)) for c in channels)


def _picture(image, times):
    """uint8 [1 or 3, H, W] as a Pillow image, every pixel enlarged to times x times."""
    pixels = np.asarray(image).transpose(1, 2, 0)
    pixels = pixels.repeat(times, 0).repeat(times, 1)
    grey = pixels.shape[2] == 1
    return Image.fromarray(pixels[..., 0] if grey else pixels)


def _write(image, path):
    """Write a Pillow image as a PNG, whole or not at all; its folder is created."""
    # The suffix of the temporary name does not tell Pillow the format.
    with atomic(path) as temporary:
        image.save(temporary, "PNG", optimize=True)


class _Page:
    """A white page: the title, free space of the given height from `top` down, the note."""

    def __init__(self, width, height, title, note):
        title = _wrap(title, 19, width - 40)
        note = _wrap(note, 13, width - 40)
        self.top = round(30 + _size(title, size=19)[1])
        end = self.top + height
        bottom = end + 28 + _size(note, size=13)[1]
        size = math.ceil(width) * DRAW, math.ceil(bottom) * DRAW
        self.image = Image.new("RGB", size, "white")
        self.pen = ImageDraw.Draw(self.image)
        self.text(20, 16, title, 19, anchor="lt", bold=True)
        self.text(20, end + 12, note, 13, MUTED, "lt")

    def text(self, x, y, text, size=14, colour=INK, anchor="lm",
             bold=False, upright=False):
        """Write a block of lines; anchor names the point of the block that lies at (x, y).

        The first letter is l, m or r (left, middle, right), the second t, m or b (top, bottom).
        """
        across, down = anchor
        font = ImageFont.load_default(size * DRAW)
        extent = [math.ceil(v * DRAW) + 2 for v in _size(text, size=size)]
        mask = Image.new("L", extent)
        for n, line in enumerate(text.split("\n")):
            # Placing lines by their baselines keeps a row of labels level.
            baseline = (1.3 * n + 1) * size * DRAW
            spot = mask.width * ANCHORS[across], baseline
            ImageDraw.Draw(mask).text(spot, line, 255, font, across + "s",
                                      stroke_width=int(bold))
        if upright:
            mask = mask.transpose(Image.Transpose.ROTATE_90)
        left = round(x * DRAW - ANCHORS[across] * mask.width)
        top = round(y * DRAW - ANCHORS[down] * mask.height)
        self.image.paste(colour, (left, top), mask)

    def line(self, points, colour, width=1.0, style="solid"):
        """Draw a line with gaps at NaN; the dashes of a broken line continue around corners."""
        on, off = (DRAW * units for units in DASHES[style])
        if not on:
            return
        points = DRAW * np.array(points, float).reshape(-1, 2)
        gaps = np.flatnonzero(np.isnan(points).any(1))
        for piece in np.split(points, gaps):
            x, y = piece[~np.isnan(piece).any(1)].T
            steps = np.hypot(np.diff(x), np.diff(y))
            along = np.append(0, np.cumsum(steps))
            for start in np.arange(0, along[-1], on + off):
                at = np.unique(np.clip(along, start, start + on))
                dash = zip(np.interp(at, along, x), np.interp(at, along, y))
                self.pen.line([*dash], colour, round(width * DRAW), joint="curve")

    def marker(self, x, y, shape, colour, scale=1.0):
        """Draw a marker unless x or y is NaN; a white rim separates it from what lies below."""
        if shape is None or not math.isfinite(x + y):
            return
        sides, turn, radius = SHAPES[shape]
        for r, fill in (1.27 * radius, "white"), (radius, colour):
            circle = x * DRAW, y * DRAW, r * scale * DRAW
            self.pen.regular_polygon(circle, sides, turn, fill)

    def save(self, path, photographs=False):
        """Write the page as a PNG."""
        image = self.image.reduce(DRAW // SHRINK)
        # A palette of 256 makes the file several times smaller, but is too small for photographs.
        if not photographs:
            image = image.quantize(256, Image.Quantize.MAXCOVERAGE)
        _write(image, path)


class _Axis:
    """Maps data to units, linearly or by log10; values beyond an end are drawn at that end."""

    def __init__(self, values, start, end, log=False, pad=0.06, from_zero=False):
        self.log, self.start, self.end = log, start, end
        least, values = 0 if log else -math.inf, np.array(values, float)
        values = [v for v in values if least < v < math.inf] or [1, 10]
        low, high = min(values), max(values)
        # Starting at zero shows true proportions, and here it costs little room.
        flush = from_zero and not log and 0 <= low <= 0.4 * high > 0
        low, high = self.scale([0 if flush else low, high])
        gap = pad * (high - low)
        if low == high:
            gap = 0.2 if log else 0.1 * abs(low) or 1.0
        self.low = low if flush else low - gap
        self.high = high + gap

    def scale(self, values):
        """The values, or their log10 on a logarithmic axis."""
        values = np.array(values, float)
        # Zero has no logarithm; the bound puts it below every axis.
        return np.log10(np.maximum(values, 1e-300)) if self.log else values

    def __call__(self, values):
        share = (self.scale(values) - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * np.clip(share, 0, 1)

    def ticks(self):
        """About 3 to 8 pairs (value, label), at round values."""
        low, high = self.low, self.high
        if self.log:
            low, high = 10 ** low, 10 ** high
        firsts = (1,) if self.log and high > 500 * low else (1, 2, 5)
        values = [m * 10.0 ** k for k in range(-12, 16) for m in firsts]
        if not self.log or high < 5 * low:
            step = next(v for v in values if high - low <= 7 * v)
            first, last = math.floor(low / step), math.ceil(high / step)
            values = [k * step for k in range(first, last + 1)]
        return [(v, f"{v:,.6g}") for v in values if low <= v <= high]


# Without eq: comparing fields that are arrays would fail.
@dataclass(eq=False)
class _Series:
    """A line of line_chart(), which explains the fields; spots: its points (x, y) on the page."""
    label: str
    x: list
    y: list
    style: str = "solid"
    shape: str = None
    colour: str = "#555555"
    y_low: list = ()
    y_high: list = ()
    dots: list = ()
    spots: list = ()


def line_chart(series, path, title, x_label, y_label, hlines=(),
               log_x=False, log_y=False, x_ticks=None, note="", height=380):
    """Draw lines over x, each named beside its right end.

    series: one dict per line with label, x [n] and y [n]; None and NaN leave a gap. Optional keys:
    y_low [n] and y_high [n], the ends of error bars; dots, n lists of single measurements; style,
    "solid" (default), "dashed", "dotted" or "points" (markers without a line); shape, a key of
    SHAPES or None; colour. By default, lines take shapes and colours in turn.
    hlines: (label, y, style) of each horizontal line. x_ticks: (x, label) pairs; some are left out
    where labels would touch. height: the height of the plotting area in units. All x and y are in
    the units of the data.
    """
    ends = [-math.inf, math.inf]
    rows = [_Series(label, ends, [y, y], style) for label, y, style in hlines]
    for given, colour, shape in zip(series, cycle(PALETTE), cycle(SHAPES)):
        rows.append(_Series(**dict(colour=colour, shape=shape) | given))
        if rows[-1].style == "points":  # without a marker there would be nothing to see
            rows[-1].shape = rows[-1].shape or "circle"
    places, labels = zip(*x_ticks) if x_ticks else ((), ())
    below = max(50, _size(*labels)[1] + 14)
    page = _Page(WIDTH, height + below, title, note)
    heights = [y for row in rows for y in chain(row.y, row.y_low, row.y_high, *row.dots)]
    y_axis = _Axis(heights, page.top + height, page.top, log_y, from_zero=True)
    left = 52 + _size(*(label for _, label in y_axis.ticks()))[0]
    right = WIDTH - 82 - _size(*(row.label for row in rows))[0]
    across = [*places, *(x for row in rows for x in row.x)]
    x_axis = _Axis(across, left, right, log_x, pad=0.05)
    _frame(page, x_axis, y_axis, x_ticks or x_axis.ticks(), x_label, y_label)
    for row in rows:
        row.spots = [*zip(x_axis(row.x) + _shift(row, rows), y_axis(row.y))]
        if len(row.spots) > 40 and row.style != "points":
            row.shape = None  # markers would hide a long curve
    _legend(page, rows, right, y_axis)
    for row in rows:
        _draw(page, row, y_axis)
    page.save(path)


def _shift(row, rows):
    """How far, in units, to move a series of "points" away from others at the same x."""
    beside = [other for other in rows if other.style == row.style == "points"
              and set(other.x) & set(row.x)]
    if len(beside) < 2:
        return 0
    return np.linspace(-48, 48, len(beside) + 2)[1 + beside.index(row)]


def _frame(page, x_axis, y_axis, ticks, x_label, y_label):
    """Draw the grid lines, their labels and the labels of the axes."""
    left, right = x_axis.start, x_axis.end
    top, bottom = y_axis.end, y_axis.start
    for value, label in y_axis.ticks():
        y = y_axis(value)
        page.line([(left, y), (right, y)], RULE)
        page.text(left - 8, y, label, colour=MUTED, anchor="rm")
    room = sum(_size(label)[0] + 8 for _, label in ticks)
    every = max(1, math.ceil(room / (right - left)))
    # Backwards, so that the last tick always gets its label.
    for value, label in ticks[::-every]:
        x = x_axis(value)
        page.line([(x, top), (x, bottom)], RULE)
        page.text(x, bottom + 7, label, colour=MUTED, anchor="mt")
    page.line([(left, bottom), (right, bottom)], "#888888", 1.25)
    page.text((left + right) / 2, bottom + 38, x_label, anchor="mm")
    page.text(30, (top + bottom) / 2, y_label, anchor="mm", upright=True)


def _draw(page, row, y_axis):
    """Draw a series: error bars, the line, markers, and faint dots for single measurements."""
    bars = zip(row.spots, y_axis(row.y_low), y_axis(row.y_high))
    for (x, _), low, high in bars:
        page.line([(x, low), (x, high)], row.colour, 1.5)
        for y in low, high:
            page.line([(x - 4, y), (x + 4, y)], row.colour, 1.5)
    width = 2.25 if row.shape else 1.6
    page.line(row.spots, row.colour, width, row.style)
    for x, y in row.spots:
        page.marker(x, y, row.shape, row.colour)
    faint = tuple((c + 255) // 2 for c in ImageColor.getrgb(row.colour))
    for (x, _), values in zip(row.spots, row.dots):
        for y in y_axis(values):
            page.marker(x + 9, y, "circle", faint, 0.55)


def _legend(page, rows, x, y_axis):
    """Write the name of each line to the right of x, as near to its end as the others allow."""
    bottom, y = y_axis.start, -math.inf
    ends = []
    for row in rows:
        known = [spot for spot in row.spots if math.isfinite(sum(spot))]
        ends.append((*max(known, default=(0, bottom)), row))
    ends.sort(key=lambda end: end[1])
    step = min(24, (bottom - y_axis.end) / max(1, len(rows)))
    for n, (right, height, row) in enumerate(ends, 1):
        y = min(max(height, y + step), bottom - (len(rows) - n) * step)
        # A longer lead would be mistaken for data.
        if right > x - 60:
            page.line([(right, height), (x + 2, height), (x + 14, y)], "#bbbbbb")
        page.line([(x + 18, y), (x + 52, y)], row.colour, 2.25, row.style)
        page.marker(x + 35, y, row.shape, row.colour)
        page.text(x + 60, y, row.label)


def sample_rows(rows, path, title, note=""):
    """Draw rows of images, each row with a label; pixels are enlarged by a whole number.

    rows: (label, uint8 [n, 1 or 3, H, W] or None) of each row; n, H and W may differ between rows.
    """
    labels = [label for label, _ in rows]
    nothing = np.zeros((0, 1, 1, 1))
    grids = [nothing if images is None else np.asarray(images) for _, images in rows]
    columns = max(map(len, grids)) or 1
    side = max(max(grid.shape[2:]) for grid in grids)
    left = math.ceil(34 + _size(*labels)[0])
    room = min((WIDTH - 17 - left) / columns - 3, 84)
    zoom = max(1, int(SHRINK * room // side))  # whole: no blur
    tile = side * zoom / SHRINK
    height = math.ceil(max(tile, _size(*labels)[1] + 6))
    width = left + columns * (tile + 3) + 17
    page = _Page(max(480, width), len(rows) * (height + 3), title, note)
    for row, (label, images) in enumerate(zip(labels, grids)):
        y = page.top + row * (height + 3)
        page.text(left - 14, y + height / 2, label, anchor="rm")
        y += (height - tile) // 2
        for n, image in enumerate(images):
            x = left + n * (tile + 3)
            picture = _picture(image, zoom * DRAW // SHRINK)
            page.image.paste(picture, (int(x * DRAW), int(y * DRAW)))
    page.save(path, photographs=True)


def animation(blocks, labels, path, title, note="", limit=2_000_000):
    """Draw blocks of images side by side that change from frame to frame, as a GIF that pauses at
    its end; the bar below the title shows how far it is.

    blocks: (label, uint8 [frames, n, 1 or 3, H, W]) of each block; labels: a text per frame. limit:
    bytes; where they are exceeded, the colours are halved, then every second frame is left out.
    """
    stills = [_still(blocks, k, f"{title}: {text}", note, k / max(1, len(labels) - 1))
              for k, text in enumerate(labels)]
    grey = all(frames.shape[2] == 1 for _, frames in blocks)
    for colours, skip in (128, 1), (64, 1), (32, 1), (32, 2), (16, 4):
        content = _gif([*stills[:-1:skip], stills[-1]], colours, grey)
        if len(content) <= limit:
            break
    with atomic(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


def _still(blocks, frame, title, note, share):
    """A frame of animation() as a Pillow image; share: of the bar, 0 to 1."""
    across = math.ceil(math.sqrt(blocks[0][1].shape[1]))  # tiles in a row of a block
    n, _, high, wide = blocks[0][1].shape[1:]
    zoom = max(1, min(84, (2 * WIDTH - 80) // (len(blocks) * across) - 12) // wide)
    step_x, step_y = wide * zoom / SHRINK + 2, high * zoom / SHRINK + 2
    room = max(across * step_x, _size(*(label for label, _ in blocks), size=13)[0]) + 14
    head = _size(*(label for label, _ in blocks), size=13)[1] + 20
    width = max(360, 26 + len(blocks) * room)
    page = _Page(width, head + math.ceil(n / across) * step_y, title, note)
    page.line([(20, page.top), (width - 20, page.top)], RULE, 3)
    page.line([(20, page.top), (20 + share * (width - 40), page.top)], PALETTE[0], 3)
    for k, (label, frames) in enumerate(blocks):
        left, top = 20 + k * room, page.top + head
        page.text(left, page.top + 9, label, 13, anchor="lt")
        for i, image in enumerate(frames[frame]):
            spot = left + i % across * step_x, top + i // across * step_y
            tile = _picture(image, zoom * DRAW // SHRINK)
            page.image.paste(tile, tuple(int(v * DRAW) for v in spot))
    return page.image.reduce(DRAW // SHRINK)


def _gif(images, colours, grey, pause=2500, each=90):
    """The bytes of a GIF that repeats; one palette for all frames, without dithering, so that what
    is still stays still and flat areas stay flat. pause, each: milliseconds."""
    palette = _palette((images[0], images[2 * len(images) // 3], images[-1]), colours, grey)
    flat = [_flat(image, palette, colours, grey) for image in images]
    content, times = io.BytesIO(), [700] + [each] * (len(flat) - 2) + [pause]
    flat[0].save(content, "GIF", save_all=True, append_images=flat[1:], duration=times[-len(flat):],
                 loop=0, optimize=False)
    return content.getvalue()


def _palette(images, colours, grey):
    """A Pillow image with a palette for images: white, the accent, and even steps of grey, or the
    colours that the images need."""
    found = np.linspace(0, 255, colours - 2).round().astype(int).repeat(3).tolist()
    if not grey:
        sheet = Image.new("RGB", (images[0].width, len(images) * images[0].height))
        for k, image in enumerate(images):
            sheet.paste(image, (0, k * image.height))
        found = sheet.quantize(colours - 2).getpalette()[:3 * (colours - 2)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([*found, *ImageColor.getrgb(PALETTE[0]), 255, 255, 255])
    return palette


def _flat(image, palette, colours, grey):
    """The image in a palette of _palette(). Pillow takes a colour near by, not the nearest: white
    would be tinted, and even areas of grey would be speckled."""
    pixels = np.asarray(image)
    index = np.array(image.quantize(palette=palette, dither=Image.Dither.NONE))
    if grey:
        index = (pixels[..., 0] / 255 * (colours - 3)).round().astype(np.uint8)
    exact = ImageColor.getrgb(PALETTE[0]), (255, 255, 255)
    for place, colour in enumerate(exact, colours - 2):
        index[(pixels == colour).all(2)] = place
    found = Image.fromarray(index)
    found.putpalette(palette.getpalette())
    return found


def last_frame(path):
    """The last frame of a GIF, as the bytes of a PNG."""
    content = io.BytesIO()
    with Image.open(path) as image:
        image.seek(image.n_frames - 1)
        still = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE)
    still.save(content, "PNG", optimize=True)
    return content.getvalue()


def heat_map(matrix, row_labels, col_labels, path, title, note="",
             log=False, x_label="", bar_label="", marked=()):
    """Draw a matrix as coloured cells, with the values in them where they fit.

    matrix: numbers [R][C]; None and NaN are grey. row_labels, col_labels: R and C texts. log: the
    colours follow log10 of the values. x_label: text above the columns. bar_label: text beside the
    colour bar, such as the unit of the values. marked: (row, column) of cells with a star.
    """
    values = np.array(matrix, float)
    left = 28 + _size(*row_labels, size=12)[0]
    wide = min(100, max(20, (WIDTH - left - 120) / len(col_labels)))
    right = left + len(col_labels) * wide
    high = len(values) * ROW
    page = _Page(max(480, right + 120), 44 + max(high, 170), title, note)
    top = page.top + 44
    page.text((left + right) / 2, top - 36, x_label, 13, MUTED, "mm")
    for j, label in enumerate(col_labels):
        page.text(left + (j + 0.5) * wide, top - 5, label, 13, anchor="mb")
    axis = _Axis(values.ravel(), 0, 1, log, pad=0)
    for i, label in enumerate(row_labels):
        y = top + (i + 0.5) * ROW
        page.text(left - 8, y, label, 12, anchor="rm")
        for j, value in enumerate(values[i]):
            text = f"{value:.2f}{'*' * ((i, j) in marked)}"
            _cell(page, left + j * wide, y, wide, text, axis(value))
    length = min(240, max(high, 140))
    _colour_bar(page, right + 20, top, length, axis, bar_label)
    page.save(path)


def _cell(page, x, y, wide, text, share):
    """Draw one cell of a heat map; share: its place on the colour bar, 0 to 1 or NaN."""
    known = math.isfinite(share)
    colour = _viridis(share) if known else EMPTY
    page.line([(x, y), (x + wide - 1, y)], colour, ROW - 1)
    if known and _size(text, size=11)[0] < wide - 4:
        ink = "white" if share < 0.49 else INK
        page.text(x + wide / 2, y, text, 11, ink, "mm")


def _colour_bar(page, x, top, length, axis, label):
    """Draw the colours of an axis from (x, top) downwards, the greatest first, with its ticks."""
    for down in np.arange(0, length, 1 / SHRINK):
        ends = [(x, top + down), (x + 16, top + down)]
        page.line(ends, _viridis(1 - down / length))
    for value, text in axis.ticks():
        y = top + length * (1 - axis(value))
        page.text(x + 20, y, text, 13, MUTED)
    y = top + length / 2
    page.text(x + 66, y, label, 13, anchor="mm", upright=True)


def save_grid(images, path, columns=10, scale=2):
    """Write images, a uint8 tensor [N, 1 or 3, H, W], as tiles of one PNG, row by row.

    columns: tiles per row. scale: every pixel of an image becomes scale x scale pixels. Grey lines,
    one pixel wide, separate the tiles.
    """
    tiles = [_picture(image, scale) for image in images]
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    width, height = (side + 1 for side in tiles[0].size)
    size = columns * width + 1, rows * height + 1
    grid = Image.new(tiles[0].mode, size, "#606060")
    for n, tile in enumerate(tiles):
        x, y = n % columns * width, n // columns * height
        grid.paste(tile, (x + 1, y + 1))
    _write(grid, path)


def _as_text(value):
    """A value as text_table() shows it."""
    if value is None or value != value:
        return "-"
    number = isinstance(value, (float, np.floating))
    return f"{value:.4g}" if number else str(value)


def typed_columns(header, rows):
    """Yield the name and texts of each column, and whether they are numbers, such as "35.7M"."""
    table = [[_as_text(value) for value in row] for row in rows]
    for k, name in enumerate(header):
        texts = [row[k] for row in table]
        letters = [sum(map(str.isalpha, text)) for text in texts]
        yield str(name), texts, max(letters, default=0) < 3


def text_table(header, rows):
    """Return a table as text for a terminal, its columns aligned, numbers to the right.

    header: C names. rows: any number of rows of C values. Floats are rounded to four significant
    digits; None and NaN become "-".
    """
    columns = []
    for name, texts, numbers in typed_columns(header, rows):
        width = max(map(len, [name, *texts]))
        align = str.rjust if numbers else str.ljust
        column = name, "-" * width, *texts
        columns.append([align(text, width) for text in column])
    return "\n".join("  ".join(row).rstrip() for row in zip(*columns))


def markdown_table(header, rows):
    """Return a table as GitHub Markdown; the arguments are those of text_table()."""
    columns = []
    for name, texts, numbers in typed_columns(header, rows):
        column = name, "---:" if numbers else "---", *texts
        columns.append([text.replace("|", "\\|") for text in column])
    lines = [f"| {' | '.join(row)} |" for row in zip(*columns)]
    return "\n".join(line.replace("\n", "<br>") for line in lines)
