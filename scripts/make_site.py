"""Write the course as a web site that works from a folder, without a network: python scripts/make_site.py build/site

nbconvert renders the notebooks, pdoc the API; search is the elasticlunr that comes with pdoc. Nothing is loaded from
elsewhere. Lessons keep the names of their notebooks, and their headings the anchors that JupyterLab gives them.
"""

import argparse
import dataclasses
import html
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote, unquote

import jinja2
import make_docs
import pdoc
from pygments.formatters import HtmlFormatter
from web.registers import register_page
from web.rendering import Rendered, render_markdown, render_notebook

ROOT = Path(__file__).resolve().parent.parent
WEB = ROOT / "scripts" / "web"
LABELS = {"README": "Overview", "gpu": "Run it on a GPU", "interview": "Thirty interview questions"}
LABELS |= {
    "serving": "The server",
    "recipe": "The recipe",
    "glossary": "Glossary",
    "claims": "What people claim",
}


@dataclasses.dataclass
class Page:
    """A page of the site.

    Attributes:
        path: of its file in the site.
        source: of the file it is made from, in the repository.
        group: the heading of the contents that it stands under.
        label: its name there.
    """

    path: str
    source: str
    group: str
    label: str
    rendered: Rendered

    @property
    def root(self) -> str:
        return "../" * self.path.count("/")


def lessons() -> list[Page]:
    """The notebooks, in order."""
    made = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        rendered = render_notebook(path)
        made.append(
            Page(
                f"{path.stem}.html", f"notebooks/{path.name}", "Lessons", rendered.sections[0].title, rendered
            )
        )
    return made


def guides() -> list[Page]:
    """The pages of docs/, and the registers: reference first, then what a teacher needs."""
    made = [
        Page(
            "claims.html",
            "docs/claims.md",
            "Reference",
            LABELS["claims"],
            render_markdown(register_page(ROOT / "notebooks")),
        )
    ]
    for path in sorted((ROOT / "docs").rglob("*.md")):
        name = path.relative_to(ROOT / "docs").with_suffix("")
        if str(name) == "claims":
            continue
        rendered = render_markdown(path.read_text(encoding="utf-8"))
        group = "Reference" if len(name.parts) == 1 else "Teaching"
        target = name.with_name("index" if name.name == "README" else name.name)
        label = LABELS.get(path.stem) if len(name.parts) == 1 or path.stem == "README" else None
        made.append(
            Page(f"{target}.html", f"docs/{name}.md", group, label or rendered.sections[0].title, rendered)
        )
    return sorted(made, key=lambda page: (page.group, not page.path.endswith("index.html"), page.label))


def home() -> Page:
    """The first page: README.md from its top to the commands, and its section on the course."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    about, course = (
        text.partition("\n## ")[0],
        re.search(r"^## The course\n.*?(?=^## )", text, re.M | re.S)[0],
    )
    return Page("index.html", "README.md", "", "Start", render_markdown(f"{about}\n\n{course}"))


def link_names(pages: list[Page], api: Path) -> None:
    """Make links of lessons, guides and modules that are named in the text, and let links lead to pages."""
    at = {page.source: page.path for page in pages}
    names = {Path(source).stem: path for source, path in at.items() if source.startswith("notebooks/")}
    for page in pages:
        soup = page.rendered.soup
        for code in soup.select(".rendered_html code"):
            name = code.get_text()
            target = names.get(name.removesuffix(".ipynb").removeprefix("notebooks/")) or at.get(name)
            target = target or module_page(name, api)
            if target and not code.find_parent(["a", "pre"]) and target != page.path:
                code.wrap(soup.new_tag("a", href=page.root + target))
        for tag, attribute in [
            *((a, "href") for a in soup.select("a[href]")),
            *((i, "src") for i in soup.select("img")),
        ]:
            tag[attribute] = page_of(tag[attribute], page, at, api)
            if tag[attribute] is None:
                tag.unwrap()  # a file of the repository that has no page


def page_of(link: str, page: Page, at: dict[str, str], api: Path) -> str | None:
    """Where a link of a page leads in the site; None for a file of the repository that is not in it."""
    address, sharp, anchor = link.partition("#")
    if not address or ":" in address or not (ROOT / page.source).parent.joinpath(unquote(address)).exists():
        return link
    target = os.path.relpath((ROOT / page.source).parent.joinpath(unquote(address)).resolve(), ROOT)
    if target in at:
        return page.root + at[target] + sharp + anchor
    if (found := module_page(target, api)) is not None:
        return page.root + found
    if target.endswith((".png", ".svg")):
        page.rendered.files[target] = (ROOT / target).read_bytes()
        return page.root + target
    return None


def module_page(name: str, api: Path) -> str | None:
    """The API page of `labkit.lora.layer` or `labkit/lora/layer.py`, if there is one."""
    if not re.fullmatch(r"labkit[\w./]*", name):
        return None
    path = name.removesuffix(".py").rstrip("/").replace(".", "/") + ".html"
    return f"api/{path}" if (api / path).is_file() else None


def search_data(pages: Iterable[Page], api: Path) -> str:
    """What can be found: the sections of all pages, and the modules, functions and classes of labkit."""
    entries = [
        dict(title=s.title, page=page.label, href=f"{page.path}#{quote(s.anchor)}", text=s.text)
        for page in pages
        for s in page.rendered.sections
    ]
    if api.is_dir():
        for path in sorted(api.rglob("*.html")):
            if path.with_suffix("").is_dir():
                continue  # a package, which only names again what its modules define
            module = ".".join(path.relative_to(api).with_suffix("").parts)
            for anchor, name in re.findall(
                r'<section id="([A-Z_a-z.]+)">.*?<span class="name">(\w+)', path.read_text(), re.S
            ):
                if anchor.count(".") == 0:
                    entries.append(
                        dict(title=name, page=module, href=f"api/{path.relative_to(api)}#{anchor}", text="")
                    )
    return f"const SECTIONS = {json.dumps(entries, ensure_ascii=False)};\n"


def write(folder: Path, pages: list[Page]) -> None:
    """Write the pages, what they show, and what search needs."""
    shared = Path(pdoc.__file__).parent / "templates" / "resources" / "elasticlunr.min.js"
    shutil.copyfile(shared, folder / shared.name)
    for name in ("style.css", "search.js"):
        shutil.copyfile(WEB / name, folder / name)
    light, dark = (
        HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark")
    )
    background = re.compile(r"^(pre|td|span)[^\n]*\n|background: #[^;}]*;?", re.M)
    dark = f"@media (prefers-color-scheme: dark) {{\n{background.sub('', dark)}\n}}\n"
    (folder / "code.css").write_text(f"{background.sub('', light)}\n{dark}")
    (folder / "search-data.js").write_text(search_data(pages, folder / "api"), encoding="utf-8")
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(WEB), trim_blocks=True)
    environment.filters["quoted"] = quote
    template = environment.get_template("page.html.j2")
    groups: dict[str, list] = {}
    for page in pages:
        groups.setdefault(page.group or "The course", []).append(page)
    groups.setdefault("Reference", []).append({"path": "api/index.html", "label": "The API of labkit"})
    if not (folder / "api").is_dir():
        groups["Reference"].pop()
    for before, page, after in zip([None, *pages], pages, [*pages[1:], None]):
        path = folder / page.path
        path.parent.mkdir(parents=True, exist_ok=True)
        text = template.render(
            title=html.escape(page.label), path=page.path, root=page.root, groups=groups.items(),
            sections=page.rendered.sections, body=str(page.rendered.soup), before=before, after=after,
        )  # fmt: skip
        path.write_text(text, encoding="utf-8")
        for name, content in page.rendered.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


def main(folder: Path, with_api: bool = True) -> None:
    """Write the site beside `folder` and put it in its place when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        if with_api:
            make_docs.write(made / "api", search=False)  # the site's own finds names too
        pages = [home(), *lessons(), *guides()]
        link_names(pages, made / "api")
        write(made, pages)
        shutil.rmtree(folder, ignore_errors=True)
        made.replace(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{len(pages)} pages and {size / 1e6:.0f} MB: open {folder / 'index.html'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--without-api", action="store_true", help="leave out the pages of labkit's modules")
    given = parser.parse_args()
    main(given.folder, not given.without_api)
