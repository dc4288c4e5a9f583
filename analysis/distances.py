"""Command line: which adapters were kept, against how far the images of their tasks had moved from the nearest key.

    python -m analysis.distances exps/studies/routed_domains.json
"""

import argparse
import io
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.command import add_runs, make_output
from utils.errors import UserError, status_of

if TYPE_CHECKING:
    from analysis.records import Draw, Method, Stream

OUTPUT = Path("runs/distances")
EXCEPTIONS_SHOWN = 10
COLUMNS = ("stream", "method", "seed", "task", "domain", "first_of_domain", "key", "key_domain", "distance", "nearest",
           "price", "kept")

READING = """## How to read this

- Distance is the F ratio with which the gate starts in a task (docs/METHOD.md, section 9): how far the task's images have
  moved from those of a key, over what the choice of classes alone would make of it; about 1 for not at all. Price is
  `gate_price`, the distance at which a new adapter starts with the weight of an old one. Mean ± sample standard deviation.
- A key has the domain of the task that founded it, though refused tasks of other domains may have joined it.
- First: no earlier task had the domain. The first task of a stream meets no key and is always kept.
- "Measured": how often tasks of the domain were held against a key of that domain. "Kept of nearest": the adapters kept of
  those tasks of which this key was the nearest.
"""


@dataclass(frozen=True)
class Arrival:
    """A task of a run at its decision.

    domain: "" where the stream has none. first: whether no earlier task had it. distances: of its images, by the key's task,
    to every key that there was; price: what they were held against, None where nothing was.
    """

    draw: "Draw"
    task: int
    domain: str
    first: bool
    distances: Mapping[int, float]
    price: float | None
    kept: bool

    @property
    def nearest(self) -> int | None:
        """The key at the smallest distance; None for the first task."""
        return min(self.distances, key=self.distances.get, default=None)

    @property
    def distance(self) -> float | None:
        """To the nearest key."""
        return min(self.distances.values(), default=None)


def arrivals(method: "Method", domains: Sequence[str]) -> list[Arrival]:
    """All tasks of those runs of the method that have recorded distances."""
    from backbone.keys import shifts_of
    from utils.data.domains import first_appearances

    found = []
    for draw, run in method.runs.items():
        entries = run.result["tasks"]
        moved = [shifts_of(entry.get("numbers", {})) for entry in entries]
        if any(moved):
            firsts = first_appearances(list(domains))
            found += [Arrival(draw, task, domains[task] if domains else "", bool(domains) and firsts[task], shifts,
                              entry["numbers"].get("price"), entry["kept"])
                      for task, (entry, shifts) in enumerate(zip(entries, moved, strict=True))]
    return found


def task_table(found: Sequence[Arrival]) -> str:
    """A row per task, over seeds."""
    from analysis.tables import MISSING, markdown

    domains = {arrival.task: arrival.domain for arrival in found}
    rows = []
    for task, domain in sorted(domains.items()):
        of_task = [arrival for arrival in found if arrival.task == task]
        keys = Counter(arrival.nearest for arrival in of_task if arrival.distances).most_common()
        names = [f"{key} {domains[key]}".strip() + (f" ({count} of {len(of_task)})" if len(keys) > 1 else "")
                 for key, count in keys]
        row = [str(task), domain, "first" if of_task[0].first else "", ", ".join(names) or MISSING,
               _mean(arrival.distance for arrival in of_task if arrival.distances), _kept(of_task)]
        rows.append(row if any(domains.values()) else [row[0], *row[3:]])
    named = ["domain", "first"] if any(domains.values()) else []
    return markdown(["task", *named, "nearest key", "distance", "kept"], rows)


def pair_table(found: Sequence[Arrival]) -> str:
    """A row per ordered pair of domains, over tasks and seeds: the arriving one, and that of a key."""
    from analysis.tables import MISSING, markdown

    domains = {arrival.task: arrival.domain for arrival in found}
    order = list(dict.fromkeys(domains[task] for task in sorted(domains)))
    rows = []
    for arriving, of_key in ((arriving, of_key) for arriving in order for of_key in order):
        measured = [distance for arrival in found if arrival.domain == arriving
                    for key, distance in arrival.distances.items() if domains[key] == of_key]
        nearest = [arrival for arrival in found if arrival.domain == arriving and arrival.distances
                   and domains[arrival.nearest] == of_key]
        if measured:
            rows.append([arriving, of_key, str(len(measured)), _mean(measured), _kept(nearest) if nearest else MISSING])
    return markdown(["arriving", "key", "measured", "distance", "kept of nearest"], rows)


def verdict(found: Sequence[Arrival]) -> str:
    """Whether the decisions are those that the price alone would make, and whether a price can tell new domains from old."""
    held = [arrival for arrival in found if arrival.distances]
    lines = []
    priced = [arrival for arrival in held if arrival.price is not None]
    if priced:
        other = [arrival for arrival in priced if arrival.kept != (arrival.distance > arrival.price)]
        shown = [f"task {arrival.task} of seed {arrival.draw} at {_figure(arrival.distance)} "
                 f"{'kept' if arrival.kept else 'refused'}" for arrival in other[:EXCEPTIONS_SHOWN]]
        shown += [f"and {len(other) - len(shown)} more"] * (len(other) > len(shown))
        lines.append(f"Kept beyond the price {priced[0].price:g} and refused within it: {len(priced) - len(other)} of "
                     f"{len(priced)} decisions{'; not so ' * bool(other)}{', '.join(shown)}.")
    new, old = ([arrival.distance for arrival in held if arrival.domain and arrival.first is first] for first in (True, False))
    if new and old:
        told = (f"a price between {_figure(max(old))} and {_figure(min(new))} tells them apart" if min(new) > max(old) else
                "no price tells them apart")
        lines.append(f"Distance to the nearest key: {_figure(min(new))} to {_figure(max(new))} for the first task of a "
                     f"domain, {_figure(min(old))} to {_figure(max(old))} for later ones; {told}.")
    return "\n\n".join(lines)


def page(streams: "Sequence[tuple[Stream, Mapping[str, list[Arrival]], str]]", unfinished: Sequence[str], command: str) -> str:
    """The answer as Markdown. Per stream its arrivals by method, and the file of its picture."""
    parts = ["# Kept adapters against distance", f"Written by `{command}`."]
    for stream, by_method, picture in streams:
        parts.append(f"## {stream.title}")
        for name, found in by_method.items():
            seeds = dict.fromkeys(str(arrival.draw) for arrival in found)
            parts += [f"### {name}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}", verdict(found),
                      task_table(found), *([pair_table(found)] if stream.domains else [])]
        parts.append(f"![distance to the nearest key, kept and refused]({picture})")
        without = {method.name: lacking for method in stream.methods
                   if (lacking := len(method.runs) - len({arrival.draw for arrival in by_method.get(method.name, ())}))}
        if without:
            counted = ", ".join(f"{name} ({count} run{'s' * (count > 1)})" for name, count in without.items())
            parts.append("Without distances in their records, because their gate measures none or because they are older than "
                         f"that figure: {counted}.")
    if unfinished:
        parts.append("## Left out: not finished\n\n" + "\n".join(f"- {line}" for line in unfinished))
    return "\n\n".join([*(part for part in parts if part), READING])


def csv_rows(stream: "Stream", by_method: Mapping[str, Iterable[Arrival]]) -> list[list[Any]]:
    """A line per run, task and key, as `COLUMNS` names it."""
    return [[stream.title, name, str(arrival.draw), arrival.task, arrival.domain, arrival.first, key,
             stream.domains[key] if stream.domains else "", distance, key == arrival.nearest, arrival.price, arrival.kept]
            for name, found in by_method.items() for arrival in found for key, distance in arrival.distances.items()]


def write(paths: Sequence[Path], output: Path = OUTPUT, labels: Mapping[Path, str] | None = None,
          command: str = "analysis.distances.write") -> tuple[str, list[Path]]:
    """Writes page, picture and figures of the runs at `paths` into `output`; returns the page and the files written.

    labels: names for the runs at or below a path. Raises UserError for what is no run, and where none has recorded distances.
    """
    from analysis.distance_picture import figure
    from analysis.records import find_runs, group_runs
    from analysis.tables import csv_text
    from utils.results.plots import DPI
    from utils.runs.files import write_bytes

    found = find_runs(paths, labels)
    by_stream = [(stream, {method.name: held for method in stream.methods if (held := arrivals(method, stream.domains))})
                 for stream in group_runs(found.runs)]
    shown = [(stream, by_method, f"distances_{stream.slug}.png" if stream.slug else "distances.png")
             for stream, by_method in by_stream if by_method]
    if not shown:
        raise UserError(f"{paths[0]}: no finished run has recorded how far images have moved ({len(found.runs)} finished); "
                        "run a config with inference \"routed\" or gate \"evidence\" (records of older versions lack it).")
    make_output(output)
    for stream, by_method, name in shown:
        buffer = io.BytesIO()
        figure(stream.title, by_method).savefig(buffer, format="png", dpi=DPI)
        write_bytes(output / name, buffer.getvalue())
    text = page(shown, found.unfinished, command)
    write_bytes(output / "distances.md", text.encode())
    rows = [row for stream, by_method, _ in shown for row in csv_rows(stream, by_method)]
    write_bytes(output / "distances.csv", csv_text(COLUMNS, rows).encode())
    return text, [output / name for name in ("distances.md", "distances.csv", *(name for *_, name in shown))]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m analysis.distances",
        description="Which adapters were kept, against how far the images of their tasks had moved from the nearest key: "
                    "tables and a picture, over runs and seeds.")
    add_runs(parser)
    parser.add_argument("--output", type=Path, default=OUTPUT, metavar="FOLDER",
                        help=f"where distances.md, distances.csv and the picture go (default: {OUTPUT})")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the page and says where it was written; returns the exit status: 0, or 2 for bad input."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)

    def work() -> None:
        from analysis.compare import labels_of

        text, written = write(options.runs, options.output, labels_of(options.label),
                              shlex.join(["python", "-m", "analysis.distances", *arguments]))
        print(text)
        print("Written: " + ", ".join(str(path) for path in written), flush=True)

    return status_of(work)


def _figure(distance: float) -> str:
    """Three significant digits, or all before the point."""
    return f"{distance:.2f}" if distance < 9.995 else f"{distance:.1f}" if distance < 99.95 else f"{distance:.0f}"


def _mean(distances: Iterable[float]) -> str:
    from analysis.tables import MISSING
    from utils.results.metrics import mean_std

    known = list(distances)
    if not known:
        return MISSING
    mean, deviation = mean_std(known)
    return _figure(mean) + ("" if deviation is None else f" ± {_figure(deviation)}")


def _kept(of: Sequence[Arrival]) -> str:
    return f"{sum(arrival.kept for arrival in of)} of {len(of)}"


if __name__ == "__main__":
    sys.exit(main())
