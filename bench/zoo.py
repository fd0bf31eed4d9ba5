"""Which networks of torchvision and timm are cut exactly, with every block a position; writes docs/zoo.md.

    python bench/zoo.py --work FOLDER [--timm 220] [--only PATTERN] [--page docs/zoo.md] [--json FILE]

Every network is built without weights, as `fastsitch add` builds it, given random values where it starts with zeros and
ones, cut at its default positions, and compared with itself bit by bit: from the image and from up to 8 positions on,
for 1 and for 3 images.
Each runs in a process of its own, on one thread, with a time limit; outcomes are appended to FOLDER/zoo.jsonl, so that
an interrupted run goes on where it stopped.
"""

import argparse
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsitch.chains.chain import Chain
from fastsitch.chains.cut_points import CutGraph
from fastsitch.chains.module_between_cuts import cut_module
from fastsitch.chains.vet_chain import vet_chain
from fastsitch.errors import FastsitchError
from fastsitch.machine import versions
from fastsitch.networks.model_source import ModelSource

PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
CLASSES = 10
SIDES = (64, 96, 128)
"""Smaller than most defaults, to save time; a network that is not cut so is tried at its own size."""

LARGE = re.compile(
    r"giant|gigantic|huge|enormous|large|base|xlarge|_[bl](\d|_|$)|_x?xxl|[gh]14|so\d+m|[5-9]b|\d{3}d?_?\d*x"
)
"""Names of architectures that are not small, where there are others: building them takes time."""

MOST_PARAMETERS = 60_000_000
MOST_SECONDS = 600
MOST_TAILS = 8
MOST_BETWEEN = 0.6
"""Of the operations of a network, between two positions: more, and its blocks are beside each other."""

Row = dict[str, Any]


def torchvision_names() -> list[str]:
    """All classifiers."""
    from torchvision import models

    return models.list_models(module=models)


def timm_parameters() -> Row:
    """Parameters of every architecture of timm, on the meta device, by its module; None where that cannot be told."""
    import timm

    def parameters(name: str) -> int | None:
        try:
            with torch.device("meta"):
                model = timm.create_model(name, pretrained=False)
        # its own code, on tensors without values
        except Exception:
            return None
        return sum(parameter.numel() for parameter in model.parameters())

    listed = {module: timm.list_models(module=module) for module in timm.list_modules()}
    small = {module: [name for name in names if not LARGE.search(name)] or names for module, names in listed.items()}
    return {module: {name: parameters(name) for name in names} for module, names in small.items() if names}


def chosen(counted: dict[str, dict[str, int | None]], wanted: int) -> list[str]:
    """At least so many architectures: the smallest of every module and of every word in it, then the next ones."""
    by_module = {
        module: sorted(names, key=lambda name: (names[name] is None, names[name] or 0, name))
        for module, names in counted.items()
    }
    taken: list[str] = []
    for module, names in by_module.items():
        seen: set[str] = set()
        for name in names:
            word = re.split(r"[\d_]", name)[0]
            small = (counted[module][name] or 0) <= MOST_PARAMETERS
            if not seen or (word not in seen and small):
                taken.append(name)
            seen.add(word)
    for place in range(max(map(len, by_module.values()), default=0)):
        for module, names in by_module.items():
            if len(taken) >= wanted:
                return sorted(taken)
            name = names[place] if place < len(names) else None
            if name is not None and name not in taken and (counted[module][name] or MOST_PARAMETERS) < MOST_PARAMETERS:
                taken.append(name)
    return sorted(taken)


def own_side(source: str) -> int:
    """The side of the images that a network is meant for."""
    kind, _, name = source.partition(":")
    if kind == "timm":
        import timm

        size = getattr(timm.get_pretrained_cfg(name), "input_size", None)
        return 224 if size is None else max(size[1:])
    return 299 if name == "inception_v3" else 224


def images(count: int, side: int) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Normalisation that is not the identity, and no weights that are zero or tiny from the start."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.named_parameters():
        if tensor.dim() < 2 or name.endswith(("layer_scale", "gamma")):
            low = 0.5 if name.endswith(("weight", "gamma", "layer_scale")) else -0.3
            nn.init.uniform_(tensor, low, low + 0.6, generator=generator)
        elif not tensor.any():
            nn.init.normal_(tensor, std=0.1, generator=generator)
    for name, tensor in model.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            low = 0.5 if name.endswith("var") else -0.3
            nn.init.uniform_(tensor, low, low + 0.6, generator=generator)
    # what is derived from weights for evaluation
    model.train()
    model.eval()


def hides_blocks(model: nn.Module, path: str) -> bool:
    """Whether a module that is run as a whole holds several modules of one kind in a row."""
    rows = (m for m in model.get_submodule(path).modules() if isinstance(m, nn.Sequential | nn.ModuleList))
    kinds = ([type(child) for child in row if any(True for _ in child.children())] for row in rows)
    return any(len(row) > len(set(row)) for row in kinds)


def longest_gap(graph: CutGraph, chain: Chain) -> float:
    """The largest share of a network's operations between two positions."""
    names = {position.name for position in chain.positions}
    ends = [0, *(graph.order[point.node] for point in graph.points if names & set(point.aliases)), len(graph.data) - 1]
    return max(after - before for before, after in pairwise(ends)) / len(graph.data)


@torch.no_grad()
def cut(source: str, side: int) -> Row:
    """What comes of a network at one size."""
    model = ModelSource.parse(source).build(CLASSES, (3, side, side))
    randomise(model)
    # as Chain.from_module does with all but an nn.Sequential, and with the graph at hand
    found = cut_module(model, images(1, side))
    graph = found.graph
    chain = Chain(found.segments, found.head, found.names, (3, side, side), found.layouts)
    vet_chain(chain, "it")
    wrong = []
    for count in (1, 3):
        x = images(count, side)
        expected = model(x)
        representations = chain.representations(x)
        if not torch.equal(chain(x), expected):
            wrong.append(f"the input with {count} images")
        every = -(-len(representations) // MOST_TAILS)
        for position, representation in [*zip(chain.positions, representations, strict=True)][::every]:
            if not torch.equal(chain.tail(representation.clone(), position.index), expected):
                wrong.append(f"{position.name} with {count} images")
    left_out = graph.left_out()
    hidden = [path for path in graph.trace.opaque if hides_blocks(model, path)]
    reasons = [
        *(f"other bits from {name} on" for name in wrong[:1]),
        *(f"{path} is run as a whole ({graph.trace.opaque[path]})" for path in hidden[:1]),
        *(f"{len(left_out)} blocks are no positions, {path}: {why}" for path, why in [*left_out.items()][:1]),
    ]
    if not reasons and longest_gap(graph, chain) > MOST_BETWEEN:
        reasons.append(f"{100 * longest_gap(graph, chain):.0f} % of its operations lie between two positions")
    return {
        "side": side,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "positions": len(chain.positions),
        "blocks": sum(point.node in graph.blocks for point in graph.points),
        "left_out": len(left_out),
        "exported": graph.trace.exported,
        "exact": not wrong,
        "full": not reasons,
        "reason": "; ".join(reasons),
    }


def outcome(source: str) -> Row:
    """The first size at which a network is cut as it should be, or what is wrong at its own."""
    last: Row = {}
    own = own_side(source)
    for side in [*(side for side in SIDES if side < own), own]:
        try:
            last = cut(source, side)
        except FastsitchError as error:
            last = {"side": side, "reason": str(error).removeprefix(f"{source}: ")}
        # whatever a network's code raises is the answer
        except Exception as error:
            last = {"side": side, "reason": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
        if last.get("full"):
            break
    return last


def in_a_process(work: Callable[..., Row], *arguments: Any, seconds: float = MOST_SECONDS) -> Row:
    """What a function returns, in a process that has loaded everything already."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def run(pipe: Connection) -> None:
        torch.set_num_threads(1)
        pipe.send(work(*arguments))

    process = context.Process(target=run, args=(sending,))
    process.start()
    sending.close()
    try:
        answer: Row = receiving.recv() if receiving.poll(seconds) else {"reason": f"took more than {seconds:.0f} s"}
    except EOFError:
        answer = {"reason": "its process was killed"}
    process.kill()
    process.join()
    return answer


def done(path: Path) -> dict[str, Row]:
    """Outcomes of earlier attempts; the last line may have been cut off."""
    rows: dict[str, Row] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
            rows[row["network"]] = row
        except (ValueError, KeyError):
            continue
    return rows


def page(rows: Sequence[Row]) -> str:
    """docs/zoo.md."""
    full = sum(bool(row.get("full")) for row in rows)
    exact = sum(bool(row.get("exact")) for row in rows)
    by_library = {
        library: [row for row in rows if row["network"].startswith(f"{library}:")]
        for library in ("torchvision", "timm")
    }
    counts = ", ".join(
        f"{sum(bool(row.get('full')) for row in part)} of {len(part)} of {library}"
        for library, part in by_library.items()
    )
    lines = [
        "# Networks that were tried",
        "",
        f"{full} of {len(rows)} networks ({100 * full / max(1, len(rows)):.1f} %) are cut bit by bit exactly with "
        f"every block a position ({counts}); {exact} are cut exactly. Every classifier of torchvision was tried, and "
        "of every module of timm the smallest architectures, without weights. `bench/zoo.py` writes this page "
        f"(torch {torch.__version__.partition('+')[0]}, one CPU thread).",
        "",
        "*Exact*: from the image and from up to eight positions on, for 1 and for 3 images, the segments give the "
        "network's own logits, bit by bit. *Blocks* is how many are positions, of how many there are; 0 where nothing "
        "branches, and every layer is a position. *Traced by export* are networks that torch.fx cannot trace.",
        "",
    ]
    for library, part in by_library.items():
        lines += [
            f"## {library}",
            "",
            "| network | side | positions | blocks | exact | why not |",
            "|---|---|---|---|---|---|",
        ]
        for row in part:
            _, _, name = row["network"].partition(":")
            blocks = f"{row['blocks']} of {row['blocks'] + row['left_out']}" if "blocks" in row else ""
            answer = ("yes" if row["exact"] else "no") if "exact" in row else "not cut"
            note = row.get("reason", "") or ("traced by export" if row.get("exported") else "")
            shown = (
                re.sub(r"/\S*/(?=[^/\s]+\.py)", "", note).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
            )
            cells = [f"`{name}`", str(row.get("side", "")), str(row.get("positions", "")), blocks, answer, shown]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the outcomes")
    parser.add_argument("--timm", type=int, default=220, help="how many architectures of timm at least")
    parser.add_argument("--only", default="*", help="networks that match, such as 'timm:vit*'; repeats them")
    parser.add_argument("--page", type=Path, help="where the page is written, such as docs/zoo.md")
    parser.add_argument("--json", type=Path, help="where all rows are written")
    options = parser.parse_args(None if argv is None else list(argv))
    options.work.mkdir(parents=True, exist_ok=True)
    path, counts = options.work / "zoo.jsonl", options.work / "parameters.json"
    if options.timm and not counts.exists():
        counts.write_text(json.dumps(in_a_process(timm_parameters, seconds=3600)))
    names = [f"timm:{name}" for name in chosen(json.loads(counts.read_text()), options.timm)] if options.timm else []
    networks = [*(f"torchvision:{name}" for name in torchvision_names()), *names]
    rows = done(path)
    for number, network in enumerate(networks):
        if not fnmatchcase(network, options.only) or (network in rows and options.only == "*"):
            continue
        start = time.monotonic()
        row = {"network": network, **in_a_process(outcome, network), "seconds": round(time.monotonic() - start, 1)}
        rows[network] = row
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        state = "full" if row.get("full") else "exact" if row.get("exact") else "no"
        print(
            f"{number + 1}/{len(networks)} {network}: {state}, {row['seconds']} s {row.get('reason', '')}", flush=True
        )
    ordered = [rows[network] for network in networks if network in rows]
    if options.json:
        options.json.write_text(json.dumps({"versions": versions(), "networks": ordered}, indent=1) + "\n")
    if options.page:
        options.page.write_text(page(ordered))
    full = sum(bool(row.get("full")) for row in ordered)
    print(f"{full} of {len(ordered)} are cut bit by bit exactly with every block a position")
    return 0


if __name__ == "__main__":
    sys.exit(main())
