"""The toy city: scenes of a street, each rendered in three looks by numpy ray casting.

A camera moves along a street between box buildings; one to three people walk in front of it.

- *coarse*: flat grey boxes and orange capsules, as a user would block a scene out in a 3D tool;
- *CG*: a fine rendering with clean colours and flat light;
- *real*: stands for real video: material texture, sun and shadow, weather, haze, vignette, grain.

World axes in metres: x to the right, y up, z along the street; the ground is y = 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LOOKS = ("coarse", "cg", "real")
SKY, GROUND, BUILDING, PERSON = range(4)

# name: (base colour, darker second colour of its pattern)
MATERIALS = {
    "brick": ((0.60, 0.27, 0.20), (0.46, 0.20, 0.15)),
    "stone": ((0.56, 0.55, 0.52), (0.45, 0.44, 0.42)),
    "yellow": ((0.74, 0.60, 0.34), (0.66, 0.52, 0.28)),
    "blue": ((0.32, 0.43, 0.58), (0.27, 0.37, 0.51)),
}
# name: (sky at the zenith, sky at the horizon, tint of the light, ambient light, direct light, visibility in metres)
SKIES = {
    "sunny": ((0.30, 0.54, 0.90), (0.74, 0.85, 0.95), (1.00, 0.96, 0.86), 0.46, 0.72, 120.0),
    "rainy": ((0.50, 0.54, 0.58), (0.66, 0.69, 0.72), (0.84, 0.89, 0.95), 0.76, 0.00, 40.0),
    "foggy": ((0.74, 0.76, 0.78), (0.80, 0.81, 0.82), (0.95, 0.96, 1.00), 0.80, 0.00, 14.0),
    "snowy": ((0.66, 0.70, 0.76), (0.82, 0.85, 0.90), (0.92, 0.96, 1.00), 0.80, 0.05, 50.0),
    "dusk": ((0.36, 0.28, 0.50), (0.96, 0.60, 0.36), (1.00, 0.72, 0.54), 0.52, 0.45, 70.0),
    "night": ((0.03, 0.04, 0.12), (0.12, 0.13, 0.26), (0.64, 0.68, 0.95), 0.62, 0.00, 60.0),
}
COATS = (
    (0.90, 0.12, 0.12),
    (0.98, 0.82, 0.08),
    (0.10, 0.75, 0.30),
    (0.10, 0.45, 0.95),
    (0.85, 0.15, 0.75),
    (0.05, 0.85, 0.85),
)
COUNTS = {1: "one person", 2: "two people", 3: "three people"}


@dataclass
class Person:
    """A walker: position (m), velocity (m/s), height (m), phase of the stride (rad), colours (RGB in [0, 1])."""

    x: float
    z: float
    vx: float
    vz: float
    height: float
    phase: float
    coat: np.ndarray
    legs: np.ndarray


@dataclass
class Scene:
    """Content of one scene, which its three looks share."""

    boxes: np.ndarray  # (n, 2, 3): lower and upper corner of each building
    shades: np.ndarray  # (n,): brightness of each building
    people: list[Person]
    material: str
    sky: str
    camera: np.ndarray  # (3,): position at time 0
    velocity: np.ndarray  # (3,)
    yaw: float
    yaw_rate: float
    sun_side: float  # -1 or 1: the side of the street that the light comes from
    noise_seed: int


def make_scene(seed: int) -> Scene:
    """Draw a random scene; the same seed gives the same scene on any machine."""
    rng = np.random.default_rng(seed)
    boxes, shades = [], []
    for side in (-1, 1):
        z = rng.uniform(-3, 3)
        while z < 32:
            depth, front = rng.uniform(6, 12), rng.uniform(4.0, 6.5)
            x_low, x_high = (front, front + 12) if side > 0 else (-front - 12, -front)
            boxes.append(((x_low, 0, z), (x_high, rng.uniform(4, 12), z + depth)))
            shades.append(rng.uniform(0.8, 1.15))
            z += depth + rng.choice([0.4, 3.0, 6.0])
    people = []
    for _ in range(rng.integers(1, 4)):
        z = rng.uniform(3.0, 5.6)
        if rng.random() < 0.6:  # crosses the view
            vx, vz = rng.choice([-1, 1]) * rng.uniform(0.5, 1.4), rng.uniform(-0.3, 0.3)
        else:  # walks along the street
            vx, vz = 0.0, rng.choice([-1, 1]) * rng.uniform(0.4, 1.0)
        people.append(
            Person(
                x=rng.uniform(-0.5, 0.5) * z,
                z=z,
                vx=vx,
                vz=vz,
                height=rng.uniform(1.6, 1.95),
                phase=rng.uniform(0, 2 * np.pi),
                coat=np.array(COATS[rng.integers(len(COATS))]) * rng.uniform(0.85, 1.0),
                legs=rng.uniform(0.05, 0.30, 3),
            )
        )
    return Scene(
        boxes=np.array(boxes),
        shades=np.array(shades),
        people=people,
        material=rng.choice(list(MATERIALS)).item(),
        sky=rng.choice(list(SKIES)).item(),
        camera=np.array([rng.uniform(-1.0, 1.0), rng.uniform(1.4, 2.0), 0.0]),
        velocity=np.array([rng.uniform(-0.3, 0.3), 0.0, rng.uniform(0, 0.8)]),
        yaw=rng.uniform(-0.15, 0.15),
        yaw_rate=rng.uniform(-0.06, 0.06),
        sun_side=rng.choice([-1.0, 1.0]).item(),
        noise_seed=int(rng.integers(1 << 30)),
    )


def caption(scene: Scene, look: str = "real") -> str:
    """Describe a rendering as a captioner would, such as "a rainy street, brick buildings, three people"."""
    street = {"dusk": "a street at dusk", "night": "a street at night"}.get(scene.sky, f"a {scene.sky} street")
    things = f"{scene.material} buildings, {COUNTS[len(scene.people)]}"
    if look == "real":
        return f"{street}, {things}"
    return f"{'cg render' if look == 'cg' else 'coarse render'} of a street, {things}"


@dataclass
class _Geometry:
    """The surface that each pixel shows. All arrays are (F, H, W) float32 or small integers."""

    ray: tuple  # x, y, z of the ray direction
    position: tuple  # x, y, z of the surface that is hit
    depth: np.ndarray  # along the ray, with people; 1e4 in the sky
    kind: np.ndarray  # SKY, GROUND, BUILDING, without people
    box: np.ndarray  # index of the building, -1 elsewhere
    face: np.ndarray  # axis of the building's face: 0, 1 or 2
    person: np.ndarray  # index of the walker, -1 elsewhere
    part: np.ndarray  # 0 head, 1 coat, 2 legs
    across: np.ndarray  # distance from the middle of the walker's body, in body heights
    capsule: np.ndarray  # index of the walker whose coarse capsule is hit, -1 elsewhere


def _segment_distance(u, v, a, b):
    du, dv = b[0] - a[0], b[1] - a[1]
    t = np.clip(((u - a[0]) * du + (v - a[1]) * dv) / (du * du + dv * dv + 1e-9), 0, 1)
    return np.hypot(u - a[0] - t * du, v - a[1] - t * dv)


def _enter_and_leave(origin, inverse_direction, box):
    """Slab test of rays against one box.

    Returns:
        distance to the entry, distance to the exit, axis of the face that is entered.
    """
    enter, leave, axis = np.float32(-1e9), np.float32(1e9), 0
    for k in range(3):
        near, far = (box[0, k] - origin[k]) * inverse_direction[k], (box[1, k] - origin[k]) * inverse_direction[k]
        near, far = np.minimum(near, far), np.maximum(near, far)
        axis = np.where(near > enter, np.int8(k), np.int8(axis) if k == 0 else axis)
        enter, leave = np.maximum(enter, near), np.minimum(leave, far)
    return enter, leave, axis


def _trace(scene: Scene, times: np.ndarray, height: int, width: int, offset: float) -> _Geometry:
    """Cast one ray through each pixel of each frame, `offset` pixels to the right of its centre and below it."""
    shape = (len(times), height, width)
    t = times[:, None, None]
    focal = width / 2 / np.tan(np.radians(36))
    across = ((np.arange(width) + 0.5 + offset - width / 2) / focal)[None, None]
    up = (-(np.arange(height) + 0.5 + offset - height * 0.48) / focal)[None, :, None]
    yaw = scene.yaw + scene.yaw_rate * t
    directions = (across * np.cos(yaw) + np.sin(yaw), up, np.cos(yaw) - across * np.sin(yaw))
    ray = tuple(np.ascontiguousarray(np.broadcast_to(d, shape), np.float32) for d in directions)
    origin = tuple((scene.camera[k] + scene.velocity[k] * t).astype(np.float32) for k in range(3))

    depth, kind = np.full(shape, 1e4, np.float32), np.full(shape, SKY, np.int8)
    ground = -origin[1] / np.minimum(ray[1], -1e-4)
    hit = (ray[1] < -1e-3) & (ground < 80)
    depth[hit], kind[hit] = ground[hit], GROUND
    box_index, face = np.full(shape, -1, np.int16), np.zeros(shape, np.int8)
    inverse = tuple(1 / np.where(np.abs(d) < 1e-5, np.float32(1e-5), d) for d in ray)
    for i, box in enumerate(scene.boxes.astype(np.float32)):
        enter, leave, axis = _enter_and_leave(origin, inverse, box)
        hit = (enter < leave) & (enter > 0.05) & (enter < depth)
        depth[hit], kind[hit], box_index[hit], face[hit] = enter[hit], BUILDING, i, axis[hit]
    position = tuple(origin[k] + ray[k] * depth for k in range(3))

    # Each walker is a cut-out in the plane of its z; u, v are body coordinates in units of its height.
    person, part, body_u = np.full(shape, -1, np.int8), np.zeros(shape, np.int8), np.zeros(shape, np.float32)
    capsule, person_depth, capsule_depth = np.full(shape, -1, np.int8), depth.copy(), depth.copy()
    for i, p in enumerate(scene.people):
        distance = ((p.z + p.vz * t - origin[2]) / ray[2]).astype(np.float32)
        u = (origin[0] + ray[0] * distance - (p.x + p.vx * t)) / p.height
        v = (origin[1] + ray[1] * distance) / p.height
        stride = (0.15 if abs(p.vx) > 0.3 else 0.07) * np.sin(p.phase + 7 * t)
        head = np.hypot(u, v - 0.90) < 0.10
        coat = _segment_distance(u, v, (0, 0.46), (0, 0.70)) < 0.155
        legs = np.minimum(
            _segment_distance(u, v, (0, 0.44), (stride, 0.05)), _segment_distance(u, v, (0, 0.44), (-stride, 0.05))
        )
        hit = (head | coat | (legs < 0.075)) & (distance > 0.3) & (distance < person_depth)
        person_depth[hit], person[hit], body_u[hit] = distance[hit], i, u[hit]
        part[hit] = np.where(head, 0, np.where(coat, 1, 2))[hit]
        hit = _segment_distance(u, v, (0, 0.16), (0, 0.83)) < 0.165
        hit &= (distance > 0.3) & (distance < capsule_depth)
        capsule_depth[hit], capsule[hit] = distance[hit], i
    return _Geometry(ray, position, person_depth, kind, box_index, face, person, part, body_u, capsule)


def _paint(mask, colours, onto):
    onto[mask] = np.broadcast_to(colours, onto.shape)[mask]


def _street_parts(scene, g):
    """Return masks of the carriageway, its centre dashes and the windows, and the metres from the facade's corner.

    All are (F, H, W). The windows start at the corner of their facade, and none is cut by its end.
    """
    x, y, z = g.position
    low, high = (scene.boxes[np.maximum(g.box, 0), k].astype(np.float32) for k in (0, 1))
    along, length = (
        np.where(g.face == 0, a[..., 2] - b[..., 2], a[..., 0] - b[..., 0])
        for a, b in ((np.stack(g.position, -1), low), (high, low))
    )
    column, row = np.floor(along / 3.4) * 3.4, np.floor(y / 3.6) * 3.6
    windows = (along > column + 0.9) & (along < column + 2.6) & (column + 2.6 < length - 0.3)
    windows &= (y > row + 1.3) & (y < row + 3.0) & (row + 3.0 < high[..., 1] - 0.3) & (g.face != 1)
    return np.abs(x) < 3.2, (np.abs(x) < 0.14) & (np.mod(z, 3) < 1.5), windows, along


def _shade_coarse(scene, g):
    carriageway, _, _, _ = _street_parts(scene, g)
    image = np.empty((*g.kind.shape, 3), np.float32)
    image[:] = (0.70, 0.75, 0.80)
    _paint(g.kind == GROUND, np.where(carriageway[..., None], 0.33, 0.45), image)
    light = np.array([0.75, 1.1, 1.0], np.float32)[g.face] * scene.shades[np.maximum(g.box, 0)]
    _paint(g.kind == BUILDING, 0.60 * light[..., None], image)
    image[g.capsule >= 0] = (0.92, 0.48, 0.14)
    return image


def _clothes(scene, g):
    coats, legs = (np.array([getattr(p, name) for p in scene.people], np.float32) for name in ("coat", "legs"))
    i, part = np.maximum(g.person, 0), g.part[..., None]
    return np.where(part == 0, np.float32([0.85, 0.66, 0.53]), np.where(part == 1, coats[i], legs[i]))


def _shade_cg(scene, g):
    carriageway, dashes, windows, _ = _street_parts(scene, g)
    up = np.clip(g.ray[1] / 0.5, 0, 1)[..., None]
    image = np.float32([0.45, 0.70, 1.0]) * up + np.float32([0.72, 0.86, 1.0]) * (1 - up)
    ground = np.where(carriageway[..., None], np.float32([0.40, 0.40, 0.44]), np.float32([0.64, 0.62, 0.60]))
    _paint(g.kind == GROUND, np.where(dashes[..., None], np.float32(0.95), ground), image)
    light = np.array([0.8, 1.1, 1.0], np.float32)[g.face] * scene.shades[np.maximum(g.box, 0)]
    wall = np.clip(np.float32(MATERIALS[scene.material][0]) * 1.3, 0, 1) * light[..., None]
    _paint(g.kind == BUILDING, np.where(windows[..., None], np.float32([0.55, 0.76, 0.86]), wall), image)
    _paint(g.person >= 0, np.clip(_clothes(scene, g) * 1.1, 0, 1), image)
    return image


def _lattice_noise(a, b):
    h = np.sin(np.floor(a) * 127.1 + np.floor(b) * 311.7) * 43758.547
    return h - np.floor(h)


def _shadows(scene, g, times, sun):
    """Return the blocked share of the direct light on the ground, (F, H, W) in [0, 1]."""
    x, _, z = g.position
    shadow = np.zeros(x.shape, np.float32)
    if SKIES[scene.sky][4] > 0.2:
        ground = g.kind == GROUND
        points = tuple(p[ground] for p in g.position)
        for box in scene.boxes.astype(np.float32):
            enter, leave, _ = _enter_and_leave(points, 1 / sun, box)
            shadow[ground] = np.maximum(shadow[ground], (leave > np.maximum(enter, 0.05)).astype(np.float32))
    length = 0.9 if SKIES[scene.sky][4] > 0.2 else 0.2
    for p in scene.people:
        feet_x, feet_z = (p.x + p.vx * times)[:, None, None], (p.z + p.vz * times)[:, None, None]
        d = _segment_distance(x, z, (feet_x, feet_z), (feet_x - scene.sun_side * length, feet_z + 0.2))
        shadow = np.maximum(shadow, 0.8 * np.clip(1.4 - d / 0.28, 0, 1))
    return shadow


def _shade_real(scene, g, times):
    zenith, horizon, tint, ambient, direct, visibility = SKIES[scene.sky]
    tint, horizon = np.float32(tint), np.float32(horizon)
    x, y, z = g.position
    carriageway, dashes, windows, along = _street_parts(scene, g)
    sun = np.float32([scene.sun_side * 0.8, 1.3, -0.5])
    sun /= np.linalg.norm(sun)
    up = np.clip(g.ray[1] / 0.5, 0, 1)[..., None]
    image = np.float32(zenith) * up + horizon * (1 - up)

    blocked = _shadows(scene, g, times, sun)
    light = ambient * (1 - 0.45 * blocked) + direct * sun[1] * (1 - blocked)
    ground = np.where(carriageway[..., None], np.float32([0.31, 0.31, 0.32]), np.float32([0.50, 0.47, 0.43]))
    ground = np.where(dashes[..., None], np.float32([0.74, 0.72, 0.66]), ground)
    if scene.sky == "snowy":
        ground = np.where(carriageway[..., None], ground * 0.5 + 0.42, np.float32([0.93, 0.94, 0.97]))
    ground = ground * (0.94 + 0.12 * _lattice_noise(x * 1.5, z * 1.5)[..., None]) * light[..., None] * tint
    if scene.sky == "rainy":  # a wet street mirrors the sky, more so at a grazing angle
        mirror = np.clip(0.55 - 2.2 * np.abs(g.ray[1]), 0, 0.5)[..., None]
        ground = ground * (1 - mirror) + horizon * mirror
    _paint(g.kind == GROUND, ground, image)

    base, darker = (np.float32(c) for c in MATERIALS[scene.material])
    courses = _lattice_noise(along * 0.9, y * 1.6)[..., None]
    wall = (base * courses + darker * (1 - courses)) * scene.shades[np.maximum(g.box, 0)][..., None]
    facing = np.float32([max(0.0, sun[0]), sun[1], 0.35])[g.face]  # the left row faces +x
    facing = np.where((g.face == 0) & (x > 0), max(0.0, -sun[0]), facing)
    wall = wall * (ambient + direct * facing)[..., None] * tint
    if scene.sky == "snowy":
        wall = np.where((g.face == 1)[..., None], np.float32(0.9), wall)
    lit = (_lattice_noise(along / 3.4, y / 3.6) > 0.45) & (scene.sky in ("dusk", "night"))
    pane = np.where(lit[..., None], np.float32([0.98, 0.78, 0.36]), base * 0.45 * (ambient + 0.2) * tint)
    _paint(g.kind == BUILDING, np.where(windows[..., None], pane, wall), image)

    side = np.clip(0.55 + 2.0 * scene.sun_side * g.across, 0, 1)
    body = _clothes(scene, g) * (0.22 + ambient + direct * side)[..., None] * tint
    _paint(g.person >= 0, np.clip(body, 0, 1), image)

    haze = (1 - np.exp(-np.minimum(g.depth, 200) / visibility))[..., None] * (g.depth < 1e3)[..., None]
    return image * (1 - haze) + horizon * haze


def _filter_pixels(image):
    """Mix each pixel with its neighbours, 1/4, 1/2, 1/4 in both directions, as renderers and lenses do."""
    for axis in (1, 2):
        edge = [(0, 0)] * 4
        edge[axis] = (1, 1)
        padded = np.pad(image, edge, mode="edge")
        n = image.shape[axis]
        image = 0.25 * padded.take(range(n), axis) + 0.5 * image + 0.25 * padded.take(range(2, n + 2), axis)
    return image


def _camera(image, rng):
    """Add the marks of a lens and a sensor: a vignette and grain."""
    _, height, width, _ = image.shape
    radius = np.linspace(-1, 1, width)[None, :] ** 2 + np.linspace(-1, 1, height)[:, None] ** 2
    return image * (1 - 0.11 * radius)[None, ..., None] + rng.normal(0, 0.012, image.shape)


def _times(num_frames, fps):
    return np.arange(num_frames, dtype=np.float32) / np.float32(fps)


def trace(scene: Scene, num_frames: int, fps: float, height: int, width: int) -> list[_Geometry]:
    """Cast the rays of `render`, for the arguments see there."""
    times = _times(num_frames, fps)
    # Against jagged edges, two rays for each pixel, on one diagonal, and a filter: an edge along a row or a column has
    # a step between its colours by the rays, one along that diagonal by the filter alone.
    return [_trace(scene, times, height, width, offset) for offset in (-0.25, 0.25)]


def render(
    scene: Scene,
    looks: Sequence[str] = LOOKS,
    num_frames: int = 9,
    fps: float = 8.0,
    height: int = 96,
    width: int = 160,
    rays: list[_Geometry] | None = None,
) -> dict[str, np.ndarray]:
    """Render a scene.

    Args:
        scene: the content.
        looks: those of `LOOKS` to render.
        num_frames, fps: frame k is taken at k / fps seconds.
        height, width: in pixels.
        rays: `trace` of a scene of the same layout, whose weather and material may be others; None: traced here.

    Returns:
        each look as (F, H, W, 3) uint8 RGB, and `kinds`, (F, H, W) uint8: SKY, GROUND, BUILDING or PERSON for each
        pixel of the CG and the real look, the highest of these numbers where the pixel shows two kinds.
    """
    times = _times(num_frames, fps)
    shaders = {
        "coarse": lambda g: _shade_coarse(scene, g),
        "cg": lambda g: _shade_cg(scene, g),
        "real": lambda g: _shade_real(scene, g, times),
    }
    rays = rays or trace(scene, num_frames, fps, height, width)
    images = {look: sum(np.clip(shaders[look](g), 0, 1) for g in rays) / len(rays) for look in looks}
    images = {look: _filter_pixels(image) for look, image in images.items()}
    if "real" in images:
        images["real"] = np.clip(_camera(images["real"], np.random.default_rng(scene.noise_seed)), 0, 1)
    clips = {look: (image * 255 + 0.5).astype(np.uint8) for look, image in images.items()}
    kinds = np.maximum(*(np.where(g.person >= 0, PERSON, g.kind) for g in rays))
    return clips | {"kinds": kinds.astype(np.uint8)}
