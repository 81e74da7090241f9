"""Draw scaling laws on the plane of cost and service, as SVG. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 760, 460
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 40, 48
COLOURS = ("#d1242f", "#0969da", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#57606a", "#0b7285", "#5c3c10", "#2da44e")
TICKS = 5

Point = tuple[float, float]
"""(replica-hours, share of requests that missed)"""


def plane(curves: Mapping[str, Sequence[Point]], title: str) -> str:
    """One line per law through its points, the first of which is drawn larger: the law as it comes."""
    points = [point for curve in curves.values() for point in curve]
    most_hours = max((hours for hours, _ in points), default=1.0) * 1.05
    most_misses = max((misses for _, misses in points), default=1.0) * 1.05 or 1.0

    def place(point: Point) -> Point:
        x = LEFT + point[0] / most_hours * (WIDTH - LEFT - RIGHT)
        return x, HEIGHT - BOTTOM - point[1] / most_misses * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif"'
        ' font-size="12" fill="#24292f">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="22" font-size="14">{escape(title)}</text>',
        *_axes(most_hours, most_misses),
    ]
    for number, (name, curve) in enumerate(curves.items()):
        parts += _curve(name, [place(point) for point in curve], number)
    return "\n".join([*parts, "</svg>", ""])


def _curve(name: str, places: Sequence[Point], number: int) -> list[str]:
    colour = COLOURS[number % len(COLOURS)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in sorted(places))
    parts = [f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-opacity="0.6"/>']
    for index, (x, y) in enumerate(places):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if index == 0 else 3}" fill="{colour}"/>')
    y = TOP + 10 + 20 * number
    parts.append(f'<circle cx="{WIDTH - RIGHT + 16}" cy="{y - 4}" r="5" fill="{colour}"/>')
    parts.append(f'<text x="{WIDTH - RIGHT + 28}" y="{y}">{escape(name)}</text>')
    return parts


def _axes(most_hours: float, most_misses: float) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="#24292f"/>']
    for tick in range(TICKS + 1):
        x = LEFT + tick / TICKS * (right - LEFT)
        y = bottom - tick / TICKS * (bottom - TOP)
        parts.append(f'<text x="{x:.0f}" y="{bottom + 18}" text-anchor="middle">{most_hours * tick / TICKS:.1f}</text>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.0f}" text-anchor="end">{most_misses * tick / TICKS:.0%}</text>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 10}" text-anchor="middle">replica-hours</text>')
    label = "requests whose first token came too late"
    parts.append(f'<text x="16" y="{(TOP + bottom) / 2:.0f}" transform="rotate(-90 16 {(TOP + bottom) / 2:.0f})"')
    parts[-1] += f' text-anchor="middle">{label}</text>'
    return parts
