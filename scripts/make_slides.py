"""Write slides of every lesson, made of its own figures, for the projector: python scripts/make_slides.py build/slides

A section of a lesson becomes a slide with its first paragraph and its equations; each figure, each prediction and each
answer one more. Sections marked optional are left out. A deck is one page with its figures beside it, without anything
loaded from elsewhere: arrow keys and the space bar turn it, P prints it.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import jinja2
from bs4 import Tag
from web.rendering import Rendered, render_notebook, title_of

ROOT = Path(__file__).resolve().parent.parent
WEB = ROOT / "scripts" / "web"
TEXT = 420  # characters: what a room reads from the back row


def slides_of(rendered: Rendered) -> Iterator[tuple[str, str, str]]:
    """(kind, heading, HTML) of each slide of a lesson."""
    heading, optional = "", False
    for link in rendered.soup.select("a[href]"):
        if not link["href"].startswith("http"):
            link.unwrap()  # what it leads to is not beside the slides
    for part in rendered.soup.select(".text_cell .rendered_html, .output_area"):
        if "output_area" not in part["class"]:
            for block in part.find_all(["h1", "h2", "h3"], recursive=False):
                heading = title_of(block)
                optional = "(optional" in heading or heading.startswith("Appendix") or "Exercises" in heading
                if not optional:
                    yield ("title" if block.name == "h1" else "text"), plain(heading), beginning(block)
        elif not optional and (image := part.find("img")):
            yield "figure", plain(heading), str(image)
        elif not optional and (told := part.select_one(".rendered_html")):
            if told.get_text().strip().startswith("Predict:"):
                yield "question", plain(heading), told.decode_contents()
            elif told.get_text().strip().startswith("Answer:"):
                yield "answer", plain(heading), told.decode_contents()


def plain(heading: str) -> str:
    """A heading without its tier: “1 · Why (core, 5 minutes)” is “1 · Why”."""
    return heading.partition(" (core")[0]


def beginning(heading: Tag) -> str:
    """What follows a heading, up to the next: paragraphs while they are short enough, all equations, drawings."""
    shown, used = [], 0
    for block in heading.find_next_siblings():
        if block.name in ("h1", "h2", "h3"):
            break
        drawn = block.find("math", display="block") or (block.name == "div" and block.find("pre"))
        if drawn or (block.name in ("ul", "ol") and len(block.get_text()) < TEXT):
            shown.append(str(block))
        elif block.name == "p" and (not used or used + len(block.get_text()) < TEXT):
            shown.append(str(block))
            used += len(block.get_text())
    return "".join(shown)


def write_deck(path: Path, folder: Path, template: jinja2.Template) -> dict:
    """Write the slides of one notebook; what the list of decks says about it."""
    rendered = render_notebook(path)
    slides = list(slides_of(rendered))
    title = rendered.sections[0].title
    (folder / f"{path.stem}.html").write_text(template.render(title=title, slides=slides), encoding="utf-8")
    drawn = "".join(html for _, _, html in slides)
    for name, content in rendered.files.items():
        if name in drawn:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(content)
    return dict(href=f"{path.stem}.html", title=title, number=len(slides))


def main(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(WEB), trim_blocks=True)
    template = environment.get_template("slides.html.j2")
    decks = [write_deck(path, folder, template) for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    listed = "".join(f'<li><a href="{d["href"]}">{d["title"]}</a> ({d["number"]})</li>' for d in decks)
    index = [("title", "The LoRA lab: slides", f"<ul>{listed}</ul>")]
    (folder / "index.html").write_text(template.render(title="Slides", slides=index), encoding="utf-8")
    print(f"{sum(d['number'] for d in decks)} slides in {len(decks)} decks: open {folder / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
