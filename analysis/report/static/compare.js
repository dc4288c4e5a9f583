// The pictures of a comparison: `spec(stream)`, `rows(stream, shown, measure)`, `table(stream, shown, measure)`.

const STREAM_CHARTS = {
  curve: overTasks("curve", "accuracy (%)", stream => [0, 102]),
  adapters: overTasks("adapters", "adapters", stream => [0, 1.06 * Math.max(1, ...stream.methods.flatMap(
    method => method.adapters.filter(known).map(highest)))], {tickMinStep: 1, format: "d"}),
  difference: {
    spec: stream => spec(320, {step: 30}, "Mean paired differences with their intervals.", [
      {transform: [{filter: "datum.edge !== null"}], mark: {type: "rule", strokeDash: [2, 3], stroke: GREY},
       encoding: {x: {field: "edge", type: "quantitative"}, y: null}},
      {data: {values: [{zero: 0}]}, mark: {type: "rule", stroke: INK, strokeWidth: 1},
       encoding: {x: {field: "zero", type: "quantitative"}, y: null}},
      {transform: [{filter: "datum.mean !== null"}], mark: {type: "rule", strokeWidth: 2, stroke: BLUE},
       encoding: {x: {field: "low", type: "quantitative"}, x2: {field: "high"}}},
      {transform: [{filter: "datum.mean !== null"}], mark: {type: "point", filled: true, size: 90, opacity: 1, color: BLUE},
       encoding: {x: {field: "mean", type: "quantitative", title: "difference", scale: {nice: true, padding: 12},
                      axis: {format: ".3~s"}},
                  tooltip: tips("method", "mean", "low", "high", "pairs")}},
    ], {encoding: {y: {field: "method", type: "nominal", title: null, sort: names(stream),
                       axis: {labelLimit: 180, grid: true, ticks: false, domain: false}}}}),
    rows: (stream, shown, measure) => {
      const found = stream.differences[measure], edges = found.margin === null ? [] : [-found.margin, found.margin];
      const rows = found.rows.filter(row => shown.has(row.method));
      return [...rows.map(row => ({...row, low: row.low ?? row.mean, high: row.high ?? row.mean, edge: null})),
              ...(rows.length ? edges.map(edge => ({method: rows[0].method, mean: null, edge})) : [])];
    },
    table: (stream, shown, measure) => [
      `Difference in ${stream.differences[measure].heading}`, ["method", "pairs", "mean", "interval from", "to"],
      stream.differences[measure].rows.filter(row => shown.has(row.method)).map(row => [
        row.method, row.pairs, row.mean, row.low, row.high])],
  },
  final: {
    spec: stream => spec({step: Math.max(16, Math.min(56, Math.floor(700 / stream.tasks)))}, {step: 26},
                         "Heat map of the accuracy on each task after the last one, a row per method.", [
      {mark: "rect", encoding: {color: {field: "value", type: "quantitative", scale: percentScale,
                                        ...colorBar("accuracy (%)")},
                                tooltip: tips("method", "task", "value", "deviation", "told")}},
      ...written("value", stream.tasks, ".0f", "datum.value > 55"),
    ], {params: [...PARAMS, {name: "names", value: range(stream.tasks).map(k => taskName(stream, k).split(" "))}],
        encoding: {x: ordinal("task", "task", stream.tasks, {labelExpr: "names[datum.value]"}),
                   y: {field: "method", type: "nominal", title: null, sort: names(stream),
                       axis: {labelLimit: 200, ticks: false, domain: false}}}}),
    rows: (stream, shown) => chosen(stream, shown).flatMap(method => (
      method.final.top1.flatMap((entry, task) => (known(entry) ? [
        {method: method.name, task, value: entry[0], deviation: entry[1], told: method.final.within[task][0]}] : [])))),
    table: (stream, shown) => [
      "Accuracy in percent on each task after the last one, mean over seeds; with the task told in brackets",
      ["method", ...range(stream.tasks).map(k => taskName(stream, k))],
      chosen(stream, shown).map(method => [method.name, ...method.final.top1.map((entry, k) => (
        known(entry) ? {text: `${entry[0].toFixed(1)} (${method.final.within[k][0].toFixed(1)})`, sort: entry[0]} : null))])],
  },
};

const names = stream => stream.methods.map(method => method.name);
const chosen = (stream, shown) => stream.methods.filter(method => shown.has(method.name));
const lowest = ([value, deviation]) => value - (deviation ?? 0);
const highest = ([value, deviation]) => value + (deviation ?? 0);

// Last accuracy against a cost (its `key`, `title`, and the names of the methods that are `best`), a point per method.
function against({key, title, best}) {
  const rows = (stream, shown) => chosen(stream, shown).filter(method => method.costs[key] && method.accuracy).map(method => (
    {method: method.name, cost: method.costs[key][0], accuracy: method.accuracy[0], deviation: method.accuracy[1],
     best: best.includes(method.name), low: lowest(method.accuracy), high: highest(method.accuracy)}));
  return {
    spec: stream => {
      const costs = stream.methods.filter(method => method.costs[key]).map(method => method.costs[key][0]);
      const logarithmic = Math.min(...costs) > 0 && Math.max(...costs) > 8 * Math.min(...costs);
      const x = {field: "cost", type: "quantitative", title: `${title}${logarithmic ? " (logarithmic)" : ""}`,
                 scale: {...(logarithmic ? {type: "log"} : {zero: false}), nice: true, padding: 20}, axis: {format: "~s"}};
      const y = {field: "accuracy", type: "quantitative", title: "last accuracy (%)", scale: {zero: false, padding: 12}};
      return spec(440, 260, `Points of last accuracy against: ${title}.`, [
        {mark: {type: "rule", strokeWidth: 1}, encoding: {y: {field: "low", type: "quantitative"}, y2: {field: "high"}}},
        {transform: [{filter: "datum.best"}],
         mark: {type: "point", size: 260, filled: false, stroke: GREY, shape: "circle", strokeWidth: 1.2}},
        {mark: {type: "point", filled: true, size: 80, opacity: 1}, encoding: {
          shape: looks("method", names(stream), SHAPES), tooltip: [
            ...tips("method"), {field: "cost", title, type: "quantitative", format: ",.4~r"}, ...tips("accuracy", "deviation")]}},
      ], {encoding: {x, y, color: looks("method", names(stream), COLORS)}});
    },
    rows,
    table: (stream, shown) => [
      `Last accuracy and ${title}, mean and deviation over seeds`,
      ["method", "accuracy (%)", "deviation", title, "best for its cost"],
      rows(stream, shown).map(row => [
        row.method, row.accuracy, row.deviation, row.cost < 1000 ? row.cost : Math.round(row.cost), row.best ? "yes" : "no"])],
  };
}

// A line per method with its deviations; lines that meet are moved apart by a little.
function overTasks(field, title, domain, axis = {}) {
  const aside = (stream, method) => 0.06 * (stream.methods.indexOf(method) - (stream.methods.length - 1) / 2);
  const rows = (stream, shown) => chosen(stream, shown).flatMap(method => (
    method[field].flatMap((entry, task) => (known(entry) ? [
      {method: method.name, task, after: task + aside(stream, method), value: entry[0], deviation: entry[1],
       low: lowest(entry), high: highest(entry)}] : []))));
  return {
    spec: stream => spec(440, 260, `Lines of ${title} after each task, one per method.`, [
      {mark: {type: "rule", strokeWidth: 1, opacity: 0.6},
       encoding: {y: {field: "low", type: "quantitative"}, y2: {field: "high"}}},
      {mark: {type: "line", strokeWidth: 1.8}, encoding: {strokeDash: dashes("method", names(stream))}},
      {mark: {type: "point", filled: true, size: 42, opacity: 1}, encoding: {
        shape: looks("method", names(stream), SHAPES), tooltip: tips("method", "task", ["value", title], "deviation")}},
      ...(field === "adapters" && stream.truth ? [{
        data: {values: stream.truth.map((needed, after) => ({after, needed}))},
        mark: {type: "line", stroke: INK, strokeWidth: 0.8},
        encoding: {y: {field: "needed", type: "quantitative"}, color: null}}] : []),
    ], {encoding: {x: taskAxis(stream.tasks), y: numberAxis("value", title, domain(stream), {axis}),
                   color: looks("method", names(stream), COLORS)}, ...MARKERS_ALONE}),
    rows,
    table: (stream, shown) => [
      `${title} after each task, mean and deviation over seeds`,
      ["method", ...range(stream.tasks).map(t => `after ${t}`)],
      chosen(stream, shown).map(method => [method.name, ...method[field].map(entry => (known(entry) ? {
        text: plain(entry[0]) + (known(entry[1]) ? ` \u00b1 ${plain(entry[1])}` : ""), sort: entry[0]} : null))])],
  };
}
