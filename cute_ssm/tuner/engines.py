"""Where configs are measured: in this process, in processes of their own, or on what Ray offers; one GPU each."""

from __future__ import annotations

import multiprocessing
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

from cute_ssm.errors import describe
from cute_ssm.tuner import objectives
from cute_ssm.tuner.journal import Measurement
from cute_ssm.tuner.problems import Case

JOB_TIMEOUT_S = 300.0  # a kernel that never ends must not end the search
FATAL = ("CUDA error", "cudaError", "AcceleratorError", "illegal memory access")  # after these a process is of no use


@dataclass(frozen=True)
class Job:
    """One config to measure."""

    case: Case
    fields: tuple[tuple[str, int | str], ...]
    rule: tuple[tuple[str, int | str], ...]
    rounds: int = 1


class Engine(Protocol):
    """Measures jobs.

    Attributes
    ----------
    workers : int
        Jobs that are measured at once.
    """

    workers: int

    def map(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Measurement]]:
        """Yield the number of each job and its measurement, as they are done."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


class Worker:
    """Measures jobs one after another, with an objective of its own.

    Parameters
    ----------
    objective : str or Objective
        Name, for `objectives.create`, or what measures.
    device : int
        Index of the GPU.
    """

    def __init__(self, objective: str | objectives.Objective, device: int = 0):
        self.objective = objectives.create(objective, device) if isinstance(objective, str) else objective

    def measure(self, job: Job) -> Measurement:
        """Return the measurement; a config that raises has none."""
        try:
            return self.objective.measure(job.case, dict(job.fields), dict(job.rule), job.rounds)
        except Exception as error:  # whatever a config makes of compiler, emulator or driver: it is not for use
            return Measurement(None, error=f"{type(error).__name__}: {error}")

    def numbered(self, number: int, job: Job) -> tuple[int, Measurement]:
        """Return the job's number and its measurement."""
        return number, self.measure(job)


class Inline:
    """This process."""

    workers = 1

    def __init__(self, objective: str | objectives.Objective):
        self._worker = Worker(objective)

    def map(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Measurement]]:
        for number, job in enumerate(jobs):
            yield number, self._worker.measure(job)

    def close(self) -> None:
        pass


class Processes:
    """Processes, one for each GPU; one that breaks is replaced, and its config has failed.

    Parameters
    ----------
    objective : str
    workers : int
    """

    def __init__(self, objective: str, workers: int, timeout_s: float = JOB_TIMEOUT_S):
        self.objective, self.workers, self.timeout_s = objective, workers, timeout_s
        self._pools = [self._start(index) for index in range(workers)]

    def map(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Measurement]]:
        waiting: queue.SimpleQueue[tuple[int, Job]] = queue.SimpleQueue()
        done: queue.SimpleQueue[tuple[int, Measurement]] = queue.SimpleQueue()
        for entry in enumerate(jobs):
            waiting.put(entry)

        def serve(index: int) -> None:
            while True:
                try:
                    number, job = waiting.get_nowait()
                except queue.Empty:
                    return
                done.put((number, self._measure(index, job)))

        threads = [threading.Thread(target=serve, args=(index,), daemon=True) for index in range(self.workers)]
        for thread in threads:
            thread.start()
        for _ in jobs:
            yield done.get()

    def close(self) -> None:
        for pool in self._pools:
            _stop(pool)

    def _start(self, index: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(self.objective, index))

    def _measure(self, index: int, job: Job) -> Measurement:
        try:
            found = self._pools[index].submit(_serve, job).result(self.timeout_s)
        except FutureTimeout:
            found = Measurement(None, error=f"CUDA error: no result after {self.timeout_s:.0f} s")
        except BrokenProcessPool as error:
            found = Measurement(None, error=f"CUDA error: the process ended: {error}")
        except Exception as error:
            found = Measurement(None, error=f"{type(error).__name__}: {error}")
        if any(word in found.error for word in FATAL):
            _stop(self._pools[index])
            self._pools[index] = self._start(index)
        return found


class Ray:
    """Actors of Ray, one for each GPU, on one host or on many.

    Parameters
    ----------
    objective : str
    workers : int
    """

    def __init__(self, objective: str, workers: int):
        try:
            ray: Any = import_module("ray")
            pool: Any = import_module("ray.util").ActorPool
        except ImportError:
            fix = "pip install 'cute-ssm[tune]', or --engine processes"
            raise ValueError(describe("--engine", "ray, which needs the package ray", "none", fix)) from None
        self.workers = workers
        if not ray.is_initialized():
            local: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False}
            gpus = {} if objective == "gpu" else {"num_cpus": workers}
            ray.init(address="local" if objective != "gpu" else None, **local, **gpus)
        resources = {"num_gpus": 1} if objective == "gpu" else {"num_cpus": 1}
        actor = ray.remote(**resources)(Worker)  # Ray shows each actor its own GPU as the first
        self._ray, self._pool = ray, pool([actor.remote(objective) for _ in range(workers)])

    def map(self, jobs: Sequence[Job]) -> Iterator[tuple[int, Measurement]]:
        yield from self._pool.map_unordered(lambda actor, entry: actor.numbered.remote(*entry), list(enumerate(jobs)))

    def close(self) -> None:
        self._ray.shutdown()


def create(name: str, objective: str, workers: int) -> Engine:
    """Return an engine by its name: ``inline``, ``processes``, ``ray`` or ``auto``.

    Raises
    ------
    ValueError
        If there is no such engine, or it cannot work here.
    """
    if name == "auto":
        name = "inline" if workers == 1 and objective != "gpu" else "processes"
    if name == "inline":
        return Inline(objective)
    if name == "processes":
        return Processes(objective, workers)
    if name == "ray":
        return Ray(objective, workers)
    raise ValueError(describe("--engine", "auto, inline, processes or ray", repr(name)))


_worker: Worker | None = None  # of a process that `Processes` has started


def _begin(objective: str, index: int) -> None:
    global _worker
    _worker = Worker(objective, index)


def _serve(job: Job) -> Measurement:
    if _worker is None:
        raise RuntimeError("this process was not started as a worker")
    return _worker.measure(job)


def _stop(pool: ProcessPoolExecutor) -> None:
    """End a pool at once, whatever its process is doing."""
    for process in list(getattr(pool, "_processes", {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
