"""`fastsitch doctor`: is this machine ready, and are its runs and stores whole?"""

import typer

from fastsitch.cli.options import DebugOption, DeviceOption, RootOption
from fastsitch.cli.text_formats import size, table


def doctor(root: RootOption = None, device: DeviceOption = "auto", debug: DebugOption = False) -> None:
    """Say what this machine will use: device, precision, kernels, threads, versions, disk."""
    import torch

    from fastsitch.files import free_space
    from fastsitch.machine import (
        available_memory,
        native_bf16,
        processor,
        resolve_device,
        resolve_kernel,
        resolve_precision,
        versions,
        waiting_policy,
    )
    from fastsitch.root import Root

    here = Root.at(root)
    chosen = resolve_device(device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else processor()
    bf16 = "native" if native_bf16(chosen) else "not native"
    rows = [
        ["device", f"{chosen.type}: {name}"],
        ["precision", f"{resolve_precision('auto', chosen)} (bf16 is {bf16} here)"],
        ["kernel", resolve_kernel("auto", chosen)],
        ["threads", str(torch.get_num_threads())],
        ["waiting threads", waiting_policy()],
        ["memory", f"{size(available_memory(chosen))} free"],
        ["disk", f"{size(free_space(here.path))} free for {here.path}"],
        *([name, version] for name, version in versions().items()),
    ]
    typer.echo(table(["this machine", "uses"], rows))
