"""Notebooks and Markdown as HTML that needs no network: nbconvert's exporter, with equations as MathML.

nbconvert leaves equations to MathJax, which a page would have to load. Browsers draw MathML themselves, so each
equation is converted once, here. Code that a notebook collapses is folded, and so are solutions of exercises.
"""

import html
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import nbformat
from bs4 import BeautifulSoup, Tag
from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from traitlets.config import Config

CLAIM = "application/vnd.labkit.claim+json"
HEADINGS = ("h1", "h2", "h3")
UNKNOWN_TO_MATHML = {
    r"\arg": r"\operatorname{arg}",
    r"\big": "",
    r"\Big": "",
    r"\bigl": "",
    r"\bigr": "",
    r"\lVert": r"\|",
    r"\rVert": r"\|",
}


@dataclass
class Section:
    """A heading and the prose below it: what the table of contents lists, and what a search finds."""

    level: int
    anchor: str
    title: str
    text: str = ""


@dataclass
class Rendered:
    """A page's body.

    Attributes:
        soup: its HTML.
        sections: its headings, with the prose below each.
        files: what it shows besides: {name: bytes}.
    """

    soup: BeautifulSoup
    sections: list[Section]
    files: dict[str, bytes]


def mathml(latex: str, display: str) -> str:
    """An equation of LaTeX as MathML, which keeps its source as `alttext`."""
    known = re.sub(r"\\[A-Za-z]+", lambda m: UNKNOWN_TO_MATHML.get(m[0], m[0]), latex.strip())
    drawn = convert(known, display=display).replace(r"\%", "%")  # which it leaves as it is inside \text
    return drawn.replace("<math ", f'<math alttext="{html.escape(latex.strip(), quote=True)}" ', 1)


class CourseRenderer(IPythonRenderer):
    """nbconvert's renderer of Markdown, with equations drawn."""

    def block_math(self, body: str) -> str:
        return f'<div class="equation">{mathml(body, "block")}</div>'

    def inline_math(self, body: str) -> str:
        return mathml(body, "inline")


class CourseExporter(HTMLExporter):
    """nbconvert's exporter, with that renderer."""

    @pass_context
    def markdown2html(self, context, source):
        return MarkdownWithMath(renderer=CourseRenderer(escape=False)).render(source)


EXPORTER = Config(
    {
        "CourseExporter": {
            "template_name": "basic",
            "preprocessors": ["nbconvert.preprocessors.ExtractOutputPreprocessor"],
        },
        "ExtractOutputPreprocessor": {
            "output_filename_template": "{unique_key}_{cell_index}_{index}{extension}"
        },
    }
)


def render_notebook(path: Path) -> Rendered:
    """The notebook at `path` with its outputs."""
    return render(nbformat.read(path, as_version=4), path.stem)


def render(notebook: nbformat.NotebookNode, name: str) -> Rendered:
    """A notebook with its outputs; figures become files `figures/NAME_CELL_OUTPUT.png`."""
    resources = {"unique_key": name, "output_files_dir": "figures"}
    body, resources = CourseExporter(config=EXPORTER).from_notebook_node(notebook, resources)
    soup = BeautifulSoup(body, "html.parser")
    for cell, drawn in zip(notebook.cells, soup.select("div.cell"), strict=True):
        drawn["id"] = f"cell-id={cell.id}"  # as JupyterLab has it
        if cell.cell_type == "code":
            finish_code_cell(soup, cell, drawn)
    heading = ""
    for found in soup.select("h1, h2, h3, img"):
        if found.name == "img":
            found["alt"] = f"Figure of “{heading}”"
            found["loading"] = "lazy"
        else:
            heading = title_of(found)
    return finish(soup, soup.select(".rendered_html > *"), resources.get("outputs", {}))


def finish_code_cell(soup: BeautifulSoup, cell: nbformat.NotebookNode, drawn: Tag) -> None:
    """Fold what a reader need not see, and name the place of each claim."""
    is_solution = "### BEGIN SOLUTION" in cell.source
    if is_solution or cell.metadata.get("jupyter", {}).get("source_hidden"):
        draws = any("image/png" in output.get("data", {}) for output in cell.outputs)
        label = "A solution" if is_solution else "The code of this figure" if draws else "Code"
        fold(soup, drawn.select_one(".input"), label)
    areas = drawn.select(".output_area")
    for output, area in zip(cell.outputs, areas, strict=True):
        if CLAIM in output.get("data", {}):
            number = output["data"][CLAIM]["claim"]
            if not soup.find(id=number):  # a lesson may rule on parts of one claim
                area["id"] = number
            area["class"] = [*area["class"], "claim"]


def fold(soup: BeautifulSoup, part: Tag, summary: str) -> None:
    """Put a part of a page into a `details` that is closed."""
    details = soup.new_tag("details")
    line = soup.new_tag("summary")
    line.string = summary
    part.wrap(details)
    details.insert(0, line)


def render_markdown(text: str) -> Rendered:
    """A page of Markdown."""
    body = MarkdownWithMath(renderer=CourseRenderer(escape=False)).render(text)
    soup = BeautifulSoup(f'<div class="rendered_html">{body}</div>', "html.parser")
    return finish(soup, soup.select(".rendered_html > *"), {})


def finish(soup: BeautifulSoup, blocks: list[Tag], files: dict[str, bytes]) -> Rendered:
    """Let wide tables scroll, and gather the sections."""
    sections: list[Section] = []
    for heading in soup.select("h1[id], h2[id], h3[id], h4[id]"):
        heading["id"] = unquote(heading["id"])  # as JupyterLab has it; links to it stay quoted
    for block in blocks:
        if block.name in HEADINGS and block.get("id"):
            sections.append(Section(int(block.name[1]), block["id"], title_of(block)))
        elif sections:
            sections[-1].text += prose_of(block) + " "
    for table in soup.select("table"):
        table.wrap(soup.new_tag("div", attrs={"class": "wide"}))
    return Rendered(soup, sections, files)


def title_of(heading: Tag) -> str:
    """A heading's words, without nbconvert's pilcrow."""
    return heading.get_text().removesuffix("¶")


def prose_of(block: Tag) -> str:
    """The words of a block, without its equations."""
    words = [s for s in block.strings if not s.find_parent("math")]
    return re.sub(r"\s+", " ", " ".join(words)).strip()
