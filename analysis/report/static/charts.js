// The pictures of one run as Vega-Lite specifications: `spec(run)`, the `rows(run, task)` that they draw, and as an
// alternative to each picture `table(run, task)`: caption, header and rows.

const taskName = (run, task) => (run.domains[task] ? `${task} ${run.domains[task]}` : `${task}`);
const taskNames = run => range(columns(run)).map(task => taskName(run, task));
const taskCell = (run, task) => ({text: taskName(run, task), sort: task});
const stages = run => run.matrix.length;
const columns = run => run.matrix[0].length;

const RUN_CHARTS = {
  matrix: {
    spec: run => spec(step(columns(run)), step(stages(run)), "Heat map of the accuracy on each task after each task.", [
      {mark: "rect", encoding: {color: {field: "value", type: "quantitative", scale: percentScale,
                                        ...colorBar("accuracy (%)")},
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
       encoding: {x: numberAxis("now", "accuracy (%)", [0, 107], percentAxis), x2: {field: "best"}}},
      {mark: {type: "point", filled: false, size: 90, strokeWidth: 2, stroke: INK},
       encoding: {x: {field: "best", type: "quantitative"}}},
      {mark: {type: "point", filled: true, size: 80, color: BLUE, opacity: 1},
       encoding: {x: {field: "now", type: "quantitative"}, tooltip: tips("task", "best", "now", "lost")}},
      {mark: {type: "text", align: "left", dx: 9, fontSize: 11},
       encoding: {x: {field: "right", type: "quantitative"}, text: {field: "label"}}},
    ], {params: [...PARAMS, {name: "names", value: taskNames(run)}],
        encoding: {y: ordinal("task", "task", columns(run), {labelExpr: "names[datum.value]"})}}),
    rows: (run, task) => lost(run, task),
    table: (run, task) => [`Highest accuracy so far and accuracy after task ${task}, in percent`,
                           ["task", "highest", "now", "lost (points)"],
                           lost(run, task).map(row => [taskCell(run, row.task), row.best, row.now, row.lost])],
  },
  weights: {
    spec: run => spec(step(stages(run)), step(stages(run)), "Heat map of the gate weights that each growth decision read.", [
      {transform: [{filter: "!datum.gone"}], mark: "rect", encoding: {
        color: {field: "weight", type: "quantitative", ...colorBar("gate weight", {values: [0, 0.1, 0.3, 0.6, 1]}),
                scale: {type: "sqrt", domain: [0, 1], clamp: true, range: shades}},
        tooltip: tips("after", "adapter", "weight", "state")}},
      {transform: [{filter: "datum.gone"}], mark: {type: "text", text: "\u00d7", color: GREY, fontSize: 13}},
      ...(stages(run) > CELLS_WRITTEN ? [] : [{
        transform: [{filter: "!datum.gone"}], mark: {type: "text", fontSize: 10.5}, encoding: {
          text: {field: "label"}, color: {condition: {test: "datum.weight > 0.3", value: "white"}, value: INK}}}]),
      {transform: [{filter: "datum.leaves"}], mark: {
        type: "point", filled: false, size: 0.75 * cell(stages(run)) ** 2, stroke: RUST, strokeWidth: 1.8,
        strokeDash: [3, 2]}},
      chosenRow(stages(run)),
    ], {encoding: {x: ordinal("adapter", "adapter of task", stages(run)),
                   y: ordinal("after", "decision of task", stages(run))}}),
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
    ], {encoding: {x: {...ordinal("adapter", "adapter of task", stages(run)),
                       scale: {domain: range(stages(run)), paddingInner: 0.25}},
                   xOffset: {field: "kind", type: "nominal", scale: {domain: KINDS}},
                   y: numberAxis("weight", "gate weight", [0, 1.08])}}),
    rows: (run, task) => gateRows(run, task).filter(row => !row.gone).flatMap(row => KINDS.map((kind, index) => {
      const value = index ? row.force : row.weight;
      return {adapter: row.adapter, kind, weight: value, label: weight(value)};
    })),
    table: (run, task) => [
      `Gate weights at task ${task}`,
      ["adapter of task", ...KINDS, ...(run.share ? ["share of |beta * alpha|"] : []), "state"],
      gateRows(run, task).map(row => {
        const figures = [row.weight, row.force, ...(run.share ? [run.share[task][row.adapter]] : [])];
        return [row.adapter, ...figures.map(value => (row.gone ? null : value)), row.state];
      })],
  },
  kept: {
    spec: run => spec(440, 220, "Step line of the adapters in use after each task.", [
      {mark: {type: "line", interpolate: "step-after", stroke: GREY, strokeWidth: 1.5}},
      {mark: {type: "point", size: 90, strokeWidth: 2, opacity: 1, stroke: BLUE}, encoding: {
        fill: {field: "state", type: "nominal", title: "the task's own adapter",
               scale: run.kept.every(known) ? {domain: ["kept", "pruned"], range: [BLUE, "white"]}
                 : {domain: ["no decision"], range: ["#c8c8c8"]}},
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
    ], {params: [...PARAMS, {name: "names", value: taskNames(run)}],
        encoding: {x: {field: "share", type: "quantitative", stack: "zero", title: "test images of the task (%)",
                       scale: {domain: [0, 100]}, ...percentAxis},
                   order: {field: "place"},
                   y: {...ordinal("task", "task", columns(run), {labelExpr: "names[datum.value]"}),
                       scale: {domain: range(columns(run)), paddingInner: 0.2}}}}),
    rows: (run, task) => errorRows(run, task),
    table: (run, task) => [
      `Test images of each task after task ${task}`, ["task", "images", ...PLACES, "right with the task told"],
      run.counts[task].images.map((images, k) => [
        taskCell(run, k), images, ...placed(run.counts[task], k), run.counts[task].within[k]])],
  },
  classes: {
    spec: run => {
      const count = run.task_of_class.length, height = Math.max(7, Math.min(22, Math.floor(1000 / count)));
      return spec({step: Math.max(14, Math.min(52, Math.floor(620 / columns(run))))}, {step: height},
                  "Heat map of every class and the task whose classes it is taken for.", [
        {mark: {type: "rect", strokeWidth: 0.5}, encoding: {
          color: {field: "share", type: "quantitative", scale: percentScale, ...colorBar("images of the class (%)")},
          tooltip: tips("name", "of", "task", "images", "share", "right")}},
        ...(height < 12 ? [] : written("share", columns(run), ".0f", "datum.share > 55")),
        {transform: [{filter: "datum.own"}], mark: {type: "rect", fill: null, stroke: INK, strokeWidth: 1.5}},
      ], {params: [...PARAMS, {name: "names", value: run.class_names}], encoding: {
        x: ordinal("task", "taken for a class of task", columns(run), {orient: "top"}),
        y: ordinal("place", "class", count, {labelExpr: "names[datum.value]", labelLimit: 140,
                                             labelFontSize: Math.min(11, height)})}});
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
const fate = (run, after) => (known(run.kept[after]) ? (run.kept[after] ? "kept" : "pruned") : "no decision");

function gateRows(run, after) {
  return run.read[after].map((value, adapter) => {
    const was = gone(run, after, adapter), leaves = !was && !run.stored[after][adapter];
    return {after, adapter, weight: value, force: run.force[after][adapter], label: weight(value), gone: was, leaves,
            state: was ? "pruned before" : leaves ? "pruned now" : "stored"};
  });
}

// For every task so far the highest accuracy up to now and that of now (Chaudhry et al., 2018, at the chosen task).
function lost(run, task) {
  return range(columns(run)).filter(k => known(run.matrix[task][k])).map(k => {
    const earlier = range(task).filter(t => t >= k).map(t => run.matrix[t][k]), now = run.matrix[task][k];
    const best = earlier.length ? Math.max(...earlier) : now;
    const change = now > best ? `+${(now - best).toFixed(1)}` : now < best ? `\u2212${(best - now).toFixed(1)}` : "0";
    return {task: k, best, now, lost: earlier.length ? best - now : null, right: Math.max(best, now),
            label: earlier.length ? change : stages(run) < columns(run) ? "" : "newest"};
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
