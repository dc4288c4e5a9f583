"""The page itself: data, template, styles and scripts put together into one HTML file that asks nothing of a network.

Pictures are drawn in the browser by Vega-Lite (Satyanarayan et al., 2017), whose scripts the package vl-convert-python holds:
they take 0.9 MB of a page, draw SVG that stays sharp in print, and follow plain HTML controls, which a keyboard reaches. What
pictures show is decided by `static/charts.js` and `static/compare.js`.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from analysis.records import Found, Method, Stream
from analysis.report.run_data import run_data
from analysis.report.stream_data import config_differences, differences, means, pictures, runs_table
from analysis.tables import READING, SIGNIFICANT
from utils.errors import UserError

GENERATOR = "Gumbel CL-LoRA analysis.report"  # how an older report is told from a file of somebody's own
STATIC = Path(__file__).parent / "static"
SCRIPTS = ("tables.js", "looks.js", "charts.js", "compare.js", "page.js")  # in this order one module
PACKAGES = {"vl_convert": "vl-convert-python", "jinja2": "jinja2"}


def check_output(path: Path, overwrite: bool) -> None:
    """Raises UserError where the page cannot go to `path`, before anything is computed."""
    if path.is_dir():
        raise UserError(f"--output: '{path}' is a folder; name a file in it, such as '{path / 'report.html'}'.")
    if not path.parent.is_dir():
        raise UserError(f"--output: there is no folder '{path.parent}'; make it, or choose another file.")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--output: nothing may be written into '{path.parent}'; choose another folder.")
    if path.exists() and not overwrite:
        try:
            with open(path, "rb") as file:
                start = file.read(1000)
        except OSError as error:
            raise UserError(f"--output: '{path}' is there and cannot be read ({error.strerror}); choose another "
                            "file.") from error
        if GENERATOR.encode() not in start:
            raise UserError(f"--output: '{path}' is there and is not a report; choose another file, or replace it with "
                            "--overwrite.")


def check_packages() -> None:
    """Raises UserError where a package that the page needs is missing."""
    missing = [package for module, package in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{missing[0]}: a report needs this package; install it with: pip install {' '.join(missing)}")


def libraries() -> str:
    """The scripts of Vega, Vega-Lite and Vega-Embed, which put `vegaEmbed` into the page's `window`."""
    import vl_convert

    return vl_convert.javascript_bundle()


def page(found: Found, streams: Sequence[Stream], baselines: Sequence[Method | None], margin: float, folder: Path,
         command: str) -> str:
    """The page about runs; arguments as `analysis.tables.page` has them. `folder`: where it will lie."""
    import jinja2

    runs = [(number, method, run) for number, stream in enumerate(streams) for method in stream.methods
            for run in method.runs.values()]
    data = {"runs": [run_data(run, method.name, number, streams[number].domains, folder) for number, method, run in runs],
            "streams": [pictures(stream, baseline, margin) for stream, baseline in zip(streams, baselines, strict=True)]}
    links = {str(run.path): shown["record"] for (_, _, run), shown in zip(runs, data["runs"], strict=True)}
    # Whatever comes from records and file names is escaped, in the text by autoescape, in the data by `tojson`.
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(STATIC), autoescape=True, trim_blocks=True,
                                     lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    return environment.get_template("page.html").render(
        title=_title(streams, len(runs)), generator=GENERATOR, command=command, data=data,
        streams=[_section(stream, baseline, margin, number, links) for number, (stream, baseline)
                 in enumerate(zip(streams, baselines, strict=True)) if len(runs) > 1],
        unfinished=found.unfinished, reading=_reading(margin), style=(STATIC / "page.css").read_text(encoding="utf-8"),
        libraries=_inline(libraries()),
        script="\n".join(_inline((STATIC / name).read_text(encoding="utf-8")) for name in SCRIPTS))


def _title(streams: Sequence[Stream], runs: int) -> str:
    if runs == 1:
        (method,) = streams[0].methods
        (draw,) = method.runs
        return f"{method.name}, seed {draw}"
    names = list(dict.fromkeys(method.name for stream in streams for method in stream.methods))
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return f"{runs} runs of {shown}"


def _section(stream: Stream, baseline: Method | None, margin: float, number: int, links: dict[str, str]) -> dict[str, Any]:
    """What the template needs of a stream."""
    slug = f"stream-{number}"
    return {"slug": slug, "number": number, "title": stream.title, "baseline": baseline and baseline.name,
            "methods": [method.name for method in stream.methods], "means": means(stream, slug),
            "differences": differences(stream, baseline, margin, slug), "config": config_differences(stream, slug),
            "runs": runs_table(stream, slug, links)}


def _reading(margin: float) -> list[str]:
    """The notes under a comparison, a paragraph each."""
    text = READING.format(margin=margin, significant=SIGNIFICANT).split("\n\n", 1)[1]
    return [" ".join(part.split()) for part in ("\n" + text).split("\n- ")[1:]]


def _inline(script: str) -> str:
    """A script as it may stand in a page: nothing in it may end the element that holds it."""
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
