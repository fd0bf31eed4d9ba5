"""What the site takes from elsewhere while it is built: files of the repository outside docs/, and the command line.

In the repository docs/ is a folder, on the site it is the root; files outside it keep their path. Links are written as
GitHub needs them and translated here, so that they work in both.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from fastsitch.cli.main import app

REPOSITORY = Path(__file__).parents[1]
PAGES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "bench/README.md")
DOWNLOADS = ("LICENSE", "CITATION.cff", "bench/results/*", "examples/*.ipynb")

FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<=\]\()[^)\s]+(?=\))")
FETCHING = re.compile(
    r"""<(?:script|img|source|iframe|video|audio)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*>"""
    r"""|<link\b[^>]*\brel=["']?(?:stylesheet|preconnect|preload|icon|dns-prefetch)[^>]*\bhref=["']?(?:https?:)?//[^>]*>"""
    r"""|data-md-component=["']?source\b|@import\s+(?:url\()?["']?https?:[^;]*|url\(["']?(?:https?:)?//[^)]*\)"""
)
"""What makes a browser ask another host while it shows a page; the theme's component "source" asks GitHub."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is not in docs/, an index of every folder that pages link to, and the page of the command line."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(REPOSITORY / name)))
    for pattern in DOWNLOADS:
        for path in sorted(REPOSITORY.glob(pattern)):
            files.append(File.generated(config, path.relative_to(REPOSITORY).as_posix(), abs_src_path=str(path)))
    for folder in linked_folders(files):
        path = folder.relative_to(REPOSITORY).as_posix().removeprefix("docs/")
        files.append(File.generated(config, f"{path}/index.md", content=listing(folder)))
    files.append(File.generated(config, "reference/commands.md", content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Translate the page's links."""
    source = page.file.src_uri
    return outside_code(markdown, lambda text: LINK.sub(lambda link: site_link(link[0], source), text))


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Leave out the roles of docstrings, such as ``:func:``, which say to an editor what a name is."""
    return re.sub(r":(?:func|class|meth|attr|mod):(?=<code>)", "", html)


def on_post_build(config: MkDocsConfig) -> None:
    """Fail where a page would make a browser ask another host."""
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css"):
            found = FETCHING.search(path.read_text())
            if found:
                raise PluginError(f"{path} asks another host: {found[0][:200]}")


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """Change the text of a page and leave its blocks of code alone."""
    pieces = FENCED.split(markdown)
    return "".join(piece if number % 2 else change(piece) for number, piece in enumerate(pieces))


def repository_path(link: str, source: str) -> str:
    """Where a link in the page ``source`` (its path on the site) leads to in the repository."""
    page = source if (REPOSITORY / source).exists() else f"docs/{source}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def site_link(link: str, source: str) -> str:
    """A link in the page ``source`` as it has to be on the site."""
    target, hash_sign, anchor = link.partition("#")
    if not target or ":" in target:
        return link
    path = repository_path(target, source)
    if (REPOSITORY / path).is_dir():
        path += "/index.md"
    return posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(source) or ".") + hash_sign + anchor


def linked_folders(files: Files) -> list[Path]:
    """Folders that pages link to, and all in them."""
    folders = set()
    for page in files.documentation_pages():
        for link in LINK.findall(page.content_string):
            folder = REPOSITORY / repository_path(link, page.src_uri)
            if ":" not in link and folder.is_dir():
                folders |= {folder, *(path for path in folder.rglob("*") if path.is_dir())}
    return sorted(folders)


def listing(folder: Path) -> str:
    """A page that lists what is in a folder."""
    names = sorted(path.name for path in folder.iterdir())
    return "\n".join([f"# {folder.name}", "", *(f"- [{name}]({name})" for name in names)]) + "\n"


def commands_page() -> str:
    """All commands with their options, as ``--help`` shows them."""
    group = typer.main.get_command(app)
    context = group.context_class(group, info_name="fastsitch")
    parts = [
        "# Command line",
        "Made from the commands: this is what `fastsitch COMMAND --help` shows. Exit codes: 0 done, 1 failed "
        "while running (what is finished is kept), 2 bad usage or input.",
    ]
    for name in group.list_commands(context):
        parts += command_section(group.get_command(context, name), context)
    return "\n\n".join(parts) + "\n"


def command_section(command: Any, parent: Any) -> list[str]:
    """Usage, purpose, and options by group."""
    context = command.context_class(command, info_name=command.name, parent=parent)
    groups: dict[str, list[str]] = {}
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            title = parameter.rich_help_panel or ("Arguments" if parameter.param_type_name == "argument" else "Options")
            groups.setdefault(title, []).append(f"- `{record[0].strip()}`: {escaped(record[1])}")
    usage = " ".join(["fastsitch", command.name, *command.collect_usage_pieces(context)])
    parts = [f"## {command.name}", f"```text\n{usage}\n```", escaped(command.help)]
    for title, lines in groups.items():
        parts += [f"**{title}**", "\n".join(lines)]
    return parts


def escaped(text: str) -> str:
    """Plain text as Markdown."""
    return re.sub(r"([\\`*_<>\[\]|])", r"\\\1", " ".join(text.split()))
