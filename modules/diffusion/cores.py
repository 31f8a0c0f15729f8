"""A call on many rows as calls on parts of them, side by side on a CPU's cores.

Threads that share every operation meet at the end of each, some thousand times a tick, and all of them wait for the
last; threads with rows of their own meet once, and work on what fits into a core's own cache. On a machine that others
use as well, where now this thread is held up and now that one, it makes several times the difference
(benchmarks/LOG.md). On a GPU there is one part.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from threading import Barrier

import torch

LEAST_ROWS = 4  # of a part: with fewer, what each call costs beside its arithmetic outweighs the waiting


def count_parts(device: torch.device, rows: int) -> int:
    """Into how many equal parts a call on `rows` is divided: on a CPU as many as divide rows and threads evenly."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    return max(p for p in range(1, threads + 1) if threads % p == rows % p == 0 and (p == 1 or rows // p >= LEAST_ROWS))


def map_parts(function: Callable, parts: Sequence[tuple], in_turn: bool = False) -> list:
    """[function(*part) for part in parts] without gradients: each part in a thread with its share of torch's threads.

    Args:
        in_turn: one part after the other in this thread, with a part's share of torch's threads; for a first call that
            compiles, which a signal can then interrupt.
    """
    call = partial(_without_gradients, function)
    if len(parts) == 1:
        return [call(*parts[0])]
    threads = torch.get_num_threads()
    if not in_turn:
        calls = [_pool(len(parts), threads).submit(call, *part) for part in parts]
        wait(calls)  # for all of them, also where one fails
        return [made.result() for made in calls]
    torch.set_num_threads(max(1, threads // len(parts)))
    try:
        return [call(*part) for part in parts]
    finally:
        torch.set_num_threads(threads)


def in_parts(function: Callable[[torch.Tensor], torch.Tensor], count: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """`function` of a tensor's rows, made in `count` equal parts."""
    if count == 1:
        return function
    return lambda x_N: torch.cat(map_parts(function, [(x_n,) for x_n in x_N.chunk(count)]))


def _without_gradients(function: Callable, *part):
    with torch.no_grad():  # a thread has a mode of its own
        return function(*part)


@cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Workers that share torch's threads evenly among them."""
    started = Barrier(workers + 1)
    pool = ThreadPoolExecutor(
        workers, thread_name_prefix="part", initializer=partial(_take, max(1, threads // workers))
    )
    for _ in range(workers):
        pool.submit(started.wait)  # all of them start now, while nothing else reads the number
    started.wait()
    torch.set_num_threads(threads)  # of this thread, and of those to come
    return pool


def _take(threads: int) -> None:
    torch.set_num_threads(threads)
    torch.get_num_threads()  # what is asked for once is this thread's own from then on
