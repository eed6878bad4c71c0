"""Draws MCD once as a whole and once for each block: mcd-overview.svg, mcd-encoders.svg, …

    python nbs/images/make_figures.py

Plain Python that writes SVG text; every position is in one drawing of 1000 × 592 units.
The drawing brings its own white card, so that it reads the same on light and on dark pages.
"""
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 1000, 592
INK, QUIET, FAINT, PAPER = "#1f2933", "#5f6c7b", "#c3ccd6", "#ffffff"
VISUAL, AUDIO, TEXT, TRAIN = "#d9731a", "#12917c", "#5752d1", "#c2316b"
SHOW, TINT = "#2563d9", "#e6effe"
SANS = "'Helvetica Neue', Arial, 'Segoe UI', sans-serif"
SERIF = "'STIX Two Text', Cambria, Georgia, 'Times New Roman', serif"
TITLE = "Mutual Correlation Distillation: from a video and a question to an answer"
BLOCKS = {  # block: (its colour when it is shown, its name)
    "encoders": (SHOW, "encoders and projections"),
    "association": (SHOW, "association"),
    "aggregator": (SHOW, "aggregator"),
    "fusion": (SHOW, "local element fusion"),
    "distillation": (TRAIN, "distillation losses"),
    "head": (SHOW, "prediction head"),
}


def text(x, y, words, size=14, color=INK, anchor="middle", weight=400, extra=""):
    words = words if "<tspan" in words else escape(words)
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
            f'font-weight="{weight}"{extra}>{words}</text>')


def symbol(letter, index="", after=""):
    """A letter of the equations with its index, and plain words after it."""
    index = f'<tspan dy="4" font-size="11">{index}</tspan>' if index else ""
    after = f'<tspan dy="-4" font-size="14"> {after}</tspan>' if after else ""
    style = f'font-style="italic" font-family="{SERIF}" font-size="17"'
    return f"<tspan {style}>{letter}</tspan>{index}{after}"


def line(path, color, dashed=False, arrow=True, both=False):
    head = f' marker-end="url(#arrow-{color[1:]})"' if arrow else ""
    head += f' marker-start="url(#arrow-{color[1:]})"' if both else ""
    dash = ' stroke-dasharray="5 5"' if dashed else ""
    return f'<path d="{path}" fill="none" stroke="{color}" stroke-width="2"{dash}{head}/>'


def rect(x, y, w, h, fill, stroke="none", radius=9):
    return (f'<rect x="{x:g}" y="{y:g}" width="{w}" height="{h}" rx="{radius}" '
            f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>')


class Drawing:
    """A list of SVG parts and the block that is shown: later parts lie above earlier ones."""

    def __init__(self, shown):
        self.shown, self.parts = shown, []

    def add(self, *parts):
        self.parts += parts

    def look(self, block):
        """Fill, border and text colour of a block; the shown one is filled."""
        color = BLOCKS[block][0]
        if self.shown == block:
            return color, color, PAPER
        if self.shown == "overview":
            return (TINT if color == SHOW else PAPER), color, INK
        return PAPER, FAINT, INK

    def box(self, block, x, y, w, h, *lines, size=14, stack=0):
        """A block; `stack` more of its kind lie behind it. Returns the colour of its text."""
        fill, border, ink = self.look(block)
        border = PAPER if stack and ink == PAPER else border
        for i in range(stack, -1, -1):
            self.add(rect(x + 5 * i, y - 5 * i, w, h, fill, border))
        top = y + h / 2 + 5 - (len(lines) - 1) * size * 0.62
        for i, words in enumerate(lines):
            self.add(text(x + w / 2, top + i * size * 1.24, words, size, ink, weight=600))
        return ink

    def chip(self, x, y, color, letter, index="", w=40, hat=False):
        """A tensor: a pill in the colour of its stream; the hat marks what has been enriched."""
        self.add(rect(x - w / 2, y - 15, w, 30, PAPER, color, radius=15),
                 text(x, y + (6 if hat else 5), symbol(letter, index), 15, color))
        if hat:
            self.add(f'<path d="M{x - 6} {y - 6.5} l4 -4 l4 4" fill="none" stroke="{color}" '
                     'stroke-width="1.4"/>')

    def point(self, x, y, color, letter, index):
        """A pooled vector that a loss compares."""
        fill, border, ink = (TRAIN, TRAIN, PAPER) if self.shown == "distillation" \
            else (PAPER, color, color)
        self.add(f'<circle cx="{x}" cy="{y}" r="17" fill="{fill}" stroke="{border}" '
                 'stroke-width="1.5"/>', text(x, y + 4, symbol(letter, index), 15, ink))

    def band(self, x, y, w, h, fill, name, color, anchor="start"):
        at = x + 16 if anchor == "start" else x + w - 16
        self.add(rect(x, y, w, h, fill, radius=14),
                 text(at, y + 20, name, 13, color, anchor, 700, ' letter-spacing=".04em"'))


def draw_page(d):
    """The card, three bands and the title."""
    d.add(rect(.75, .75, WIDTH - 1.5, HEIGHT - 1.5, PAPER, "#dde3ea", radius=18))
    d.band(316, 16, 668, 104, "#fdf1f5", "training only", TRAIN, "end")
    d.band(16, 132, 800, 216, "#f0f5fc", "once per video", QUIET)
    d.band(16, 360, 968, 216, "#f5f3fd", "once per question", QUIET)
    d.add(text(32, 52, "MCD", 28, INK, "start", 700),
          text(32, 75, "Mutual Correlation Distillation", 14, QUIET, "start"))
    if d.shown != "overview":
        color, name = BLOCKS[d.shown]
        d.add(text(32, 100, f"here: {name}", 14, color, "start", 700))


def draw_video(d):
    """mp4 → encoders → projections → low → association → high → video state."""
    holes = [rect(x, y, 6, 5, PAPER, radius=1.5) for x in (37, 49, 61, 73) for y in (199, 244)]
    d.add(rect(30, 194, 58, 60, INK, radius=8), *holes,
          f'<path d="M52 211 l18 13 l-18 13 z" fill="{PAPER}"/>',
          text(59, 273, "mp4", 14, QUIET))
    for x, level in (357, "low"), (653, "high"):
        d.add(rect(x - 33, 152, 66, 142, PAPER, FAINT, radius=12),
              text(x, 229, level, 14, QUIET), line(f"M{x} 294 V305", QUIET))
    for y, color, name, index in (184, VISUAL, "visual", "v"), (264, AUDIO, "audio", "a"):
        d.add(line(f"M88 224 C110 224 98 {y} 122 {y}", color))
        for start, end in (216, 236), (296, 334), (378, 438), (590, 630):
            d.add(line(f"M{start} {y} H{end}", color))
        d.box("encoders", 124, y - 24, 92, 48, name, "encoder")
        d.box("encoders", 238, y - 24, 58, 48, "linear", "+ pos", size=13)
        d.chip(357, y, color, "f", index)
        d.chip(653, y, color, "f", index, hat=True)
    ink = d.box("association", 440, 160, 140, 128, stack=2)
    d.add(text(510, 188, "Association", 15, ink, weight=600),
          text(510, 274, "× N", 14, ink, weight=600))
    for y, other, color in (210, 242, VISUAL), (242, 210, AUDIO):
        color = PAPER if ink == PAPER else color
        d.add(line(f"M466 {y} H554", color),
              line(f"M476 {y} C505 {y} 505 {other} 534 {other}", color, arrow=False))
    d.add(rect(324, 307, 362, 30, PAPER, QUIET, radius=15),
          text(505, 327, "video state: kept, and shared by its questions", 14))


def draw_question(d):
    """Question and text objects → text encoder → aggregator → fusion → head → answer."""
    d.add(line("M142 463 H158", TEXT), line("M142 540 H158", TEXT))
    for i in (2, 1, 0):
        d.add(rect(28 + 4 * i, 434 - 5 * i, 114, 58, PAPER, TEXT, radius=12))
    d.add(rect(28, 517, 114, 46, PAPER, TEXT, radius=12),
          text(85, 459, "Which instrument", 13), text(85, 476, "sounds first?", 13),
          text(85, 536, "instrument, first", 13), text(85, 553, "Audio, Temporal", 13))
    d.box("encoders", 160, 430, 66, 134, "text", "encoder")
    for y, letter, index in (463, "f", "q"), (540, "o", ""):
        d.add(line(f"M226 {y} H240", TEXT), line(f"M294 {y} H312", TEXT))
        d.box("encoders", 242, y - 19, 52, 38, "linear", size=13)
        d.chip(333, y, TEXT, letter, index, 36)
    draw_aggregator(d)
    d.box("fusion", 690, 396, 98, 110, "Local", "element", "fusion", size=15)
    d.add(line("M686 322 H727 Q739 322 739 334 V394", QUIET),
          line("M351 540 H727 Q739 540 739 528 V508", TEXT),
          text(749, 378, "both", 13, QUIET, "start"), text(507, 559, "text objects", 13, QUIET),
          line("M788 463 H812", TEXT), line("M858 463 H882", TEXT))
    d.chip(836, 463, TEXT, "f", "q", 44, hat=True)
    d.box("head", 884, 432, 84, 62, "Head", size=15)
    d.add(line("M926 494 V517", TEXT), rect(884, 519, 84, 40, PAPER, TEXT, radius=12),
          text(926, 544, "violin", 14, weight=600))


def draw_aggregator(d):
    """Two levels, each with its clues: attention over five segments, pictures up, sounds down."""
    ink = d.box("aggregator", 376, 396, 262, 110)
    d.add(text(507, 421, "Aggregator", 15, ink, weight=600),
          line("M351 463 H374", TEXT), line("M638 463 H688", TEXT),
          line("M496 463 H516", PAPER if ink == PAPER else TEXT))
    clues = {442: ("low", 388, (5, 17, 8, 3, 3), (3, 4, 13, 8, 3)),
             572: ("high", 518, (3, 12, 19, 4, 3), (3, 4, 17, 6, 3))}
    for arrow, (level, left, visual, audio) in clues.items():
        d.add(line(f"M{arrow} 337 V394", QUIET), text(arrow + 10, 378, level, 13, QUIET, "start"),
              rect(left, 434, 108, 58, PAPER, FAINT, radius=8), text(left + 25, 468, level, 14))
        for i, (up, down) in enumerate(zip(visual, audio)):
            d.add(rect(left + 50 + 10 * i, 462 - up, 7, up, VISUAL, radius=1),
                  rect(left + 50 + 10 * i, 464, 7, down, AUDIO, radius=1))
    d.add(text(507, 527, "clues: the moments this question needs", 13, QUIET))


def draw_training(d):
    """Semantic approximation (question–visual, question–audio) and the association loss."""
    d.add(line("M349 152 V66 Q349 56 359 56 H384", VISUAL, dashed=True),
          line("M365 152 V106 Q365 96 375 96 H384", AUDIO, dashed=True),
          line("M836 448 V94", TEXT, dashed=True),
          line("M442 56 H459", VISUAL), line("M442 96 H459", AUDIO), line("M808 76 H791", TEXT))
    for x, y, name in (386, 56, "proj₁"), (386, 96, "proj₂"), (808, 76, "proj₃"):
        d.box("distillation", x, y - 15, 56, 30, name, size=13)
    d.add(line("M753 73 L499 57", TRAIN, dashed=True, both=True),
          line("M753 79 L499 95", TRAIN, dashed=True, both=True),
          text(626, 53, symbol("L", "kd", "question–visual"), 14, TRAIN),
          text(626, 110, symbol("L", "kd", "question–audio"), 14, TRAIN))
    for y, color in (184, VISUAL), (264, AUDIO):
        d.add(line(f"M675 {y} H722", color, dashed=True),
              text(703, 175 if y == 184 else 282, "mean", 12, QUIET))
    d.add(line("M741 204 V244", TRAIN, dashed=True, both=True),
          text(764, 229, symbol("L", "av"), 15, TRAIN))
    points = ((478, 56, VISUAL, "z", "v"), (478, 96, AUDIO, "z", "a"), (773, 76, TEXT, "z", "q"),
              (741, 184, VISUAL, "m", "v"), (741, 264, AUDIO, "m", "a"))
    for point in points:
        d.point(*point)


def svg(shown):
    title = TITLE if shown == "overview" else f"{TITLE}; highlighted: {BLOCKS[shown][1]}"
    arrows = "".join(
        f'<marker id="arrow-{color[1:]}" viewBox="0 0 10 10" refX="8.5" refY="5" markerWidth="5.5" '
        f'markerHeight="5.5" orient="auto-start-reverse"><path d="M0 .8 L9 5 L0 9.2 z" '
        f'fill="{color}"/></marker>' for color in (VISUAL, AUDIO, TEXT, TRAIN, QUIET, PAPER))
    drawing = Drawing(shown)
    for part in draw_page, draw_video, draw_question, draw_training:
        part(drawing)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}" role="img" font-family="{SANS}">'
            f"<title>{title}</title><defs>{arrows}</defs>\n"
            + "\n".join(drawing.parts) + "\n</svg>\n")


if __name__ == "__main__":
    for name in ("overview", *BLOCKS):
        Path(__file__).with_name(f"mcd-{name}.svg").write_text(svg(name), encoding="utf-8")
