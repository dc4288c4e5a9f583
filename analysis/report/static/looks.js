// What all pictures share: scales, axes, marks, and how things are told apart.
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
           symbolStrokeWidth: 2, symbolOpacity: 1},
};

const PARAMS = [{name: "task", value: 0}];  // the chosen task

function spec(width, height, description, layer, more = {}) {
  return {width, height, description, layer, data: {name: "rows"}, params: PARAMS,
          autosize: {type: "pad"}, padding: 2, config: CONFIG, ...more};
}

const cell = (count, room = 420, most = 50) => Math.max(4, Math.min(most, Math.floor(room / count)));
const step = (count, room, most) => ({step: cell(count, room, most)});
const ordinal = (field, title, count, more = {}) => (
  {field, type: "ordinal", title, scale: {domain: range(count), paddingInner: 0, paddingOuter: 0},
   axis: {labelAngle: 0, ticks: false, domain: false, ...more}});
const numberAxis = (field, title, domain, more = {}) => (
  {field, type: "quantitative", title, scale: {domain, nice: false, zero: false}, ...more});
const taskAxis = count => numberAxis("after", "after task", [-0.4, Math.max(0.4, count - 0.6)],
                                     {axis: {tickMinStep: 1, format: "d", grid: false, values: ticks(count)}});
const percentAxis = {axis: {values: [0, 20, 40, 60, 80, 100]}};
const colorBar = (title, more = {}) => ({legend: {title, gradientLength: 180, ...more}});
const shades = ["#f7fbff", "#6baed6", "#08306b"];
const percentScale = {domain: [0, 100], range: shades};
const range = count => Array.from({length: count}, (_, index) => index);
const ticks = count => range(count).filter(index => index % Math.ceil(count / 12) === 0);
const percent = (part, whole) => (whole ? 100 * part / whole : null);
const mean = values => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
const known = value => value !== null && value !== undefined;

// A frame around the row, or a line at the task, that is chosen.
const chosenOnly = count => ({data: {values: range(count).map(after => ({after}))},
                              transform: [{filter: "datum.after === task"}]});
const chosenRow = count => ({
  ...chosenOnly(count), mark: {type: "rect", fill: null, stroke: INK, strokeWidth: 2.5},
  encoding: {x: {value: 0}, x2: {value: "width"}, y: {field: "after", type: "ordinal"}}});
const chosenLine = count => ({
  ...chosenOnly(count), mark: {type: "rule", stroke: INK, strokeWidth: 1, strokeDash: [3, 2]},
  encoding: {x: {field: "after", type: "quantitative"}, y: null, color: null}});
const written = (field, count, format, dark) => (count > CELLS_WRITTEN ? [] : [{
  mark: {type: "text", fontSize: 11}, encoding: {
    text: {field, type: "quantitative", format},
    color: {condition: {test: dark, value: "white"}, value: INK}}}]);

// Fields whose figures have one decimal there.
const NUMBERS = new Set(["value", "told", "share", "best", "now", "lost", "right", "accuracy", "deviation"]);

// What is told where the mouse is: fields, or pairs of a field and its title.
function tips(...fields) {
  const titles = {told: "with the task told", of: "of task", value: "accuracy (%)", share: "share (%)"};
  return fields.map(entry => {
    const [field, title] = Array.isArray(entry) ? entry : [entry, titles[entry] ?? entry];
    return NUMBERS.has(field) ? {field, title, type: "quantitative", format: ".1f"} : {field, title};
  });
}

// The legend shows marker and colour; with the dashes in it too its symbols would have dashed edges.
const dashes = (field, names) => ({...looks(field, names, DASHES), legend: null});
const MARKERS_ALONE = {resolve: {legend: {strokeDash: "independent"}}};

function looks(field, names, values) {
  const columns = Math.max(1, Math.floor(88 / (6 + Math.max(...names.map(name => name.length)))));
  return {field, type: "nominal", title: null, legend: {columns},
          scale: {domain: names, range: names.map((_, index) => values[index % values.length])}};
}
