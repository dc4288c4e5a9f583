"""python -m analysis.report: what stands on the page and in its data, what it refuses, and how it works in a browser."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from analysis.compare import read_streams
from analysis.measures import MEASURES
from analysis.pictures import COSTS
from analysis.report import page as page_module
from analysis.report.__main__ import main
from analysis.report.page import GENERATOR, check_output
from analysis.report.run_data import _task_sizes
from analysis.tables import difference_cells, means_cells
from tests.helpers import refusal, save, varied
from utils.results.metrics import forgetting
from utils.runs.files import write_sealed_json

EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta"}
HOSTILE = "</script><script>alert(1)</script><img src onerror><b>&\"'"


@pytest.fixture
def runs(base, tmp_path) -> Path:
    """`gated` and `sdlora` over three seeds, as committed records: unlike those of the other tests, nothing but the
    record is there."""
    for index, seed in enumerate(range(1993, 1996)):
        save(tmp_path / "runs/gated", varied(base, seed, last=62 + 2 * index, adapters=[1, 2, 2]), committed=True)
        save(tmp_path / "runs/sdlora", varied(base, seed, last=60 + index % 2, parameters=3000, gate="none"), committed=True)
    return tmp_path / "runs"


@pytest.fixture
def no_libraries(monkeypatch) -> None:
    """The page without the scripts of Vega, which only a browser needs."""
    pytest.importorskip("jinja2")
    monkeypatch.setattr(page_module, "PACKAGES", {})
    monkeypatch.setattr(page_module, "libraries", lambda: "")


class Page(HTMLParser):
    """Elements of a page with their attributes, the text of its tables by id, and that of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.scripts: list[str] = []
        self.row: list[str] | None = None
        self.feed(text)
        assert self.open == []
        self.data = json.loads(next(text for text in self.scripts if text.startswith("{")))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in EMPTY:
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables.setdefault(dict(attributes)["id"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        elif tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        if "script" in self.open:
            self.scripts[-1] += text
        elif {"th", "td"} & set(self.open):
            self.rows[-1][-1] += text.strip()

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(tmp_path: Path, *arguments: str | Path) -> Page:
    output = tmp_path / "report.html"
    assert main([*map(str, arguments), "-o", str(output)]) == 0
    return Page(output.read_text(encoding="utf-8"))


def refused(capsys, *arguments: str | Path) -> str:
    return refusal(main, capsys, *arguments)


# ---- what is on the page


@pytest.mark.usefixtures("no_libraries")
def test_the_data_of_a_run_are_those_of_its_record_and_files(trained, base, tmp_path):
    (run,) = page_of(tmp_path, trained).data["runs"]
    matrix = base["metrics"]["accuracy_matrix"]
    assert [[value and round(value, 4) for value in row] for row in matrix] == run["matrix"]
    assert run["forgetting"] == forgetting(matrix) and run["kept"] == [task["kept"] for task in base["tasks"]]
    for task, entry in enumerate(base["tasks"]):
        assert run["read"][task] == pytest.approx(entry["beta_values"], abs=1e-4)
        assert run["classes"][task] == entry["class_counts"] and run["counts"][task] == entry["counts"]
        gate = torch.load(trained / f"beta_values_task_{task}.pt")
        coefficients = (gate["beta_after"][:, None, None] * gate["alphas"]).abs().sum((1, 2))
        assert run["share"][task] == pytest.approx((coefficients / coefficients.sum()).tolist(), abs=1e-4)
    assert run["task_of_class"] == [0, 0, 1, 1] and run["class_names"] == [str(c) for c in base["class_order"][:4]]
    config = {key: (value, at_default) for key, value, _, _, at_default in run["config"]}
    assert config["rank"] == ("4", False) and config["pretrained"] == ("true", True)
    figures = {measure.heading for measure in MEASURES if measure.read(base) is not None}
    assert {name for name, _ in run["figures"]} == figures


@pytest.mark.usefixtures("no_libraries")
def test_files_are_linked_and_checked(trained, tmp_path):
    copy = Path(shutil.copytree(trained, tmp_path / "with space" / "tiny"))
    (copy / "head_task_0.safetensors").unlink()
    (copy / "head_task_1.safetensors").write_bytes(b"other")
    page = page_of(tmp_path, copy)
    files = {file["name"]: file for file in page.data["runs"][0]["files"]}
    assert files["head_task_0.safetensors"] == {"name": "head_task_0.safetensors", "state": "not here"}
    assert files["head_task_1.safetensors"]["state"] == "differs from the record"
    assert files["beta_values_task_0.pt"]["state"] == "as recorded" and files["train.log"]["state"] == "here"
    assert files["results.json"]["href"] == "with%20space/tiny/results.json"
    (copy / "beta_values_task_0.pt").unlink()  # then the page has the record's gate weights alone
    (run,) = page_of(tmp_path, copy).data["runs"]
    assert run["share"] is None and run["read"][1] is not None


@pytest.mark.usefixtures("no_libraries")
def test_a_comparison_has_the_tables_and_tests_of_compare(runs, tmp_path):
    page = page_of(tmp_path, runs, "--margin", "2")
    _, (stream,), (baseline,) = read_streams([runs], None, None, 2.0)
    header, cells = means_cells(stream)
    assert page.tables["stream-0-means"] == [header, *cells]
    for measure in (m for m in MEASURES if m.key in ("last_accuracy", "forgetting", "stored_parameters")):
        header, cells = difference_cells(stream, baseline, measure, 2.0)
        shown = page.tables[f"stream-0-by-{measure.key}"]
        assert shown == [header, *cells] or [row[:-1] for row in [header, *cells]] == shown
    assert ["gate", "gumbel_sparsemax", "none"] in page.tables["stream-0-config"]
    assert len(page.tables["stream-0-runs"]) == 1 + 6
    links = [link["href"] for link in page.of("a") if link["href"].endswith(".json")]
    assert len(links) == 6 and all((tmp_path / link).is_file() for link in links)
    (shown,) = page.data["streams"]
    gated = {row["method"]: row for row in shown["differences"]["last_accuracy"]["rows"]}["gated"]
    assert gated["mean"] == pytest.approx(64 - 181 / 3) and gated["low"] < gated["mean"] < gated["high"]
    assert shown["methods"][0]["adapters"] == [[1.0, 0.0], [2.0, 0.0], [2.0, 0.0]]


@pytest.mark.usefixtures("no_libraries")
def test_accuracy_is_shown_against_every_cost_that_the_runs_have(runs, base, tmp_path):
    old = varied(base, 1993, last=70, parameters=9000, rank=7)
    for entry in old["tasks"]:
        del entry["evaluation_seconds"]
    save(tmp_path / "runs/old", old)
    page = page_of(tmp_path, runs)
    shown = page.data["streams"][0]
    figures = {figure["id"] for figure in page.of("figure")}
    assert [cost["key"] for cost in shown["costs"]] == list(COSTS)
    assert {f"stream-0-{key}" for key in COSTS} <= figures
    best = {cost["key"]: cost["best"] for cost in shown["costs"]}
    assert best["image_milliseconds"] == ["gated"]  # as fast as `sdlora` and better; `old` has no such figure
    by_name = {method["name"]: method for method in shown["methods"]}
    assert by_name["old"]["costs"]["image_milliseconds"] is None and "old" in best["stored_bytes"]


@pytest.mark.usefixtures("no_libraries")
def test_the_page_can_be_read_by_keyboard_and_aloud_and_asks_for_nothing(runs, tmp_path):
    page = page_of(tmp_path, runs)
    assert page.of("html")[0]["lang"] == "en"
    assert len(page.of("main")) == len(page.of("header")) == len(page.of("h1")) == 1 and page.of("nav")[0]["aria-label"]
    assert len(page.of("caption")) == len(page.of("table")) == len(page.tables)
    headings = [attributes for tag, attributes in page.elements if tag == "th" and attributes.get("scope") == "col"]
    assert len(page.of("figcaption")) == len(page.of("figure")) >= 9 and headings
    levels = [int(tag[1]) for tag, _ in page.elements if tag in ("h1", "h2", "h3")]
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:]))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"][1:] for link in page.of("a") if link["href"].startswith("#")} <= set(ids)
    assert {attributes["aria-labelledby"] for attributes in page.of("section")} <= set(ids)
    policy = next(meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    asking = {key for _, attributes in page.elements for key in attributes} & {"src", "srcset", "action", "data"}
    assert asking == set() and [link["href"] for link in page.of("link")] == ["data:,"]


@pytest.mark.usefixtures("no_libraries")
def test_all_text_is_escaped(trained, runs, tmp_path):
    copy = Path(shutil.copytree(trained, tmp_path / "tiny"))
    split = json.loads((copy / "split.json").read_text())
    (copy / "split.json").write_text(json.dumps({**split, "class_names": [HOSTILE] * 10}))
    plain = page_of(tmp_path, runs)
    page = page_of(tmp_path, copy, runs, "--label", f"{runs / 'gated'}={HOSTILE}")
    assert len(page.of("script")) == len(plain.of("script")) and page.of("img") == []
    assert page.data["runs"][0]["class_names"] == [HOSTILE] * 4
    assert HOSTILE in [row[0] for row in page.tables["stream-1-means"]]
    assert HOSTILE in [box["value"] for box in page.of("input") if box["type"] == "checkbox"]


@pytest.mark.usefixtures("no_libraries")
def test_records_of_other_times_and_methods(base, tmp_path):
    old = varied(base, 1)
    for entry in old["tasks"]:
        del entry["class_counts"]
    joint = varied(base, 2, right=[[50, 40, 30]])
    joint["tasks"][0]["seen_classes"] = 30
    for entry in joint["tasks"]:
        entry.update(beta_values=None, beta_after=None, pruning_mask=None, kept=None, evicted=None, active_adapters=None)
    path = tmp_path / "joint.json"
    write_sealed_json(path, joint)
    first, second = page_of(tmp_path, save(tmp_path / "old", old), path).data["runs"]
    assert first["classes"] == [None] * 3 and first["counts"][2]["wrong_task"] == [0, 0, 0]
    assert second["matrix"] == [[50.0, 40.0, 30.0]]
    assert second["read"] == [None] and second["newest"] == [None]
    result = {"config": {"init_cls": 2, "increment": 2}, "tasks": [{
        "seen_classes": 5, "counts": {"images": [7, 3, 9]},  # the first data set ends with a task of one class
        "class_counts": {"predicted_task": [[3, 0, 0], [1, 2, 1], [0, 3, 0], [0, 0, 4], [1, 1, 3]]}}]}
    assert _task_sizes(result) == [2, 1, 2]


# ---- what is refused


@pytest.mark.usefixtures("no_libraries")
def test_bad_input_is_one_sentence_and_nothing_is_written(trained, tmp_path, capsys):
    output = tmp_path / "new.html"
    assert "there is no such file or folder" in refused(capsys, tmp_path / "absent", "-o", output)
    assert "no run is there" in refused(capsys, tmp_path, "-o", output)
    assert "no method is called 'x'" in refused(capsys, trained, "--baseline", "x", "-o", output)
    assert "is not PATH=NAME" in refused(capsys, trained, "--label", "x", "-o", output)
    assert "--margin" in refused(capsys, trained, "--margin", "0", "-o", output)
    assert "name a file in it" in refused(capsys, trained, "-o", tmp_path)
    assert "there is no folder" in refused(capsys, trained, "-o", tmp_path / "deep" / "new.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_libraries")
def test_only_a_report_is_replaced_unasked(trained, tmp_path, capsys):
    output = tmp_path / "index.html"
    output.write_text("<p>mine</p>")
    assert "is there and is not a report; choose another file, or replace it with --overwrite" in refused(
        capsys, trained, "-o", output)
    assert output.read_text() == "<p>mine</p>"
    assert main([str(trained), "-o", str(output), "--overwrite"]) == 0
    assert GENERATOR in output.read_text()[:1000]
    check_output(output, overwrite=False)
    assert main([str(trained), "-o", str(output)]) == 0
    before = output.read_bytes()
    refused(capsys, tmp_path / "absent", "-o", output)
    assert output.read_bytes() == before


def test_a_missing_package_is_named_with_its_command(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = refused(capsys, trained, "-o", tmp_path / "new.html")
    assert "pip install vl-convert-python jinja2" in text and not (tmp_path / "new.html").exists()


# ---- in a browser


@contextmanager
def browser(path: Path) -> Iterator[Any]:
    """The page in a Chromium without a window, once its pictures are drawn; at the end its console and what it asked for.

    Skips the test where there is no browser, driver or package to steer it with.
    """
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium to open reports in a browser")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        pytest.skip("no Chromium with its driver is here (on Debian: apt-get install chromium chromium-driver)")
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    try:
        chrome.get(path.resolve().as_uri())
        WebDriverWait(chrome, 60).until(lambda it: it.execute_script("return document.documentElement.dataset.ready"))
        yield chrome
        assert [line for line in chrome.get_log("browser") if line["level"] != "INFO"] == []
        messages = [json.loads(entry["message"])["message"] for entry in chrome.get_log("performance")]
        asked = {message["params"]["request"]["url"] for message in messages
                 if message["method"] == "Network.requestWillBeSent"}
        assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {path.resolve().as_uri()}
    finally:
        chrome.quit()


def picture(chrome, name: str) -> str:
    return chrome.execute_script("return document.querySelector(`#${arguments[0]} .chart svg`).outerHTML", name)


def until(chrome, done) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(chrome, 30).until(lambda _: done())


@pytest.mark.slow
def test_in_a_browser_the_chosen_task_changes_the_pictures(trained, tmp_path):
    pytest.importorskip("vl_convert", reason="pip install vl-convert-python to draw reports")
    output = tmp_path / "report.html"
    assert main([str(trained), "-o", str(output)]) == 0
    names = ["matrix", "curve", "drop", "weights", "gate", "kept", "bytes", "errors", "classes"]
    with browser(output) as chrome:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        last = {name: picture(chrome, name) for name in names}
        table = chrome.find_element(By.CSS_SELECTOR, "#classes summary")
        table.send_keys(Keys.ENTER)
        until(chrome, lambda: len(chrome.find_elements(By.CSS_SELECTOR, "#classes tbody tr")) == 4)
        chrome.find_element(By.ID, "task").send_keys(Keys.ARROW_LEFT)
        until(chrome, lambda: all(picture(chrome, name) != last[name] for name in names))
        assert chrome.find_element(By.ID, "task-text").text == "0, 2 classes seen"
        assert len(chrome.find_elements(By.CSS_SELECTOR, "#classes tbody tr")) == 2
        assert not chrome.find_element(By.ID, "earlier").is_enabled()
        chrome.find_element(By.ID, "later").click()
        until(chrome, lambda: all(picture(chrome, name) == last[name] for name in names))


@pytest.mark.slow
def test_in_a_browser_tables_sort_and_choices_are_followed(runs, tmp_path):
    pytest.importorskip("vl_convert", reason="pip install vl-convert-python to draw reports")
    output = tmp_path / "report.html"
    assert main([str(runs), "-o", str(output)]) == 0
    with browser(output) as chrome:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys
        from selenium.webdriver.support.ui import Select

        def column(number: int) -> list[str]:
            return [cell.text for cell in chrome.find_elements(
                By.CSS_SELECTOR, f"#stream-0-means tbody tr > :nth-child({number})")]

        def heading(number: int) -> Any:
            return chrome.find_element(By.CSS_SELECTOR, f"#stream-0-means thead th:nth-child({number})")

        accuracy = column(3)
        heading(3).find_element(By.TAG_NAME, "button").send_keys(Keys.ENTER)
        assert column(3) == sorted(accuracy, key=lambda text: float(text.split()[0]))
        assert heading(3).get_attribute("aria-sort") == "ascending"
        heading(3).find_element(By.TAG_NAME, "button").send_keys(Keys.SPACE)
        assert column(3) == sorted(accuracy, key=lambda text: -float(text.split()[0]))
        heading(1).find_element(By.TAG_NAME, "button").click()
        assert column(1) == ["gated", "sdlora"] and heading(3).get_attribute("aria-sort") is None

        before = {name: picture(chrome, f"stream-0-{name}") for name in ("curve", "final", "difference")}
        chrome.find_element(By.CSS_SELECTOR, ".methods input[value=sdlora]").send_keys(Keys.SPACE)
        until(chrome, lambda: all(picture(chrome, f"stream-0-{name}") != before[name] for name in ("curve", "final")))
        Select(chrome.find_element(By.ID, "stream-0-measure")).select_by_value("forgetting")
        until(chrome, lambda: picture(chrome, "stream-0-difference") != before["difference"])
        matrix = picture(chrome, "matrix")
        Select(chrome.find_element(By.ID, "run-choice")).select_by_visible_text("gated, seed 1995")
        until(chrome, lambda: picture(chrome, "matrix") != matrix)
        assert "gated, seed 1995" in chrome.find_element(By.ID, "run-about").text
