"""One job at a time in a run folder, on one machine or on several that share a disk.

`run.lock` names the host, the process and the start of the job that works in the folder. It is created as a hard link,
which is atomic on NFS; flock is not needed. A holder on this machine is alive while its process exists. A holder on another
machine is alive while the file's modification time advances. The age of the file is measured with the clock of the file
system, so the clocks of the machines may differ.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from atfr.engine.distributed.preemption import StopFlag

log = logging.getLogger(__name__)

NAME = "run.lock"
BEAT_S = 10.0  # between two updates of the modification time
DEAD_S = 90.0  # without an update, a holder on another machine counts as dead
ENDING_S = 300.0  # longest wait for a holder that is stopping
STEP_S = 0.2  # between two checks of the lock
ENDING = "ending\n"  # second line of the file, once the holder has received a stop signal


@dataclass(frozen=True)
class Holder:
    """The job that a lock file names."""

    host: str
    pid: int
    since: str
    machine: str | None = None  # boot and PID namespace in which `pid` counts; None if the system does not say
    started: str | None = None  # start of the process, in ticks since boot
    job: str | None = None  # SLURM job
    restart: int = 0  # how often SLURM has requeued that job
    token: str = ""  # unique to this lock

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


@dataclass(frozen=True)
class _Seen:
    """The contents of a lock file."""

    holder: Holder
    ending: bool
    mtime_ns: int


@contextmanager
def run_lock(folder: Path, stop: StopFlag | None = None) -> Iterator[None]:
    """Hold the lock of a run folder in this block. The folder is created, and removed again if it stays empty.

    Args:
        stop: once it is set, the lock file says that this job is stopping, so that the next job waits for it.

    Raises:
        ValueError: another job holds the lock; names its host, process and start.
    """
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = RunLock(folder, stop)
        lock.acquire()
        try:
            yield
        finally:
            lock.release()
    finally:
        if created:
            with suppress(OSError):  # not empty
                folder.rmdir()


class RunLock:
    """The lock of a run folder. Use it through `run_lock`."""

    def __init__(self, folder: Path, stop: StopFlag | None = None) -> None:
        self.folder, self.path, self.stop = folder, folder / NAME, stop
        self.holder = _this_process()
        self._own = folder / f"{NAME}.new-{self.holder.token}"
        self._file = -1  # descriptor of our lock file
        self._released = threading.Event()
        self._beat = threading.Thread(target=self._keep_alive, name="run lock", daemon=True)

    def acquire(self) -> None:
        """Take the lock. Waits for a holder that is stopping, and takes over from one that is dead.

        Raises:
            ValueError: another job holds it.
        """
        try:
            self._own.write_text(json.dumps(asdict(self.holder)) + "\n", encoding="utf-8")
            self._file = os.open(self._own, os.O_RDWR | os.O_APPEND)
        except OSError as error:
            raise OSError(f"{self.path} could not be written ({error.strerror}); make room, or choose another trainer.output_dir") from error
        try:
            self._wait()
        except BaseException:
            os.close(self._file)
            raise
        finally:
            self._own.unlink(missing_ok=True)
        self._beat.start()

    def release(self) -> None:
        """Remove the lock file, unless another job has taken over."""
        self._released.set()
        self._beat.join()
        with suppress(OSError):
            if self._is_ours():
                self.path.unlink()
        os.close(self._file)

    def _wait(self) -> None:
        began, first, warned = time.monotonic(), None, False
        while not self._create(self.path):
            seen = self._current()
            if seen is None:
                continue  # it was released meanwhile
            alive = self._is_alive(seen)
            if alive is False:
                if self._take_over(seen):
                    log.warning("%s was left by a job that ended without removing it (%s); it is taken over", self.path, seen.holder)
                    return
                continue
            first = first if first is not None and first.holder == seen.holder else seen
            alive = alive or seen.mtime_ns != first.mtime_ns
            if alive and not (self._is_ending(seen) and time.monotonic() - began < ENDING_S):
                raise ValueError(
                    f"another job works in run folder {self.folder}: {seen.holder}; wait until it ends, or choose another trainer.output_dir"
                )
            if not warned:
                warned = True
                log.warning("%s is held by %s: waiting for its end, or for a sign that it still runs", self.path, seen.holder)
            time.sleep(STEP_S)

    def _current(self) -> _Seen | None:
        """Read the lock, or the last claim if jobs were about to take over from a dead holder; None if there is no lock."""
        seen = _read(self.path)
        while seen is not None and (successor := _read(self._after(seen.holder))) is not None:
            seen = successor
        return seen

    def _after(self, holder: Holder) -> Path:
        """Return the claim file of the job that takes over from `holder`."""
        return self.folder / f"{NAME}.after-{holder.token}"

    def _take_over(self, dead: _Seen) -> bool:
        """Replace the lock of a dead holder. Of several jobs that try, one succeeds."""
        claim = self._after(dead.holder)
        if not self._create(claim):
            return False
        now = self._current()
        if now is None or now.holder != self.holder:  # another job took over and removed the claim
            claim.unlink(missing_ok=True)
            return False
        chain = self._claims()
        os.replace(self._own, self.path)
        for path in chain:
            path.unlink(missing_ok=True)
        return True

    def _claims(self) -> list[Path]:
        found, seen = [], _read(self.path)
        while seen is not None and (path := self._after(seen.holder)).exists():
            found.append(path)
            seen = _read(path)
        return found

    def _create(self, path: Path) -> bool:
        """Create our lock file at `path`; False if there is one."""
        try:
            os.link(self._own, path)
        except FileExistsError:
            with suppress(OSError):
                return os.path.samestat(os.stat(path), os.fstat(self._file))  # True if it is ours: the reply of an NFS server was lost
            return False
        except OSError:  # a file system without hard links
            try:
                with open(path, "x", encoding="utf-8") as file:
                    file.write(self._own.read_text(encoding="utf-8"))
            except FileExistsError:
                return False
            if path == self.path:
                os.close(self._file)
                self._file = os.open(path, os.O_RDWR | os.O_APPEND)
        return True

    def _is_alive(self, seen: _Seen) -> bool | None:
        """Return whether the holder's process runs; None if that is not known yet."""
        holder = seen.holder
        if holder.machine is not None and holder.machine == self.holder.machine:
            return _runs(holder)
        os.utime(self._file)
        return False if os.fstat(self._file).st_mtime_ns - seen.mtime_ns > DEAD_S * 1e9 else None

    def _is_ending(self, seen: _Seen) -> bool:
        """Return whether the holder has received a stop signal, or is this SLURM job before it was requeued."""
        before = seen.holder.job is not None and seen.holder.job == self.holder.job and seen.holder.restart < self.holder.restart
        return seen.ending or before

    def _is_ours(self) -> bool:
        return os.path.samestat(os.stat(self.path), os.fstat(self._file))

    def _keep_alive(self) -> None:
        """Update the modification time until the release. Ends the process if another job has taken over."""
        beat, marked = time.monotonic(), False
        while not self._released.wait(min(1.0, BEAT_S)):
            try:
                if self.stop is not None and self.stop.signal is not None and not marked:
                    marked = True
                    os.write(self._file, ENDING.encode())
                if time.monotonic() - beat < BEAT_S:
                    continue
                beat = time.monotonic()
                if not self._is_ours():
                    self._lost()
                os.utime(self._file)
            except OSError:
                continue  # the disk does not answer, or the file was deleted

    def _lost(self) -> None:
        """End the process: it was suspended for so long that another job counted it as dead."""
        print(f"error: another job has taken over run folder {self.folder}, see {self.path}; this job ends", file=sys.stderr, flush=True)
        os._exit(1)


def _this_process() -> Holder:
    pid = os.getpid()
    return Holder(
        host=socket.gethostname(),
        pid=pid,
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
        machine=_machine(),
        started=_started(pid),
        job=os.environ.get("SLURM_JOB_ID"),
        restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        token=uuid.uuid4().hex,
    )


def _read(path: Path) -> _Seen | None:
    """Read a lock file; None if there is none. If it is damaged, the holder is unknown."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # opening it makes an NFS client ask the server
            found = os.fstat(file.fileno())
            first, _, rest = file.read().partition("\n")
    except OSError:
        return None
    try:
        holder = Holder(**json.loads(first))
    except (ValueError, TypeError):
        holder = Holder("an unknown host", 0, time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(found.st_mtime)), token=f"unreadable-{found.st_ino}")
    return _Seen(holder, ENDING in rest, found.st_mtime_ns)


def _machine() -> str | None:
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _started(pid: int) -> str | None:
    """Return when a process of this machine started; None if it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]


def _runs(holder: Holder) -> bool:
    started = _started(holder.pid)
    if started is None:
        try:
            os.kill(holder.pid, 0)
        except PermissionError:
            return True  # of another user, whose processes are hidden
        except (OSError, OverflowError):
            return False
    return started == holder.started
