"""The pages of the documentation do what they say: their commands and their Python run as they stand there.

Comments in a page's source say what a test cannot know: ``<!-- first: COMMAND -->`` is run before the page, and a block
behind ``<!-- not run: WHY -->`` is held against the parser, or compiled, only.
"""

import importlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import fastsitch
from fastsitch.cli.main import app
from fastsitch.data import read_dataset as load
from tests.conftest import Command
from tests.test_remote import KEYS, serve

PROJECT = Path(__file__).parents[1]
PAGES = [path for pattern in ("*.md", "bench/*.md", "docs/**/*.md") for path in sorted(PROJECT.glob(pattern))]

FENCED = re.compile(r"(?:^<!-- not run: (?P<why>[^>]+) -->\n)?^```(?P<head>[^\n]*)\n(?P<text>.*?)^```$", re.M | re.S)
FIRST = re.compile(r"^<!-- first: (.+) -->$", re.M)
INLINE = re.compile(r"`([^`]+)`")

OTHER_TOOLS = ("make", "pip", "git")
SCRIPT = re.compile(r"python (bench/\w+\.py)")
LANGUAGES = ("sh", "python", "text")

BUCKET = "my-bucket"


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and title, its text, and why it is not run, if it is not."""

    language: str
    title: str
    text: str
    why: str | None

    @property
    def commands(self) -> list[str]:
        """Lines of a shell, continued ones joined, without those that are comments alone."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if shlex.split(line, comments=True)]


def blocks(page: Path) -> Iterator[Block]:
    for found in FENCED.finditer(page.read_text()):
        language, _, title = found["head"].partition(" ")
        yield Block(language, title.removeprefix('title="').removesuffix('"'), found["text"], found["why"])


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text())


def page_id(page: Path) -> str:
    return page.relative_to(PROJECT).as_posix()


def parse(arguments: list[str]) -> None:
    """Hold a command line against the parser: the command, its options and their values; nothing is run."""
    group = typer.main.get_command(app)
    context = group.context_class(group, info_name="fastsitch")
    command = group.get_command(context, arguments[0])
    assert command is not None, f"there is no command {arguments[0]}"
    # as main() does it: --ray may stand without an address
    command.make_context(arguments[0], main_arguments(arguments[1:]), parent=context)


def main_arguments(arguments: list[str]) -> list[str]:
    return importlib.import_module("fastsitch.cli.options").with_addresses(arguments)


@pytest.fixture
def few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 128 and 48 images in the place of the embedded ones, so that commands end in seconds."""
    (x_train, y_train), (x_test, y_test) = load._BY_NAME["fashion-mini"](Path())
    small = ((x_train[:128], y_train[:128]), (x_test[:48], y_test[:48]))
    monkeypatch.setitem(load._BY_NAME, "fashion-mini", lambda data_dir: small)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server, url = serve(BUCKET)
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": url}.items():
        monkeypatch.setenv(name, value)
    yield
    server.kill()
    server.wait()


class Reader:
    """Somebody who does what a page says, from top to bottom, in an empty folder."""

    def __init__(self, page: Path, run_cli: Command) -> None:
        self.page = page
        self.names: dict[str, Any] = {"__name__": "page"}
        self._run_cli = run_cli

    def shell(self, line: str) -> None:
        program, *arguments = shlex.split(line, comments=True)
        if program in OTHER_TOOLS:
            return
        assert program == "fastsitch", f"{page_id(self.page)}: what does a test do with {line!r}?"
        ended = self._run_cli(*arguments)
        assert ended.returncode == 0, f"{page_id(self.page)}: {line}\n{ended.stderr}"

    def do(self, block: Block) -> None:
        if block.language == "sh":
            for line in block.commands:
                self.shell(line)
        elif block.title:
            Path(block.title).write_text(block.text)
        else:
            exec(compile(block.text, f"{page_id(self.page)}: {block.text[:40]!r}", "exec"), self.names)


def pages_with_blocks() -> Iterator[Any]:
    for page in PAGES:
        found = [block for block in blocks(page) if block.language in ("sh", "python")]
        needs_bucket = any(f"s3://{BUCKET}" in block.text for block in found)
        marks = [pytest.mark.slow, *([pytest.mark.bucket] if needs_bucket else [])]
        if found:
            yield pytest.param(page, id=page_id(page), marks=marks)


def read(page: Path, run_cli: Command, request: pytest.FixtureRequest) -> Reader:
    reader = Reader(page, run_cli)
    for line in FIRST.findall(page.read_text()):
        reader.shell(line)
    for block in blocks(page):
        if block.language in ("sh", "python") and block.why is None:
            if f"s3://{BUCKET}" in block.text:
                request.getfixturevalue("bucket")
            reader.do(block)
    return reader


@pytest.mark.parametrize("page", [*pages_with_blocks()])
@pytest.mark.usefixtures("few_images")
def test_the_blocks_of_a_page_run(
    page: Path, run_cli: Command, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    # files that commands of a page name by their path in the repository
    shutil.copytree(PROJECT / "docs" / "families", "docs/families", ignore=shutil.ignore_patterns("*.png", "*.npz"))
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    names = read(page, run_cli, request).names
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    if page.name == "python.md" and page.parent.name == "guides":
        assert names["accuracy"].shape == (5, 6)
        pair = names["pair"]
        assert pair.accuracy.shape == (3, 3)
        assert (pair.status == 1).all()
        assert np.isfinite(names["matched"].matched_error).all()
        for path in ("results/R1111--R1112.T2T.npz", "results/R1111--R1112.T2T.png", "two-modules.npz"):
            assert Path(path).is_file()


@pytest.mark.slow
def test_the_modules_of_the_python_page_learn(run_cli: Command) -> None:
    """On as many images as the page says: chance is 0.1."""
    page = PROJECT / "docs/guides/python.md"
    reader = Reader(page, run_cli)
    reader.names |= {"fastsitch": fastsitch, "numpy": np}
    section = page.read_text().partition("## Two modules in memory")[2]
    for found in FENCED.finditer(section):
        reader.do(Block("python", "", found["text"], None))
        if "pair" in reader.names:
            break
    assert reader.names["pair"].accuracy.mean() > 0.4


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_blocks_that_are_not_run_are_right_as_far_as_can_be_told(page: Path) -> None:
    for block in blocks(page):
        assert block.language in LANGUAGES, f"expected one of {LANGUAGES}, found {block.language!r}"
        if block.language == "python":
            compile(block.text, page_id(page), "exec")
        elif block.language == "sh":
            for line in block.commands:
                program, *arguments = shlex.split(line, comments=True)
                script = SCRIPT.match(line)
                if program == "fastsitch":
                    parse(arguments)
                elif script is not None:
                    assert (PROJECT / script[1]).is_file(), line
                else:
                    assert program in OTHER_TOOLS, line


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_command_hides_outside_blocks(page: Path) -> None:
    """Indented code would be run by nobody."""
    assert not re.findall(r"^(?: {4}|\t)\$? ?fastsitch .*$", prose(page), re.M)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_options_that_are_mentioned_exist(page: Path) -> None:
    """In prose too: ``sweep --receiver-bn batch``, ``--positions`` or ``fastsitch tables RUN``."""
    group = typer.main.get_command(app)
    context = group.context_class(group, info_name="fastsitch")
    options = {
        name: {option for parameter in group.get_command(context, name).params for option in parameter.opts}
        for name in group.list_commands(context)
    }
    everywhere = set().union(*options.values()) | {"--help", "--version", "--install-completion"}
    for code in INLINE.findall(prose(page)):
        words = code.removeprefix("fastsitch ").split()
        mentioned = {word.split("=")[0] for word in words if word.startswith("--")}
        if words and words[0] in options:
            assert mentioned <= options[words[0]] | {"--help"}, code
        elif words and words[0].startswith("--"):
            assert mentioned <= everywhere, code
        assert not code.startswith("fastsitch ") or words[0] in {*options, "COMMAND"} or words[0][0] == "-", code


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose(page)):
        # made while the site is built
        if target.endswith("commands.md"):
            continue
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_are_mentioned_exist(page: Path) -> None:
    """By their path in the repository or in the package."""
    for path in re.findall(r"(?<![\w./-])(?:[a-z_]+/)+\w+\.py\b", page.read_text()):
        folders = (PROJECT, PROJECT / "fastsitch", page.parent)
        assert any((folder / path).is_file() for folder in folders), path


def test_the_reference_has_everything_that_is_public() -> None:
    page = (PROJECT / "docs/reference/python.md").read_text()
    assert set(re.findall(r"^::: fastsitch\.(\w+)$", page, re.M)) == set(fastsitch.__all__)


def test_the_readme_is_short() -> None:
    readme = (PROJECT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    cells = [cell for line in readme.splitlines() if line.startswith("|") for cell in line.strip("|").split("|")]
    assert max(map(len, cells)) <= 120
