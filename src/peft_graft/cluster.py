"""Tasks on Ray, on this machine or on a cluster: one function, called for many things, wherever there is room."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from peft_graft.errors import GraftError, PlanError, not_installed, reason
from peft_graft.processes import Processes


class Tasks:
    """Calls of a function on Ray, a task each; that of a worker that dies is made again elsewhere.

    Args:
        address: of the cluster, or ``local`` to use this machine. function: that is called; workers import it.
        cpus, gpus: that one task takes. of: what a task is for, in messages.
        shared: the first arguments of every call, which are sent to each node once.

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
    ) -> None:
        ray = self._ray = start_ray(address)
        offered: dict[str, float] = ray.cluster_resources()
        asked = {"CPU": cpus, "GPU": gpus}
        fitting = [int(offered.get(kind, 0) // amount) for kind, amount in asked.items() if amount]
        self.slots = min(fitting, default=1)
        if self.slots < 1:
            raise PlanError(
                f"no node has the resources of a {of}",
                where=f"--ray {address}",
                expected=f"{cpus:g} CPUs and {gpus:g} GPUs",
                found=f"{offered.get('CPU', 0):g} CPUs and {offered.get('GPU', 0):g} GPUs in all",
            )
        here = Path.cwd()

        def task(*arguments: Any) -> Any:
            with suppress(OSError):  # names of what lies here are found where nodes share the folder
                os.chdir(here)
            return function(*arguments)

        self._remote = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=-1)(task)
        self._shared = [ray.put(one) for one in shared]
        self._running: dict[Any, Any] = {}

    def start(self, key: Any, *arguments: Any) -> None:
        """Call the function as soon as there is room; ``key`` is what its result comes back with."""
        self._running[self._remote.remote(*self._shared, *arguments)] = key

    @property
    def running(self) -> int:
        """Calls whose results have not been taken."""
        return len(self._running)

    def next(self) -> tuple[Any, Any]:
        """The key and the result of the next call that ends.

        Raises:
            GraftError: the function raised it; other errors as Ray gives them.
        """
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        key = self._running.pop(ready[0])
        try:
            return key, self._ray.get(ready[0])
        except self._ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, GraftError) else error) from None

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
