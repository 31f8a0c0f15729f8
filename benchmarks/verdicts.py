"""Decides from the rows of benchmarks/kernels.py which kernels stay, and checks those that kernels/backend.py trusts.

A kernel stays if it is >= 1.05x torch.compile in time, or >= 2x better in memory at equal time, in the median over the
sizes of a run.
"""

import csv
import statistics
from collections.abc import Iterable
from pathlib import Path

FASTER, LEANER = 1.05, 2.0  # than torch.compile, in time or in memory: what a kernel needs to stay
PEER = "torch.compile"
RUN = ("date", "commit", "device")  # rows that share these were measured side by side


def verdicts(rows: Iterable[dict]) -> dict[str, str]:
    """op -> its verdict, starting with "stays", "goes" or "not judged"; ops without a timed kernel are left out.

    rows: those of one run. An op that was never timed beside torch.compile is not judged: beating eager code is not
    enough.
    """
    rows, found = list(rows), {}
    for op in dict.fromkeys(row["op"] for row in rows):
        by_shape: dict[str, dict[str, dict]] = {}
        for row in rows:
            if row["op"] == op and row["median_ms"]:
                by_shape.setdefault(row["shape"], {})[row["implementation"]] = row
        kernels = [own for own in by_shape.values() if "triton" in own]
        pairs = [(own["triton"], own[PEER]) for own in kernels if PEER in own]
        if pairs:
            found[op] = _verdict(pairs)
        elif kernels:
            found[op] = f"not judged: no {PEER} row at any of {len(kernels)} sizes"
    return found


def _verdict(pairs: list[tuple[dict, dict]]) -> str:
    faster = statistics.median(float(peer["median_ms"]) / float(kernel["median_ms"]) for kernel, peer in pairs)
    memory = [(_mib(kernel), _mib(peer)) for kernel, peer in pairs]
    known = [(own, other) for own, other in memory if own is not None and other is not None]
    ratios = [other / own for own, other in known if own > 0]
    if ratios:
        leaner = statistics.median(ratios)
        said, lean = f"{leaner:.1f}x in memory", leaner >= LEANER and faster >= 1 / FASTER
    else:  # the kernel needs no memory (or none is known), so there is no ratio: it may not cost time either
        saved = statistics.median([other for _, other in known] or [0.0])
        said, lean = f"in place against {saved:.1f} MiB" if known else "memory unknown", saved > 0 and faster >= 1
    stays = faster >= FASTER or lean
    return f"{'stays' if stays else 'goes'}: {faster:.2f}x {PEER} in time, {said}, median of {len(pairs)} sizes"


def _mib(row: dict) -> float | None:
    return None if row["peak_mib"] in ("", None) else float(row["peak_mib"])


def unbacked(judged: Iterable[str], folder: Path) -> list[str]:
    """The ops among `judged` whose last verdict from the runs in `folder`/kernels_gpu*.csv is not "stays"."""
    last: dict[str, str] = {}
    for path in sorted(folder.glob("kernels_gpu*.csv")):
        runs: dict[tuple, list[dict]] = {}
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                runs.setdefault(tuple(row[name] for name in RUN), []).append(row)
        for _, rows in sorted(runs.items(), key=lambda run: run[0]):
            last |= verdicts(rows)
    return [op for op in judged if not last.get(op, "").startswith("stays")]
