"""The world that the small text-to-video model is trained on: coloured shapes that move, and captions that say so.

A scene is plain data drawn from a seed; `pack` turns scenes into numbers, `draw` the numbers into video, `caption` a
scene into English and `parse` English back into what it asks for. Lengths are in pixels of a 64 x 64 frame, x to the
right and y down. Letters: B batch, A the two actors of a scene (the second may be absent), T frames.
"""

import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE, FRAMES = 64, 16  # of a video: pixels a side, frames
MARGIN, GAP = 1.0, 3.0  # pixels kept free: to the frame's edge, and between two actors

COLOURS = {  # red, green, blue in 0..1
    "red": (0.90, 0.08, 0.10),
    "orange": (1.00, 0.50, 0.00),
    "yellow": (1.00, 0.95, 0.10),
    "green": (0.10, 0.75, 0.15),
    "cyan": (0.10, 0.88, 0.92),
    "blue": (0.10, 0.25, 1.00),
    "purple": (0.62, 0.12, 0.85),
    "white": (1.00, 1.00, 1.00),
}
# a shape is a star of n points about its centre: half the angle between two points, the direction of an edge's normal
# seen from a point, and the direction of the first point from straight up, all in half turns. Every one of them fits
# in the disc of the actor's radius; a circle is the star of 64 points whose edges lie flat.
SHAPES = {
    "circle": (1 / 64, 1 / 64, 0.0),
    "square": (1 / 4, 1 / 4, 1 / 4),
    "triangle": (1 / 3, 1 / 3, 0.0),
    "star": (1 / 5, 0.37, 0.0),
}
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "circle", "grow", "shrink", "still")

RADII = {"small": (7.0, 8.0), None: (8.5, 10.5), "large": (11.5, 13.0)}
SPANS = {1: (28.0, 36.0), 2: (16.0, 26.0)}  # actors in the scene -> pixels that a straight motion covers
ORBITS = {1: (10.0, 16.0), 2: (8.0, 11.0)}  # actors in the scene -> radius of the path
GROWTH = (1.8, 2.2)  # the larger radius over the smaller
GREYS = (0.05, 0.15)  # of the background, black 0 and white 1

NUMBERS = 15  # that say all of an actor: what `pack` makes and `draw` takes

Triple = tuple[str, str, str]  # colour, shape, motion
TRIPLES: tuple[Triple, ...] = tuple(itertools.product(COLOURS, SHAPES, MOTIONS))


def _is_held_out(triple: Triple) -> bool:
    """A diagonal through the cube of triples: it meets a line along any axis at most once, so every pair is trained."""
    axes = zip(triple, (COLOURS, SHAPES, MOTIONS), strict=True)
    colour, shape, motion = (list(axis).index(name) for name, axis in axes)
    return (colour + 3 * shape + 7 * motion) % 10 == 0


HELD_OUT = frozenset(filter(_is_held_out, TRIPLES))


@dataclass(frozen=True, kw_only=True)
class Actor:
    """One shape and its path."""

    colour: str
    shape: str
    motion: str
    radius: float  # pixels, in the first frame
    centre: tuple[float, float]  # x, y: the middle of its path
    extent: float  # pixels covered, or radius of the orbit, or larger radius over smaller; 0 when still
    phase: float = 0.0  # radians: where on its orbit it starts, clockwise from the right

    @property
    def triple(self) -> Triple:
        return self.colour, self.shape, self.motion

    @property
    def size(self) -> str | None:
        """The adjective that its first frame deserves, if any."""
        if self.radius <= RADII["small"][1]:
            return "small"
        return "large" if self.radius >= RADII["large"][0] else None

    @property
    def course(self) -> tuple[float, float, float, float, float]:
        """How it moves, of which most are zero: dx, dy, orbit (pixels), phase (radians), growth (log of the factor)."""
        dx, dy = DIRECTIONS.get(self.motion, (0, 0))
        orbit = self.extent if self.motion == "circle" else 0.0
        sign = {"grow": 1, "shrink": -1}.get(self.motion, 0)
        return dx * self.extent, dy * self.extent, orbit, self.phase, sign * math.log(self.extent) if sign else 0.0

    def at(self, u: float) -> tuple[float, float, float]:
        """x, y, radius at a moment u from 0, the first frame, to 1, the last. `draw` does the same for a batch."""
        dx, dy, orbit, phase, growth = self.course
        x = self.centre[0] + dx * (u - 0.5) + orbit * math.cos(phase + math.tau * u)
        y = self.centre[1] + dy * (u - 0.5) + orbit * math.sin(phase + math.tau * u)
        return x, y, self.radius * math.exp(growth * u)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One or two actors, of different colours, before a grey."""

    actors: tuple[Actor, ...]
    background: float  # grey level in 0..1


def sample_scene(rng: random.Random, *, actors: int | None = None, held_out: bool = False) -> Scene:
    """A scene of 1 or 2 actors (None: 70 % have one), every one a held-out triple or, as in training, none of them."""
    if actors not in (None, 1, 2):
        raise ValueError(f"actors must be 1, 2 or None, got {actors!r}")
    count = actors or (1 if rng.random() < 0.7 else 2)
    choice = [triple for triple in TRIPLES if (triple in HELD_OUT) == held_out]
    triples = [rng.choice(choice)]
    if count == 2:
        triples.append(rng.choice([other for other in choice if other[0] != triples[0][0]]))
    return scene(rng, triples)


def scene(rng: random.Random, triples: Sequence[Triple]) -> Scene:
    """A scene of an actor for each of the triples, one or two."""
    return Scene(actors=_place(rng, triples), background=rng.uniform(*GREYS))


def _place(rng: random.Random, triples: Sequence[Triple]) -> tuple[Actor, ...]:
    """Actors for the triples that never touch. An orbit beside something that grows fits one try in 500."""
    for _ in range(10_000):
        actors = tuple(_sample_actor(rng, triple, len(triples)) for triple in triples)
        if not any(_touch(one, other) for one, other in itertools.combinations(actors, 2)):
            return actors
    raise AssertionError(f"no room for {triples}: RADII, SPANS, ORBITS or GROWTH are too large for two actors")


def _sample_actor(rng: random.Random, triple: Triple, count: int) -> Actor:
    """An actor anywhere in the frame where its whole path fits. count: the actors in its scene."""
    colour, shape, motion = triple
    resizes = motion in ("grow", "shrink")
    radius = rng.uniform(*RADII[rng.choice(("small", None) if resizes else ("small", None, "large"))])
    extent = _sample_extent(rng, motion, count)
    largest = radius * extent if resizes else radius
    reach = largest + MARGIN + (extent if motion == "circle" else 0.0)
    dx, dy = DIRECTIONS.get(motion, (0, 0))
    along = [reach + abs(d) * extent / 2 for d in (dx, dy)]  # centre to edge, at the least: x, y
    return Actor(
        colour=colour,
        shape=shape,
        motion=motion,
        radius=largest if motion == "shrink" else radius,
        centre=(rng.uniform(along[0], SIZE - along[0]), rng.uniform(along[1], SIZE - along[1])),
        extent=extent,
        phase=rng.uniform(0, math.tau) if motion == "circle" else 0.0,
    )


def _sample_extent(rng: random.Random, motion: str, count: int) -> float:
    if motion == "still":
        return 0.0
    if motion in DIRECTIONS:
        return rng.uniform(*SPANS[count])
    return rng.uniform(*(ORBITS[count] if motion == "circle" else GROWTH))


def _touch(one: Actor, other: Actor) -> bool:
    """Do their discs come closer than GAP in any frame?"""
    for frame in range(FRAMES):
        (x, y, radius), (x2, y2, radius2) = (actor.at(frame / (FRAMES - 1)) for actor in (one, other))
        if math.hypot(x - x2, y - y2) < radius + radius2 + GAP:
            return True
    return False


def pack(scenes: Sequence[Scene]) -> Tensor:
    """(B, A, 15) float32: what `draw` needs, cheap to make in a data worker and to send to a GPU."""
    return torch.tensor([_rows(scene) for scene in scenes], dtype=torch.float32).reshape(-1, 2, NUMBERS)


def _rows(scene: Scene) -> list[list[float]]:
    """Two rows; an absent actor is the first one once more, in a colour that adds nothing."""
    rows = []
    for actor in scene.actors:
        outline = [math.pi * half_turns for half_turns in SHAPES[actor.shape]]
        contrast = [channel - scene.background for channel in COLOURS[actor.colour]]
        rows.append([*actor.centre, *actor.course, actor.radius, *outline, *contrast, scene.background])
    return rows if len(rows) == 2 else [rows[0], [*rows[0][:11], 0.0, 0.0, 0.0, scene.background]]


def draw(packed: Tensor, frames: int = FRAMES, size: int = SIZE) -> Tensor:
    """Packed scenes (B, A, 15) -> video (B, 3, T, size, size) float32 in -1..1, on the device of `packed`."""
    columns = packed.reshape(*packed.shape[:2], NUMBERS, 1, 1, 1).unbind(2)  # each (B, A, 1, 1, 1)
    x, y, dx, dy, orbit, phase, growth, radius, half_angle, normal, turn = columns[:11]
    contrast, background = packed[..., 11:14], packed[:, 0, 14]  # (B, A, 3), (B,)
    u = torch.linspace(0, 1, frames, device=packed.device).reshape(-1, 1, 1)  # (T, 1, 1)
    pixels = (torch.arange(size, device=packed.device) + 0.5) * (SIZE / size)  # centres of pixels
    right = pixels - (x + dx * (u - 0.5) + orbit * torch.cos(phase + math.tau * u))  # (B, A, T, 1, W)
    below = pixels[:, None] - (y + dy * (u - 0.5) + orbit * torch.sin(phase + math.tau * u))  # (B, A, T, H, 1)
    # fold the plane into the half sector beside one point of the star, where its outline is one straight line
    angle = torch.atan2(right, -below) - turn + half_angle  # (B, A, T, H, W), clockwise from up
    fold = (torch.remainder(angle, 2 * half_angle) - half_angle).abs()
    distance = torch.hypot(right, below) * torch.cos(fold - normal) - radius * torch.exp(growth * u) * torch.cos(normal)
    coverage = (0.5 - distance * (size / SIZE)).clamp(0, 1)
    # actors never overlap, so each adds its contrast by itself
    video = background[:, None, None, None, None] + torch.einsum("bathw,bac->bcthw", coverage, contrast)
    return video * 2 - 1


def render(scenes: Sequence[Scene], device: torch.device | str = "cpu") -> Tensor:
    """Scenes -> video (B, 3, 16, 64, 64) float32 in -1..1 on the device."""
    return draw(pack(scenes).to(device))


# what captions are made of. A verb is said three ways: "moves", "is moving", "moving".
ARTICLES = ("a", "the", "one")
SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge"), None: ()}
SHAPE_WORDS = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
_GOING = (
    ("moves", "moving"),
    ("goes", "going"),
    ("slides", "sliding"),
    ("drifts", "drifting"),
    ("glides", "gliding"),
    ("travels", "traveling"),
    ("floats", "floating"),
)
_BECOMING = (("gets", "getting"), ("becomes", "becoming"), ("grows", "growing"))
_STAYING = (("stays", "staying"), ("remains", "remaining"))
_ALONE = ("",)
PHRASES = {  # motion -> its verbs, and what may follow them
    "right": ((_GOING, ("right", "to the right", "from left to right")),),
    "left": ((_GOING, ("left", "to the left", "from right to left")),),
    "up": ((_GOING, ("up", "upwards")), ((("rises", "rising"), ("climbs", "climbing")), _ALONE)),
    "down": ((_GOING, ("down", "downwards")), ((("falls", "falling"), ("sinks", "sinking")), _ALONE)),
    "circle": (
        (_GOING, ("in a circle", "around in a circle", "in circles")),
        ((("orbits", "orbiting"), ("circles", "circling"), ("circles around", "circling around")), _ALONE),
    ),
    "grow": ((_BECOMING, ("bigger", "larger")), ((("grows", "growing"), ("expands", "expanding")), _ALONE)),
    "shrink": ((_BECOMING, ("smaller",)), ((("shrinks", "shrinking"), ("contracts", "contracting")), _ALONE)),
    "still": (
        (_STAYING, ("still", "in place", "where it is")),
        ((("stands", "standing"), ("holds", "holding")), ("still",)),
        ((("does not move", "not moving"), ("rests", "resting")), _ALONE),
    ),
}
FINITE, PROGRESSIVE, PARTICIPLE = range(3)  # the three ways
OPENINGS = {FINITE: ("",), PROGRESSIVE: ("",), PARTICIPLE: ("", "there is ", "a video of ", "we see ")}
JOINTS = {
    FINITE: (" and ", ", and ", " while "),
    PROGRESSIVE: (" and ", ", and ", " while "),
    PARTICIPLE: (" and ", ", and ", ", "),
}


def verb_phrases(motion: str, way: int) -> Iterator[str]:
    """Everything that may be said of a motion in one of the three ways: "is moving right", "is moving to the right"."""
    for verbs, tails in PHRASES[motion]:
        for (finite, participle), tail in itertools.product(verbs, tails):
            verb = (finite, f"is {participle}", participle)[way]
            yield f"{verb} {tail}".rstrip()


def caption(scene: Scene, rng: random.Random) -> str:
    """One of the many things to say of a scene, such as "a red circle moves left, and a big blue star is growing"."""
    way = rng.choice((FINITE, FINITE, PROGRESSIVE, PARTICIPLE))
    actors = rng.sample(scene.actors, len(scene.actors))
    clauses = [f"{_noun(actor, rng)} {rng.choice(list(verb_phrases(actor.motion, way)))}" for actor in actors]
    return rng.choice(OPENINGS[way]) + rng.choice(JOINTS[way]).join(clauses)


def _noun(actor: Actor, rng: random.Random) -> str:
    """Such as "the small red ball". The plain "a", the plain shape and no size are the likeliest."""
    article = rng.choice(("a", *ARTICLES))
    size = rng.choice(("", *SIZE_WORDS[actor.size]))
    names = SHAPE_WORDS[actor.shape]
    shape = rng.choice((names[0], *names))
    if article == "a" and not size and actor.colour == "orange":
        article = "an"
    return " ".join(word for word in (article, size, actor.colour, shape) if word)


def words(text: str) -> list[str]:
    """The words of a caption; a comma is one of them."""
    return text.replace(",", " , ").split()


def _vocabulary() -> tuple[str, ...]:
    said = [phrase for motion in MOTIONS for way in OPENINGS for phrase in verb_phrases(motion, way)]
    nouns = itertools.chain(*SIZE_WORDS.values(), *SHAPE_WORDS.values())
    glue = itertools.chain(*OPENINGS.values(), *JOINTS.values())
    return tuple(sorted(set(words(" ".join((*ARTICLES, "an", *COLOURS, *nouns, *glue, *said))))))


VOCABULARY = _vocabulary()
_MOTION_OF = {phrase: motion for motion in MOTIONS for way in OPENINGS for phrase in verb_phrases(motion, way)}
_SHAPE_OF = {word: shape for shape, names in SHAPE_WORDS.items() for word in names}


def parse(text: str) -> tuple[Triple, ...]:
    """What a caption asks for, one triple an actor in the order they are named. ValueError: says what was not clear."""
    plain = " ".join(text.lower().rstrip(" .").split())
    opening = next((opening for opening in OPENINGS[PARTICIPLE] if opening and plain.startswith(opening)), "")
    return tuple(_parse_clause(clause) for clause in re.split(r",? and |,? while |, ", plain[len(opening) :]))


def _parse_clause(clause: str) -> Triple:
    """One actor: an article, a size if any, a colour, a shape, what it does."""
    sizes = "|".join(itertools.chain(*SIZE_WORDS.values()))
    match = re.fullmatch(rf"(?:a|an|the|one) (?:(?:{sizes}) )?(\S+) (\S+) (.+)", clause)
    if not match:
        raise ValueError(f"cannot read {clause!r}: expected something like 'a red circle moves to the right'")
    colour, shape, phrase = match.groups()
    if colour not in COLOURS:
        raise ValueError(f"{colour!r} in {clause!r} is none of the colours: {', '.join(COLOURS)}")
    if shape not in _SHAPE_OF:
        raise ValueError(f"{shape!r} in {clause!r} is none of the shapes: {', '.join(_SHAPE_OF)}")
    if phrase not in _MOTION_OF:
        examples = ", ".join(repr(next(verb_phrases(motion, FINITE))) for motion in MOTIONS)
        raise ValueError(f"{phrase!r} in {clause!r} is none of the motions: try {examples}")
    return colour, _SHAPE_OF[shape], _MOTION_OF[phrase]


def prompts(count: int, seed: int) -> list[tuple[str, bool]]:
    """Captions to judge a model by, and whether their combinations were held out of training: every fifth's are."""
    rng = random.Random(f"prompts {seed}")
    held_out = [i % 5 == 0 for i in range(count)]
    return [(caption(sample_scene(rng, held_out=held), rng), held) for held in held_out]
