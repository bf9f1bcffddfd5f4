"""Who computes the cells of a grid: this process, one after the other, or workers of Ray.

Ray places the workers, one for each share of CPUs, GPU and memory that a cluster has room for, and
says when one is lost. Each worker loads the model once and takes one cell after the other. A cell
whose worker was killed or lost, with its machine perhaps, goes to another; so does one that raised
an error, up to three times in all. What nothing can mend (`RALensError`) is not tried again.

Nothing here knows what a cell computes: `start` gives a worker its state, `compute` takes it and
one of the jobs. Both are handed to Ray as they are, so they hold no model.
"""

from __future__ import annotations

import os
import re
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from socket import create_connection
from typing import Any, Literal

from ra_lens.errors import BadInput, NotEnoughMemory, RALensError, one_of
from ra_lens.experiments.grid import Failure

_TRIES = 3
_LOOK = 5.0  # seconds between looks at what room the cluster has


@dataclass(frozen=True)
class RayEngine:
    """Ray, for `engine=`; `engine="ray"` is short for `engine=RayEngine()`.

    Attributes:
        address: Of a cluster, as `ray.init` takes it, such as `"auto"`, where this process is not
            connected to one already. Default: what RAY_ADDRESS names, or that runs on this machine;
            else one is started here, with all CPUs and GPUs, and stopped at the end.
        device: Where workers put the model: `"cpu"`, `"cuda"`. Default: the kind of device that
            the model is on that was given. A model on the CPU is enough here, whatever they take.
        cpus: CPUs of each worker, and threads that it computes with.
        gpus: GPUs of each worker. Default: where they put the model on GPUs, as many as the model
            given is laid over, else none.
    """

    address: str | None = None
    device: str | None = None
    cpus: int = 1
    gpus: float | None = None


Engine = Literal["local", "ray"] | RayEngine


def read_engine(engine: Engine) -> RayEngine | None:
    """Read an engine: None is this process. BadInput if it is unknown, or Ray is not installed."""
    if isinstance(engine, RayEngine):
        chosen = engine
    else:
        one_of("engine", engine, ("local", "ray"), where=", which is no RayEngine")
        if engine == "local":
            return None
        chosen = RayEngine()
    if chosen.device == "auto":
        raise BadInput(
            "found device='auto' for workers of Ray, each of which has GPUs of its own. Leave it "
            "out, and give a model that is laid over several: load_model(name, n_devices=2)."
        )
    _ray()
    return chosen


def _ray() -> Any:
    try:
        return import_module("ray")
    except ImportError as error:
        raise BadInput(
            "found engine='ray', and Ray is not installed. Install it: pip install 'ra-lens[ray]'; "
            "or leave engine= out and split the grid with part='1/8' and so on."
        ) from error


@dataclass(frozen=True)
class Outcome:
    """What came of a job: a result, or why there is none and whether another try could help."""

    result: Any = None
    failure: Failure | None = None
    again: bool = False


Finished = Generator[tuple[str, Outcome], None, None]
"""The keys of jobs with what came of them, as they end."""


def tried(compute: Callable[..., Any], *arguments: Any) -> Outcome:
    """Compute a job; what it raises is among what comes of it."""
    try:
        return Outcome(compute(*arguments))
    except Exception as error:
        failure = Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
        return Outcome(failure=failure, again=not isinstance(error, RALensError))


def compute_here(
    jobs: Mapping[str, Any], state: Any, compute: Callable[[Any, Any], Any]
) -> Finished:
    """Compute jobs in this process."""
    for key, job in jobs.items():
        yield key, tried(compute, state, job)


# ---- Ray ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What a worker needs: CPUs, GPUs, and bytes of memory beside the GPU's."""

    cpus: int
    gpus: float
    memory: int

    @property
    def told(self) -> str:
        """In words."""
        gpus = f", {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.cpus} CPU{gpus} and {self.memory / 1e9:.1f} GB of memory"

    def room(self, resources: Mapping[str, float]) -> int:
        """How many workers a machine has room for."""
        needs = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return int(min(resources.get(name, 0) // need for name, need in needs.items() if need))


class _Worker:
    """A process of a cluster: loads what it needs, then computes one job after the other."""

    def __init__(self) -> None:
        self._state: Any = None

    def start(self, start: Callable[[], Any]) -> Outcome:
        def load() -> None:
            self._state = start()

        return tried(load)

    def compute(self, compute: Callable[[Any, Any], Any], job: Any) -> Outcome:
        return tried(compute, self._state, job)


@dataclass(eq=False)
class _Crew:
    """The workers of a run, by what they are at: calls, with the worker, and the job's key."""

    ray: Any
    request: Request
    start: Callable[[], Any]
    loading: dict[Any, Any] = field(default_factory=dict[Any, Any])
    idle: list[Any] = field(default_factory=list[Any])
    busy: dict[Any, tuple[Any, str]] = field(default_factory=dict[Any, tuple[Any, str]])
    refused: list[Failure] = field(default_factory=list[Failure])  # why some could not start

    def hire(self, most: int) -> None:
        """Ask for workers, as many as there is room for, up to a number in all."""
        nodes: Sequence[Mapping[str, Any]] = [n for n in self.ray.nodes() if n["Alive"]]
        room = sum(self.request.room(node["Resources"]) for node in nodes)
        if room == 0:
            raise NotEnoughMemory(
                f"no machine of the Ray cluster has {self.request.told}, which one worker needs. "
                "Give a smaller batch_size, or RayEngine(cpus=, gpus=), or take larger machines."
            )
        there = len(self.loading) + len(self.idle) + len(self.busy)
        if len(self.refused) >= _TRIES:
            if there == 0:
                raise self._cannot_start()
            return
        request = self.request
        for _ in range(min(most, room) - there):
            worker = (
                self.ray.remote(_Worker)
                .options(num_cpus=request.cpus, num_gpus=request.gpus, memory=request.memory)
                .remote()
            )
            self.loading[worker.start.remote(self.start)] = worker

    def give(self, key: str, compute: Callable[[Any, Any], Any], job: Any) -> None:
        """Give a job to a worker that has none."""
        worker = self.idle.pop()
        self.busy[worker.compute.remote(compute, job)] = worker, key

    def wait(self) -> Generator[tuple[str, Outcome], None, None]:
        """Wait until a worker has started or ended a job, or for a while; give the ended ones."""
        calls = [*self.loading, *self.busy]
        for call in self.ray.wait(calls, timeout=_LOOK)[0] if calls else ():
            loads = call in self.loading
            worker, key = (self.loading.pop(call), "") if loads else self.busy.pop(call)
            try:
                outcome: Outcome = self.ray.get(call)
            except self.ray.exceptions.RayError as error:  # it was killed, or its machine is gone
                outcome = Outcome(failure=_loss(str(error)), again=True)
                self.ray.kill(worker)
            else:
                self.idle.append(worker)
            if not loads:
                yield key, outcome
            elif outcome.failure is not None:
                self._refused(worker, outcome.failure, again=outcome.again)

    def _refused(self, worker: Any, failure: Failure, *, again: bool) -> None:
        """Let a worker go that could not start; raise where no other one could."""
        self.refused.append(failure)
        if worker in self.idle:
            self.idle.remove(worker)
            self.ray.kill(worker)
        if not again:
            raise self._cannot_start()

    def _cannot_start(self) -> BadInput:
        return BadInput(
            f"a worker could not start: {self.refused[-1].error} Each loads the model as it was "
            "loaded here: what was named then has to be there on every machine of the cluster, "
            "with the same versions of what runs it."
        )

    def dismiss(self) -> None:
        """Let all workers go."""
        for worker in (*self.loading.values(), *self.idle, *(one for one, _ in self.busy.values())):
            self.ray.kill(worker)


def _loss(said: str) -> Failure:
    """Say why Ray gave no outcome; its own words may end in a whole traceback."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said)
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    short = lines[-1] if "Traceback" in plain else " ".join(lines)
    return Failure(f"the worker was lost: {short[:400]}", plain)


def compute_on_ray(
    jobs: Mapping[str, Any],
    start: Callable[[], Any],
    compute: Callable[[Any, Any], Any],
    *,
    engine: RayEngine,
    request: Request,
    running: Callable[[int], None],
) -> Finished:
    """Compute jobs on workers of a Ray cluster; `running` is told how many are being computed.

    Raises:
        BadInput: the cluster cannot be reached, or no worker can start.
        NotEnoughMemory: no machine has what a worker needs.
    """
    waiting, tries = deque(jobs), Counter[str]()
    with _connected(engine) as ray:
        crew = _Crew(ray, request, start)
        try:
            while waiting or crew.busy:
                crew.hire(len(waiting) + len(crew.busy))
                while waiting and crew.idle:
                    key = waiting.popleft()
                    crew.give(key, compute, jobs[key])
                running(len(crew.busy))
                for key, outcome in crew.wait():
                    tries[key] += 1
                    if outcome.again and tries[key] < _TRIES:
                        waiting.append(key)
                    else:
                        yield key, outcome
        finally:
            crew.dismiss()


@contextmanager
def _connected(engine: RayEngine) -> Generator[Any, None, None]:
    """Give Ray, connected to a cluster; what was connected before stays so."""
    ray = _ray()
    if ray.is_initialized():
        yield ray
        return
    _need_somebody_at(engine.address)
    # A cluster that is started here tells nobody of itself.
    silent = {"RAY_USAGE_STATS_ENABLED": "0"} if "RAY_USAGE_STATS_ENABLED" not in os.environ else {}
    os.environ.update(silent)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    try:
        ray.init(address=engine.address, include_dashboard=False, **quiet)
    except Exception as error:  # of every class, where a cluster does not come up in time
        raise _unreachable(engine.address or "this machine", error) from error
    finally:
        for name in silent:
            del os.environ[name]
    try:
        yield ray
    finally:
        ray.shutdown()


def _need_somebody_at(address: str | None) -> None:
    """Raise at once where nobody answers at an address, which Ray takes minutes to say."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            create_connection((host, int(port)), timeout=_LOOK).close()
        except OSError as error:
            raise _unreachable(str(address), error) from error


def _unreachable(address: str, error: Exception) -> BadInput:
    return BadInput(
        f"cannot reach a Ray cluster at {address}: {error} Start one with ray start --head, or "
        "leave the address out."
    )
