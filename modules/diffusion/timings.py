"""What a start-up tuner measured: ways to compute one layer, timed on the shapes that a model really meets."""

from dataclasses import dataclass

FASTER = 1.05  # than torch's own way another must be: a tie would be another one's the next time


@dataclass(frozen=True)
class Timing:
    """One way on one shape."""

    shape: tuple[int, ...]
    way: str
    ms: float | None  # None: it refused
    reason: str = ""  # why it refused


def best(timings: list[Timing], own: str) -> Timing | None:
    """The fastest way of one shape, but `own`, torch's, where no other is FASTER than it; None where all refused."""
    working = [t for t in timings if t.ms is not None]
    if not working:
        return None
    fastest = min(working, key=lambda t: t.ms)
    plain = next((t for t in working if t.way == own), fastest)
    return plain if plain.ms <= FASTER * fastest.ms else fastest


def chosen(timings: list[Timing], own: str) -> dict[str, str]:
    """The best way at each shape at which one works, by a name of the shape that JSON can hold."""
    found = {shape: best(rows, own) for shape, rows in by_shape(timings).items()}
    return {name_of(shape): way.way for shape, way in found.items() if way is not None}


def by_shape(timings: list[Timing]) -> dict[tuple[int, ...], list[Timing]]:
    """The timings of each shape, in the order in which they were taken."""
    rows: dict[tuple[int, ...], list[Timing]] = {}
    for t in timings:
        rows.setdefault(t.shape, []).append(t)
    return rows


def told(timings: list[Timing]) -> str:
    """The ways of one shape in a line, the fastest first: each with its time, or why it refused."""
    tried = sorted(timings, key=lambda t: (t.ms is None, t.ms or 0.0))
    return ", ".join(f"{t.way} {t.ms:.3f} ms" if t.ms is not None else f"{t.way} no ({t.reason})" for t in tried)


def name_of(shape: tuple[int, ...]) -> str:
    """64x4096x4096x8x40."""
    return "x".join(map(str, shape))
