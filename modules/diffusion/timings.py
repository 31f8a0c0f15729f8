"""What a start-up tuner measured: the ways to compute a layer, timed on the shapes that a model really has."""

from dataclasses import dataclass

FASTER = 1.05  # factor by which another way must beat torch's own; on a tie the choice would vary between runs


@dataclass(frozen=True)
class Timing:
    """The measurement of one way on one shape."""

    shape: tuple[int, ...]
    way: str
    ms: float | None  # None: it refused
    reason: str = ""  # why it refused


def best(timings: list[Timing], own: str) -> Timing | None:
    """The fastest way of one shape, or torch's `own` unless another is faster by FASTER; None if all refused."""
    working = [t for t in timings if t.ms is not None]
    if not working:
        return None
    fastest = min(working, key=lambda t: t.ms)
    plain = next((t for t in working if t.way == own), fastest)
    return plain if plain.ms <= FASTER * fastest.ms else fastest


def chosen(timings: list[Timing], own: str) -> dict[str, str]:
    """Name of the shape (a JSON key) -> the best way, for each shape on which some way works."""
    found = {shape: best(rows, own) for shape, rows in by_shape(timings).items()}
    return {name_of(shape): way.way for shape, way in found.items() if way is not None}


def by_shape(timings: list[Timing]) -> dict[tuple[int, ...], list[Timing]]:
    """The timings grouped by shape, in the order in which they were taken."""
    rows: dict[tuple[int, ...], list[Timing]] = {}
    for t in timings:
        rows.setdefault(t.shape, []).append(t)
    return rows


def told(timings: list[Timing]) -> str:
    """The ways of one shape in one line, fastest first, each with its time or its reason for refusing."""
    tried = sorted(timings, key=lambda t: (t.ms is None, t.ms or 0.0))
    return ", ".join(f"{t.way} {t.ms:.3f} ms" if t.ms is not None else f"{t.way} no ({t.reason})" for t in tried)


def name_of(shape: tuple[int, ...]) -> str:
    """A shape as text, such as 64x4096x4096x8x40."""
    return "x".join(map(str, shape))
