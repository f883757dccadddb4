"""Build the site of the documents into output/docs/site, and stop at a warning or at a link that leads nowhere.

    make docs            # or: python docs/build.py, where docs/requirements.txt is installed

The pages are the repository's own Markdown files, at the same places: a link that works there works on the site. The
navigation is the list in docs/README.md, so a new page needs one line there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "output" / "docs"
SECTION = re.compile(r"^## (.+)|^- \[([^]]+)\]\(([^)]+)\)", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)\s]*)?\)")


def documents() -> list[Path]:
    """List the Markdown files that become pages."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").rglob("*.md")])


def navigation() -> list[dict[str, str | list[dict[str, str]]]]:
    """Read the sections of docs/README.md and the pages in each, as the generator takes them."""
    sections: list[dict[str, str | list[dict[str, str]]]] = [{"Home": "README.md"}]
    pages: list[dict[str, str]] = []
    for section, title, link in SECTION.findall((ROOT / "docs" / "README.md").read_text()):
        if section:
            sections.append({section: (pages := [])})
        else:
            pages.append({title: str((ROOT / "docs" / link).resolve().relative_to(ROOT))})
    return sections


def copy_pages(folder: Path) -> None:
    """Copy the documents, the files that they link to and the site's style to the same places below `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    for document in documents():
        linked = (document.parent / link for link in LINK.findall(document.read_text()))
        for path in [document, *(file for file in linked if file.is_file())]:
            target = folder / path.resolve().relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    shutil.copy(ROOT / "docs" / "site.css", folder / "docs")


def write_settings(path: Path) -> None:
    """Write the generator's settings with the navigation. JSON's lists and texts are TOML's, its objects are not."""
    nav = re.sub(r'("[^"]+"): ', r"\1 = ", json.dumps(navigation()))
    text = (ROOT / "docs" / "zensical.toml").read_text()
    path.write_text(text.replace("# NAV", f"nav = {nav}").replace("ROOT", str(ROOT)))


class Links(HTMLParser):
    """The addresses on a page.

    Attributes:
        found: values of `href` and `src`, in their order.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attributes if name in ("href", "src") and value]


def broken_links(site: Path) -> list[str]:
    """List the addresses of the built pages that name no file of the site."""
    broken = []
    for page in sorted(site.rglob("index.html")):
        for address in map(urlsplit, Links(page.read_text()).found):
            if not address.scheme and not address.netloc and address.path:
                target = page.parent / unquote(address.path)
                if not (target / "index.html" if target.is_dir() else target).is_file():
                    broken.append(f"{page.relative_to(site)}: {address.path}")
    return broken


def main() -> None:
    """Build the site, check it, and print where it is."""
    copy_pages(BUILD / "pages")
    write_settings(BUILD / "zensical.toml")
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(BUILD / "zensical.toml")]
    run = subprocess.run(command, cwd=BUILD, env=os.environ | {"NO_COLOR": "1"}, capture_output=True, text=True)
    if run.returncode or re.search("griffe:|warning", run.stderr, re.IGNORECASE):  # griffe reads the docstrings
        sys.exit(f"{run.stdout}{run.stderr}\nThe site was not built: mend what is named above.")
    if broken := broken_links(BUILD / "site"):
        sys.exit("These links lead nowhere:\n" + "\n".join(broken))
    print(f"{BUILD / 'site' / 'index.html'}: {len(documents())} pages")


if __name__ == "__main__":
    main()
