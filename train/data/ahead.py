"""Results in order, made ahead of time by threads."""

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


class Ahead:
    """A pool of threads that works on the next results while the caller is busy with one.

    Args:
      num_threads: of the pool, which every iterator shares.
      depth: results that are being made, or lie ready, besides the one in the caller's hands.
    """

    def __init__(self, num_threads: int, depth: int):
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="input")
        self._depth = depth

    def run(self, results: Iterable[tuple[T, Iterable[Callable[[], object]]]]) -> Iterator[T]:
        """Yield each result of `results` in order, once the calls that fill it have returned.

        The iterable itself is run in the caller's thread; what a call raises is raised where its result would
        have been yielded. Ending the iteration early cancels what has not begun.
        """
        pending: collections.deque[tuple[T, list[Future]]] = collections.deque()
        try:
            for result, calls in results:
                pending.append((result, [self._pool.submit(call) for call in calls]))
                if len(pending) > self._depth:
                    yield _first(pending)
            while pending:
                yield _first(pending)
        finally:
            for _, futures in pending:
                for future in futures:
                    future.cancel()

    def close(self) -> None:
        """Wait for what has begun, cancel the rest and end the threads; nothing can be run afterwards."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _first(pending: collections.deque[tuple[T, list[Future]]]) -> T:
    result, futures = pending[0]
    for future in futures:
        future.result()
    pending.popleft()
    return result
