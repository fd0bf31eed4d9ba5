"""Training steps that are recorded once and replayed, on CUDA."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from fastsitch.activations.representation_batch import Batch
from fastsitch.kernels.cuda_graph import record

log = logging.getLogger(__name__)

WARM_UP = 3
"""Steps that run before one is recorded: they compile, allocate what lasts, and create the optimizer's state."""

MOST_REFUSALS = 3
"""After so many groups whose steps could not be recorded, this process stops trying."""

_refusals: list[str] = []

Record = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]
"""record(work): a replay, and the tensor into which it writes what ``work`` returns."""


class RecordedStep:
    """A training step that is replayed from a recording after its first calls; on devices without CUDA, run as it is.

    A step launches hundreds of kernels, many of which take less time than Python takes to launch them. The recording
    reads batches from a fixed address in memory, where a resident or streamed source puts all of them. A batch at
    another address is trained on without the recording, and a step that cannot be recorded never is. What changes from
    step to step, such as the learning rate, has to be a tensor on the device. The losses that a call returns are
    overwritten by the next one.
    """

    def __init__(self, step: Callable[[Batch], Tensor], device: torch.device, record: Record | None = None) -> None:
        self._step = step
        self._record = _recorder(device) if record is None else record
        if len(_refusals) >= MOST_REFUSALS:
            self._record = None
        self._replay: Callable[[Batch], Tensor] | None = None
        self._address: object = None
        self._calls = 0

    def __call__(self, batch: Batch) -> Tensor:
        if self._record is None:
            return self._step(batch)
        if batch.address != self._address:
            self._address, self._calls, self._replay = batch.address, 0, None
        self._calls += 1
        if self._calls == WARM_UP + 1:
            self._replay = self._recorded(batch)
        return self._step(batch) if self._replay is None else self._replay(batch)

    def _recorded(self, batch: Batch) -> Callable[[Batch], Tensor] | None:
        assert self._record is not None
        index, labels = batch.index.clone(), batch.labels.clone()
        step = self._step
        try:
            # the closure leaves out this object, which will hold the replay: no cycle keeps the memory alive
            replay, loss = self._record(lambda: step(batch.of(index, labels)))
        except RuntimeError as error:
            reason = str(error).strip().split("\n")[0]
            log.warning("steps are not recorded as a CUDA graph, which makes them slower (%s)", reason)
            _refusals.append(reason)
            self._record = None
            return None

        def run(batch: Batch) -> Tensor:
            index.copy_(batch.index)
            labels.copy_(batch.labels)
            replay()
            return loss

        return run


def _recorder(device: torch.device) -> Record | None:
    return (lambda work: record(work, device)) if device.type == "cuda" else None
