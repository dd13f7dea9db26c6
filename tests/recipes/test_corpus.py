"""The text of tiny-llama: nothing of the held-out text is trained on; pages, docstrings and tokens."""

import ast

from recipes.tiny_llama import corpus, pages, sources, tokens


def test_training_text_has_no_line_of_held_out_text(monkeypatch, tmp_path):
    secret = "this sentence of more than forty characters is held out"
    page = sources.Document("pydocs", "library/a", f"Title\n{secret}\nshort\n", True)
    other = sources.Document("pydocs", "library/b", f"Other\n{secret.upper()}!\nshort\n", False)
    for name in ("kjv", "jargon", "docstrings", "sqlite", "devil"):
        monkeypatch.setattr(corpus, name, lambda folder: [])
    monkeypatch.setattr(corpus, "pydocs", lambda folder: [page, other])
    train, held = corpus.collect(tmp_path)
    assert train.text == "Other\nshort\n" and held == page


def test_page_text_keeps_code_and_leaves_out_navigation():
    html = "<nav>menu</nav><h1>Title<a class='headerlink'>¶</a></h1><p>one\n two</p><pre>x = 1\n  y</pre><svg>z</svg><p>end"
    assert pages.page_text(html) == "Title\n\none two\n\nx = 1\n  y\n\nend\n"


def test_docstrings_are_read_with_their_signatures():
    source = 'import os\nclass A(B):\n    """A."""\n    def f(self, x=1):\n        """Do\n        it."""\n'
    lines = "\n".join(sources.described(ast.parse(source), ""))
    assert lines == 'class A(B):\n    """A."""\n\n    def f(self, x=1):\n        """Do\n        it."""\n'


def test_tokenizer_is_the_same_for_the_same_text():
    texts = ["In the beginning God created the heaven and the earth. " * 3, "def f(x): return x 1234"]
    one, two = (tokens.train_tokenizer(texts, vocab=300).backend_tokenizer.to_str() for _ in range(2))
    assert one == two
