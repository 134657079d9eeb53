"""Procedural animal heads: the analytic ground truth that the toy teacher learns.

A latent z [N, 16] is second-moment normalised, as a teacher's mapping network does, and each of its
components turns one dial of a head (`Heads`): its proportions, ears, eyes, coat and markings. The surface
is the zero set of a distance function, a smooth union of ellipsoids and slab ears; colour and light depend
on the point alone, never on the view, so that a radiance field can represent a head exactly.

World: x right, y up, z out of the face; everything lies within 0.35 of the origin. Rays are sphere-traced,
in any subset: a ray's colour doesn't depend on its neighbours. Colours are in [-1, 1], the background 1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Z_DIM = 16
RADIUS = 0.36

# Coats from light to dark and back, so that a walk along the dial has no jump.
_COATS = [
    (0.98, 0.95, 0.88),
    (0.99, 0.80, 0.48),
    (0.96, 0.58, 0.22),
    (0.72, 0.42, 0.24),
    (0.42, 0.38, 0.40),
    (0.58, 0.63, 0.72),
    (0.86, 0.87, 0.90),
]
_MARKS = [(0.18, 0.15, 0.16), (0.42, 0.24, 0.14), (0.80, 0.40, 0.15), (0.98, 0.95, 0.90)]
_IRISES = [(0.25, 0.14, 0.07), (0.62, 0.38, 0.08), (0.88, 0.70, 0.12), (0.35, 0.62, 0.20), (0.16, 0.55, 0.75)]
_NOSES = [(0.13, 0.10, 0.11), (0.32, 0.18, 0.15), (0.90, 0.50, 0.52)]
# Spots on the skull: direction (azimuth from +z towards +x, elevation; radians) and size.
_SPOTS = [
    (0.00, 1.18, 0.20),
    (0.62, 0.80, 0.25),
    (-0.55, 0.66, 0.20),
    (1.15, 0.30, 0.26),
    (-1.10, 0.42, 0.25),
    (0.98, -0.35, 0.21),
    (-0.98, -0.28, 0.23),
    (1.75, 0.65, 0.26),
    (-1.72, 0.80, 0.23),
    (1.80, -0.20, 0.26),
    (-1.75, -0.10, 0.27),
    (2.50, 0.35, 0.28),
    (-2.45, 0.30, 0.26),
    (3.10, 0.80, 0.28),
]
_LIGHT = (0.38, 0.72, 0.58)


class Heads(NamedTuple):
    """N heads, ready to be traced. Lengths in world units; every tensor starts with N."""

    centres: Tensor  # [N, 4, 3]  skull, cheek, muzzle, chin; the x >= 0 half, mirrored
    radii: Tensor  # [N, 4, 3]
    eye: Tensor  # [N, 4]     centre, radius
    gaze: Tensor  # [N, 3]     unit, where the right eye's pupil sits on the eyeball
    nose: Tensor  # [N, 6]     centre, radii
    ear: Tensor  # [N, 7]     base (3), direction in the x-y plane (2), base radius, tip radius
    ear_length: Tensor  # [N, 1]
    marks: Tensor  # [N, 6]     strength of stripes, spots, eye patch, blaze, socks (muzzle), saddle
    pupil: Tensor  # [N, 1]     share of the eyeball
    colours: Tensor  # [N, 5, 3]  coat, marks, light parts, iris, nose; in [0, 1]


def _normalize(v: Tensor) -> Tensor:
    return v / v.square().sum(-1, keepdim=True).clamp_min(1e-12).sqrt()


def _mirror(p: Tensor) -> Tensor:
    """Points on the side of the right eye, x >= 0."""
    return torch.cat([p[..., :1].abs(), p[..., 1:]], -1)


def _smoothstep(x: Tensor, low: float, high: float) -> Tensor:
    t = ((x - low) / (high - low)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def _palette(t: Tensor, colours: list) -> Tensor:
    """Walk a list of colours: t [N] in [0, 1] -> [N, 3], linear between neighbours."""
    anchors = t.new_tensor(colours)
    x = t.unsqueeze(1) * (len(colours) - 1)
    weights = (1 - (x - torch.arange(len(colours), device=t.device, dtype=t.dtype)).abs()).clamp_min(0)
    return weights @ anchors


def heads(
    z: Tensor,  # [N, 16]
) -> Heads:
    """The heads of latents; a smooth function of the second-moment normalised z, hence of z's direction."""
    z = z * (z.square().mean(1, keepdim=True) + 1e-8).rsqrt()
    # Gently, above all the shapes, the first half: what moves is what a generator finds hardest.
    dial = torch.cat([torch.special.ndtr(0.6 * z[:, :8]), torch.special.ndtr(0.8 * z[:, 8:])], 1)
    (
        wide,
        tall,
        snout,
        snout_w,
        ear_l,
        ear_r,
        ear_at,
        eye_r,
        coat,
        marks,
        light,
        iris,
        stripes,
        spots,
        patch,
        blaze,
    ) = dial.unbind(1)
    zero = torch.zeros_like(wide)

    def mix(t: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * t

    def stack(*parts: Tensor | float) -> Tensor:
        return torch.stack([zero + part for part in parts], 1)

    rx, ry, rz = mix(wide, 0.150, 0.190), mix(tall, 0.135, 0.172), 0.155
    cy = -0.055
    skull = stack(0.0, cy, -0.015), stack(rx, ry, rz)
    cheek = stack(0.45 * rx, cy - 0.38 * ry, 0.045), stack(0.62 * rx, 0.52 * ry, 0.105)
    length, width = mix(snout, 0.03, 0.125), mix(snout_w, 0.042, 0.066)
    front = 0.105
    muzzle_y = cy - 0.40 * ry
    muzzle = (
        stack(0.55 * width, muzzle_y, front + 0.55 * length),
        stack(width, 0.85 * width, 0.035 + 0.45 * length),
    )
    chin = (
        stack(0.0, muzzle_y - 0.75 * width, front + 0.35 * length),
        stack(0.75 * width, 0.5 * width, 0.03 + 0.4 * length),
    )

    nose_r = 0.020 + 0.010 * snout_w
    tip = front + 0.93 * length + 0.026
    nose = stack(0.0, muzzle_y + 0.62 * width, tip, 1.25 * nose_r, 0.85 * nose_r, 0.8 * nose_r)

    r_eye = mix(eye_r, 0.031, 0.050)
    eye_x, eye_y = 0.44 * rx, cy + 0.16 * ry
    # On the skull's surface, sunk by half the eyeball.
    eye_z = rz * (1 - (eye_x / rx).square() - ((eye_y - cy) / ry).square()).sqrt() - 0.015
    eye = stack(eye_x, eye_y, eye_z - 0.42 * r_eye, r_eye)
    gaze = _normalize(stack(0.16, 0.02, 1.0))

    # Ears walk from the top of the skull to its sides, where they droop.
    at = mix(ear_at, 0.42, 1.12)
    lean = mix(_smoothstep(ear_at, 0.1, 1.0), 0.10, 2.35)
    base_r = mix(ear_r, 0.040, 0.062)
    tip_r = mix(_smoothstep(ear_r, 0.15, 0.85), 0.010, 0.050)
    ear_length = mix(ear_l, 0.070, 0.165) * mix(_smoothstep(ear_at, 0.1, 0.6), 1.0, 0.85)
    ear = stack(0.90 * rx * at.sin(), cy + 0.90 * ry * at.cos(), -0.03, lean.sin(), lean.cos(), base_r, tip_r)

    def on(t: Tensor) -> Tensor:
        return _smoothstep(t, 0.40, 0.85)

    fur = _palette(coat, _COATS)
    mark = _palette(marks, _MARKS)
    pale = torch.lerp(fur, fur.new_tensor([0.99, 0.96, 0.92]), on(light).unsqueeze(1) * 0.9)
    return Heads(
        torch.stack([part[0] for part in (skull, cheek, muzzle, chin)], 1),
        torch.stack([part[1] for part in (skull, cheek, muzzle, chin)], 1),
        eye,
        gaze,
        nose,
        ear,
        ear_length.unsqueeze(1),
        stack(on(stripes), on(spots), on(patch), on(blaze), on(light), on(1 - blaze)),
        mix(eye_r, 0.60, 0.50).unsqueeze(1),
        torch.stack([fur, mark, pale, _palette(iris, _IRISES), _palette(snout_w, _NOSES)], 1),
    )


def _ellipsoid(x: Tensor, y: Tensor, z: Tensor, centre: Tensor, radii: Tensor) -> Tensor:
    """Distance [N, R] to ellipsoids [N, 3], first order: k (k - 1) / |grad k|; coordinates are [N, R]."""
    inverse = 1 / radii
    shift = -centre * inverse
    # Plane by plane: [N, R] tensors vectorise over rays, where [N, R, 3] would not.
    qx, qy, qz = (
        torch.addcmul(shift[:, i : i + 1], v, inverse[:, i : i + 1]) for i, v in enumerate((x, y, z))
    )
    k0 = torch.addcmul(torch.addcmul(qx * qx, qy, qy), qz, qz).sqrt()
    qx, qy, qz = (q * inverse[:, i : i + 1] for i, q in enumerate((qx, qy, qz)))
    k1 = torch.addcmul(torch.addcmul(qx * qx, qy, qy), qz, qz).clamp_min(1e-6).rsqrt()
    return k0 * (k0 - 1) * k1


def _smooth_min(a: Tensor, b: Tensor, k: float) -> Tensor:
    h = (k - (a - b).abs()).clamp_min(0) / k
    return torch.minimum(a, b) - h * h * (k / 4)


def _ear(h: Heads, x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distance to the ear: a capsule of two radii in the ear's plane, given a rounded thickness and a cup.

    Returns:   distance [N, R]; the distance within the plane [N, R]; height over the plane [N, R].
    """
    x, y, z = x - h.ear[:, :1], y - h.ear[:, 1:2], z - h.ear[:, 2:3]
    sin, cos, base, tip = (t.unsqueeze(1) for t in h.ear[:, 3:].unbind(1))
    length = h.ear_length
    along, across = x * sin + y * cos, (x * cos - y * sin).abs()
    slope = (base - tip) / length
    side = (1 - slope * slope).sqrt()
    k = side * along - slope * across
    inside = torch.where(
        k < 0,
        (across.square() + along.square()).sqrt() - base,
        torch.where(
            k > side * length,
            (across.square() + (along - length).square()).sqrt() - tip,
            across * side + along * slope - base,
        ),
    )
    height = z - 5.0 * across.square()
    thick = 0.014
    outer, off = inside + thick, height.abs() - 0.004
    d = (outer.clamp_min(0).square() + off.clamp_min(0).square()).sqrt() + torch.maximum(
        outer, off
    ).clamp_max(0)
    return d - thick, inside, height


class _Parts(NamedTuple):
    skull: Tensor
    cheek: Tensor
    muzzle: Tensor
    chin: Tensor
    nose: Tensor
    eye: Tensor
    ear: Tensor
    in_ear: Tensor
    ear_height: Tensor


def _parts(h: Heads, p: Tensor) -> _Parts:
    """Distances [N, R] from p [N, R, 3] to each part."""
    x, y, z = p.movedim(-1, 0).contiguous().unbind(0)
    x = x.abs()
    # Rounded |x|: no groove where a cheek meets its mirror image, a soft one down the muzzle.
    xs = (x, (x * x + 0.035**2).sqrt(), (x * x + 0.008**2).sqrt(), x)
    body = [_ellipsoid(x, y, z, h.centres[:, i], h.radii[:, i]) for i, x in enumerate(xs)]
    nose = _ellipsoid(x, y, z, h.nose[:, :3], h.nose[:, 3:])
    dx, dy, dz = x - h.eye[:, :1], y - h.eye[:, 1:2], z - h.eye[:, 2:3]
    eye = torch.addcmul(torch.addcmul(dx * dx, dy, dy), dz, dz).sqrt() - h.eye[:, 3:]
    return _Parts(*body, nose, eye, *_ear(h, x, y, z))


def _union(d: _Parts) -> Tensor:
    fur = _smooth_min(_smooth_min(d.skull, d.cheek, 0.06), _smooth_min(d.muzzle, d.chin, 0.012), 0.035)
    fur = _smooth_min(fur, d.ear, 0.03)
    return torch.minimum(_smooth_min(fur, d.nose, 0.008), d.eye)


def distance(
    h: Heads,
    p: Tensor,  # [N, R, 3]  world units
) -> Tensor:
    """Signed distance [N, R] to the heads' surfaces, world units; exact near the surface to first order."""
    return _union(_parts(h, p))


def _coat(h: Heads, p: Tensor) -> Tensor:
    """How much of the mark colour [N, R, 1] and of the light colour the fur at p shows, as [N, R, 2]."""
    q = (p - h.centres[:, None, 0]) / h.radii[:, None, 0]
    q = _normalize(q)
    x, y, z = q.unbind(-1)
    stripes, spots, patch, blaze, socks, saddle = (t.unsqueeze(1) for t in h.marks.unbind(1))

    # Stripes run over the skull from side to side, thin out towards the face.
    wave = torch.sin(13.0 * torch.atan2(y + 0.25 * x * x, z) + 2.0)
    stripe = _smoothstep(wave, 0.05, 0.75) * _smoothstep(y - 0.35 * z, -0.25, 0.2)
    stripe = stripe * _smoothstep(x.abs(), 0.02, 0.16)
    side = _smoothstep(torch.sin(12.0 * y + 3.0 * x.abs()), 0.1, 0.8) * _smoothstep(x.abs(), 0.62, 0.82)
    stripe = torch.maximum(stripe, side * _smoothstep(-y, -0.25, 0.0))

    where = p.new_tensor(_SPOTS)
    az, el, size = where.unbind(1)
    centres = torch.stack([az.sin() * el.cos(), el.sin(), az.cos() * el.cos()], 1)
    gap = (2 - 2 * (q @ centres.T)).clamp_min(1e-8).sqrt() - size
    spot = 1 - _smoothstep(gap.amin(-1), -0.06, 0.06)

    to_eye = (_mirror(p) - h.eye[:, None, :3]).square().sum(-1).sqrt()
    around = 1 - _smoothstep(to_eye / h.eye[:, 3:], 1.25, 1.95)
    # One eye of two: patches are seldom symmetric.
    around = around * _smoothstep(x, -0.05, 0.05)
    cap = _smoothstep(y - 0.55 * z + 0.25 * x, 0.25, 0.5)

    patches = torch.maximum(around, cap * saddle) * patch
    mark = torch.maximum(torch.maximum(stripe * stripes, spot * spots), patches)
    line = (1 - _smoothstep(x.abs() - 0.10 + 0.09 * y, 0.0, 0.10)) * _smoothstep(z, 0.1, 0.4)
    belly = _smoothstep(-y + 0.25 * z, 0.42, 0.62)
    pale = torch.maximum(line * blaze, belly * socks)
    return torch.stack([mark, pale], -1)


def _eyeball(h: Heads, p: Tensor, iris: Tensor) -> Tensor:
    """Colour [N, R, 3] of the eyes, in [0, 1], by the direction of p from an eye's centre."""
    white, centre = iris.new_tensor([0.97, 0.96, 0.94]), h.eye[:, None, :3]
    off = (_normalize(_mirror(p) - centre) - h.gaze.unsqueeze(1)).square().sum(-1, keepdim=True).sqrt()
    ball = torch.lerp(white.expand_as(p), iris.expand_as(p), 1 - _smoothstep(off, 0.80, 0.98))
    ball = ball * _smoothstep(off / h.pupil.unsqueeze(1), 0.85, 1.15) + 0.03
    # The highlight sits on the same side of both eyes.
    side = torch.cat([p[..., :1].sign(), torch.ones_like(p[..., 1:])], -1)
    glint = _normalize(p.new_tensor([0.22, 0.36, 0.9]))
    off = (_normalize(p - side * centre) - glint).square().sum(-1, keepdim=True).sqrt()
    return torch.lerp(ball, torch.ones_like(ball), 1 - _smoothstep(off, 0.13, 0.27))


def colour(
    h: Heads,
    p: Tensor,  # [N, R, 3]  on or near the surface
) -> Tensor:
    """Lit colour [N, R, 3] in [-1, 1] of surface points; the same from every side.

    Wrapped Lambert light from above and the side, a warm fill from below, and an occlusion term from the
    distance one step out along the normal.
    """
    parts = _parts(h, p)
    skull, cheek, muzzle, chin, nose, eye, ear, in_ear, ear_height = parts
    d = _union(parts)
    step = 2e-3
    axes = torch.eye(3, device=p.device, dtype=p.dtype) * step
    normal = _normalize(torch.stack([distance(h, p + axis) - d for axis in axes], -1))
    coat, mark, pale, iris, nose_colour = (t.unsqueeze(1) for t in h.colours.unbind(1))

    amount = _coat(h, p)
    head, jaw = torch.minimum(skull, cheek), torch.minimum(muzzle, chin)
    is_ear = _smoothstep(head - ear, -0.004, 0.012).unsqueeze(-1)
    is_muzzle = _smoothstep(head - jaw, -0.004, 0.014).unsqueeze(-1)
    albedo = torch.lerp(coat, mark, amount[..., :1] * (1 - is_muzzle) * (1 - is_ear))
    albedo = torch.lerp(albedo, pale, torch.maximum(amount[..., 1:], is_muzzle) * (1 - is_ear))
    inner = _smoothstep(-in_ear, 0.008, 0.022) * _smoothstep(ear_height, 0.0, 0.008)
    pink = torch.lerp(coat, coat.new_tensor([0.95, 0.62, 0.58]), 0.75)
    edge = torch.lerp(coat, mark, h.marks[:, None, 1:2] * 0.8)
    albedo = torch.lerp(albedo, torch.lerp(edge, pink, inner.unsqueeze(-1)), is_ear)

    # A mouth, drawn on the muzzle: the seam below the nose, and a smile that crosses it.
    x, y = p[..., 0], p[..., 1]
    top, mouth = h.nose[:, 1:2], h.centres[:, 2, 1:2] - 0.38 * h.radii[:, 2, 1:2]
    width = h.radii[:, 2, :1]
    smile = mouth + 0.9 * x.square() / width
    dark = torch.exp(-((y - smile) / 0.0055).square()) * (1 - _smoothstep(x.abs() / width, 0.75, 1.05))
    seam = torch.exp(-(x / 0.005).square()) * _smoothstep(top - y, 0.0, 0.01)
    seam = seam * _smoothstep(y - smile, -0.004, 0.004)
    dark = (torch.maximum(dark, seam) * _smoothstep(p[..., 2], 0.10, 0.13)).unsqueeze(-1)
    albedo = albedo * (1 - 0.7 * dark)

    at_nose = _smoothstep(torch.minimum(muzzle, skull) - nose, -0.002, 0.006).unsqueeze(-1)
    albedo = torch.lerp(albedo, nose_colour, at_nose)

    fur = torch.minimum(head, nose)
    at_eye = _smoothstep(fur - eye, -0.001, 0.004).unsqueeze(-1)
    rim = torch.exp(-((fur - eye) / 0.006).square()).unsqueeze(-1)
    albedo = torch.lerp(albedo * (1 - 0.6 * rim), _eyeball(h, p, iris), at_eye)

    light = _normalize(p.new_tensor(_LIGHT))
    diffuse = ((normal @ light + 0.55) / 1.55).clamp_min(0)
    fill = 0.5 - 0.5 * normal[..., 1]
    reach = 0.05
    free = (distance(h, p + normal * reach) / reach).clamp(0, 1)
    shade = 0.40 + 0.78 * diffuse.unsqueeze(-1) * p.new_tensor([1.0, 0.985, 0.96])
    shade = shade + 0.16 * fill.unsqueeze(-1) * p.new_tensor([1.0, 0.85, 0.75])
    shade = shade * (0.62 + 0.38 * free.unsqueeze(-1))
    shade = torch.lerp(shade, torch.ones_like(shade), 0.45 * at_eye)
    return (albedo * shade).clamp(0, 1) * 2 - 1


def trace(
    h: Heads,
    origins: Tensor,  # [N, R, 3]
    directions: Tensor,  # [N, R, 3]  unit
    steps: int = 32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where rays meet the heads, by sphere tracing between the ends of a bounding sphere.

    Returns:   points [N, R, 3]; depth [N, R, 1], world units along the ray (the far end where it misses);
               mask [N, R, 1], True where it hits.
    """
    middle = -(origins * directions).sum(-1)
    reach = (RADIUS**2 - (origins + middle.unsqueeze(-1) * directions).square().sum(-1)).clamp_min(0).sqrt()
    t, end = middle - reach, middle + reach
    d = torch.zeros_like(t)
    for _ in range(steps):
        d = distance(h, origins + t.unsqueeze(-1) * directions)
        t = torch.minimum(t + 0.9 * d, end)
    mask = (d.abs() < 4e-3) & (t < end)
    return origins + t.unsqueeze(-1) * directions, t.unsqueeze(-1), mask.unsqueeze(-1)


def shade(
    h: Heads,
    origins: Tensor,  # [N, R, 3]
    directions: Tensor,  # [N, R, 3]  unit
) -> tuple[Tensor, Tensor, Tensor]:
    """Colour [N, R, 3] in [-1, 1], depth [N, R, 1] and mask [N, R, 1] of any set of rays."""
    points, depth, mask = trace(h, origins, directions)
    return torch.where(mask, colour(h, points), 1.0), depth, mask
