"""A lock that threads get in the order in which they ask for it."""

from __future__ import annotations

import collections
import threading


class Turns:
    """A lock for ``with``. `threading.Lock` may go to the thread that just released it again and again, while others
    wait; here whoever asks anew comes after all that wait."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._held = False
        self._waiting: collections.deque[threading.Lock] = collections.deque()

    def __enter__(self) -> None:
        turn = threading.Lock()
        turn.acquire()
        with self._mutex:
            if self._held:
                self._waiting.append(turn)
            else:
                self._held = True
                turn.release()
        turn.acquire()

    def __exit__(self, *_: object) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False
