"""Captions that are wrong about a clip in one attribute, and clips that differ in one."""

from dataclasses import replace

import numpy as np
from numpy.random import Generator

from ..captions import Caption, Stated, write
from ..motion import DIRECTIONS, RATES, REACH, Motion
from ..palette import GROUNDS, OBJECT_COLOURS
from ..scene import Body, Ground, Scene
from ..shapes import SHAPES
from ..world import SIZES

OPPOSITE = {"left": "right", "above": "below", "behind": "front"}
OPPOSITE |= {value: key for key, value in OPPOSITE.items()}
MIDDLE = (0.35, 0.65)  # range of a new swing's or orbit's centre, in frame sides
Change = tuple[int, str, str]  # object (-1: the caption), attribute, new value


def changes(caption: Caption) -> list[Change]:
    """List every change of one stated attribute; each makes a true caption false."""
    possible = [(-1, "ground", other) for other in GROUNDS if caption.ground not in (None, other)]
    passing = caption.relation in ("behind", "front")
    if caption.relation:
        possible.append((-1, "relation", OPPOSITE[caption.relation]))
    for place, one in enumerate(caption.objects):
        rest = [other.colour for other in caption.objects if other is not one]
        possible += [
            (place, "colour", name)
            for name in OBJECT_COLOURS
            if name != one.colour and name not in rest
        ]
        possible += [
            (place, "shape", name)
            for name, shape in SHAPES.items()
            if name != one.shape and (one.motion != "spin" or shape.symmetry)
        ]
        if not passing:
            possible += [
                (place, "motion", name)
                for name in DIRECTIONS
                if name != one.motion and (name != "spin" or SHAPES[one.shape].symmetry)
            ]
        if one.size:
            possible.append((place, "size", "small" if one.size == "large" else "large"))
        if one.speed:
            possible.append((place, "speed", "slow" if one.speed == "fast" else "fast"))
        if one.direction:
            ways = [
                name
                for name in DIRECTIONS[one.motion]
                if name != one.direction and (not passing or " " not in name)
            ]
            possible += [(place, "direction", name) for name in ways]
    return possible


def draw_change(
    caption: Caption, rng: Generator, attributes: frozenset[str] | None = None
) -> Change | None:
    """Draw a change, uniformly over the attributes; None if none of `attributes` can change."""
    possible = [
        change for change in changes(caption) if attributes is None or change[1] in attributes
    ]
    if not possible:
        return None
    names = sorted({(place, name) for place, name, _ in possible})
    chosen = names[int(rng.integers(len(names)))]
    same = [change for change in possible if change[:2] == chosen]
    return same[int(rng.integers(len(same)))]


def changed(caption: Caption, change: Change, rng: Generator) -> Caption:
    """Return the caption with the change, in new words."""
    place, name, value = change
    objects, relation, ground = caption.objects, caption.relation, caption.ground
    if place >= 0:
        objects = tuple(
            _restated(one, name, value) if i == place else one for i, one in enumerate(objects)
        )
    elif name == "relation":
        relation = value
    else:
        ground = value
    return write(objects, relation, ground, rng)


def _restated(stated: Stated, name: str, value: str) -> Stated:
    one = replace(stated, **{name: value})
    if name != "motion":
        return one
    return replace(
        one,
        direction=None,
        speed=one.speed if value in RATES else None,
        size=None if value == "pulse" else one.size,
    )


def twin(scene: Scene, change: Change, caption: Caption, rng: Generator) -> Scene:
    """Return the scene with the change, which must not be of a relation, and its caption."""
    place, name, value = change
    if name == "ground":
        return replace(scene, ground=Ground(value, scene.ground.split), caption=caption)
    bodies = tuple(
        _rebuilt(body, name, value, rng) if i == place else body
        for i, body in enumerate(scene.bodies)
    )
    return replace(scene, bodies=bodies, caption=caption)


def _rebuilt(body: Body, name: str, value: str, rng: Generator) -> Body:
    """Return the object with another attribute, in place unless its new motion needs room."""
    stated = replace(body.stated, **{name: value})
    if name in ("shape", "colour"):
        return replace(body, stated=stated)
    if name == "size":
        return replace(body, stated=stated, radius=float(rng.uniform(*SIZES[value])))
    if name == "direction":
        return replace(body, stated=stated, motion=replace(body.motion, direction=value))
    if name == "speed":
        rate = float(rng.uniform(*RATES[stated.motion][value]))
        return replace(body, stated=stated, motion=replace(body.motion, speed=value, rate=rate))
    ways, rates = DIRECTIONS[value], RATES.get(value)
    direction = ways[int(rng.integers(len(ways)))] if ways else None
    speed = (body.stated.speed or ("slow", "fast")[int(rng.integers(2))]) if rates else None
    rate = float(rng.uniform(*rates[speed])) if rates else 0.0
    reach = float(rng.uniform(*REACH[value])) if value in REACH else 0.0
    phase = float(rng.uniform(0, 2 * np.pi)) if value in REACH else 0.0
    centre = body.centre
    if value in ("orbit", "swing"):
        centre = tuple(float(np.clip(c, *MIDDLE)) for c in centre)
    stated = replace(stated, direction=direction, speed=speed)
    motion = Motion(value, direction, speed, rate, reach, phase)
    return replace(body, stated=stated, motion=motion, centre=centre)
