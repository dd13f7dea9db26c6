"""Readable text from the HTML of documentation: what a reader sees, without navigation and images."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """The readable text of an HTML page: each block on its own lines, `pre` as it is, no navigation."""

    SKIP = re.compile("script|style|svg|head|nav|form|button")
    BLOCK = re.compile("p|div|h[1-6r]|br|li|ul|ol|dl|dt|dd|table|tr|section|blockquote|center")

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.skipping: list[str] = []  # open tags, from the first skipped one inward
        self.pre = 0

    def handle_starttag(self, tag, attrs):
        marked = dict(attrs).get("class") or ""
        if self.skipping:
            if tag == self.skipping[0]:
                self.skipping.append(tag)
        elif self.SKIP.fullmatch(tag) or marked in (
            "nosearch",
            "headerlink",
            "fancy_toc",
            "related",
            "sphinxsidebar",
        ):
            self.skipping.append(tag)
        elif tag == "pre":
            self.pre += 1
            self.parts.append("\n\n")
        elif self.BLOCK.fullmatch(tag):
            self.parts.append("\n\n" if tag in ("p", "section", "dt", "pre") or tag[0] == "h" else "\n")
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_endtag(self, tag):
        if self.skipping:
            if tag == self.skipping[0]:
                self.skipping.pop()
        elif tag == "pre":
            self.pre = max(0, self.pre - 1)
            self.parts.append("\n\n")
        elif self.BLOCK.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data):
        if not self.skipping:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))

    def text(self) -> str:
        joined = "".join(self.parts).replace("¶", "")
        joined = re.sub(r"[ \t]+\n", "\n", joined)
        joined = re.sub(r"\n (?=\S)", "\n", joined)
        return re.sub(r"\n{3,}", "\n\n", joined).strip() + "\n"


def page_text(html: str) -> str:
    """The readable text of a page."""
    page = Page()
    page.feed(html)
    page.close()
    return page.text()
