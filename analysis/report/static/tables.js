// Tables: sorted by the buttons in their headings; those of a run and of the pictures are built here.

const LONG = 40;  // letters from which the text of a cell is broken into lines

// A cell is a text, a number, null, or {text, sort, href, code}; `code`: what is between backticks is code.
function cellOf(value) {
  if (value === null || value === undefined) return {text: "-", sort: -Infinity};
  if (typeof value === "number") return {text: plain(value), sort: value};
  return typeof value === "string" ? {text: value, sort: value.toLowerCase()} : value;
}

function plain(value) {
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(3);
}

// Cells come as text nodes, so that whatever is in a record stays text.
function makeTable(caption, header, rows) {
  const cells = rows.map(row => row.map(cellOf));
  const numeric = header.map((_, column) => cells.length > 0 && cells.every(row => typeof row[column].sort === "number"));
  const table = element("table", {class: "sortable"}, element("caption", {}, caption));
  const head = header.map((name, column) => element(
    "th", {scope: "col", class: numeric[column] ? "number" : null}, element("button", {type: "button"}, name)));
  const made = (cell, column) => element(
    column ? "td" : "th", {scope: column ? null : "row", "data-sort": cell.sort,
                           class: numeric[column] ? "number" : cell.text.length > LONG ? "long" : null},
    ...(cell.href ? [element("a", {href: cell.href}, cell.text)] : cell.code ? withCode(cell.text) : [cell.text]));
  table.append(element("thead", {}, element("tr", {}, ...head)),
               element("tbody", {}, ...cells.map(row => element("tr", {}, ...row.map(made)))));
  return element("div", {class: "scroll", tabindex: "0", role: "region", "aria-label": caption}, table);
}

function withCode(text) {
  return text.split("`").map((part, index) => (index % 2 ? element("code", {}, part) : part));
}

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// The first press sorts upwards, the next downwards. Rows that are equal stay in their order.
function sortBy(button) {
  const heading = button.closest("th"), table = button.closest("table"), body = table.tBodies[0];
  const column = [...heading.parentNode.children].indexOf(heading);
  const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of heading.parentNode.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const numeric = heading.classList.contains("number");
  const key = row => numeric ? Number(row.children[column].dataset.sort) : row.children[column].dataset.sort;
  const order = (a, b) => (a === b ? 0 : numeric ? a - b : a.localeCompare(b, "en", {numeric: true}));
  body.append(...[...body.rows].sort((a, b) => sign * order(key(a), key(b))));
}

document.addEventListener("click", event => {
  const button = event.target.closest("table.sortable thead button");
  if (button) sortBy(button);
});
