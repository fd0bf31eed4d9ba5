"""Work on a GPU as a CUDA graph: its kernels are launched all at once instead of one by one from Python."""

from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

Result = TypeVar("Result")


def record(work: Callable[[], Result], device: torch.device) -> tuple[Callable[[], None], Result]:
    """Record what ``work`` launches on a CUDA device; returns a replay, and what ``work`` returned.

    Nothing is computed while recording. Every replay reads and writes the memory that was used in the recording, and
    overwrites the result; ``work`` lives as long as the replay, and so do the tensors that it holds. Call ``work`` once
    before, so that everything is compiled and lasting memory is allocated. Raises RuntimeError when ``work`` waits for
    the device; what was recorded until then has not run.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        # the graph allocates memory for temporary tensors again, beside what the cache holds for them
        torch.cuda.empty_cache()
        # other threads copy to the device meanwhile: never on this stream, since theirs have another priority
        with torch.cuda.stream(torch.cuda.Stream(device, priority=-1)):  # type: ignore[no-untyped-call]
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                result = work()
            except BaseException:
                # ending the capture fails too, with an error that says less
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()

    def replay(kept: object = work) -> None:
        graph.replay()

    return replay, result
