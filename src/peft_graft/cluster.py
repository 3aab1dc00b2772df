"""Tasks on Ray, on this machine or on a cluster: one function, called for many things, wherever there is room."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_graft.errors import DeviceError, GraftError, PlanError, not_installed, reason
from peft_graft.processes import Processes

#: Workers that may die over one task.
_LIVES = 5


class Tasks:
    """Calls of a function on Ray, a task each; that of a worker that dies is made again elsewhere, a few times.

    Args:
        address: of the cluster, or ``local`` to use this machine. function: that is called; workers import it.
        cpus, gpus: that one task takes. of: what a task is for, in messages.
        shared: the first arguments of every call, which are sent to each node once.
        lost: gives the result of a call over which worker after worker has died, from its key and the error, which is
            raised where this is left out.

    Attributes:
        slots: tasks that can run at a time.

    Raises:
        DependencyError: Ray is not installed. PlanError: there is no such cluster, or no room for a task in it.
    """

    def __init__(
        self,
        address: str,
        function: Callable[..., Any],
        *,
        of: str,
        cpus: float = 1,
        gpus: float = 0,
        shared: Sequence[Any] = (),
        lost: Callable[[Any, DeviceError], Any] | None = None,
    ) -> None:
        ray = self._ray = start_ray(address)
        nodes: list[dict[str, float]] = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.slots = _slots(nodes, {"CPU": cpus, "GPU": gpus})
        if self.slots < 1:
            raise PlanError(
                f"no node has the resources of a {of}",
                where=f"--ray {address}",
                expected=f"{cpus:g} CPUs and {gpus:g} GPUs",
                found=" and ".join(
                    sorted({f"{one.get('CPU', 0):g} CPUs with {one.get('GPU', 0):g} GPUs" for one in nodes})
                ),
            )
        here = Path.cwd()

        def task(*arguments: Any) -> Any:
            with suppress(OSError):  # names of what lies here are found where nodes share the folder
                os.chdir(here)
            return function(*arguments)

        # Ray itself would try for ever where memory runs out.
        self._remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(task)
        self._shared = [ray.put(one) for one in shared]
        self._running: dict[Any, _Call] = {}
        self._what, self._lost = (of, f"--ray {address}"), lost

    def start(self, key: Any, *arguments: Any) -> None:
        """Call the function as soon as there is room; ``key`` is what its result comes back with."""
        self._start(_Call(key, arguments))

    def _start(self, call: _Call) -> None:
        self._running[self._remote.remote(*self._shared, *call.arguments)] = call

    @property
    def running(self) -> int:
        """Calls whose results have not been taken."""
        return len(self._running)

    def next(self) -> tuple[Any, Any]:
        """The key and the result of the next call that ends.

        Raises:
            GraftError: the function raised it; other errors as Ray gives them. DeviceError: workers die over it.
        """
        errors = self._ray.exceptions
        deaths = (errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError, errors.ObjectLostError)
        while True:
            ready, _ = self._ray.wait(list(self._running), num_returns=1)
            call = self._running.pop(ready[0])
            try:
                return call.key, self._ray.get(ready[0])
            except errors.RayTaskError as error:
                raise (error.cause if isinstance(error.cause, GraftError) else error) from None
            except deaths as error:
                if call.died + 1 < _LIVES:
                    self._start(replace(call, died=call.died + 1))
                    continue
                found = self._killed(error)
                if self._lost is None:
                    raise found from None
                return call.key, self._lost(call.key, found)

    def _killed(self, error: Exception) -> DeviceError:
        what, where = self._what
        return DeviceError(
            f"{_LIVES} workers have died over the same {what}, of too little memory most likely",
            where=where,
            found=reason(error),
            fix="give tasks more memory: fewer at a time, on larger nodes, or with less to do in each",
        )

    def results(self, calls: Iterable[Sequence[Any]]) -> Generator[tuple[int, Any], None, None]:
        """The number and the result of each call, as they end; what still runs is cancelled where no more are taken.

        Args:
            calls: the arguments of each, after the shared ones.

        Raises:
            GraftError: see ``next``.
        """
        with closing(self):
            for number, arguments in enumerate(calls):
                self.start(number, *arguments)
            while self._running:
                yield self.next()

    def close(self) -> None:
        """Cancel what runs."""
        for task in self._running:
            self._ray.cancel(task)
        self._running.clear()


@dataclass(frozen=True)
class _Call:
    """``died``: workers over it."""

    key: Any
    arguments: Sequence[Any]
    died: int = 0


def _slots(nodes: Sequence[Mapping[str, float]], asked: Mapping[str, float]) -> int:
    """Tasks that can run at a time, each on one of the nodes."""
    wanted = {kind: amount for kind, amount in asked.items() if amount}
    return (
        sum(min(int(node.get(kind, 0) // amount) for kind, amount in wanted.items()) for node in nodes) if wanted else 1
    )


def start_ray(address: str) -> Any:
    """Ray, connected to a cluster or started on this machine (``local``).

    Raises:
        DependencyError: it is not installed. PlanError: there is no such cluster.
    """
    try:
        import ray
    except ImportError as error:
        raise not_installed("ray", "study") from error
    if not ray.is_initialized():
        try:
            ray.init(
                address=None if address == "local" else address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise PlanError(
                "no cluster of Ray can be reached",
                where=f"--ray {address}",
                expected="local for this machine, auto for the cluster that it belongs to, or the address of one",
                found=reason(error),
            ) from error
    return ray


def check_alone(address: str | None) -> None:
    """Refuse Ray among several processes, each of which would start the same tasks.

    Raises:
        PlanError: there are some.
    """
    if address is not None and not Processes.started().alone:
        raise PlanError(
            "work is shared out by Ray or among processes of torchrun, not by both",
            where=f"--ray {address}",
            expected="one process",
            found=f"{Processes.started().count} of them",
            fix="start one, or leave --ray out",
        )
