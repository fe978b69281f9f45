"""``aspo view`` in a real browser: what a page shows, and that nothing in it can do anything else."""

import json

import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

from aspo_lightning.cli import view
from aspo_lightning.view.runs import PANELS
from tests.support.browser import chromium, emulate, visit
from tests.support.commands import aspo
from tests.support.viewed_runs import HOSTILE, record, two_runs, write_epoch, write_events

# Of the ratios in viewed_runs.POSITIVE and NEGATIVE, by hand from the paper's equations with eps = 0.2 and c = 3.
# A > 0:  ASPO [r <= 1.2] min(1/r, 3),  GRPO [r <= 1.2] r
POSITIVE_WEIGHTS = {"ASPO": ["3", "2", "0.909", "0", "0"], "GRPO": ["0.25", "0.5", "1.1", "0", "0"]}
# A < 0:  ASPO [r >= 0.8] min(r, 3),  GRPO [r >= 0.8] r
NEGATIVE_WEIGHTS = {"ASPO": ["0", "0.9", "2", "3"], "GRPO": ["0", "0.9", "2", "5"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return two_runs(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def page(runs):
    """The page that the command writes."""
    done = aspo("view", *map(str, runs))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"Wrote {runs[0]}/view.html (")
    return runs[0] / "view.html"


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture
def shown(browser, page):
    """The browser with the page just opened, which has written nothing to the console when the test ends."""
    emulate(browser)
    visit(browser, page)
    browser.get_log("performance")
    yield browser
    assert browser.get_log("browser") == []


def text(browser, selector):
    return browser.find_element(By.CSS_SELECTOR, selector).text


def column(browser, number):
    return [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, f"#rows td:nth-child({number})")]


def open_row(browser, line):
    browser.find_element(By.CSS_SELECTOR, f'tr[data-line="{line}"] td:nth-child(2)').click()


def weights(browser):
    """What the open completion says of each token: its text, and its weight by objective."""
    found = []
    for cell in browser.find_elements(By.CSS_SELECTOR, "#detail-body [data-token]"):
        ActionChains(browser).move_to_element(cell).perform()
        said = [span.text for span in browser.find_elements(By.CSS_SELECTOR, "#detail-body .readout > span")]
        found.append([said[0].split(" ", 4)[-1], *said[3:]])
    return found


def test_the_page_opens_from_a_file_and_asks_for_nothing(browser, page):
    browser.get_log("performance")
    browser.get_log("browser")
    visit(browser, page)
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert asked == [page.as_uri()]
    assert browser.get_log("browser") == []
    assert text(browser, "h1") == "tiny/version_0, tiny/version_1"
    drawn = [title.text for title in browser.find_elements(By.CSS_SELECTOR, "figure h3")]
    assert drawn == [panel.title for panel in PANELS]
    assert len(browser.find_elements(By.CSS_SELECTOR, ".chart svg .scatterlayer")) == 9


def test_the_last_epoch_is_shown_from_its_worst_completion_on(shown):
    assert shown.execute_script(
        "return [document.getElementById('run').value, document.getElementById('epoch').value]"
    ) == ["0", "4"]
    assert column(shown, 2)[:4] == ["-1", "0", "0.25", "0.5"]
    worst = [item.text for item in shown.find_elements(By.CSS_SELECTOR, "#worst li")]
    assert [line.split()[0] for line in worst] == ["-1", "0", "0.25"]
    assert "The very worst" in worst[0]
    assert "truncated" in worst[0]


def test_the_token_that_is_weighed_most_differently_is_named(shown):
    assert text(shown, "#standout .name") == "Let"  # 3 and 0.25; the other completion has 3 and 5
    said = text(shown, "#standout .readout")
    assert "token 1 of 5" in said
    assert "ASPO 3 (dual-clipped)" in said
    assert "GRPO 0.25" in said
    shown.find_element(By.CSS_SELECTOR, "#standout button").click()
    assert text(shown, "#detail-title").startswith("Completion 0 of chain_sum/0")
    assert text(shown, "#detail-body .tokens .chosen .weight") == "Let"


def test_an_epoch_without_tokens_says_why_and_leads_to_the_one_where_the_weights_are_furthest_apart(shown):
    choose = "const e = document.getElementById('epoch'); e.value = '2'; e.dispatchEvent(new Event('change'))"
    shown.execute_script(choose)
    said = text(shown, "#standout")
    assert "No tokens are kept of this epoch." in said  # it was trained on, as its advantages show
    assert "In the whole run they are furthest apart in epoch 4." in said
    shown.find_element(By.CSS_SELECTOR, "#standout .elsewhere").click()
    assert shown.execute_script("return document.getElementById('epoch').value") == "4"
    assert text(shown, "#standout .name") == "Let"
    assert not shown.find_elements(By.CSS_SELECTOR, "#standout .elsewhere")


def test_tokens_have_the_weights_of_the_papers_equations(shown):
    for line, by_hand in ((1, POSITIVE_WEIGHTS), (2, NEGATIVE_WEIGHTS)):
        open_row(shown, line)
        for number, (_, aspo_said, grpo_said) in enumerate(weights(shown)):
            assert aspo_said.split()[1] == by_hand["ASPO"][number]
            assert grpo_said.split()[1] == by_hand["GRPO"][number]
        shown.find_element(By.ID, "close").click()


def test_masked_and_limited_tokens_are_marked(shown):
    def marks(line):
        open_row(shown, line)
        cells = shown.find_elements(By.CSS_SELECTOR, "#detail-body [data-token]")
        lines = [[w.get_attribute("class") for w in cell.find_elements(By.CLASS_NAME, "weight")] for cell in cells]
        shown.find_element(By.ID, "close").click()
        return [[set(names.split()) - {"weight"} for names in of_cell] for of_cell in lines]

    assert marks(1) == [
        [{"more", "limited"}, {"less"}],
        [{"more"}, {"less"}],
        [{"less"}, {"more"}],
        [{"masked"}, {"masked"}],
        [{"masked"}, {"masked"}],
    ]
    assert marks(2) == [
        [{"masked"}, {"masked"}],
        [{"less"}, {"less"}],
        [{"more"}, {"more"}],
        [{"more", "limited"}, {"more"}],
    ]


def test_a_runs_own_objective_stands_below_the_two(shown):
    shown.find_element(By.CSS_SELECTOR, "#run option[value='1']").click()
    open_row(shown, 1)
    # DAPO keeps up to r = 1.28, so 1.25 has a weight there.
    assert weights(shown)[3] == [":⏎", "ASPO 0 (masked)", "GRPO 0 (masked)", "this run's DAPO 1.25"]


def test_a_click_on_a_point_shows_the_completions_of_its_epoch(shown):
    def click(chart, trace, point):
        spot = shown.execute_script(
            "return document.querySelectorAll('.chart')[arguments[0]].querySelectorAll('.scatterlayer .trace')"
            "[arguments[1]].querySelectorAll('path.point')[arguments[2]]",
            *(chart, trace, point),
        )
        shown.execute_script("arguments[0].scrollIntoView({block: 'center'})", spot)
        ActionChains(shown).move_to_element(spot).perform()
        area = shown.find_elements(By.CLASS_NAME, "chart")[chart]
        said = {f"tiny/version_{trace}", f"epoch {point}, step"}  # each of these runs has one of the curves clicked on
        WebDriverWait(shown, 20).until(lambda _: all(part in area.get_property("textContent") for part in said))
        ActionChains(shown).click().perform()
        return [shown.find_element(By.ID, name).get_property("value") for name in ("run", "epoch")]

    assert click(0, 0, 1) == ["0", "1"]  # the first run's reward
    assert text(shown, "#completions-title") == "Completions of tiny/version_0, epoch 1"
    assert "Epoch 1, number 0." in column(shown, 1)[0]
    shown.find_element(By.CSS_SELECTOR, "#axis option[value='step']").click()
    assert click(1, 0, 2) == ["0", "2"]  # its entropy at step 5
    assert "Epoch 2, number 0." in column(shown, 1)[0]
    assert click(1, 1, 3) == ["1", "3"]  # the second run's entropy
    assert text(shown, "#shown") == ""
    assert click(1, 1, 2) == ["1", "3"]  # of its epochs 0 and 3 are kept
    assert text(shown, "#shown") == "Of epoch 2 nothing was kept; this is epoch 3."


def test_runs_lie_over_one_another_in_one_colour_each(shown):
    def colours(chart):
        return shown.execute_script(
            "return document.querySelectorAll('.chart')[arguments[0]].data.filter(t => !t.showlegend && t.customdata)"
            ".map(t => [t.customdata.length && t.customdata[0][0], t.line.color, t.line.dash])",
            chart,
        )

    clip = colours(2)
    assert [run for run, *_ in clip] == [0, 0, 1, 1]
    assert clip[0][1] == clip[1][1] != clip[2][1] == clip[3][1]
    assert [dash for *_, dash in clip] == ["solid", "dash", "solid", "dash"]
    assert [points for points, *_ in colours(3)] == [0, 0]  # the KL: an empty curve, the second run has none
    legend = [key.text for key in shown.find_elements(By.CSS_SELECTOR, ".chart:nth-of-type(1) .legendtext")]
    assert {"reward", "accuracy", "A > 0", "A < 0"} <= set(legend)
    shown.find_element(By.CSS_SELECTOR, "#runs label:nth-child(2) input").click()
    visible = shown.execute_script("return document.querySelector('.chart').data.slice(0, 4).map(t => t.visible)")
    assert visible == [True, True, False, False]


def test_the_table_is_sorted_by_its_heads(shown):
    heads = {head.text: head for head in shown.find_elements(By.CSS_SELECTOR, "th button")}
    heads["length"].click()
    assert column(shown, 3)[:4] == ["10", "20", "30", "30"]
    heads["length"].click()
    assert column(shown, 3)[:2] == ["40", "35"]
    heads["advantage"].click()
    assert column(shown, 4)[:3] == ["-0.5", "-0.25", "+0.5"]
    assert column(shown, 4)[-1] == "-"  # it isn't trained on
    heads["reward"].send_keys(Keys.ENTER)
    heads["reward"].send_keys(Keys.ENTER)
    assert column(shown, 2)[0] == "1"
    assert heads["reward"].find_element(By.XPATH, "..").get_attribute("aria-sort") == "descending"


def test_the_search_finds_questions_and_completions(shown):
    search = shown.find_element(By.ID, "search")
    search.send_keys("NEEDLE")
    assert len(column(shown, 1)) == 1
    assert text(shown, "#count") == "1 of 10 match"
    search.clear()
    search.send_keys("What is 2 + 31")
    assert "The very worst" in column(shown, 1)[0]
    search.clear()
    search.send_keys("nowhere")
    assert column(shown, 1) == []


def test_a_completion_is_shown_whole_with_what_it_earned(shown):
    button = shown.find_element(By.CSS_SELECTOR, 'tr[data-line="2"] button')
    button.send_keys(Keys.ENTER)
    body = text(shown, "#detail-body")
    assert "What is 1 + 31?" in body
    assert "Completion number 1 says 32." in body
    facts = {
        pair.find_element(By.TAG_NAME, "dt").text: pair.find_element(By.TAG_NAME, "dd").text
        for pair in shown.find_elements(By.CSS_SELECTOR, "#detail dl div")
    }
    assert facts["reward"] == "0"
    assert facts["advantage"] == "-0.5"
    assert facts["mean ratio"] == "1.01"
    assert facts["share clipped"] == "0.125"
    assert facts["my_package.brevity"] == "0.25"
    assert text(shown, "#detail-body .marks") == "reward failed"
    box = shown.find_element(By.CSS_SELECTOR, "#detail-body .tokens")
    box.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert "token 2 of 4" in text(shown, "#detail-body .readout")
    box.send_keys(Keys.ESCAPE)
    assert not shown.find_element(By.ID, "detail").is_displayed()
    assert shown.switch_to.active_element == button


def test_hostile_completions_are_text(shown):
    scripts = shown.execute_script("return [...document.scripts].map(s => s.type + '/' + s.id)")
    assert scripts == [
        "application/json/data",
        *(f"application/json/epoch-0-{e}" for e in range(5)),
        "application/json/epoch-1-0",
        "application/json/epoch-1-3",
        "/",
        "/",
    ]
    expected = {
        **HOSTILE,
        "large": HOSTILE["large"][:20_000],
        "control": "before␀after ␛[31m",
        "broken": "half \ufffd of a pair, \ufffd and \u2028 lines",
    }
    for line, (name, said) in enumerate(expected.items(), 5):
        shown.execute_script("document.querySelector(`tr[data-line='${arguments[0]}']`).click()", line)
        boxes = shown.find_elements(By.CSS_SELECTOR, "#detail-body pre")
        assert [box.get_property("textContent") for box in boxes] == [said, said], name
        isolation = (
            "return [getComputedStyle(arguments[0]).unicodeBidi, arguments[0].dir, arguments[0].childElementCount]"
        )
        assert shown.execute_script(isolation, boxes[1]) == ["isolate", "auto", 0]
        cut = [note.text for note in shown.find_elements(By.CSS_SELECTOR, "#detail-body .cut")]
        assert cut == ["980,003 more characters are in rollouts/epoch_00004.jsonl.gz in the run's folder."] * 2 * (
            name == "large"
        )
        shown.find_element(By.ID, "close").click()
    assert shown.execute_script("return typeof window.pwned") == "undefined"
    assert shown.find_elements(By.CSS_SELECTOR, "main img, dialog img") == []


def test_a_script_that_got_in_would_not_run(shown):
    shown.execute_script(
        "const s = document.createElement('script'); s.text = 'window.pwned = 4'; document.body.append(s)"
    )
    assert shown.execute_script("return typeof window.pwned") == "undefined"
    assert "Content Security Policy" in shown.get_log("browser")[0]["message"]


def test_light_and_dark(shown):
    def look():
        return shown.execute_script(
            "const chart = document.querySelector('.chart').layout;"
            "return [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
            " chart.font.color, chart.xaxis.gridcolor, document.querySelector('.chart').data[0].line.color]"
        )

    light = look()
    emulate(shown, scheme="dark")
    dark = look()
    assert light[:3] == ["rgb(246, 247, 249)", "rgb(27, 31, 36)", "#1b1f24"]
    assert dark[:3] == ["rgb(20, 23, 27)", "rgb(230, 233, 237)", "#e6e9ed"]
    assert all(a != b for a, b in zip(light, dark, strict=True))


def test_a_phones_screen_is_wide_enough(shown):
    emulate(shown, width=390)
    shown.refresh()
    assert shown.execute_script("return [innerWidth, document.documentElement.scrollWidth]") == [390, 390]
    for line in (1, 5, 7, 8):
        shown.execute_script("document.querySelector(`tr[data-line='${arguments[0]}']`).click()", line)
        assert shown.execute_script(
            "const detail = document.getElementById('detail');"
            "return [detail.scrollWidth <= detail.clientWidth, document.documentElement.scrollWidth]"
        ) == [True, 390]
        shown.find_element(By.ID, "close").click()


def test_runs_without_rollouts_or_without_events_say_so(browser, tmp_path, capsys):
    write_events(tmp_path / "a" / "version_0", epochs=2)
    for epoch in (0, 5):
        write_epoch(tmp_path / "b" / "version_0", epoch, [record(s, s * (epoch + 1) / 2) for s in range(3)])
    out = tmp_path / "new" / "both.html"
    view.main([str(tmp_path / "a" / "version_0"), str(tmp_path / "b" / "version_0"), "--out", str(out)])
    assert str(out) in capsys.readouterr().out
    emulate(browser)
    visit(browser, out)
    notes = [note.text for note in browser.find_elements(By.CSS_SELECTOR, "#notes li")]
    assert notes == [
        "a/version_0: No completions were kept (rollouts/ is missing): there are curves only.",
        "b/version_0: No TensorBoard events: the curves are made from the kept completions.",
    ]
    assert not browser.find_element(By.ID, "completions").is_displayed()
    assert text(browser, "#shown") == "No completions of this run were kept."
    curves = browser.execute_script("return document.querySelector('.chart').data.map(t => [t.x, t.y])")
    assert curves[2:4] == [[[0, 5], [0.5, 3]], [[0, 5], [0.33333, 0]]]
    browser.find_element(By.CSS_SELECTOR, "#run option[value='1']").click()
    assert len(column(browser, 1)) == 3
    assert browser.get_log("browser") == []


def test_what_is_left_out_is_said(browser, tmp_path):
    write_epoch(tmp_path / "version_0", 0, [record(s, s / 10) for s in range(9)])
    view.main([str(tmp_path / "version_0"), "--completions", "4"])
    visit(browser, tmp_path / "version_0" / "view.html")
    assert sorted(column(browser, 2)) == ["0", "0.1", "0.2", "0.8"]
    assert text(browser, "#left-out").startswith("4 of 9 completions are on this page")
    assert "rollouts/epoch_00000.jsonl.gz in the run's folder has all." in text(browser, "#left-out")
