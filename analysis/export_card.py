"""The model card that goes beside an exported network: data, classes, metrics, licences, and how to load it."""

import json
from typing import Any

import timm

from analysis.export_formats import Exported, Source
from utils.config import title_of
from utils.config.rules import as_list
from utils.results.metrics import TaskCounts, summary

_UNSTATED = "not stated; fill it in before you publish"


def card(source: Source, to: str, exported: Exported, licence: str | None, data_licence: str | None) -> str:
    """The card as Markdown, with the header that model hubs read."""
    return "\n\n".join([
        _header(source, to, licence), _title(source, to), _load(source, exported), _images(source), _classes(source),
        _metrics(source), _licences(source, licence, data_licence), _origin(source)]) + "\n"


def _header(source: Source, to: str, licence: str | None) -> str:
    fields: dict[str, Any] = {
        "license": licence or "unknown", "library_name": to, "pipeline_tag": "image-classification",
        "datasets": as_list(source.saved.config.dataset), "metrics": ["accuracy"],
        "base_model": source.saved.result["backbone"]["name"], "tags": ["continual-learning", "lora"]}
    return "\n".join(["---", *(f"{name}: {json.dumps(value)}" for name, value in fields.items()), "---"])  # JSON is YAML


def _title(source: Source, to: str) -> str:
    saved, network = source.saved, source.network
    config, tasks = saved.config, saved.result["tasks"]
    bank = network.bank
    gate = f" with gate {config.gate}" if hasattr(config, "gate") else ""
    kept = "" if bank is None else f", adapters of the tasks {', '.join(map(str, bank.tasks))}"
    return (f"# {title_of(config.dataset)}, {source.classes} classes, as {to}\n\n"
            f"An image classifier that learned its classes task by task, by {config.model_name}{gate} on a frozen "
            f"{saved.result['backbone']['name']}: the network after task {saved.task} (tasks count from 0; "
            f"{len(tasks)} are finished), seed {saved.seed}{kept}.")


def _load(source: Source, exported: Exported) -> str:
    size = source.network.backbone.image_size
    measured = "" if exported.difference is None else (
        f" On images of noise the logits differed from the run's network by {exported.difference:.1e} of the largest.")
    return (f"## Load\n\nIn this folder, with {', '.join(exported.packages)}; `images` is a float32 tensor "
            f"`[b, 3, {size}, {size}]`, any b:\n\n```python\n{exported.load}\n```\n\n"
            f"`logits` is `[b, {source.classes}]`, in the order of the classes below.{measured}")


def _images(source: Source) -> str:
    view = source.saved.test_view()
    steps = f"resized to {view.size} x {view.size} pixels" if view.test_resize is None else (
        f"shorter side resized to {round(view.size * view.test_resize)} pixels, the central {view.size} x {view.size} cut out")
    scaled = "values in 0..1, no mean or standard deviation taken" if view.mean is None else (
        f"values in 0..1, minus {list(view.mean)}, over {list(view.std)} per channel")
    return f"## Images\n\nRGB, {steps} (bicubic, antialiased), {scaled}."


def _classes(source: Source) -> str:
    names, rows, number = source.saved.class_names(), [], 0
    for entry in source.saved.result["tasks"][:source.saved.task + 1]:
        for _ in range(number, entry["seen_classes"]):
            rows.append(f"| {number} | {names[number].replace('|', chr(92) + '|')} | {entry['task']} |")
            number += 1
    return "\n".join(["## Classes", "", "| column | class | learned with task |", "| ---: | --- | ---: |", *rows])


def _metrics(source: Source) -> str:
    saved = source.saved
    found = summary([TaskCounts(**entry["counts"]) for entry in saved.result["tasks"][:saved.task + 1]])
    whole = [("accuracy on the test images of all classes above", found["last_accuracy"], "%"),
             ("mean of that over the tasks so far", found["average_accuracy"], "%"),
             ("forgetting", found["forgetting"], "points")]
    rows = [(name, f"{value:.2f} {unit}") for name, value, unit in whole if value is not None]
    rows += [(f"accuracy on the classes of task {task}, all competing", f"{value:.2f} %")
             for task, value in enumerate(found["accuracy_matrix"][-1]) if value is not None]
    return "\n".join(["## Metrics", "", "As the run measured them.", "", "| measure | value |", "| --- | ---: |",
                      *(f"| {name} | {value} |" for name, value in rows)])


def _licences(source: Source, licence: str | None, data_licence: str | None) -> str:
    named = source.saved.result["backbone"]
    full = f"{named['name']}.{named['tag']}" if named["tag"] else named["name"]
    known = timm.get_pretrained_cfg(full) if named["source"] == "pretrained" else None
    rows = [("this model", licence or _UNSTATED),
            (f"the data, {title_of(source.saved.config.dataset)}", data_licence or _UNSTATED),
            (f"the backbone's weights, {full} ({named['source']})", getattr(known, "license", None) or _UNSTATED)]
    return "\n".join(["## Licences", "", "| of | licence |", "| --- | --- |", *(f"| {of} | {text} |" for of, text in rows)])


def _origin(source: Source) -> str:
    result = source.saved.result
    commit = result["code"].get("commit") or "unknown"
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return ("## Origin\n\nExported by `python -m analysis.export` of Gumbel CL-LoRA.\n\n"
            f"The run: code {commit}; {versions}; SHA-256 of the frozen weights {result['backbone']['sha256']}, of the class "
            f"order {result['class_order_sha256']}.")
