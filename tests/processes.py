"""Processes that tests kill, interrupt or start several of, without the imports that take longer than all they do."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from peft_graft.cli.main import main

#: Copies of this process, which has imported everything; after work on CUDA it cannot be copied.
METHOD = "forkserver" if torch.cuda.is_available() else "fork"
_CONTEXT = multiprocessing.get_context(METHOD)


def start(
    function: Callable[..., object], *arguments: object, out: Path | str = os.devnull, err: Path | str = os.devnull
) -> BaseProcess:
    """Run a function in a process of its own.

    Args:
        out, err: file or terminal that standard output and standard error go to.
    """
    process = _CONTEXT.Process(target=_run, args=(function, arguments, (str(out), str(err))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns that threads are not copied
        process.start()
    return process


def command(*arguments: str) -> None:
    """``peft-graft``, to be started."""
    sys.argv = ["peft-graft", *arguments]
    main()


def torchrun(count: int, *arguments: str) -> None:
    """``peft-graft`` as ``torchrun --standalone`` starts it, in copies of this process in place of new ones."""
    settings = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=count, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, start_method=METHOD,
    )  # fmt: skip
    elastic_launch(settings, _one_of_several)(*arguments)


def _one_of_several(*arguments: str) -> None:
    try:
        command(*arguments)
    except SystemExit as ended:  # which torchrun takes for a failure of any code
        if ended.code:
            raise


def _run(function: Callable[..., object], arguments: tuple[object, ...], streams: tuple[str, str]) -> None:
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell puts in the background ignores it
    warnings.resetwarnings()
    function(*arguments)
