"""From a failure to one sentence and an exit status. Imports no torch unless it is there already."""

from __future__ import annotations

import errno
import sys
import traceback
from collections.abc import Callable

from config import ProgramError
from utils.runtime import launcher

EXIT_FAILURE = 1
_SAID_BY_ONE = (2, 75)  # what every process of a job meets alike: usage, and a signal to stop


def exit_status(work: Callable[[], int]) -> int:
    """What ``work`` returns; a failure of it is told in a sentence, with the exit status that it carries."""
    try:
        try:
            return work()
        finally:
            if progress := sys.modules.get("utils.loggers.progress"):
                progress.clear_live_line()  # what is said next begins on a clean line
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt:
        return _say("stopped by Ctrl-C; what was saved before is intact", EXIT_FAILURE)
    except BrokenPipeError:
        return EXIT_FAILURE
    except Exception as error:
        return _explain(error)


def _explain(error: Exception) -> int:
    if not isinstance(error, ProgramError):
        error = _translated(error) or error
    if not isinstance(error, ProgramError):
        if isinstance(error, OSError):
            where, why = error.filename or "file system", error.strerror or error
            return _say(f"{where}: {why}; what was saved before is intact", EXIT_FAILURE, any_rank=True)
        traceback.print_exc()
        return _say(f"unexpected {type(error).__name__}, please report it with the lines above", EXIT_FAILURE, any_rank=True)
    return _say(str(error), error.exit_status, error.any_rank) if str(error) else error.exit_status


def _translated(error: Exception) -> ProgramError | None:
    try:
        if "torch" in sys.modules:
            from utils.runtime.foreign_errors import translated
            return translated(error)
    except (ImportError, MemoryError):
        pass  # torch itself could not be loaded
    # Python has an error for it; the loader of its libraries only has words.
    unloaded = isinstance(error, ImportError) and any(words in str(error) for words in ("failed to map segment", "annot allocate memory"))
    if unloaded or isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return ProgramError("out of memory while the program was being loaded; raise the limit (ulimit -v) or free some")
    return None


def _say(sentence: str, status: int, any_rank: bool = False) -> int:
    """Say it once: rank 0, or with its place any rank that may be alone in its trouble."""
    from utils.loggers.console import plain
    rank, where = launcher.rank(), ""
    if launcher.of_several():
        where = f" (rank {rank})"
        if status not in _SAID_BY_ONE and (distributed := sys.modules.get("utils.runtime.distributed")):
            distributed.announce_failure(sentence)
            where = f" ({distributed.current_place()})"
    if rank == 0 or any_rank or launcher.local_rank() == 0:
        print(f"error{where if rank or any_rank else ''}: {plain(sentence)}", file=sys.stderr, flush=True)
    return status
