"""The built book as readers meet it: every page in a real browser, served and from disk.

Each check is a function that returns its findings as sentences; an empty list is a pass. One test
per page, window and colour scheme applies them all, so that a failure names the page. A made page
with one fault of every kind proves that each check can fail.
"""

import html.parser
import re
import threading
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import nbformat
import pytest
import yaml
from axe_playwright_python.base import AXE_SCRIPT
from playwright.sync_api import sync_playwright

from bootstrap import find_browser

pytestmark = pytest.mark.browser

ROOT = Path(__file__).parent.parent
HTML = ROOT / "_build" / "html"

# What Chromium would fetch on its own account is switched off. No name but the loopback's resolves,
# so that a foreign request fails at once instead of waiting for the network.
BROWSER_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
WINDOWS = {
    "desktop": {"viewport": {"width": 1280, "height": 800}},
    "phone": {
        "viewport": {"width": 390, "height": 844},
        "device_scale_factor": 2,
        "is_mobile": True,
        "has_touch": True,
    },
}
# Axe takes most of the time, and sees each window and each scheme once.
DIAGONAL = [("desktop", "light"), ("phone", "dark")]


def documents(node):
    """The pages of a table of contents, in its order."""
    if isinstance(node, list):
        return [name for child in node for name in documents(child)]
    if not isinstance(node, dict):
        return []
    own = [node[key] for key in ("root", "file") if key in node]
    return own + [name for child in node.values() for name in documents(child)]


TOC = documents(yaml.safe_load((ROOT / "_toc.yml").read_text()))
NOTEBOOKS = [name for name in TOC if "/notebooks/" in name]
CHAPTERS = [name for name in NOTEBOOKS if not name.endswith("/results")]
# The pages that Sphinx adds are read as well: search, index, list of the modules.
PAGES = [*TOC, "search", "genindex", "py-modindex"]


# The HTML as it was written


class Markup(html.parser.HTMLParser):
    """The tags of a page with their attributes, and the text of its first heading."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.heading = ""
        self._in_heading = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = {name: value or "" for name, value in attributes}
        self.tags.append((tag, attributes))
        if tag == "h1" and not self.heading:
            self._in_heading = True
        elif "headerlink" in attributes.get("class", ""):
            self._in_heading = False

    def handle_endtag(self, tag):
        if tag == "h1":
            self._in_heading = False

    def handle_data(self, data):
        if self._in_heading:
            self.heading += data

    def with_class(self, name):
        return [a for _, a in self.tags if name in a.get("class", "").split()]

    def anchors(self):
        return {a[key] for _, a in self.tags for key in ("id", "name") if key in a}

    def addresses(self):
        for tag, attributes in self.tags:
            yield from (attributes[key] for key in ("href", "src") if key in attributes)
            if tag == "meta" and attributes.get("http-equiv", "").lower() == "refresh":
                yield attributes["content"].partition("url=")[2]


@cache
def markup(path):
    return Markup(path.read_text(encoding="utf-8"))


def page_markup(name):
    return markup(HTML / f"{name}.html")


def dead_links(folder):
    """Internal addresses of all pages of a folder that lead to no file or to no anchor."""
    pages = [p for p in folder.rglob("*.html") if "_static" not in p.relative_to(folder).parts]
    findings = []
    for page in pages:
        for address in dict.fromkeys(markup(page).addresses()):
            if urlsplit(address).scheme or address.startswith("//"):
                continue
            target, anchor = map(unquote, urldefrag(urljoin(page.as_uri(), address)))
            file = Path(urlsplit(target).path)
            where = f"{page.relative_to(folder)}: {address}"
            if not file.is_file():
                findings.append(f"{where} leads to no file")
            elif anchor and file.suffix == ".html" and anchor not in markup(file).anchors():
                findings.append(f"{where} leads to no anchor")
    return findings


# Checks of an open page


class Reader:
    """A tab that remembers what the page said on the console and what it asked for."""

    def __init__(self, page):
        self.page = page
        self.said, self.asked, self.failed = [], [], []
        page.on("console", lambda m: self.said.append((m.type, m.text)))
        page.on("pageerror", lambda error: self.said.append(("error", str(error))))
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("requestfailed", lambda r: self.failed.append(f"{r.url} ({r.failure})"))
        page.on("response", self._note_response)

    def _note_response(self, response):
        if response.status >= 400:
            self.failed.append(f"{response.url} ({response.status})")

    def open(self, url):
        # First nowhere: what the page before still asks for is broken off, and is not this one's.
        self.page.goto("about:blank")
        for notes in (self.said, self.asked, self.failed):
            notes.clear()
        self.page.goto(url)
        self.page.evaluate(
            "async () => { await window.MathJax?.startup?.promise; await document.fonts.ready }"
        )
        return self.page


def console_errors(reader):
    return [f"console {kind}: {text}" for kind, text in reader.said if kind in ("error", "warning")]


def failed_requests(reader):
    return [f"failed request: {what}" for what in reader.failed]


def foreign_requests(reader, home):
    own = (home, "data:", "blob:")
    return [f"foreign request: {url}" for url in reader.asked if not url.startswith(own)]


def formula_faults(page, expected):
    """As many formulas as the source has, none of them in error (an unknown command is red)."""
    found, faults = page.evaluate("""() => {
        const all = [...document.querySelectorAll('mjx-container')]
        const error = 'mjx-merror, merror, [data-mml-node="merror"], mjx-mtext[style*="red"]'
        const bad = all.filter(formula => formula.querySelector(error))
        return [all.length, bad.map(formula => formula.textContent)]
    }""")
    findings = [f"formula in error: {text}" for text in faults]
    if found != expected:
        findings.append(f"{found} formulas are rendered, the page has {expected}")
    return findings


def overflow(page):
    """A page that scrolls sideways, and content that leaves the window without a scroll bar."""
    width, window, outside = page.evaluate("""() => {
        const window_ = document.scrollingElement.clientWidth
        const scrolls = e => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)
        const boxed = e => e && e.tagName != 'BODY' && (scrolls(e) || boxed(e.parentElement))
        const outside = [...document.querySelectorAll('article *, main > *')].filter(e => {
            const box = e.getBoundingClientRect()
            return box.width && box.height && box.right > window_ + 1 && !boxed(e)
        })
        const name = e => e.outerHTML.slice(0, 120)
        return [document.scrollingElement.scrollWidth, window_, outside.slice(0, 3).map(name)]
    }""")
    findings = [f"outside the window: {element}" for element in outside]
    if width > window:
        findings.append(f"the page is {width} pixels wide, the window {window}")
    return findings


def image_faults(page):
    """Images that did not load, or whose alternative text is missing or only a file name."""
    return page.evaluate(r"""() => {
        const name = e => e.outerHTML.slice(0, 200)
        const named = e => e.getAttribute('aria-label') || e.getAttribute('aria-labelledby')
            || e.querySelector('title')?.textContent.trim()
        const images = [...document.images]
        const drawings = [...document.querySelectorAll('svg')].filter(
            e => !e.closest('[aria-hidden=true], button, mjx-container'))  // axe names buttons
        return [
            ...images.filter(e => !e.naturalWidth && e.complete).map(
                e => 'image not loaded: ' + name(e)),
            ...images.filter(e => !e.alt.trim()).map(e => 'image without alt: ' + name(e)),
            ...images.filter(e => /^\S+\.(png|svg|jpe?g|gif)$/.test(e.alt)).map(
                e => 'alt is a file name: ' + name(e)),
            ...drawings.filter(e => !named(e)).map(e => 'drawing without a name: ' + name(e)),
        ]
    }""")


def luminance(page):
    """Relative luminance of the page's background (WCAG), from 0, black, to 1, white."""
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    red, green, blue, *alpha = (float(number) for number in re.findall(r"[\d.]+", colour))
    if alpha == [0]:
        return 1.0  # transparent: the browser's own white shows
    linear = [
        v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4
        for v in (red / 255, green / 255, blue / 255)
    ]
    return sum(weight * v for weight, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def wrong_scheme(page, scheme):
    value = luminance(page)
    if value < 0.1 if scheme == "dark" else value > 0.8:
        return []
    return [f"the background is not {scheme}: luminance {value:.2f}"]


def axe_violations(page):
    """Serious and critical findings of axe-core, by rule and element.

    Of the thousands of words of code it sees one of each colour: four times faster. It asks for
    style sheets at wrong addresses, so look at the requests before.
    """
    page.evaluate(AXE_SCRIPT)
    violations = page.evaluate("""async () => {
        const seen = new Set()
        const again = [...document.querySelectorAll('pre span:not(:has(*))')].filter(word => {
            const styles = [word, word.closest('pre')].map(e => getComputedStyle(e))
            const look = styles.map(s => [s.color, s.backgroundColor, s.fontWeight]).join()
            return seen.has(look) || !seen.add(look)
        })
        again.forEach(word => word.replaceWith(word.textContent))
        return (await axe.run({resultTypes: ['violations']})).violations
    }""")
    return [
        f"axe {violation['id']} ({violation['impact']}): {node['target']} {node['html'][:200]}"
        for violation in violations
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"][:5]
    ]


def cells_without_copy_button(page):
    return page.evaluate("""() => [...document.querySelectorAll('.cell_input pre')]
        .filter(pre => !pre.parentElement.querySelector('button.copybtn'))
        .map(pre => 'no copy button: ' + pre.textContent.slice(0, 80))""")


# Browser and server


class QuietHandler(SimpleHTTPRequestHandler):
    made_pages: dict[str, bytes]

    def do_GET(self):
        made = self.made_pages.get(self.path)
        if made is None:
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(made)
        return None

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module", autouse=True)
def _the_book_is_built():
    if not (HTML / "index.html").exists():
        pytest.fail(f"{HTML} does not exist: build the book first with `make book`", pytrace=False)


@pytest.fixture(scope="module")
def home():
    """Address of the served book, with a slash at its end."""
    QuietHandler.made_pages = {"/faulty.html": FAULTY.encode()}
    handler = partial(QuietHandler, directory=str(HTML))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def readers(home):
    """`readers(window, scheme)`: the one tab of that window and colour scheme, made when needed."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=BROWSER_FLAGS)

        @cache
        def reader(window="desktop", scheme="light"):
            context = browser.new_context(color_scheme=scheme, **WINDOWS[window])
            context.set_default_timeout(30_000)  # a busy machine
            clipboard = ["clipboard-read", "clipboard-write"]
            context.grant_permissions(clipboard, origin=home)
            return Reader(context.new_page())

        yield reader
        browser.close()


def report(findings, *where):
    return "\n".join([", ".join(where) + ":", *findings])


# The matrix


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("window", WINDOWS)
def test_the_page_is_complete_quiet_and_accessible(name, window, scheme, home, readers):
    reader = readers(window, scheme)
    page = reader.open(f"{home}{name}.html")
    findings = [
        *formula_faults(page, len(page_markup(name).with_class("math"))),
        *overflow(page),
        *image_faults(page),
        *wrong_scheme(page, scheme),
        *cells_without_copy_button(page),
        *console_errors(reader),
        *failed_requests(reader),
        *foreign_requests(reader, home),
    ]
    if (window, scheme) in DIAGONAL:
        findings += axe_violations(page)
    assert not findings, report(findings, name, window, scheme)


@pytest.mark.parametrize("name", PAGES)
def test_the_page_works_from_disk(name, readers):
    reader = readers()
    page = reader.open((HTML / f"{name}.html").as_uri())
    findings = [
        *formula_faults(page, len(page_markup(name).with_class("math"))),
        *image_faults(page),
        *console_errors(reader),
        *failed_requests(reader),
        *foreign_requests(reader, HTML.as_uri()),
    ]
    assert not findings, report(findings, name, "from disk")


FAULTY = r"""<!doctype html>
<html lang="en"><head><title>faulty</title>
<script>console.error("made error"); throw Error("made exception")</script>
<script defer src="/_static/mathjax/tex-chtml.js"></script></head>
<body style="background: #888"><main><article>
<img src="http://foreign.example/picture.png"><img src="/_static/logo.svg" alt="logo.svg">
<img src="/missing.png" alt="A picture that does not exist">
<svg width="10" height="10"></svg><button></button>
<p style="width: 2000px">wide</p><div class="cell_input"><div><pre>code</pre></div></div>
<p>\(\undefined\) and \(\frac\) and \(x\)</p>
<a href="nowhere.html">no file</a> <a href="#nowhere">no anchor</a>
</article></main></body></html>"""


def test_every_check_reports_its_fault(home, readers, tmp_path):
    reader = readers("phone", "dark")
    page = reader.open(home + "faulty.html")
    (tmp_path / "faulty.html").write_text(FAULTY)
    found = {
        "console error: made error": console_errors(reader),
        "console error: made exception": console_errors(reader),
        "failed request: http://foreign.example/picture.png": failed_requests(reader),
        f"failed request: {home}missing.png (404)": failed_requests(reader),
        "foreign request: http://foreign.example/picture.png": foreign_requests(reader, home),
        "formula in error: \\undefined": formula_faults(page, 3),
        "formula in error: Missing argument": formula_faults(page, 3),
        "3 formulas are rendered, the page has 4": formula_faults(page, 4),
        "the page is 20": overflow(page),
        'outside the window: <p style="width: 2000px">': overflow(page),
        'image not loaded: <img src="/missing.png"': image_faults(page),
        'image without alt: <img src="http://foreign.example': image_faults(page),
        'alt is a file name: <img src="/_static/logo.svg"': image_faults(page),
        'drawing without a name: <svg width="10"': image_faults(page),
        "the background is not dark": wrong_scheme(page, "dark"),
        "the background is not light": wrong_scheme(page, "light"),
        "no copy button: code": cells_without_copy_button(page),
        "axe button-name (critical)": axe_violations(page),
        "faulty.html: nowhere.html leads to no file": dead_links(tmp_path),
        "faulty.html: #nowhere leads to no anchor": dead_links(tmp_path),
    }
    missed = [
        f"{expected!r} is not in {findings}"
        for expected, findings in found.items()
        if not any(finding.startswith(expected) for finding in findings)
    ]
    assert not missed, "\n".join(missed)
    assert len(formula_faults(page, 3)) == 2


# What readers do


def test_every_link_within_the_book_leads_somewhere():
    findings = dead_links(HTML)
    assert not findings, report(findings, "dead links")


def test_the_navigation_of_the_first_page_lists_every_page():
    first, *others = TOC
    folder = (HTML / f"{first}.html").parent
    linked = {(folder / urldefrag(a).url).resolve() for a in page_markup(first).addresses()}
    assert {(HTML / f"{name}.html").resolve() for name in others} <= linked


@pytest.mark.parametrize(
    ("name", "place"), [*((name, "served") for name in CHAPTERS), (CHAPTERS[0], "disk")]
)
def test_typing_the_title_of_a_chapter_into_the_search_finds_it(name, place, home, readers):
    root = home if place == "served" else HTML.as_uri() + "/"
    page = readers().open(f"{root}{TOC[0]}.html")
    page.locator("button.search-button__button:visible").first.click()
    page.keyboard.type(page_markup(name).heading)
    page.keyboard.press("Enter")
    page.locator("#search-results .search-summary", has_text="finished").wait_for()
    # By its key: summaries still come in, and a click between two of them meets another place.
    page.locator(f"#search-results a[href*='{name}.html']").first.press("Enter")
    page.wait_for_url(f"{root}{name}.html*")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_launch_button_opens_this_page_s_notebook_on_colab(name):
    addresses = [urlsplit(address) for address in page_markup(name).addresses()]
    launches = {a.path for a in addresses if a.netloc == "colab.research.google.com"}
    (path,) = {re.sub("^/github/[^/]+/[^/]+/blob/main/", "", path) for path in launches}
    assert path == f"{name}.ipynb"
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", TOC)
def test_the_edit_button_opens_the_text_page(name):
    (button,) = page_markup(name).with_class("btn-source-edit-button")
    path = button["href"].partition("/edit/main/")[2]
    assert path == name.replace("/notebooks/", "/") + ".md"
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_download_button_gives_the_executed_twin(name, home, readers):
    page = readers().open(f"{home}{name}.html")
    page.get_by_role("button", name="Download this page").click()
    with page.expect_download() as download:
        page.locator("a.btn-download-source-button").click()
    assert download.value.suggested_filename == Path(name).name + ".ipynb"
    assert download.value.path().read_bytes() == (ROOT / f"{name}.ipynb").read_bytes()


def copied(page, block):
    page.evaluate("navigator.clipboard.writeText('')")
    block.locator("button.copybtn").click()
    page.wait_for_function("async () => await navigator.clipboard.readText() != ''")
    return page.evaluate("navigator.clipboard.readText()")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_copy_button_gives_the_code_of_the_cell(name, home, readers):
    page = readers().open(f"{home}{name}.html")
    cells = nbformat.read(ROOT / f"{name}.ipynb", 4).cells
    shown = [c for c in cells if c.cell_type == "code" and "remove-cell" not in str(c.metadata)]
    text = copied(page, page.locator(".cell_input .highlight").first)
    assert text.strip() == shown[0].source.strip()


def test_the_copy_button_leaves_prompts_and_outputs_out(home, readers):
    pages = [n for n in TOC if "&gt;&gt;&gt; " in (HTML / f"{n}.html").read_text(encoding="utf-8")]
    assert pages, "not even the API shows an example with prompts"
    for name in pages:
        page = readers().open(f"{home}{name}.html")
        examples = page.evaluate("""async () => {
            const examples = []
            for (const block of document.querySelectorAll('.highlight')) {
                const shown = block.querySelector('pre').innerText
                if (!shown.startsWith('>>> ')) continue
                await navigator.clipboard.writeText('')
                block.querySelector('button.copybtn').click()
                let copied = ''
                for (let tries = 0; !copied && tries < 2000; tries++) {
                    await new Promise(done => setTimeout(done, 5))
                    copied = await navigator.clipboard.readText()
                }
                examples.push([shown, copied])
            }
            return examples
        }""")
        assert examples, name
        for shown, copied_text in examples:
            lines = shown.splitlines()
            code = [line[4:] for line in lines if line.startswith((">>> ", "... "))]
            assert copied_text.split("\n") == code, name


@pytest.mark.parametrize("name", CHAPTERS)
def test_solutions_are_folded_and_unfold(name, home, readers):
    page = readers().open(f"{home}{name}.html")
    solutions = page.locator(".solution.dropdown").all()
    assert solutions, f"{name} has no folded solution"
    for solution in solutions:
        content = solution.locator("#solution-content")
        assert not content.is_visible()
        solution.locator("button.toggle-button").click()
        content.wait_for(state="visible")


def test_the_theme_switch_turns_the_page_dark_and_is_remembered(home, readers):
    page = readers("desktop", "light").open(f"{home}{TOC[0]}.html")
    switch = page.locator("button.theme-switch-button:visible").first
    for scheme in ("dark", "light"):
        switch.click()
        page.wait_for_function(f"document.documentElement.dataset.theme == '{scheme}'")
        page.reload()
        assert not wrong_scheme(page, scheme)
    page.evaluate("localStorage.clear()")
