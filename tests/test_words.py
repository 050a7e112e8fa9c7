"""Texts: links and paths lead somewhere, the words are the field's, pages stay short."""

import re
from itertools import chain

import pytest
import tiny

ROOT = tiny.REPOSITORY
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted(ROOT.glob("docs/*.md"))]
CODE = sorted(chain.from_iterable(ROOT.glob(f"{folder}*.py") for folder in ("", "augment/", "tools/", "tests/")))
TEXTS = [*PAGES, ROOT / "Makefile", ROOT / "CITATION.cff", *sorted(ROOT.glob("recipes/*.args"))]
TEXTS += [path for path in CODE if path.name != "test_words.py"]

# What not to write, and what to write instead. "Number" (of an index) and "none" (for zero) are missing, because both
# are too common in their usual sense.
WORDS = {
    r"stores? of": "cache",
    r"answers?": "predictions (logits, labels)",
    r"what the teacher said": "cached teacher predictions",
    r"the average|averaged weights|weight average": "EMA weights",
    r"to the bit|very bits?": "bitwise identical",
    r"go on|goes on|going on|done again": "resumes, is repeated",
    r"leaves? out|left out|leaving out": "skip, drop",
    r"loader process(es)?": "data-loader worker",
    r"published code": "the original implementation",
    r"images are the limit": "data loading is the bottleneck",
    r"places?": "index, position",
    r"frames?": "padded buffer",
    r"(is|are|be|being) shown": "sees",
    r"in turn|moods?": "interleaved, drift",
    r"mend|mends|mended": "fix",
    r"affairs?": "responsibility",
    r"lest": "in case",
    r"whoever": "anyone",
    r"beside": "next to",
    r"so many": "N",
    r"in place of": "instead of",
    r"faults?": "error",
    r"(ends? with|is|are|in) a line": "exits with a one-line error",
}
BRITISH = r"\w*(colour|grey|centre|behaviour|neighbour|favour|optimis|normalis|initialis|recognis)\w*"
# Where such a word is the technical term. Underscores count as spaces.
ALLOWED = [
    r"\bin place\b(?! of)",  # an operation of torch
    r"\bmodels\.place\b|\bplace\(|import [\w, ]+, place\b",  # models.place puts a model on its device
    r"\bclear frames\b|\bframe count\b|frame: FrameType|\bframes? (for|in)\b|\bframe\.|\bframes\[",  # of a stack
    r"\bframes = |\bin frames\b",
    r"\bfault handler|\bpage faults?\b|\bfault injection\b|\bfaults\.py\b",
    r"(\.|def |`)answer\b|\bthe answer to it\b",  # utils.Stop.answer: the run has noticed a signal
]


def plain(text):
    """The text with spaces for underscores, comment signs and allowed uses; its lines keep their numbers."""
    text = re.sub(r"_|^ *#+", lambda match: " " * len(match[0]), text, flags=re.MULTILINE)
    return re.sub("|".join(ALLOWED), lambda match: " " * len(match[0]), text)


def found(pattern, text):
    pattern = rf"\b({pattern})\b".replace(" ", r"\s+")
    return [(text.count("\n", 0, match.start()) + 1, match[0]) for match in re.finditer(pattern, text, re.IGNORECASE)]


def uses_of_words(text):
    """(what to write, line, word) of each use of WORDS."""
    if not found("|".join(WORDS), text):  # one search for all of them is faster
        return []
    return [(better, *use) for old, better in WORDS.items() for use in found(old, text)]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_words_are_those_of_the_field(path):
    text = plain(path.read_text())
    uses = uses_of_words(text)
    wrong = [f"line {line}: {word!r}; write: {better}" for better, line, word in uses]
    assert not wrong, "\n".join(wrong)
    assert not found(BRITISH, text)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("def test_equal_to_the_bit():", True),
        ("# some of them are left\n    # out", True),
        ("a Fault", True),
        ("faulthandler", False),
        ("sum in place", False),
        ("used in place of it", True),
        ("model = models.place(model, device)", False),
    ],
)
def test_words_are_found_across_lines_and_in_names(text, expected):
    assert bool(uses_of_words(plain(text))) is expected


def test_names_of_tests_have_at_most_70_characters():
    names = chain.from_iterable(re.findall(r"def (test_\w+)", path.read_text()) for path in ROOT.glob("tests/*.py"))
    assert not [name for name in names if len(name) > 70]


# -- links and paths ---------------------------------------------------------------------------------------------------


def links(page):
    """(file, anchor) of each relative link of a page."""
    targets = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [target.partition("#")[::2] for target in targets if not target.startswith("http")]


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(page):
    for file, anchor in links(page):
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), file
        assert not anchor or anchor in anchors(target), f"{file}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_paths_in_texts_exist(page):
    text = page.read_text()
    paths = re.findall(r"(?<![\w/.-])((?:docs|recipes|tests|tools|augment|assets|results)/[\w./-]*\w)", text)
    for path in paths:
        assert (ROOT / path).exists(), path
    for tool in re.findall(r"(?:python -m |`)tools\.([a-z_]+)", text):
        assert (ROOT / "tools" / f"{tool}.py").exists(), tool
    sources = {path.name: path for path in CODE}
    for file, test in re.findall(r"`(?:\w+/)?(\w+\.py)(?:::(\w+))?`", text):
        assert file in sources, file
        assert not test or f"def {test}(" in sources[file].read_text(), f"{file}::{test}"


def test_every_page_is_linked():
    linked = {(page.parent / file).resolve() for page in PAGES for file, _ in links(page) if file}
    assert [page.name for page in PAGES if page not in linked] == ["README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_pages_are_short(page):
    assert len(page.read_text().splitlines()) <= (160 if page.name == "README.md" else 149)
