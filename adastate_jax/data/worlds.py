"""Procedural videos: a camera moves over an endless generated landscape with a coloured subject.

The landscape is gradient noise (Perlin 2002, "Improving noise") evaluated at world coordinates, so a camera may travel
for as long as it likes and always sees the same place when it comes back. Every video carries the true motion it was
rendered with, which makes it a ruler for whatever estimates motion from pixels.

Signs. `pan_x > 0` is a camera moving right and `pan_y > 0` a camera moving down, so the *content* of the frame moves
the other way: when a camera pans left, hills slide to the right. `zoom > 0` is zooming in: content spreads outwards.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable

import numpy as np
import tensorflow_datasets as tfds

from adastate_jax.data.builder import Examples, SequentialBuilder, named_configuration
from adastate_jax.data.palettes import COLOURS, DARKER, PALETTES
from adastate_jax.data.world_pixels import paint_ground, paint_subject, subject_followed, subjects_passed_by
from adastate_jax.errors import UserError

DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}


MOTIONS = (
    *(f"pan {direction}" for direction in DIRECTIONS),
    "zoom in",
    "zoom out",
    *(f"follow {direction}" for direction in DIRECTIONS),
)


SHAPES = ("ball", "box", "diamond", "ring")


_SMALLEST_WORDS = {"a", "an", "the", "and", "of", "in", "on", "over", "with", "while", "is", "it", "there"}


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """What worlds look like and how their cameras move; every video draws from these ranges.

    Raises `UserError` naming the field when a value makes no sense.
    """

    height: int = 32
    width: int = 32
    num_frames: int = 15
    fps: int = 16
    speed: tuple[float, float] = (0.5, 1.0)  # pan and follow: frame widths (or heights) per second
    zoom_speed: tuple[float, float] = (0.5, 1.0)  # natural logarithm of the scale, per second
    motions: tuple[str, ...] = MOTIONS
    palettes: tuple[str, ...] = tuple(name for name in PALETTES if name not in DARKER)
    shapes: tuple[str, ...] = SHAPES
    colours: tuple[str, ...] = tuple(COLOURS)
    finest: float = 3.0  # pixels of the landscape's smallest details, which fade in up to 8/3 of that
    # Pans pass identical subjects this many frame extents apart: beyond 1.5 the subject is out of sight in between,
    # and its colour has to be remembered until the next one.
    subject_spacing: float = 1.0
    subject_scatter: float = 1.0  # how irregularly they stand; 0 is a straight row at even distances
    subject_radius: tuple[float, float] = (0.11, 0.15)  # fractions of the frame's shorter side
    name_colour: bool = True  # whether the caption tells the subject's colour
    # Turns of the landscape's hue per second. The caption tells the sense, forwards (red, yellow, green, blue) or
    # backwards, but not how far the hue is turned when a video begins: up to hue_start turns.
    hue_turn: tuple[float, float] = (0.0, 0.0)
    hue_start: float = 1.0
    # Share of the videos whose subject takes another colour while it is in full view: once the first time that it is,
    # then every time with even odds. What comes back has the colour that was seen last. No caption tells.
    colour_change: float = 0.0
    withheld: tuple[str, ...] = ()  # captions that no video has

    def __post_init__(self):
        # Command lines and configuration files hand over lists; the hash of a configuration must not depend on that.
        for field in (
            "speed",
            "zoom_speed",
            "motions",
            "palettes",
            "shapes",
            "colours",
            "subject_radius",
            "hue_turn",
            "withheld",
        ):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        for field in ("height", "width"):
            if getattr(self, field) < 8:
                raise UserError(f"world {field} is {getattr(self, field)}: give at least 8 pixels")
        for field in ("num_frames", "fps"):
            if getattr(self, field) < 1:
                raise UserError(f"world {field} is {getattr(self, field)}: give at least 1")
        for field in ("speed", "zoom_speed", "subject_radius", "hue_turn"):
            value = getattr(self, field)
            if len(value) != 2 or not 0 <= value[0] <= value[1] < math.inf:
                raise UserError(f"world {field} is {value}: give (lowest, highest) with 0 ≤ lowest ≤ highest")
        for field, known in (("motions", MOTIONS), ("palettes", PALETTES), ("shapes", SHAPES), ("colours", COLOURS)):
            unknown = [name for name in getattr(self, field) if name not in known]
            if unknown or not getattr(self, field):
                culprit = f"has unknown {unknown[0]!r}" if unknown else "is empty"
                raise UserError(f"world {field} {culprit}: choose from {', '.join(known)}")
        for palette in self.palettes:
            if not set(self.colours) - set(PALETTES[palette].avoid):
                raise UserError(f"world colours {self.colours} all vanish into palette {palette!r}: add another colour")
        if not 3.0 <= self.finest <= 0.5 * self.height:
            raise UserError(f"world finest is {self.finest}: give 3 pixels at least, and at most half the height")
        if not self.subject_spacing >= 0.8:
            raise UserError(f"world subject_spacing is {self.subject_spacing}: give at least 0.8 frame extents")
        if not 0.0 <= self.subject_scatter <= 1.0:
            raise UserError(f"world subject_scatter is {self.subject_scatter}: give a number in [0, 1]")
        if not 0.0 <= self.hue_start <= 1.0:
            raise UserError(f"world hue_start is {self.hue_start}: give turns in [0, 1]")
        if not 0.0 <= self.colour_change <= 1.0:
            raise UserError(f"world colour_change is {self.colour_change}: give a share in [0, 1]")
        if self.colour_change and self.name_colour:
            raise UserError("world colour_change needs captions without a colour: set name_colour to false")
        for palette in self.palettes if self.colour_change else ():
            if len(set(self.colours) - set(PALETTES[palette].avoid)) < 2:
                raise UserError(f"world colour_change needs two colours that palette {palette!r} shows: add another")
        known = captions(self) if self.withheld else ()
        unknown = [caption for caption in self.withheld if caption not in known]
        if unknown or (known and set(known) == set(self.withheld)):
            culprit = f"has {unknown[0]!r}, which no video has" if unknown else "leaves no caption"
            raise UserError(f"world withheld {culprit}: choose some of {'; '.join(known[:8])} …")
        if not 0.0 < self.subject_radius[0] <= self.subject_radius[1] <= 0.5:
            raise UserError(f"world subject_radius is {self.subject_radius}: give (lowest, highest) in (0, 0.5]")


@dataclasses.dataclass(frozen=True)
class World:
    """One rendered video with everything that is true about it.

    `video` is uint8 sRGB `[F, H, W, 3]`. `pan_x`, `pan_y` are the camera's velocity in frame widths and heights per
    second, `subject_x`, `subject_y` the subject's mean velocity over the ground in the same units (zero unless the
    camera follows it), `zoom` the rate of log-scale per second and `hue_turn` the landscape's hue in turns per second,
    positive forwards. The module's docstring gives the signs. `colour` is the subject's at first, `changes` the frames
    from which on it has another, in order.
    """

    video: np.ndarray
    caption: str
    motion: str
    pan_x: float
    pan_y: float
    zoom: float
    subject_x: float
    subject_y: float
    hue_turn: float
    palette: str
    shape: str
    colour: str
    changes: tuple[tuple[int, str], ...] = ()


def render_world(config: WorldConfig, seed: int, index: int) -> World:
    """Renders video number `index` of the endless series `seed`.

    A pure function of its arguments: the same three give the same bytes. `seed` and `index` are non-negative. Returns
    a `World` whose video is uint8 `[F, H, W, 3]`.
    """
    for attempt in itertools.count():
        world = _draw_world(config, np.random.default_rng((seed, index, attempt) if attempt else (seed, index)))
        if world.caption not in config.withheld:
            return world


def _draw_world(config: WorldConfig, rng: np.random.Generator) -> World:
    motion = config.motions[rng.integers(len(config.motions))]
    palette = config.palettes[rng.integers(len(config.palettes))]
    shape = config.shapes[rng.integers(len(config.shapes))]
    colours = [colour for colour in config.colours if colour not in PALETTES[palette].avoid]
    colour = colours[rng.integers(len(colours))]
    speed = rng.uniform(*config.speed)
    zoom_speed = rng.uniform(*config.zoom_speed)
    hue_turn = rng.uniform(*config.hue_turn) * rng.choice((-1.0, 1.0)) + 0.0  # + 0 makes -0 an ordinary 0
    ground_key, subject_key = rng.integers(2**63, size=2, dtype=np.uint64)
    radius = rng.uniform(*config.subject_radius)
    start = rng.uniform(-1.0, 1.0, size=2)
    hue = config.hue_start * rng.uniform() if hue_turn else 0.0

    kind, way = motion.split()
    zoom = {"in": zoom_speed, "out": -zoom_speed}.get(way, 0.0)
    direction = np.array(DIRECTIONS.get(way, (0.0, 0.0)))
    pan = speed * direction + 0.0
    seconds = np.arange(config.num_frames) / config.fps

    video = paint_ground(config, PALETTES[palette], ground_key, pan, zoom, hue + hue_turn * seconds, seconds)
    if kind == "pan":
        centres = subjects_passed_by(config, direction, speed, subject_key, start, seconds)
    elif kind == "follow":
        centres = subject_followed(direction, start, seconds)
    else:
        centres = np.broadcast_to(0.12 * start, (1, len(seconds), 2))
    # A zoom shows the subject growing, but an endless zoom must not fill the frame with it: the apparent size follows
    # the true scale at first and levels off at twice (or half) the size it began with.
    limit = math.log(2.0)
    radii = radius * np.exp(limit * np.tanh(zoom * seconds / limit))
    if kind == "zoom":
        centres = centres * (radii / radius)[:, None]
    changes = _draw_changes(config, rng, colours, colour, centres, radii)
    painted = np.array([COLOURS[name] for name in _colour_by_frame(colour, changes, config.num_frames)])
    for centre in centres:
        paint_subject(video, shape, painted, centre, radii)
    return World(
        video=np.clip(video * 255.0 + 0.5, 0.0, 255.0).astype(np.uint8),
        caption=_caption(config, kind, way, PALETTES[palette].landscape, shape, colour, hue_turn),
        motion=motion,
        pan_x=float(pan[0]),
        pan_y=float(pan[1]),
        zoom=float(zoom),
        subject_x=float(pan[0]) if kind == "follow" else 0.0,
        subject_y=float(pan[1]) if kind == "follow" else 0.0,
        hue_turn=float(hue_turn),
        palette=palette,
        shape=shape,
        colour=colour,
        changes=changes,
    )


def _draw_changes(config, rng, colours, colour, centres, radii):
    """When the subject takes which colour: never after the last frame in which it is in full view."""
    if not config.colour_change or rng.uniform() >= config.colour_change:
        return ()
    in_view = (np.abs(centres) <= 0.5 - radii[:, None]).all(axis=-1).any(axis=0)  # of any of the subjects
    edges = np.flatnonzero(np.diff(np.concatenate([[False], in_view, [False]]).astype(int)))
    changes = []
    for number, (first, end) in enumerate(edges.reshape(-1, 2)):
        if end - first < 2 or (number and rng.uniform() < 0.5):
            continue
        others = [name for name in colours if name != colour]
        colour = others[rng.integers(len(others))]
        changes.append((int(rng.integers(first + 1, end)), colour))
    return tuple(changes)


def _colour_by_frame(colour, changes, num_frames):
    starts = [0, *(frame for frame, _ in changes), num_frames]
    names = [colour, *(name for _, name in changes)]
    return [
        name for name, (start, end) in zip(names, itertools.pairwise(starts), strict=True) for _ in range(start, end)
    ]


def captions(config: WorldConfig) -> tuple[str, ...]:
    """All captions that worlds can have, in a fixed order, withheld ones too."""
    senses = (1.0, -1.0) if max(config.hue_turn) else (0.0,)
    found = {}
    for motion, palette, shape, sense in itertools.product(config.motions, config.palettes, config.shapes, senses):
        kind, way = motion.split()
        for colour in config.colours if config.name_colour else config.colours[:1]:
            if not config.name_colour or colour not in PALETTES[palette].avoid:
                found[_caption(config, kind, way, PALETTES[palette].landscape, shape, colour, sense)] = None
    return tuple(found)


def _caption(config, kind, way, landscape, shape, colour, hue_turn):
    named = f"{colour} {shape}" if config.name_colour else shape
    subject = f"an {named}" if named[0] in "aeiou" else f"a {named}"
    sentence = {
        "pan": f"a camera pans {way} over {landscape} with {subject}",
        "zoom": f"a camera zooms {way} over {landscape} with {subject}",
        "follow": f"a camera follows {subject} moving {way} over {landscape}",
    }[kind]
    sense = {1.0: "forwards", -1.0: "backwards"}
    return sentence + (f" while the colours turn {sense[math.copysign(1.0, hue_turn)]}" if hue_turn else "")


def caption_pattern(config: WorldConfig) -> str:
    """All captions that worlds can have, alternatives separated by strokes: `a camera pans left/right over …`."""
    ways: dict[str, list[str]] = {}
    for motion in config.motions:
        kind, way = motion.split()
        ways.setdefault(kind, []).append(way)
    landscapes = "/".join(PALETTES[name].landscape for name in config.palettes)
    shapes, colours = "/".join(config.shapes), "/".join(config.colours)
    hue = max(config.hue_turn, key=abs)
    patterns = [
        _caption(config, kind, "/".join(found), landscapes, shapes, colours, hue) for kind, found in ways.items()
    ]
    return "; ".join(patterns)


def unknown_words(config: WorldConfig, prompt: str) -> list[str]:
    """The words of a prompt, but for the smallest, that are of no caption that worlds can have; each once, in order."""
    known = set(re.findall(r"\w+", caption_pattern(config))) | _SMALLEST_WORDS
    return [word for word in dict.fromkeys(re.findall(r"\w+", prompt.lower())) if word not in known]


@dataclasses.dataclass
class WorldsConfig(tfds.core.BuilderConfig):
    """A dataset of worlds: `num_train` + `num_validation` videos of the series `seed`."""

    world: WorldConfig = dataclasses.field(default_factory=WorldConfig)
    num_train: int = 0
    num_validation: int = 0
    seed: int = 0


class Worlds(SequentialBuilder):
    """TFDS builder of procedural videos; make one with `worlds`.

    Example i of `train` is `render_world(world, seed, i)`, and `validation` goes on where `train` ends. Features:
    `video` uint8 `[F, H, W, 3]`, `caption`, and `motion` with the other fields of `World`.
    """

    VERSION = tfds.core.Version("1.0.0")  # raise it when render_world's pixels change

    def _info(self):
        world = self.builder_config.world
        text, scalar = tfds.features.Text, tfds.features.Scalar
        motion = {name: scalar(np.float32) for name in ("pan_x", "pan_y", "zoom", "subject_x", "subject_y", "hue_turn")}
        motion |= {name: text() for name in ("motion", "palette", "shape", "colour")}
        shape = (world.num_frames, world.height, world.width, 3)
        return tfds.core.DatasetInfo(
            builder=self,
            description="A camera over an endless procedural landscape, with its true motion.",
            features=tfds.features.FeaturesDict(
                {
                    "video": tfds.features.Tensor(shape=shape, dtype=np.uint8, encoding="bytes"),
                    "caption": text(),
                    "motion": motion,
                }
            ),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        config = self.builder_config
        total = config.num_train + config.num_validation
        splits = {"train": range(config.num_train), "validation": range(config.num_train, total)}
        return {name: Examples(len(indices), self._generate_examples(indices)) for name, indices in splits.items()}

    def _generate_examples(self, indices):
        config = self.builder_config
        for index in indices:
            example = dataclasses.asdict(render_world(config.world, config.seed, index))
            del example["changes"]  # to be seen
            yield index, {"video": example.pop("video"), "caption": example.pop("caption"), "motion": example}


def worlds(world: WorldConfig, num_train: int, num_validation: int, seed: int) -> Callable[..., Worlds]:
    """A dataset of `num_train` training and `num_validation` validation videos, for `open_source`.

    Every configuration, size and seed has a directory of its own. Raises `UserError` for an empty split.
    """
    for field, value in (("num_train", num_train), ("num_validation", num_validation)):
        if value < 1:
            raise UserError(f"worlds {field} is {value}: give at least 1")
    if seed < 0:
        raise UserError(f"worlds seed is {seed}: give a non-negative integer")
    size = f"{world.height}x{world.width}x{world.num_frames}"
    fields = {"world": world, "num_train": num_train, "num_validation": num_validation, "seed": seed}
    return functools.partial(Worlds, config=named_configuration(WorldsConfig, size, fields))
