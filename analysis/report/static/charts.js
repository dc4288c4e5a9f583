// What the pictures show: Vega-Lite specifications, their rows, and the same rows as a table.
//
// Nothing is told by colour alone: lines differ in dashes and markers, states in filled and hollow marks, and scales of
// colour go from light to dark.

const INK = "#1a1a1a", GREY = "#6b6b6b", BLUE = "#0072B2", RUST = "#B34700", LIGHT = "#9ecae1";
// Okabe & Ito (2008), the lightest left out.
const COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#7a5c00", "#000000", "#3d7fa6"];
const DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 4], [10, 3], [1, 3]];
const SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right"];
const CELLS_WRITTEN = 15;  // tasks up to which figures are written into the cells of a map

const CONFIG = {
  background: null, font: "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', sans-serif",
  view: {stroke: null}, mark: {aria: false}, rect: {stroke: "white", strokeWidth: 1},
  axis: {aria: false, labelColor: INK, titleColor: INK, labelFontSize: 11, titleFontSize: 12, titleFontWeight: "normal",
         gridColor: "#e7e7e7", domainColor: "#999", tickColor: "#999", labelOverlap: true},
  legend: {aria: false, labelFontSize: 11, titleFontSize: 11, titleFontWeight: "normal", orient: "bottom", labelLimit: 200,
           symbolStrokeWidth: 2},
};

function spec(width, height, description, layer, more = {}) {
  return {width, height, description, layer, data: {name: "rows"}, params: [{name: "task", value: 0}],
          autosize: {type: "pad"}, padding: 2, config: CONFIG, ...more};
}

const cell = (count, room = 420, most = 50) => Math.max(4, Math.min(most, Math.floor(room / count)));
const step = (count, room, most) => ({step: cell(count, room, most)});
const ordinal = (field, title, count, more = {}) => (
  {field, type: "ordinal", title, scale: {domain: range(count), paddingInner: 0, paddingOuter: 0},
   axis: {labelAngle: 0, ticks: false, domain: false, ...more}});
const numberAxis = (field, title, domain, more = {}) => (
  {field, type: "quantitative", title, scale: {domain, nice: false, zero: false}, ...more});
const taskAxis = (count, title = "after task") => numberAxis(
  "after", title, [-0.4, Math.max(0.4, count - 0.6)], {axis: {tickMinStep: 1, format: "d", grid: false, values: ticks(count)}});
const percentScale = {domain: [0, 100], range: ["#f7fbff", "#6baed6", "#08306b"]};
const range = count => Array.from({length: count}, (_, index) => index);
const ticks = count => range(count).filter(index => index % Math.ceil(count / 12) === 0);
const percent = (part, whole) => (whole ? 100 * part / whole : null);
const mean = values => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
const known = value => value !== null && value !== undefined;

// A frame around the row, or a line at the task, that is chosen; `marks` are the tasks.
const chosenOnly = count => ({data: {values: range(count).map(after => ({after}))},
                              transform: [{filter: "datum.after === task"}]});
const chosenRow = count => ({
  ...chosenOnly(count), mark: {type: "rect", fill: null, stroke: INK, strokeWidth: 2.5},
  encoding: {x: {value: 0}, x2: {value: "width"}, y: {field: "after", type: "ordinal"}}});
const chosenLine = count => ({
  ...chosenOnly(count), mark: {type: "rule", stroke: INK, strokeWidth: 1, strokeDash: [3, 2]},
  encoding: {x: {field: "after", type: "quantitative"}}});
const written = (field, count, format, dark) => (count > CELLS_WRITTEN ? [] : [{
  mark: {type: "text", fontSize: 11}, encoding: {
    text: {field, type: "quantitative", format},
    color: {condition: {test: dark, value: "white"}, value: INK}}}]);

// ---- one run: `rows(run, task)` are those of the picture, `table(run, task)` is [caption, header, rows]

const taskName = (run, task) => (run.domains[task] ? `${task} ${run.domains[task]}` : `${task}`);
const stages = run => run.matrix.length;
const columns = run => run.matrix[0].length;

const RUN_CHARTS = {
  matrix: {
    spec: run => spec(step(columns(run)), step(stages(run)), "Heat map of the accuracy on each task after each task.", [
      {mark: "rect", encoding: {color: {field: "value", type: "quantitative", scale: percentScale,
                                        legend: {title: "accuracy (%)", gradientLength: 180}},
                                tooltip: tips("after", "task", "value", "told")}},
      ...written("value", columns(run), ".0f", "datum.value > 55"), chosenRow(stages(run)),
    ], {encoding: {x: ordinal("task", "accuracy on task", columns(run)), y: ordinal("after", "after task", stages(run))}}),
    rows: run => run.matrix.flatMap((row, after) => row.flatMap((value, task) => (
      known(value) ? [{after, task, value, told: run.within[after][task]}] : []))),
    table: (run, task) => [
      `Accuracy in percent on each task after task ${task} and those before; with the task told in brackets`,
      ["after task", "all seen", ...range(columns(run)).map(k => `on ${taskName(run, k)}`)],
      run.matrix.slice(0, task + 1).map((row, after) => [after, run.top1[after], ...row.map((value, k) => (
        known(value) ? {text: `${value.toFixed(1)} (${run.within[after][k].toFixed(1)})`, sort: value} : null))])],
  },
  curve: {
    spec: run => spec(440, 260, "Lines of accuracy over all classes seen, with the task told, and on the newest task.", [
      {mark: {type: "line", strokeWidth: 2}, encoding: {strokeDash: dashes("series", CURVES)}},
      {mark: {type: "point", filled: true, size: 50, opacity: 1}, encoding: {
        shape: looks("series", CURVES, SHAPES), tooltip: tips("after", "series", "value")}},
      chosenLine(stages(run)),
    ], {encoding: {x: taskAxis(stages(run)), y: numberAxis("value", "accuracy (%)", [0, 102]),
                   color: looks("series", CURVES, COLORS)}, ...MARKERS_ALONE}),
    rows: run => range(stages(run)).flatMap(after => CURVES.map((series, index) => (
      {after, series, value: [run.top1, run.told, run.newest, run.seen.map(seen => 100 / seen)][index][after]}
    ))).filter(row => known(row.value)),
    table: run => ["Accuracy in percent after each task", ["after task", "classes seen", ...CURVES],
                   range(stages(run)).map(t => [t, run.seen[t], run.top1[t], run.told[t], run.newest[t], 100 / run.seen[t]])],
  },
  drop: {
    spec: run => spec(640, {step: cell(columns(run), 440, 26)}, "Highest accuracy so far and accuracy now of each task.", [
      {mark: {type: "rule", strokeWidth: 2, stroke: GREY},
       encoding: {x: numberAxis("now", "accuracy (%)", [0, 107], {axis: {values: range(6).map(k => 20 * k)}}), x2: {field: "best"}}},
      {mark: {type: "point", filled: false, size: 90, strokeWidth: 2, stroke: INK},
       encoding: {x: {field: "best", type: "quantitative"}}},
      {mark: {type: "point", filled: true, size: 80, color: BLUE, opacity: 1},
       encoding: {x: {field: "now", type: "quantitative"}, tooltip: tips("task", "best", "now", "lost")}},
      {mark: {type: "text", align: "left", dx: 9, fontSize: 11},
       encoding: {x: {field: "right", type: "quantitative"}, text: {field: "label"}}},
    ], {params: [{name: "task", value: 0}, {name: "names", value: range(columns(run)).map(k => taskName(run, k))}],
        encoding: {y: ordinal("task", "task", columns(run), {labelExpr: "names[datum.value]"})}}),
    rows: (run, task) => lost(run, task),
    table: (run, task) => [`Highest accuracy so far and accuracy after task ${task}, in percent`,
                           ["task", "highest", "now", "lost (points)"],
                           lost(run, task).map(row => [{text: taskName(run, row.task), sort: row.task}, row.best, row.now, row.lost])],
  },
  weights: {
    spec: run => spec(step(stages(run)), step(stages(run)), "Heat map of the gate weights that each growth decision read.", [
      {transform: [{filter: "!datum.gone"}], mark: "rect", encoding: {
        color: {field: "weight", type: "quantitative", legend: {title: "gate weight", gradientLength: 180, values: [0, 0.1, 0.3, 0.6, 1]},
                scale: {type: "sqrt", domain: [0, 1], clamp: true, range: percentScale.range}},
        tooltip: tips("after", "adapter", "weight", "state")}},
      {transform: [{filter: "datum.gone"}], mark: {type: "text", text: "\u00d7", color: GREY, fontSize: 13}},
      ...(stages(run) > CELLS_WRITTEN ? [] : [{
        transform: [{filter: "!datum.gone"}], mark: {type: "text", fontSize: 10.5}, encoding: {
          text: {field: "label"}, color: {condition: {test: "datum.weight > 0.3", value: "white"}, value: INK}}}]),
      {transform: [{filter: "datum.leaves"}], mark: {
        type: "point", filled: false, size: 0.75 * cell(stages(run)) ** 2, stroke: RUST, strokeWidth: 1.8, strokeDash: [3, 2]}},
      chosenRow(stages(run)),
    ], {encoding: {x: ordinal("adapter", "adapter of task", stages(run)), y: ordinal("after", "decision of task", stages(run))}}),
    rows: run => range(stages(run)).flatMap(after => gateRows(run, after)),
    table: (run, task) => [
      `Gate weights that the decisions up to task ${task} read; a dash is an adapter that was pruned before`,
      ["task", "its adapter", ...range(stages(run)).map(k => `adapter ${k}`)],
      range(task + 1).map(after => [after, fate(run, after), ...range(stages(run)).map(k => (
        gone(run, after, k) || k > after ? null : {text: weight(run.read[after][k]), sort: run.read[after][k]}))])],
  },
  gate: {
    spec: run => spec(Math.max(160, Math.min(420, 64 * stages(run))), 240, "Bars of the gate weights at the chosen task.", [
      {mark: {type: "bar", strokeWidth: 1.5, stroke: INK},
       encoding: {fill: {field: "kind", type: "nominal", title: null, scale: {domain: KINDS, range: ["white", BLUE]}},
                  tooltip: tips("adapter", "kind", "weight")}},
      ...(stages(run) > 7 ? [] : [{mark: {type: "text", dy: -7, fontSize: 10}, encoding: {text: {field: "label"}}}]),
    ], {encoding: {x: {...ordinal("adapter", "adapter of task", stages(run)), scale: {domain: range(stages(run)), paddingInner: 0.25}},
                   xOffset: {field: "kind", type: "nominal", scale: {domain: KINDS}},
                   y: numberAxis("weight", "gate weight", [0, 1.08])}}),
    rows: (run, task) => gateRows(run, task).filter(row => !row.gone).flatMap(row => [
      {adapter: row.adapter, kind: KINDS[0], weight: row.weight, label: row.label},
      {adapter: row.adapter, kind: KINDS[1], weight: run.force[task][row.adapter], label: weight(run.force[task][row.adapter])}]),
    table: (run, task) => [
      `Gate weights at task ${task}`,
      ["adapter of task", "read by the decision", "in force after it", ...(run.share ? ["share of |beta * alpha|"] : []), "state"],
      gateRows(run, task).map(row => [row.adapter, row.gone ? null : row.weight, row.gone ? null : run.force[task][row.adapter],
                                      ...(run.share ? [row.gone ? null : run.share[task][row.adapter]] : []), row.state])],
  },
  kept: {
    spec: run => spec(440, 220, "Step line of the adapters in use after each task.", [
      {mark: {type: "line", interpolate: "step-after", stroke: GREY, strokeWidth: 1.5}},
      {mark: {type: "point", size: 90, strokeWidth: 2, opacity: 1, stroke: BLUE}, encoding: {
        fill: {field: "state", type: "nominal", title: "the task's own adapter",
               scale: {domain: ["kept", "pruned"], range: [BLUE, "white"]}},
        tooltip: tips("after", "adapters", "state")}},
      chosenLine(stages(run)),
    ], {encoding: {x: taskAxis(stages(run)), y: numberAxis("adapters", "adapters", [0, Math.max(1, ...run.adapters) + 0.5],
                                                           {axis: {tickMinStep: 1, format: "d"}})}}),
    rows: run => range(stages(run)).map(after => ({after, adapters: run.adapters[after] ?? 0, state: fate(run, after)})),
    table: run => ["Adapters in use after each task", ["after task", "its adapter", "evicted", "adapters", "seconds"],
                   range(stages(run)).map(t => [t, fate(run, t), run.evicted[t].join(", "), run.adapters[t], run.seconds[t]])],
  },
  bytes: {
    spec: run => spec(440, 220, "Bars of the bytes stored after each task.", [
      {mark: {type: "bar", stroke: BLUE, strokeWidth: 1}, encoding: {
        fill: {condition: {test: "datum.after === task", value: BLUE}, value: "#e3eef5"},
        tooltip: tips("after", "bytes", "parameters")}},
    ], {encoding: {x: {...ordinal("after", "after task", stages(run), {values: ticks(stages(run))}),
                       scale: {domain: range(stages(run)), paddingInner: 0.25}},
                   y: {field: "bytes", type: "quantitative", title: "stored bytes", axis: {format: "~s"},
                       scale: {domain: [0, 1.08 * Math.max(1, ...run.bytes)], nice: false}}}}),
    rows: run => range(stages(run)).map(after => ({after, bytes: run.bytes[after], parameters: run.parameters[after]})),
    table: run => ["Stored for the stream after each task, without the frozen backbone", ["after task", "bytes", "parameters"],
                   range(stages(run)).map(t => [t, run.bytes[t], run.parameters[t]])],
  },
  errors: {
    spec: run => spec(640, {step: cell(columns(run), 440, 26)}, "Bars of right and wrong images of each task.", [
      {mark: {type: "bar", stroke: INK, strokeWidth: 0.8}, encoding: {
        fill: {field: "kind", type: "nominal", title: null, scale: {domain: PLACES, range: [BLUE, LIGHT, "white"]},
               legend: {orient: "top"}},
        tooltip: tips("task", "kind", "images", "share")}},
      {transform: [{filter: "datum.share >= 6"}], mark: {type: "text", fontSize: 11}, encoding: {
        x: {field: "share", type: "quantitative", stack: "zero", bandPosition: 0.5}, detail: {field: "kind"},
        text: {field: "share", type: "quantitative", format: ".0f"},
        color: {condition: {test: `datum.kind === '${PLACES[0]}'`, value: "white"}, value: INK}}},
    ], {params: [{name: "task", value: 0}, {name: "names", value: range(columns(run)).map(k => taskName(run, k))}],
        encoding: {x: {field: "share", type: "quantitative", stack: "zero", title: "test images of the task (%)",
                       scale: {domain: [0, 100]}, axis: {values: range(6).map(k => 20 * k)}},
                   order: {field: "place"},
                   y: {...ordinal("task", "task", columns(run), {labelExpr: "names[datum.value]"}),
                       scale: {domain: range(columns(run)), paddingInner: 0.2}}}}),
    rows: (run, task) => errorRows(run, task),
    table: (run, task) => [`Test images of each task after task ${task}`, ["task", "images", ...PLACES, "right with the task told"],
                           range(run.counts[task].images.length).map(k => {
                             const [right, own, other] = placed(run.counts[task], k);
                             return [{text: taskName(run, k), sort: k}, run.counts[task].images[k], right, own, other,
                                     run.counts[task].within[k]];
                           })],
  },
  classes: {
    spec: run => {
      const count = run.task_of_class.length, height = Math.max(7, Math.min(22, Math.floor(1000 / count)));
      return spec({step: Math.max(14, Math.min(52, Math.floor(620 / columns(run))))}, {step: height},
                  "Heat map of every class and the task whose classes it is taken for.", [
        {mark: {type: "rect", strokeWidth: 0.5}, encoding: {
          color: {field: "share", type: "quantitative", scale: percentScale,
                  legend: {title: "images of the class (%)", gradientLength: 180}},
          tooltip: tips("name", "of", "task", "images", "share", "right")}},
        ...(height < 12 ? [] : written("share", columns(run), ".0f", "datum.share > 55")),
        {transform: [{filter: "datum.own"}], mark: {type: "rect", fill: null, stroke: INK, strokeWidth: 1.5}},
      ], {params: [{name: "task", value: 0}, {name: "names", value: run.class_names}],
          encoding: {x: {...ordinal("task", "taken for a class of task", columns(run)), axis: {labelAngle: 0, orient: "top", domain: false}},
                     y: ordinal("place", "class", count, {labelExpr: "names[datum.value]", labelLimit: 140, labelFontSize: Math.min(11, height)})}});
    },
    rows: (run, task) => classRows(run, task),
    table: (run, task) => [`Where the test images of each class go after task ${task}`,
                           ["class", "of task", "images", "right", ...range(columns(run)).map(k => `to ${taskName(run, k)}`)],
                           !run.classes[task] ? [] : run.classes[task].predicted_task.map((row, place) => [
                             run.class_names[place], run.task_of_class[place], row.reduce((a, b) => a + b, 0),
                             run.classes[task].right[place], ...range(columns(run)).map(k => row[k] ?? null)])],
  },
};

const CURVES = ["all classes seen", "task told", "newest task", "chance"];
const KINDS = ["read by the decision", "in force after it"];
const PLACES = ["right", "another class of its task", "a class of another task"];

// ---- rows of a run

const weight = value => (value === 0 ? "0" : value < 0.005 ? "<.01" : value.toFixed(2));
const gone = (run, after, adapter) => adapter < after && !run.stored[after - 1][adapter];
const fate = (run, after) => (known(run.kept[after]) ? (run.kept[after] ? "kept" : "pruned") : "none");

function gateRows(run, after) {
  return run.read[after].map((value, adapter) => {
    const was = gone(run, after, adapter), leaves = !was && !run.stored[after][adapter];
    return {after, adapter, weight: value, label: weight(value), gone: was, leaves,
            state: was ? "pruned before" : leaves ? "pruned now" : "stored"};
  });
}

// For every task so far the highest accuracy up to now and that of now (Chaudhry et al., 2018, at the chosen task).
function lost(run, task) {
  return range(columns(run)).filter(k => known(run.matrix[task][k])).map(k => {
    const earlier = range(task).filter(t => t >= k).map(t => run.matrix[t][k]), now = run.matrix[task][k];
    const best = earlier.length ? Math.max(...earlier) : now;
    const label = earlier.length ? (best > now ? `\u2212${(best - now).toFixed(1)}` : best < now ? `+${(now - best).toFixed(1)}` : "0") : "newest";
    return {task: k, best, now, lost: earlier.length ? best - now : null, right: Math.max(best, now), label};
  });
}

function placed(counts, task) {
  const right = counts.top1[task], other = counts.wrong_task[task];
  return [right, counts.images[task] - right - other, other];
}

function errorRows(run, task) {
  return run.counts[task].images.flatMap((images, k) => placed(run.counts[task], k).map((part, place) => (
    {task: k, place, kind: PLACES[place], images: part, share: percent(part, images)})));
}

function classRows(run, task) {
  const found = run.classes[task];
  return !found ? [] : found.predicted_task.flatMap((row, place) => {
    const whole = row.reduce((a, b) => a + b, 0);
    return row.map((images, k) => (
      {place, name: run.class_names[place], of: run.task_of_class[place], task: k, images, share: percent(images, whole),
       right: percent(found.right[place], whole), own: k === run.task_of_class[place]}));
  });
}

function tips(...fields) {
  const titles = {told: "with the task told", of: "of task", value: "accuracy (%)", share: "share (%)"};
  return fields.map(field => ({field, title: titles[field] ?? field, format: NUMBERS.has(field) ? ".1f" : undefined}))
    .map(tip => (tip.format ? {...tip, type: "quantitative"} : tip));
}

// The legend shows marker and colour; with the dashes in it too its symbols would have dashed edges.
const dashes = (field, names) => ({...looks(field, names, DASHES), legend: null});
const MARKERS_ALONE = {resolve: {legend: {strokeDash: "independent"}}};

function looks(field, names, values) {
  const columns = Math.max(1, Math.floor(72 / (6 + Math.max(...names.map(name => name.length)))));
  return {field, type: "nominal", title: null, legend: {columns},
          scale: {domain: names, range: names.map((_, index) => values[index % values.length])}};
}
