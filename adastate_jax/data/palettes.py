"""Colours of subjects and of landscapes in procedural videos."""

import dataclasses

COLOURS = {
    "red": (226, 38, 38),
    "orange": (255, 138, 20),
    "yellow": (252, 224, 40),
    "cyan": (40, 224, 232),
    "blue": (36, 84, 232),
    "magenta": (232, 48, 196),
    "white": (250, 250, 250),
}


@dataclasses.dataclass(frozen=True)
class Palette:
    """How a landscape is coloured: height in [0, 1] → sRGB through `stops`, plus the strength of its relief shading."""

    landscape: str
    stops: tuple[tuple[float, str], ...]
    relief: float
    avoid: tuple[str, ...]  # subject colours that would vanish into this landscape


DARKER = {"loam": 0.76, "peat": 0.58, "basalt": 0.44}  # clay at so much of its brightness

PALETTES = {
    "meadow": Palette(
        "green hills",
        ((0.0, "#1f4f8c"), (0.24, "#3f86b8"), (0.27, "#d8cf9a"), (0.33, "#86bd52"), (0.6, "#2f6b2c"), (0.9, "#c3d478")),
        0.55,
        (),
    ),
    "desert": Palette(
        "sand dunes",
        ((0.0, "#7a4a2b"), (0.35, "#c08549"), (0.6, "#e3b872"), (1.0, "#fbe6b8")),
        0.65,
        ("orange", "yellow"),
    ),
    "ocean": Palette(
        "a blue sea with islands",
        (
            (0.0, "#06224d"),
            (0.45, "#12579a"),
            (0.62, "#39a6c4"),
            (0.66, "#f0e2b0"),
            (0.72, "#5b9c4c"),
            (1.0, "#2e6b35"),
        ),
        0.4,
        ("blue", "cyan"),
    ),
    "dusk": Palette(
        "purple mountains",
        ((0.0, "#1c1440"), (0.4, "#4b2a6e"), (0.65, "#8d4a8a"), (0.85, "#e08a8a"), (1.0, "#ffd2a6")),
        0.6,
        ("magenta",),
    ),
    "snow": Palette(
        "snowy peaks",
        ((0.0, "#27415c"), (0.3, "#5d7f9e"), (0.5, "#a9c1d4"), (0.7, "#e6eef5"), (1.0, "#ffffff")),
        0.55,
        ("white", "cyan"),
    ),
    "autumn": Palette(
        "an autumn forest",
        ((0.0, "#2f2a1c"), (0.3, "#5e5a24"), (0.5, "#a8692a"), (0.7, "#c9482a"), (1.0, "#edc14d")),
        0.55,
        ("red", "orange", "yellow"),
    ),
    "clay": Palette(
        "clay",
        ((0.0, "#3d1a10"), (0.35, "#6b3020"), (0.65, "#9a4a30"), (1.0, "#c07050")),
        0.55,
        ("red", "orange"),
    ),
    "moon": Palette(
        "grey moon rock",
        ((0.0, "#17181c"), (0.35, "#4a4c52"), (0.6, "#808389"), (1.0, "#cfd0d2")),
        0.75,
        (),
    ),
}


def _darkened(palette: Palette, landscape: str, brightness: float) -> Palette:
    stops = tuple(
        (height, "#" + "".join(f"{round(brightness * channel):02x}" for channel in bytes.fromhex(colour[1:])))
        for height, colour in palette.stops
    )
    return dataclasses.replace(palette, landscape=landscape, stops=stops)


PALETTES |= {name: _darkened(PALETTES["clay"], name, brightness) for name, brightness in DARKER.items()}
