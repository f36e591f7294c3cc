"""The synthetic world: a seed gives a scene of one or two moving shapes, and its caption."""

import zlib
from dataclasses import replace

import numpy as np
from numpy.random import Generator

from .captions import Caption, Stated, write
from .motion import DIRECTIONS, RATES, REACH, WALL, Motion, extent, heading
from .palette import GROUNDS, OBJECT_COLOURS
from .scene import Body, Ground, Scene, check_size
from .shapes import SHAPES

SPLITS = ("train", "test", "composition")
# Pairs that occur in no clip of train and test, and in every clip of composition.
HELD_OUT_LOOKS = frozenset(
    {
        ("star", "purple"),
        ("circle", "cyan"),
        ("square", "yellow"),
        ("ring", "green"),
        ("triangle", "white"),
    }
)
HELD_OUT_ACTS = frozenset(
    {("yellow", "spin"), ("blue", "orbit"), ("green", "pulse"), ("white", "swing")}
)

# Lengths in frame sides.
SIZES: dict[str, tuple[float, float]] = {"small": (0.095, 0.108), "large": (0.145, 0.160)}  # radii
TILT = 0.1  # largest initial angle of a spin, radians
PULSE_SIZE = (0.120, 0.140)  # a pulse covers both sizes, so no caption states its size
TURN_GAP = 7 / 64  # smallest gap of swings and orbits to the edges, so that they are no bounce
OBJECT_GAP = 3 / 64  # between the extents of two objects of which none passes the other
RUN = 10 / 64  # shortest path of a bounce before its first turn, which shows its direction
PASS_GAP = 4 / 64  # between an object and one that passes it, at the ends of the path
TRIES = 80
# Uneven, because motions that need more room are rejected more often beside another object.
SHARES = {"bounce": 0.13, "orbit": 0.26, "swing": 0.18, "pulse": 0.17, "spin": 0.26}
TWO, PASSING, LARGE = 0.62, 0.22, 0.7  # shares of two objects, of passing pairs, of large objects


def held_out(objects: tuple[Stated, ...]) -> bool:
    """Return whether any of the objects has a pair that is held out of training."""
    return any(
        (one.shape, one.colour) in HELD_OUT_LOOKS or (one.colour, one.motion) in HELD_OUT_ACTS
        for one in objects
    )


def _choose(rng: Generator, options) -> str:
    options = tuple(options)
    return options[int(rng.integers(len(options)))]


def _moving(rng: Generator, shape: str) -> str:
    """Draw a motion that is visible on this shape."""
    while True:
        kind = str(rng.choice(list(SHARES), p=list(SHARES.values())))
        if kind != "spin" or SHAPES[shape].symmetry:
            return kind


def _complete(stated: Stated, rng: Generator, alone: bool) -> Stated:
    """Draw the object's missing attributes; only a lone object may bounce diagonally."""
    directions = [name for name in DIRECTIONS[stated.motion] if alone or " " not in name]
    size = None if stated.motion == "pulse" else "large" if rng.random() < LARGE else "small"
    direction, speed = stated.direction, stated.speed
    if not direction and directions:
        direction = _choose(rng, directions)
    if not speed and stated.motion in RATES:
        speed = _choose(rng, RATES[stated.motion])
    return replace(stated, size=stated.size or size, direction=direction, speed=speed)


def _draw_objects(rng: Generator) -> tuple[tuple[Stated, ...], str | None]:
    """Draw one or two objects; also returns behind or front if the first passes the second."""
    count = 1 + int(rng.random() < TWO)
    shapes = [_choose(rng, SHAPES) for _ in range(count)]
    colours = [str(name) for name in rng.choice(list(OBJECT_COLOURS), count, replace=False)]
    motions = [_moving(rng, shape) for shape in shapes]
    passing = None
    if count == 2 and rng.random() < PASSING:
        motions, passing = ["bounce", "still"], _choose(rng, ("behind", "front"))
    elif count == 2 and rng.random() < 0.5:
        motions[int(rng.integers(2))] = "still"
    objects = [Stated(*parts) for parts in zip(shapes, colours, motions, strict=True)]
    if passing:
        objects[0] = replace(objects[0], size="small")
    return tuple(objects), passing


def _body(stated: Stated, rng: Generator) -> Body | None:
    """Place an object at random in the frame; None if it does not fit."""
    low, high = SIZES[stated.size] if stated.size else PULSE_SIZE
    radius = float(rng.uniform(low, high))
    reach = radius * SHAPES[stated.shape].reach
    rate = float(rng.uniform(*RATES[stated.motion][stated.speed])) if stated.speed else 0.0
    low, high = REACH.get(stated.motion, (0.0, 0.0))
    turns = stated.motion in ("orbit", "swing")
    amplitude = float(rng.uniform(low, min(high, 0.5 - TURN_GAP - reach) if turns else high))
    phase = float(rng.uniform(0, 2 * np.pi)) if stated.motion in REACH else 0.0
    if stated.motion == "bounce" and " " in (stated.direction or ""):
        phase = float(rng.uniform(-0.12, 0.12))
    motion = Motion(stated.motion, stated.direction, stated.speed, rate, amplitude, phase)
    centre, ahead = [], heading(stated.direction) if stated.motion == "bounce" else (0, 0)
    # a bounce may start anywhere
    limited = replace(motion, kind="still") if stated.motion == "bounce" else motion
    for (side_low, side_high), way in zip(extent(limited, (0, 0), reach), ahead, strict=True):
        gap = TURN_GAP if turns and side_high > reach else WALL
        if side_high - side_low > 1 - 2 * gap:
            return None
        low, high = gap - side_low, 1 - gap - side_high
        run = min(RUN, (high - low) / 2)
        centre.append(float(rng.uniform(low + run * (way < 0), high - run * (way > 0))))
    angle = float(rng.uniform(-TILT, TILT)) if stated.motion == "spin" else 0.0
    return Body(stated, radius, (centre[0], centre[1]), angle, motion)


def _passing(objects: tuple[Stated, ...], passing: str, rng: Generator) -> tuple[Body, Body] | None:
    """Let the first object cross the second, a still one, and clear it on both sides."""
    mover, other = (_body(stated, rng) for stated in objects)
    if mover is None or other is None:
        return None
    along = int(objects[0].direction in ("up", "down"))
    forward = objects[0].direction in ("right", "down")
    clear = WALL + 2 * mover.reach + other.reach + PASS_GAP
    reach = max(mover.reach, other.reach)
    low, high = reach + WALL + 2 / 64, 1 - reach - WALL - 2 / 64
    if clear > 0.5:
        return None
    centre, start = [0.0, 0.0], [0.0, 0.0]
    centre[along] = float(rng.uniform(clear, 1 - clear))
    centre[1 - along] = float(rng.uniform(low, high))
    room = centre[along] if forward else 1 - centre[along]
    place = float(rng.uniform(mover.reach + WALL, room - other.reach - mover.reach - PASS_GAP))
    start[along] = place if forward else 1 - place
    start[1 - along] = centre[1 - along] + float(rng.uniform(-2, 2)) / 64
    depth = int(passing == "behind")
    return (
        replace(mover, centre=(start[0], start[1]), depth=depth),
        replace(other, centre=(centre[0], centre[1]), depth=1 - depth),
    )


def relation_of(first: Body, second: Body) -> tuple[str | None, float]:
    """Return the first body's relation to the second at all times, and their extents' gap."""
    (left, right), (top, bottom) = first.extent
    (other_left, other_right), (other_top, other_bottom) = second.extent
    gaps = {"left": other_left - right, "right": left - other_right, "above": other_top - bottom}
    gaps["below"] = top - other_bottom
    name = max(gaps, key=gaps.__getitem__)
    return name, gaps[name]


def _place(
    objects: tuple[Stated, ...], relation: str | None, rng: Generator
) -> tuple[Body, ...] | None:
    """Place objects so that the relation holds and only passing objects touch; None if unlucky."""
    if relation in ("behind", "front"):
        return _passing(objects, relation, rng)
    bodies = [_body(stated, rng) for stated in objects]
    if None in bodies:
        return None
    if len(bodies) == 2:
        actual, gap = relation_of(*bodies)
        if gap < OBJECT_GAP or relation not in (None, actual):
            return None
    return tuple(bodies)


def _leave_out(objects: tuple[Stated, ...], rng: Generator) -> tuple[Stated, ...]:
    """Drop some attributes for the caption, but never shape, colour or motion."""
    return tuple(
        replace(
            stated,
            size=stated.size if rng.random() < 0.7 else None,
            direction=stated.direction if rng.random() < 0.85 else None,
            speed=stated.speed if rng.random() < 0.75 else None,
        )
        for stated in objects
    )


def _draw_ground(rng: Generator, name: str | None = None) -> Ground:
    name = name or _choose(rng, GROUNDS)
    return Ground(name, float(rng.uniform(0.4, 0.6)))


def _stream(seed: int, *labels: str) -> Generator:
    return np.random.default_rng([zlib.crc32("/".join(labels).encode()), seed])


def sample_scene(seed: int, split: str = "train", size: int = 64) -> Scene:
    """Return the scene of a seed, the same on every machine.

    train and test are disjoint streams of one distribution; every scene of composition has a pair
    of attributes that the others never have. ValueError for an unknown split, a negative seed, or
    a bad size.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not known: use one of {', '.join(SPLITS)}")
    if seed < 0:
        raise ValueError(f"seed {seed} is negative: give 0 or more")
    check_size(size)
    rng = _stream(seed, split)
    while True:
        objects, passing = _draw_objects(rng)
        if held_out(objects) != (split == "composition"):
            continue
        for _ in range(TRIES):
            full = tuple(_complete(stated, rng, alone=len(objects) == 1) for stated in objects)
            bodies = _place(full, passing, rng)
            if bodies:
                ground = _draw_ground(rng)
                caption = _caption(bodies, passing, ground, rng)
                return Scene(seed, split, size, bodies, ground, caption)


def _caption(
    bodies: tuple[Body, ...], passing: str | None, ground: Ground, rng: Generator
) -> Caption:
    relation = passing
    if not passing and len(bodies) == 2 and rng.random() < 0.85:
        relation = relation_of(*bodies)[0]
    stated = _leave_out(tuple(body.stated for body in bodies), rng)
    return write(stated, relation, ground.name if rng.random() < 0.75 else None, rng)


def realise(caption: Caption, seed: int, size: int = 64) -> Scene:
    """Return a scene that fits a caption; what the caption leaves open is drawn from the seed.

    ValueError if no such scene is found.
    """
    check_size(size)
    rng = _stream(seed, "caption", repr(caption))
    for _ in range(200 * TRIES):
        full = tuple(
            _complete(stated, rng, alone=len(caption.objects) == 1) for stated in caption.objects
        )
        bodies = _place(full, caption.relation, rng)
        if bodies:
            return Scene(seed, "caption", size, bodies, _draw_ground(rng, caption.ground), caption)
    raise ValueError(
        f"no scene found for {caption.text!r}: its objects do not fit beside each other"
    )
