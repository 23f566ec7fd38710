"""Who stands where: signs of life of the processes of a job, so that one that hangs or breaks can name whom it waited for."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

SECONDS = 1.0  # between two signs of life
SILENT = 4.0  # without one for so long, a process is taken for dead or stopped


@dataclass(frozen=True)
class _Sign:
    """What a process last said of itself: beats so far, its place (step, phases since that step began), and the phase it is in."""

    beats: int
    place: tuple[int, int]
    phase: str


class Heartbeat:
    """A thread that tells the job's store once a second where this process is, and watches that it gets on.

    The collectives' own time-outs know neither which process is late nor what it is doing, and NCCL's end the process
    without a word of ours; so this one comes first.

    Args:
        store: a torch.distributed store of its own connection, its names not shared with anybody.
        limit: seconds in one phase after which the job is given up: one sentence, exit status 1.
    """

    def __init__(self, store: Any, rank: int, world_size: int, limit: float):
        self.store, self.rank, self.world_size, self.limit = store, rank, world_size, limit
        self.phase, self.step, self.count, self.since = "starting", 0, 0, time.monotonic()
        self._beats = 0
        self._access, self._end = threading.Lock(), threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def begin_phase(self, phase: str, step: int | None) -> None:
        """Begin a phase; called several times a step, so it only writes attributes."""
        if step is not None and step != self.step:
            self.step, self.count = step, 0
        self.phase, self.count, self.since = phase, self.count + 1, time.monotonic()

    def current_place(self) -> str:
        """The phase and the step it belongs to."""
        return f"{self.phase}, step {self.step}"

    def stop(self) -> None:
        """The job has ended well."""
        self._end.set()
        self._thread.join(2 * SECONDS)

    def announce_failure(self, sentence: str) -> None:
        """Tell the others that this process has said why it ends."""
        try:
            with self._access:
                self.store.set(f"failed/{self.rank}", sentence[:200])
        except Exception:  # the store's process may be the one that is gone
            return

    def broken_by(self) -> str | None:
        """What to say after an exchange broke: a sentence; nothing when another process says it; None if nothing is known."""
        try:
            deadline = time.monotonic() + SILENT
            before = self._signs()
            while time.monotonic() < deadline:
                if self._announced():
                    return ""
                time.sleep(0.2)
            silent = self._silent(before, self._signs())
            speaker = min(set(range(self.world_size)) - set(silent), default=self.rank)
            if not silent or speaker != self.rank:
                return None if not silent else ""
            return f"{self._names(silent, before)} ended without a word (killed, or out of memory?)"
        except Exception:  # the store's process may be the one that is gone
            return None

    def _watch(self) -> None:
        while not self._end.wait(SECONDS):
            # Without the store's process the main thread's next exchange breaks and says so; if there is none, time is up all the same.
            with contextlib.suppress(Exception):
                self._beat()
            if time.monotonic() - self.since > self.limit:
                with contextlib.suppress(Exception):
                    if not self._explain():
                        continue
                os._exit(1)

    def _beat(self) -> None:
        self._beats += 1
        with self._access:
            self.store.set(f"sign/{self.rank}", f"{self._beats} {self.step} {self.count} {self.phase}")

    def _explain(self) -> bool:
        """Say, on one rank, whom the job waits for; False when this process went on after all."""
        since, before = self.since, self._signs()
        for _ in range(round(SILENT / SECONDS)):  # the others look as well, and must see this process alive
            time.sleep(SECONDS)
            self._beat()
        if self.since != since:
            return False
        after = self._signs()
        late = self._silent(before, after)
        what = "no longer responds"
        if not late:
            least = min((sign.place for sign in after.values()), default=(0, 0))
            late = [rank for rank, sign in after.items() if sign.place == least]
            what = "gets no further"
        others = [rank for rank in after if rank not in late]
        if self.rank == min(others, default=self.rank):
            waiting = f"; the others wait ({after[others[0]].phase})" if others else ""
            print(f"error (rank {self.rank}): no progress for {self.limit / 60:g} minutes: {self._names(late, after)} {what}{waiting}; "
                  "start again to resume, and raise DIST_TIMEOUT if it was only slow", file=sys.stderr, flush=True)
        else:
            time.sleep(SECONDS)  # the sentence first: the launcher ends all when the first process does
        return True

    def _signs(self) -> dict[int, _Sign]:
        with self._access:
            known = [rank for rank in range(self.world_size) if self.store.check([f"sign/{rank}"])]
            texts = {rank: self.store.get(f"sign/{rank}").decode(errors="replace").split(" ", 3) for rank in known}
        return {rank: _Sign(int(beats), (int(step), int(count)), phase) for rank, (beats, step, count, phase) in texts.items()}

    def _announced(self) -> bool:
        with self._access:
            return any(self.store.check([f"failed/{rank}"]) for rank in range(self.world_size) if rank != self.rank)

    def _silent(self, before: dict[int, _Sign], after: dict[int, _Sign]) -> list[int]:
        return [rank for rank in after if rank != self.rank and rank in before and before[rank].beats == after[rank].beats]

    def _names(self, ranks: list[int], signs: dict[int, _Sign]) -> str:
        return ", ".join(f"rank {rank} ({signs[rank].phase}, step {signs[rank].place[0]})" for rank in ranks)
