"""The report in a real browser: Debian's Chromium, headless, driven by selenium."""

import base64
import io
import json
import re
import shutil
import time
import zlib

import numpy as np
import pytest
from matplotlib import pyplot as plt

import playbook_optax as pbx
from playbook_optax import report
from playbook_optax.analysis.findings import Finding
from playbook_optax.records.study import Study

WIDTHS = (360, 768, 1280)
HOSTILE = (
    "<script>window.executed = 1</script>",
    "</script></style><script>window.executed = 2</script>",
    '"><img src=x onerror="window.executed = 3">',
    "'><svg onload='window.executed = 4'>",
    "javascript:window.executed=5",
    '=HYPERLINK("http://example.invalid/?q=1","x")',
    "{{ 7 * 7 }}{% raw %}",
    "W" * 400,
    "مرحبا بالعالم \u202eevitagen",
    "$\\frac{",
)


def make_study(num_trials=60, name="digits", metric="valid/error_rate", extra=()):
    rng = np.random.default_rng(0)
    rates = 10 ** rng.uniform(-4, 0, num_trials)
    step = np.arange(0, 2100, 100)
    end = 0.05 + 0.1 * np.log10(rates / 0.02) ** 2
    curve = end[:, None] + (0.9 - end[:, None]) * np.exp(-step / 300)[None]
    curve = curve + 0.004 * rng.normal(size=curve.shape)
    infeasible = rates > 0.4
    curve[infeasible, 3:] = np.nan
    space = pbx.SearchSpace({"learning_rate": pbx.Float(1e-4, 1.0, scale="log")})
    points = {"learning_rate": rates}
    for other in extra:
        points[other] = np.round(rng.uniform(0.8, 0.99, num_trials), 4)
    return Study.from_arrays(
        points,
        {metric: curve, "train/loss": 2 * curve},
        step,
        objective=metric,
        space=None if extra else space,
        infeasible=infeasible,
        name=name,
    )


def very_wide():
    """A figure that was drawn wider than a page is."""
    return plt.subplots(1, 3, figsize=(17.0, 4.0))[0]


def make_decisions(study, more=()):
    figures = [*report.draw_plots(study), *more]
    sweep = report.Decision(
        "Learning rate",
        "Which learning rate is best, and is the best inside the range that was searched?",
        "0.0213 is best: valid/error_rate = 0.0443 at step 2000, well inside the range.",
        "Choosing the initial configuration",
        pbx.diagnose(study),
        figures,
        report.Table(
            ("remedy", "largest stable rate", "best valid/error_rate", "at step", "extra steps"),
            [("none", "0.0213", "0.0443", "2000", "0"), ("clipping", "0.13", "0.041", "1900", "0")],
        ),
        "Sweep again with a longer run, around the same rate.",
        "120,000 trial-steps",
    )
    steps = report.Decision(
        "Length of training",
        "Is training compute-bound?",
        "Train for 2000 steps: the best trials were still improving at the end.",
        "Deciding how long to train when training is compute-bound",
        [
            Finding(
                "still_improving",
                "warning",
                "8 of the 10 best trials were still improving at the end.",
                {"num_trials": 10, "num_improving": 8, "share": 0.8},
                "Deciding how long to train when training is compute-bound",
                "Train the next round for 4000 steps.",
            ),
            Finding("none_fits", "error", "No trial fits.", {}, "A section", "Raise N."),
        ],
    )
    return [sweep, steps]


RECIPE = """import optax
import playbook_optax as pbx

schedule = pbx.schedules.cosine_decay(init_value=0.0213, decay_steps=2000, hold_steps=500)
optimizer = optax.chain(pbx.clip_by_global_norm(max_norm=1.0), pbx.adam(schedule, b1=0.9))
"""


def write_all(folder):
    """Every kind of page: name to path."""
    study, told = make_study(), " ".join(HOSTILE)
    hostile = make_study(12, told, HOSTILE[2] + " loss", HOSTILE[7:9])
    decisions = make_decisions(study)
    bad = Finding(HOSTILE[2], "warning", told, {h: h for h in HOSTILE}, told, told)
    decision = report.Decision(
        told, told, told, told, [bad], [], report.Table(HOSTILE, [HOSTILE] * 3), told, told
    )
    return {
        "report": report.write_report(study, folder / "report", recipe=RECIPE),
        "chapter": report.write_chapter(
            "digits",
            "How can optimization failures be debugged and mitigated?",
            "Use clipping at learning rate 0.13.",
            "It took 120,000 trial-steps.",
            decisions,
            folder / "chapter",
            [("Study sweep", "60 trials x 1 seeds x 2000 steps")],
            RECIPE,
        ),
        "recipe": report.write_recipe(
            name="digits",
            headline="Adam at a learning rate of 0.0213 with cosine decay over 2000 steps reaches "
            "valid/error_rate = 0.0443.",
            trust="Five seeds spread over 0.0021; one warning below deserves a look first.",
            recipe=RECIPE,
            facts=[
                ("learning_rate", "0.0213"),
                ("b1", "0.9"),
                ("steps", "2000"),
                ("best valid/error_rate", "0.0443"),
                ("spread over 5 seeds", "0.0021"),
            ],
            decisions=make_decisions(
                study,
                [
                    report.draw_figure(
                        "figure_9.png",
                        "Three plots",
                        "Three empty plots on paper that is wider than a page.",
                        very_wide,
                    )
                ],
            ),
            studies=[("Round 1", make_study(70, extra=("b1",)))],
            directory=folder / "recipe",
            budget=[("Learning-rate sweep", 24000), ("Round 1", 120000), ("Spread", 10000)],
        ),
        "hostile": report.write_recipe(
            name=told,
            headline=told,
            trust=told,
            recipe=told,
            facts=[(h, h) for h in HOSTILE],
            decisions=[decision],
            studies=[(told, hostile)],
            directory=folder / "hostile",
            budget=[(h, 10) for h in HOSTILE],
        ),
    }


ELEMENTS = (
    "a article bdi body caption code dd details div dl dt figcaption figure footer h1 h2 h3 head "
    "header html img li main meta nav ol p pre rect section span strong style summary svg "
    "table tbody td tfoot th thead title tr"
)
PAGES = ("report", "chapter", "recipe", "hostile")


class Browser:
    """A page of those written, at a width, in a scheme, on screen or on paper."""

    def __init__(self, driver, paths):
        self.driver, self.paths = driver, paths

    def tell(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def run(self, script, *arguments):
        return self.driver.execute_script(script, *arguments)

    def open(self, page, width=1280, scheme="light", media="screen", open_details=False):
        self.tell(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.tell("Emulation.setEmulatedMedia", media=media, features=[feature])
        self.driver.get(self.paths[page].as_uri())
        if open_details:
            self.run("document.querySelectorAll('details').forEach(d => { d.open = true })")

    def press(self, key):
        codes = {"Tab": 9, "Enter": 13, "ArrowRight": 39}
        key = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key]}
        text = {"text": "\r"} if key["key"] == "Enter" else {}
        self.tell("Input.dispatchKeyEvent", type="keyDown", **key, **text)
        self.tell("Input.dispatchKeyEvent", type="keyUp", **key)

    def wait_until(self, condition):
        """Waits for what a key leads to, which may come later than the key is answered."""
        deadline = time.monotonic() + 10
        while not self.run(f"return {condition}"):
            assert time.monotonic() < deadline, condition
            time.sleep(0.02)


@pytest.fixture(scope="module")
def driver():
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in programs:
        pytest.skip("Chromium or its driver is missing: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    # Not even Chromium's own services are looked up.
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    for name in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{name}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    yield started
    started.quit()


@pytest.fixture(scope="module")
def browser(driver, tmp_path_factory):
    return Browser(driver, write_all(tmp_path_factory.mktemp("pages")))


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_fetched_or_executed_and_nothing_is_amiss(browser, page):
    browser.driver.get_log("performance")
    browser.driver.get_log("browser")
    browser.open(page, open_details=True)
    events = [
        json.loads(row["message"])["message"] for row in browser.driver.get_log("performance")
    ]
    urls = [
        event["params"]["request"]["url"]
        for event in events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert urls[0] == browser.paths[page].as_uri()
    assert {url[:22] for url in urls[1:]} == {"data:image/png;base64,"}
    assert browser.driver.get_log("browser") == []
    assert browser.run("return [window.executed ?? null, document.scripts.length]") == [None, 0]
    # The policy lets our style and our pictures through.
    assert browser.run("return getComputedStyle(document.querySelector('pre')).overflowX") == "auto"
    assert browser.run("return [...document.images].every(i => i.naturalWidth > 100)")


def test_the_policy_stops_what_escaping_should_have_stopped(browser):
    """The second line of defence: markup put into the page by force does nothing."""
    browser.open("hostile")
    browser.run(
        """
        document.body.insertAdjacentHTML("beforeend",
          "<img src=x onerror='window.executed = 6'><p style='color: rgb(1, 2, 3)' id=p>p</p>" +
          "<a id=a href='javascript:window.executed = 8'>x</a>");
        const script = document.createElement("script");
        script.textContent = "window.executed = 7";
        document.body.append(script);
        document.getElementById("a").click();
        """
    )
    time.sleep(0.2)
    assert browser.run("return window.executed ?? null") is None
    assert browser.run("return getComputedStyle(p).color") != "rgb(1, 2, 3)"
    told = " ".join(row["message"] for row in browser.driver.get_log("browser"))
    assert "Content Security Policy" in told


def test_hostile_names_stay_text(browser):
    browser.open("hostile", open_details=True)
    # But for the control that would turn round what follows, which is an escape.
    told = " ".join(HOSTILE).replace("\u202e", "\\u202e")
    assert browser.run("return document.querySelector('h1').textContent") == told
    assert browser.run("return document.title") == f"{told}: Tuned recipe"
    cells = browser.run(
        "return [...document.querySelectorAll('#decision-1 td')].map(c => c.innerText)"
    )
    for name in HOSTILE[1:]:
        assert name.replace("\u202e", "\\u202e") in cells
    found = browser.run("return [...document.querySelectorAll('*')].map(e => e.localName)")
    assert set(found) <= set(ELEMENTS.split())
    attributes = browser.run(
        "return [...document.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"
    )
    assert not [name for name in attributes if name.startswith("on") or name == "style"]
    links = browser.run("return [...document.links].map(a => a.getAttribute('href').slice(0, 8))")
    assert {link for link in links if link[0] != "#"} == {"data:tex"}


@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_scrolls_sideways(browser, width):
    for page in PAGES:
        for media in ("screen", "print"):
            browser.open(page, width, media=media, open_details=True)
            seen = browser.run(
                "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
            )
            assert seen[0] <= seen[1], (page, media)


@pytest.mark.parametrize("width", [1280, 1600, 1920, 2560])
def test_no_figure_is_cut_and_the_column_stands_in_the_middle(browser, width):
    for page in ("recipe", "chapter", "report"):
        browser.open(page, width)
        figures = browser.run(
            """
            return [...document.querySelectorAll("figure")].filter(f => f.checkVisibility()).map(
              f => {
                const shown = f.querySelector("img").getBoundingClientRect();
                const room = f.closest(".plots").getBoundingClientRect();
                return [f.className, shown.right - room.right, shown.width / room.width];
              })
            """
        )
        assert len(figures) >= 2
        # Also one that was drawn much wider than the column.
        assert ("wide widest" in [row[0] for row in figures]) == (page == "recipe")
        assert max(beyond for _, beyond, _ in figures) <= 0.5
        for kind, _, share in figures:
            assert share > (0.99 if kind else 0.48)
        left, right = browser.run(
            "const r = document.querySelector('main').getBoundingClientRect();"
            "return [r.left, document.documentElement.clientWidth - r.right]"
        )
        if width >= 1600:
            assert left == pytest.approx(right, abs=1)


def test_a_figure_alone_in_its_row_is_as_wide_as_it_was_drawn(browser):
    for page, width, wanted in (("recipe", 1280, 600), ("recipe", 360, 300)):
        browser.open(page, width)
        shown = browser.run("return document.images[0].getBoundingClientRect().width")
        assert shown > wanted


def test_no_common_word_is_broken_in_a_narrow_column(browser):
    browser.open("recipe", 360, open_details=True)
    broken = browser.run(
        """
        return [...document.querySelectorAll("#decisions > table tbody th, .finding th")].filter(
          cell => {
            const walk = document.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
            for (let node; node = walk.nextNode();)
              for (const word of node.data.matchAll(/[\\w]+/g)) {
                const range = document.createRange();
                range.setStart(node, word.index);
                range.setEnd(node, word.index + word[0].length);
                if (new Set([...range.getClientRects()].map(r => r.top)).size > 1) return true;
              }
            return false;
          }).map(cell => cell.textContent)
        """
    )
    assert broken == []


def test_what_is_wide_scrolls_in_a_region_with_a_name(browser):
    browser.open("recipe", 360, open_details=True)
    regions = browser.run(
        """
        return [...document.querySelectorAll("*")].filter(e => e.scrollWidth > e.clientWidth + 1 &&
            ["auto", "scroll"].includes(getComputedStyle(e).overflowX))
          .map(e => [e.tabIndex, e.getAttribute("role"), e.getAttribute("aria-label")])
        """
    )
    assert len(regions) >= 4
    assert {tuple(row[:2]) for row in regions} == {(0, "group")}
    assert all(row[2] for row in regions)
    browser.run("document.querySelector('figure .scroll').focus()")
    browser.press("ArrowRight")
    browser.wait_until("document.activeElement.scrollLeft")


CONTRASTS = """
const numbers = text => text.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => {
  const [x, y, z] = [r, g, b].map(c => c / 255).map(
    c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
};
const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
const ground = element => {
  for (let e = element; e; e = e.parentElement) {
    const colour = numbers(getComputedStyle(e).backgroundColor);
    if (colour.length === 3 || colour[3] > 0) return colour;
  }
  return [255, 255, 255];
};
"""


@pytest.mark.parametrize(
    ("scheme", "media"), [("light", "screen"), ("dark", "screen"), ("dark", "print")]
)
def test_every_text_stands_out_from_its_background(browser, scheme, media):
    for page in PAGES:
        browser.open(page, scheme=scheme, media=media, open_details=True)
        ground, rows = browser.run(
            CONTRASTS
            + """
            const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), rows = [];
            for (let node; node = walk.nextNode();) {
              const e = node.parentElement;
              if (!node.data.trim() || !e.checkVisibility()) continue;
              const colour = numbers(getComputedStyle(e).color);
              const alpha = colour[3] ?? 1;
              rows.push([ratio(light(colour), light(ground(e))) * (alpha === 1), node.data]);
            }
            return [light(ground(document.body)), rows];
            """
        )
        assert len(rows) > 40
        assert min(rows)[0] >= 4.5, min(rows)
        assert ground < 0.03 if (scheme, media) == ("dark", "screen") else ground == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_fit_the_scheme_and_keep_their_contrast(browser, scheme):
    image = pytest.importorskip("PIL.Image")
    browser.open("recipe", scheme=scheme)
    for i in range(2):
        clip = browser.run(
            "const r = document.images[arguments[0]].getBoundingClientRect();"
            "return {x: r.x + scrollX, y: r.y + scrollY, width: r.width, height: r.height,"
            "        scale: 1}",
            i,
        )
        shot = browser.tell("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        picture = image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("L")
        grey = np.asarray(picture, np.float64)[8:-8, 8:-8] / 255
        light = np.where(grey <= 0.04045, grey / 12.92, ((grey + 0.055) / 1.055) ** 2.4)
        ink, paper = np.percentile(light, [0.5, 50] if scheme == "light" else [99.5, 50])
        assert paper > 0.9 if scheme == "light" else paper < 0.03
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 7


@pytest.mark.parametrize("width", [360, 1280])
def test_the_keyboard_reaches_everything_in_order_and_shows_where_it_is(browser, width):
    browser.open("recipe", width)
    browser.run("document.querySelectorAll('#decisions details').forEach(d => { d.open = true })")
    wanted = browser.run(
        """
        window.wanted = [...document.querySelectorAll("a[href], summary, [tabindex='0']")]
          .filter(e => e.checkVisibility({contentVisibilityAuto: true}));
        return window.wanted.length
        """
    )
    links = browser.run("return window.wanted.filter(e => e.matches('nav a')).length")
    folded = browser.run("return window.wanted.filter(e => e.matches('nav summary')).length")
    assert (links > 6, folded) == ((False, 1) if width == 360 else (True, 0))
    assert wanted - links > 15
    first = None
    for i in range(wanted):
        browser.press("Tab")
        at, kind, style, size, contrast, inside = browser.run(
            CONTRASTS
            + """
            const e = document.activeElement, s = getComputedStyle(e);
            const r = e.getBoundingClientRect();
            return [window.wanted.indexOf(e), e.outerHTML.slice(0, 60), s.outlineStyle,
              parseFloat(s.outlineWidth),
              ratio(light(numbers(s.outlineColor)), light(ground(e.parentElement))),
              r.right > 0 && r.left < innerWidth && r.bottom > 0 && r.top < innerHeight];
            """
        )
        assert at == i, kind
        assert style == "solid", kind
        assert size >= 2
        assert contrast >= 3
        assert inside, kind
        first = first or kind
    assert 'class="skip"' in first


def test_the_skip_link_jumps_and_a_summary_opens_by_keyboard(browser):
    browser.open("recipe", 360)
    browser.press("Tab")
    browser.press("Enter")
    browser.wait_until("document.activeElement.id === 'main'")
    browser.run("document.querySelector('main summary').focus()")
    assert not browser.run("return document.querySelector('main details').open")
    browser.press("Enter")
    browser.wait_until("document.querySelector('main details').open")


@pytest.mark.parametrize("page", PAGES)
def test_the_accessibility_tree_names_pictures_tables_and_regions(browser, page):
    browser.open(page, open_details=True)
    nodes = [n for n in browser.tell("Accessibility.getFullAXTree")["nodes"] if not n["ignored"]]

    def of(*roles):
        return [node for node in nodes if node["role"]["value"] in roles]

    def names(*roles):
        return [node["name"]["value"].strip() for node in of(*roles)]

    assert len(names("image", "img")) == browser.run("return document.images.length") >= 1
    assert all(len(name) > 20 for name in names("image", "img"))
    assert all(names("table", "region", "article", "link"))
    groups = "return [...document.querySelectorAll('[role=group]')].map(e => e.ariaLabel)"
    assert all(browser.run(groups))
    assert len(names("region")) == len(set(names("region"))) >= 2
    assert len(names("table")) == browser.run("return document.querySelectorAll('table').length")
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert len(of(landmark)) == 1, landmark
    levels = [
        next(p["value"]["value"] for p in node["properties"] if p["name"] == "level")
        for node in of("heading")
    ]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert max(np.diff(levels)) <= 1
    assert len(levels) >= 4
    assert browser.run("return document.documentElement.lang") == "en"
    ids = browser.run("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_paper_has_everything_in_black_and_nothing_cut(browser):
    browser.open("recipe", 794, "dark", "print")
    closed = browser.run(
        """
        return [...document.querySelectorAll("main details > :not(summary)")]
          .filter(e => !e.checkVisibility({contentVisibilityProperty: true}) ||
                       e.getBoundingClientRect().height < 10).length
        """
    )
    assert closed == 0
    assert browser.run("return document.querySelectorAll('main details').length") > 5
    shown = "return document.querySelector('{}').checkVisibility()"
    assert not browser.run(shown.format("nav"))
    assert browser.run("return getComputedStyle(document.body).color") == "rgb(0, 0, 0)"
    assert browser.run("return getComputedStyle(document.images[0]).filter") == "none"
    break_inside = "return getComputedStyle(document.querySelector('figure')).breakInside"
    assert browser.run(break_inside) == "avoid"
    cut = browser.run(
        """
        return [...document.querySelectorAll("main *")].filter(e => !e.closest(".hidden") &&
          e.getBoundingClientRect().right > innerWidth + 1).length
        """
    )
    assert cut == 0


def printed_letters(browser):
    """How many glyphs a PDF of the page shows, and on how many pages."""
    pdf = base64.b64decode(browser.tell("Page.printToPDF", printBackground=False)["data"])
    assert pdf.startswith(b"%PDF-")
    letters = 0
    for stream in re.findall(rb"stream\r?\n(.*?)\r?\nendstream", pdf, re.DOTALL):
        try:
            content = zlib.decompress(stream)
        except zlib.error:
            continue
        if b"BT" in content:
            letters += sum(len(t) // 4 for t in re.findall(rb"<([0-9A-Fa-f]+)>", content))
    return letters, len(re.findall(rb"/Type\s*/Page\b", pdf))


def test_a_pdf_holds_what_is_folded_on_screen(browser):
    browser.open("recipe")
    browser.tell("Emulation.setEmulatedMedia", media="", features=[])
    folded = printed_letters(browser)
    browser.run("document.querySelectorAll('details').forEach(d => { d.open = true })")
    assert folded == printed_letters(browser)
    browser.run("document.querySelectorAll('main details').forEach(d => { d.remove() })")
    without = printed_letters(browser)
    assert folded[0] > without[0] + 1000
    assert folded[1] > without[1] >= 2


def test_the_recipe_can_be_saved(browser, tmp_path):
    browser.open("recipe")
    browser.tell("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.driver.find_element("css selector", "a[download]").click()
    saved, deadline = tmp_path / "recipe.py", time.monotonic() + 10
    while not saved.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert saved.read_text() == RECIPE
