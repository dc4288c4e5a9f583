// The page at work: draws the pictures, and has them follow the chosen run, task, methods and measure.

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);

// A figure of the page with its picture, table and button. Changes are drawn one after the other.
class Picture {
  constructor(id, chart) {
    this.figure = byId(id);
    this.chart = chart;
    this.name = id;
    this.drawing = Promise.resolve();
    const save = this.figure.querySelector(".save"), details = this.figure.querySelector("details");
    save.hidden = false;
    save.addEventListener("click", () => this.save());
    details.addEventListener("toggle", () => this.tabulate());
  }

  // `subject` is a run or a stream; `choice` is what else `rows` and `table` of the chart take.
  show(subject, ...choice) {
    const fresh = subject !== this.subject;
    [this.subject, this.choice] = [subject, choice];
    this.tabulate();
    this.drawing = this.drawing.then(() => this.draw(fresh));
    return this.drawing;
  }

  async draw(fresh) {
    if (fresh) {
      if (this.view) this.view.finalize();
      const spec = {...this.chart.spec(this.subject), datasets: {rows: this.chart.rows(this.subject, ...this.choice)}};
      const made = await window.vegaEmbed(this.figure.querySelector(".chart"), spec,
                                          {actions: false, renderer: "svg", tooltip: {theme: "light"}});
      this.view = made.view;
      this.view.addEventListener("click", (_, item) => {
        if (item && item.datum && this.onClick) this.onClick(item.datum);
      });
    }
    this.view.data("rows", this.chart.rows(this.subject, ...this.choice));
    if (typeof this.choice[0] === "number") this.view.signal("task", this.choice[0]);
    await this.view.runAsync();
  }

  tabulate() {
    if (!this.figure.querySelector("details").open || !this.subject) return;
    this.figure.querySelector(".figures").replaceChildren(makeTable(...this.chart.table(this.subject, ...this.choice)));
  }

  async save() {
    const file = new Blob([await this.view.toSVG()], {type: "image/svg+xml"});
    const link = element("a", {href: URL.createObjectURL(file), download: `${this.name}.svg`});
    link.click();
    URL.revokeObjectURL(link.href);
  }
}

// ---- a comparison

function startStream(section) {
  const stream = DATA.streams[Number(section.dataset.stream)];
  const charts = {...STREAM_CHARTS, ...Object.fromEntries(stream.costs.map(cost => [cost.key, against(cost)]))};
  const pictures = Object.entries(charts).filter(([name]) => byId(`${section.id}-${name}`))
    .map(([name, chart]) => new Picture(`${section.id}-${name}`, chart));
  const boxes = [...section.querySelectorAll(".methods input")], measure = byId(`${section.id}-measure`);
  const show = () => {
    const shown = new Set(boxes.filter(box => box.checked).map(box => box.value));
    return Promise.all(pictures.map(picture => picture.show(stream, shown, measure && measure.value)));
  };
  for (const control of [...boxes, ...(measure ? [measure] : [])]) control.addEventListener("change", show);
  return show();
}

// ---- one run

const pictures = Object.fromEntries(Object.entries(RUN_CHARTS).map(([name, chart]) => [name, new Picture(name, chart)]));
const slider = byId("task"), choice = byId("run-choice");
const current = {run: null, task: 0};

function chooseRun(index) {
  const run = DATA.runs[index];
  current.run = run;
  slider.max = stages(run) - 1;
  byId("run-about").textContent = [...(DATA.runs.length > 1 ? [run.title] : []), DATA.streams[run.stream].title,
                                   `${run.machine}; code ${run.code}`].join(". ") + ".";
  byId("run-figures").replaceChildren(...run.figures.map(([name, value]) => element(
    "div", {}, element("dt", {}, name), element("dd", {}, value))));
  const gated = run.read.every(known) && run.stored.every(known);
  for (const part of document.querySelectorAll(".needs-gates")) part.hidden = !gated;
  const counted = run.classes.every(known);
  byId("classes-block").hidden = !counted;
  byId("classes-missing").hidden = counted;
  byId("classes-missing").textContent = "The record of this run has no counts by class: it was made before runs wrote them. "
    + "The picture above has what it knows of errors within and between tasks; running its command again adds the rest.";
  for (const [id, caption, atDefault] of [["config-table", "Keys whose values are not the plain default", false],
                                          ["config-rest", "Keys at their default", true]]) {
    byId(id).replaceChildren(makeTable(caption, ["key", "value", "default", "meaning"], run.config
      .filter(row => row[4] === atDefault).map(row => row.slice(0, 4).map(text => ({text, sort: text, code: true})))));
  }
  byId("files-table").replaceChildren(makeTable("Files of the run", ["file", "bytes", "state"], run.files.map(file => [
    {text: file.name, sort: file.name, href: file.href}, file.bytes ?? null, file.state])));
  return chooseTask(stages(run) - 1);
}

function chooseTask(task) {
  const run = current.run;
  current.task = task;
  slider.value = task;
  const domain = run.domains[task] && stages(run) === columns(run) ? ` (${run.domains[task]})` : "";
  const text = `${task}${domain}, ${run.seen[task]} classes seen`;
  byId("task-text").textContent = text;
  slider.setAttribute("aria-valuetext", text);
  byId("earlier").disabled = task === 0;
  byId("later").disabled = task === stages(run) - 1;
  byId("forgetting-text").textContent = forgettingText(run, task);
  byId("route-text").textContent = routeText(run, task);
  const shown = Object.entries(pictures).filter(([, picture]) => !picture.figure.closest("[hidden]"));
  return Promise.all(shown.map(([, picture]) => picture.show(run, task)));
}

function forgettingText(run, task) {
  const parts = lost(run, task).map(row => row.lost).filter(known);
  if (stages(run) < columns(run)) return "All tasks were learned at once, so nothing could be forgotten.";
  if (!parts.length) return "There is no earlier task that could have been forgotten.";
  return `After task ${task}, the ${parts.length === 1 ? "earlier task has" : `${parts.length} earlier tasks have`} lost `
    + `${mean(parts).toFixed(2)} points on average since ${parts.length === 1 ? "its" : "their"} best.`;
}

function routeText(run, task) {
  if (!run.route) return "";
  const members = {};
  run.route[task].forEach((key, k) => (members[key] ??= []).push(k));
  return "Routed inference, keys by the task that founded them: " + Object.entries(members).map(
    ([key, tasks]) => `key ${key} stands for task${tasks.length > 1 ? "s" : ""} ${tasks.join(", ")}`).join("; ") + ".";
}

slider.addEventListener("input", () => chooseTask(Number(slider.value)));
byId("earlier").addEventListener("click", () => chooseTask(current.task - 1));
byId("later").addEventListener("click", () => chooseTask(current.task + 1));
choice.addEventListener("change", () => chooseRun(Number(choice.value)));
for (const name of ["matrix", "weights", "curve", "kept", "bytes"]) {
  pictures[name].onClick = datum => { if (Number.isInteger(datum.after)) chooseTask(datum.after); };
}

const drawn = [...[...document.querySelectorAll("section.stream")].map(startStream), chooseRun(0)];
Promise.all(drawn).then(() => { document.documentElement.dataset.ready = "yes"; });
