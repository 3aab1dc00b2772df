"""Where a model's weights lie and how they are read: on one device, spread over several, offloaded, quantised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

import psutil
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from peft_graft.config import AUTO, EvaluateConfig, ExportConfig, PairConfig
from peft_graft.errors import DeviceError, ModelError
from peft_graft.processes import local_count, local_index

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_Config = TypeVar("_Config", bound=PairConfig | EvaluateConfig | ExportConfig)
_PairConfig = TypeVar("_PairConfig", bound=PairConfig)


def placed(config: _Config) -> _Config:
    """The config with the device that ``auto`` is on this machine, so that records and keys name the actual one.

    A GPU of CUDA (or ROCm), each process of torchrun its own; else the processor. Apple's GPUs compute nothing in
    float64, which statistics are kept in.
    """
    if config.device != AUTO:
        return config
    own = local_index()
    found = ("cuda" if own is None else f"cuda:{own}") if torch.cuda.is_available() else "cpu"
    return cast(_Config, config.model_copy(update={"device": found}))


def gpus_of(*devices: str | None) -> list[int]:
    """The numbers of the GPUs of CUDA (or ROCm) among some devices."""
    return sorted({int(name.partition(":")[2] or 0) for name in devices if name and name.startswith("cuda")})


def on_worker(config: _PairConfig) -> _PairConfig:
    """The config on a worker of Ray, which sees no GPUs but those that are its task's, counted from 0."""
    names = {name: getattr(config, name) for name in ("device", "student_device")}
    given = gpus_of(*names.values())
    moved = {
        name: f"cuda:{given.index(own[0])}"
        for name, device in names.items()
        if (own := gpus_of(device)) and given.index(own[0]) != own[0]
    }
    return config.model_copy(update=moved)


def check_device(device: str) -> torch.device:
    """The device by its torch name: ``cpu``, ``cuda``, ``cuda:1``, ``mps``.

    Raises:
        DeviceError: no such device on this machine.
    """
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = ["cpu"]
        if torch.cuda.is_available():
            available += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        if torch.backends.mps.is_available():
            available.append("mps")
        raise DeviceError(
            "no such device", where=f"--device {device}", found=f"available: {', '.join(available)}"
        ) from error
    return chosen


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model's inputs belong and its outputs come back, also when its weights wait elsewhere."""
    for module in model.modules():  # the first that computes, if accelerate has placed them
        place = getattr(vars(module).get("_hf_hook"), "execution_device", None)
        if place is not None:
            return torch.device(place)
    return torch.device(model.device)


def free_bytes(device: torch.device) -> int:
    """How much memory a device has left; processes that run side by side share a host's.

    What torch holds on a GPU and does not use counts as free.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return int(psutil.virtual_memory().available) // local_count()


def bytes_by_device(model: nn.Module) -> Counter[torch.device]:
    """Where a model's parameters are, and how much of them; not those that wait on a disk."""
    found = Counter[torch.device]()
    for value in model.parameters():
        if not value.is_meta:
            found[value.device] += value.nbytes
    return found


def seed_generators(seed: int, device: torch.device) -> None:
    """What ``torch.manual_seed`` does, for the processor and devices of one sort.

    For devices that nothing has used yet, torch notes the place that it is called from, which takes longer than a
    training step of a small model.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        module = torch.get_device_module(device)
        getattr(module, "manual_seed_all", module.manual_seed)(seed)


def trainable_attention(device: torch.device, *, bf16: bool) -> AbstractContextManager[Any]:
    """The attention to compute forward passes with whose gradients may be asked for.

    On processors, the gradients of torch's fused attention in bfloat16 take longer than all the rest of a training
    step: its parts one by one are several times as fast there. Elsewhere, and without gradients, nothing changes.
    """
    if bf16 and device.type == "cpu" and torch.is_grad_enabled():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()


def is_blank(model: PreTrainedModel) -> bool:
    """Whether the model has shapes only, no values here or offloaded."""
    return all(value.is_meta for value in model.parameters()) and not getattr(model, "hf_device_map", None)


def is_quantised(model: nn.Module) -> bool:
    """Whether transformers loaded the model with quantised weights."""
    return bool(getattr(model, "is_quantized", False))


def is_spread(model: nn.Module) -> bool:
    """Whether the model must stay where accelerate put it: on several devices, or offloaded."""
    return len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1


def check_range(model: nn.Module, where: str) -> None:
    """Refuse weights that became infinite in the dtype that they were loaded in.

    Raises:
        ModelError: there are some.
    """
    for name, value in model.named_parameters():
        if value.is_floating_point() and not value.is_meta and not bool(torch.isfinite(value).all()):
            raise ModelError(
                "weights are too large for float16",
                where=where,
                found=f"infinity or NaN in {name}",
                fix="give --dtype bfloat16 or float32",
            )


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights on a processor, which serves inference and stops all learning."""
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


class BaseTensors(Mapping[str, Tensor]):
    """A base model's tensors by path, each read when it is asked for.

    One that is offloaded is fetched, and one that is quantised is dequantised, so that nothing is held twice.

    Args:
        model: the base model. missing: names to leave out. more: further tensors by path.
    """

    def __init__(self, model: nn.Module, missing: frozenset[str], more: Mapping[str, Tensor]) -> None:
        self._is_quantised, self._more = is_quantised(model), more
        self._owners = dict(model.named_modules(remove_duplicate=False))
        kept = {*dict(model.named_parameters(remove_duplicate=False)), *dict(model.named_buffers())}
        self._names = dict.fromkeys(name for name in model.state_dict() if name in kept - missing)

    def __getitem__(self, name: str) -> Tensor:
        if name in self._more:
            return self._more[name]
        if name not in self._names:
            raise KeyError(name)
        path, _, leaf = name.rpartition(".")
        owner = self._owners[path]
        value: Tensor = getattr(owner, leaf)
        if value.is_meta and getattr(owner, "_hf_hook", None) is not None:
            from accelerate.utils import align_module_device

            with align_module_device(owner):
                return getattr(owner, leaf).detach().clone()  # type: ignore[no-any-return]
        if leaf == "weight" and self._is_quantised:
            from peft.utils.integrations import dequantize_module_weight

            value = dequantize_module_weight(owner)
        return value.detach()

    def __contains__(self, name: object) -> bool:
        return name in self._more or name in self._names  # without reading it

    def __iter__(self) -> Iterator[str]:
        yield from self._names
        yield from self._more

    def __len__(self) -> int:
        return len(self._names) + len(self._more)
