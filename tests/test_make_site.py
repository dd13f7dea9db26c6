"""The site and the slides: every link leads somewhere, nothing is loaded from elsewhere, and search finds its page."""

import copy
import functools
import itertools
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
from bs4 import BeautifulSoup

from labkit.lab.claims import ledger

WITH_CODE = ("02", "08_")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
pytest.importorskip("latex2mathml", reason="make setup installs it")

import make_site  # noqa: E402
import make_slides  # noqa: E402
from web import rendering  # noqa: E402


@functools.cache
def rendered(path):
    """A lesson; of most of them, without the code, which takes half of the time and holds no link."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code" and not path.name.startswith(WITH_CODE):
            cell.source = ""
            cell.outputs = [one for one in cell.outputs if one["output_type"] != "stream"]
    return rendering.render(notebook, path.stem)


def render_once(path):
    """What rendering a notebook gives; site and slides may change it, and share the work."""
    made = rendered(path)
    return rendering.Rendered(copy.copy(made.soup), made.sections, dict(made.files))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The whole site, but for the API, which takes a minute."""
    folder = tmp_path_factory.mktemp("site") / "site"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_site, "render_notebook", render_once)
        make_site.main(folder, with_api=False)
    return folder


@functools.cache
def page(path):
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@functools.cache
def anchors(path):
    return {tag["id"] for tag in page(path).find_all(id=True)}


def addresses(soup):
    """What a page loads, and what it links to."""
    loads = [
        tag[key]
        for tag in soup.find_all(["img", "script", "link", "iframe", "source"])
        for key in ("src", "href")
        if tag.get(key)
    ]
    return loads, [tag["href"] for tag in soup.select("a[href]")]


def broken(folder):
    """Links inside a folder of pages that lead to no file, or to no place in it."""
    found = []
    for path in folder.rglob("*.html"):
        for link in itertools.chain(*addresses(page(path))):
            address, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            target = (path.parent / unquote(address)).resolve() if address else path
            if not target.is_file() or (anchor and unquote(anchor) not in anchors(target)):
                found.append(f"{path.name}: {link}")
    return found


@pytest.mark.slow
def test_every_link_inside_the_site_leads_to_a_place_that_is_there(site):
    assert broken(site) == []
    assert len(list(site.glob("*.html"))) > len(list((ROOT / "notebooks").glob("*.ipynb")))


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        loads, _ = addresses(page(path))
        assert not [load for load in loads if re.match(r"(https?:)?//", load)], path
    assert "http" not in (site / "style.css").read_text() + (site / "code.css").read_text()


@pytest.mark.slow
def test_no_equation_is_left_to_a_script(site):
    for path in site.glob("*.html"):
        prose = ("p", "li", "td", "th", "h1", "h2", "h3", "em", "strong")
        shown = [s for s in page(path).select_one("main").strings if s.parent.name in prose]
        assert not re.search(r"\$\$|\\(frac|alpha|text)\b", " ".join(shown)), path
    assert page(site / "02_lora_from_scratch.html").select("math mfrac")


@pytest.mark.slow
def test_every_verdict_has_a_row_that_leads_to_the_cell_that_measured_it(site):
    shown = page(site / "claims.html")
    for verdict in ledger(ROOT / "notebooks"):
        lesson, number = verdict["notebook"].removesuffix(".ipynb"), verdict["claim"]
        row = shown.find(id=f"claim-{number}").find_parent("tr")
        assert row.find("a", href=f"{lesson}.html#{number}"), (lesson, number)
    assert shown.select("h2#What-to-do ~ .wide tbody tr")


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("chromium"), reason="no chromium here: the search was NOT tried in a browser"
)
def test_search_finds_a_section_from_a_folder_and_no_page_is_wider_than_the_window(site):
    with ThreadPoolExecutor(1) as thread:  # the browser of other tests may hold this thread's event loop
        thread.submit(look_at_every_page, site).result()


def look_at_every_page(site):
    from playwright.sync_api import sync_playwright

    from tests.browser.jupyter import CHROMIUM, FLAGS

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        shown = browser.new_page()
        for path in sorted(site.rglob("*.html")):
            shown.goto(path.as_uri(), wait_until="domcontentloaded")
            for width in (1400, 400):
                shown.set_viewport_size({"width": width, "height": 800})
                assert shown.evaluate("document.documentElement.scrollWidth") <= width, path
        shown.goto((site / "05_learns_less_forgets_less.html").as_uri())
        shown.keyboard.press("/")
        shown.keyboard.type("signed dynamic map")
        found = shown.locator("#found li a").first
        found.wait_for()
        assert found.get_attribute("href").startswith("07_double_quantization.html#3-")
        browser.close()


@pytest.mark.slow
def test_every_lesson_has_slides_with_its_figures_and_without_the_optional_sections(tmp_path, monkeypatch):
    monkeypatch.setattr(make_slides, "render_notebook", render_once)
    make_slides.main(tmp_path / "slides")
    assert broken(tmp_path / "slides") == []
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        deck = page(tmp_path / "slides" / f"{path.stem}.html")
        assert deck.select(".figure img") and deck.select(".title h2"), path
        assert "(optional" not in " ".join(h.get_text() for h in deck.select("h2"))
    deck = page(tmp_path / "slides" / "02_lora_from_scratch.html")
    assert len(deck.select(".question")) == len(deck.select(".answer")) > 2


def written(tmp_path, *cells):
    path = tmp_path / "99_small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)
    return rendering.render_notebook(path)


def test_an_equation_becomes_mathml_and_keeps_its_source():
    soup = rendering.render_markdown(
        r"so $\lVert A \rVert \le \frac{\alpha}{r} \text{ 90 \% of}$ and $$\arg\min_k |x|$$"
    ).soup
    inline, block = soup.select("math")
    assert inline["alttext"] == r"\lVert A \rVert \le \frac{\alpha}{r} \text{ 90 \% of}" and inline.select(
        "mfrac"
    )
    assert block["display"] == "block" and "\\" not in inline.get_text() + block.get_text()


def test_solutions_and_collapsed_code_are_folded_and_other_code_is_not(tmp_path):
    cell = nbformat.v4.new_code_cell
    made = written(
        tmp_path,
        nbformat.v4.new_markdown_cell("# 99 · Small"),
        cell("def f():\n    ### BEGIN SOLUTION\n    return 1\n    ### END SOLUTION"),
        cell("plot()", metadata={"jupyter": {"source_hidden": True}}),
        cell("shown = 1"),
    )
    assert [s.get_text() for s in made.soup.select("details > summary")] == ["A solution", "Code"]
    assert "shown" in made.soup.get_text() and not any(
        "shown" in d.get_text() for d in made.soup.select("details")
    )


def test_a_section_is_found_by_its_prose_and_not_by_its_code(tmp_path):
    made = written(
        tmp_path,
        nbformat.v4.new_markdown_cell("# 99 · Small\n\n## 1 · Rank\n\nEach doubling buys $x^2$ less."),
        nbformat.v4.new_code_cell("needle = 1"),
    )
    assert [(s.level, s.anchor, s.text.strip()) for s in made.sections] == [
        (1, "99-·-Small", ""),
        (2, "1-·-Rank", "Each doubling buys less."),
    ]


def test_a_claim_can_be_linked_to(tmp_path):
    data = {rendering.CLAIM: {"claim": "C7"}, "text/markdown": "**C7** “so”", "text/plain": "C7"}
    cell = nbformat.v4.new_code_cell("lab.claim()", outputs=[nbformat.v4.new_output("display_data", data)])
    made = written(tmp_path, nbformat.v4.new_markdown_cell("# 99"), cell)
    assert "C7" in made.soup.find(id="C7").get_text()


def test_links_between_notebooks_and_guides_become_links_between_pages():
    at = {"notebooks/02_lora_from_scratch.ipynb": "02_lora_from_scratch.html", "docs/gpu.md": "gpu.html"}
    here = make_site.Page("teach/index.html", "docs/teach/README.md", "", "", None)
    lead = functools.partial(make_site.page_of, page=here, at=at, api=ROOT / "nowhere")
    assert lead("../../notebooks/02_lora_from_scratch.ipynb#Recap") == "../02_lora_from_scratch.html#Recap"
    assert lead("../gpu.md") == "../gpu.html"
    assert lead("../../labkit/checks.py") is None, "a file without a page is no link"
    assert lead("../missing.md") == "../missing.md", (
        "and one that is missing is left, for the check of links to find"
    )
    assert lead("https://arxiv.org/abs/2106.09685") == "https://arxiv.org/abs/2106.09685"
