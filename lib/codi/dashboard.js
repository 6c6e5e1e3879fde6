"use strict";

// Every text of a model or a problem becomes a text node, here and nowhere else.
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("data").textContent);
const rows = data.rows;
const thoughts = rows.map((row, i) => i).filter((i) => "neverix" in rows[i]);
const lastLayer = data.layers.length - 1;
const KIND = Object.fromEntries(data.categories.map((name, i) => [name, i]));
const MARKS = { operand: "operand", "other operand": "other", distractor: "distractor" };
const EVERY = `${rows[thoughts[0]].name} to ${rows[thoughts.at(-1)].name}`;
const STEPS = (n) => `${n} step${n === 1 ? "" : "s"}`;

const state = {
  problem: 0,
  row: null, // chosen: index of a state, null for the mean of all thoughts
  preview: undefined, // the same under the mouse
  token: null, // pointed at: {side, position}
  open: new Set(), // states whose lens is shown layer by layer
  sink: true, // whether the first token competes
  twin: false,
  answers: "all",
  steps: "all",
};

// -- numbers ------------------------------------------------------------------------------------------

// 231 thousandths are .23; a share is never written as 0 when it is not.
function share(thousandths, digits = 2) {
  const text = (thousandths / 1000).toFixed(digits).replace(/^0/, "");
  return thousandths > 0 && /^\.0+$/.test(text) ? `<.${"0".repeat(digits - 1)}1` : text;
}

// A text in a sentence: a character that turns the direction of writing ends with it.
function quote(text) {
  return make("bdi", {}, text);
}

function shown(text) {
  return text.trim() || text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/ /g, "␣") || "∅";
}

// Attention of a state of a problem on every token that it sees, in thousandths; null is the mean of thoughts.
function attentionOf(problem, row) {
  let masses;
  if (row === null) {
    masses = new Array(problem.attention[thoughts.at(-1)].length).fill(0);
    for (const i of thoughts) problem.attention[i].forEach((mass, j) => (masses[j] += mass / thoughts.length));
  } else {
    masses = problem.attention[row].slice();
  }
  const sink = masses[0];
  if (!state.sink) masses = masses.map((mass, j) => (j === 0 || sink >= 1000 ? 0 : (mass * 1000) / (1000 - sink)));
  return { masses, sink };
}

function topTokens(problem, row, masses) {
  const k = problem.top[0].length - 1;
  const order =
    row === null ? masses.map((_, i) => i).sort((a, b) => masses[b] - masses[a] || a - b) : problem.top[row];
  return order.filter((position) => state.sink || position !== 0).slice(0, k);
}

// Category of a token seen from a state; from all thoughts, of any step.
function kindOf(problem, row, position) {
  if (row !== null) {
    const digit = problem.kinds[row][position];
    return digit === undefined ? null : data.categories[parseInt(digit, 36)];
  }
  const kinds = thoughts.map((i) => kindOf(problem, i, position)).filter((kind) => kind !== null);
  return kinds.find((kind) => kind === "operand" || kind === "other operand") ? "operand" : kinds.at(-1) ?? null;
}

function lensOf(problem, layer, row) {
  const flat = problem.lens[layer][row];
  return Array.from({ length: flat.length / 2 }, (_, i) => [data.words[flat[2 * i]], flat[2 * i + 1]]);
}

// What a decoded word is in the solution: "answer", "step 1", or nothing. Steps are shown from 1.
function meaning(problem, word) {
  const step = problem.results.indexOf(word.trim());
  return step < 0 ? "" : step === problem.results.length - 1 ? "answer" : `step ${step + 1}`;
}

// -- one problem --------------------------------------------------------------------------------------

// Draws a problem and returns what changes when another state is chosen.
function panel(problem, other, side) {
  const parts = { problem, side, tokens: [], rows: [], leaves: [] };
  const title = make("h2", { id: `title${side}` }, side ? "Twin " : "Problem ", quote(problem.id));
  const verdict = problem.correct ? "✓ correct" : "✗ incorrect";
  const head = make(
    "div",
    { class: "head" },
    title,
    make("span", { class: `verdict ${problem.correct ? "correct" : ""}` }, verdict),
    make("span", {}, "wrote “", quote(problem.wrote), `”, the answer is ${problem.answer}`),
    make("span", { class: "muted" }, STEPS(problem.results.length)),
  );
  const strip = make("div", { class: "strip", role: "group", "aria-label": "Tokens, with attention" });
  const own = problem.attention[thoughts[0]].length - 1; // <bot>
  problem.tokens.forEach((text, position) => {
    const mass = make("small", {});
    const token = make(
      "span",
      {
        tabindex: position ? -1 : 0,
        role: "img",
        onmousemove: () => point({ side, position }),
        onmouseleave: () => point(null),
        onfocus: () => point({ side, position }),
        onblur: () => point(null),
      },
      make("bdi", { class: "word" }, shown(text)),
      mass,
    );
    const differs = other !== null && position < own && text !== other.tokens[position];
    token.dataset.base = `token${position >= own ? " behind" : ""}${differs ? " differs" : ""}`;
    if (position === own) strip.append(make("span", { class: "break" }));
    strip.append(token);
    parts.tokens.push({ token, mass });
  });
  parts.strip = strip;
  parts.readout = make("p", { class: "readout" });
  const body = make("tbody", { role: "rowgroup" });
  body.append(thoughtRow(parts, null), ...rows.map((_, i) => thoughtRow(parts, i)));
  const heads = ["state", "decodes to (probability)", "attends to (mass)"];
  const table = make(
    "table",
    { class: "thoughts", role: "table", "aria-label": "States in order" },
    make(
      "thead",
      { role: "rowgroup" },
      make("tr", { role: "row" }, ...heads.map((text) => make("th", { role: "columnheader" }, text))),
    ),
    body,
  );
  const trees = make("ul", { class: "tree" }, ...problem.tree.map((tree) => treeItem(parts, tree)));
  const aside = make(
    "aside",
    { "aria-label": "Expression tree" },
    make("h3", {}, "Expression tree"),
    problem.tree.length ? trees : make("p", { class: "muted" }, "There is no reference solution."),
  );
  parts.element = make(
    "section",
    { class: "panel", "aria-labelledby": `title${side}` },
    head,
    make("div", { class: "top" }, strip, parts.readout),
    make("div", { class: "inner" }, aside, table),
  );
  parts.lines = [head, aside, ...parts.rows.map(({ line }) => line)];
  return parts;
}

function thoughtRow(parts, row) {
  const { problem } = parts;
  const name = row === null ? "mean" : rows[row].name;
  const button = make(
    "button",
    { type: "button", class: "name", onfocus: () => choose(row), onclick: () => choose(row) },
    name,
  );
  const received = make("span", { class: "received" });
  const head = make("th", { role: "rowheader", scope: "row" }, button);
  const line = make(
    "tr",
    {
      role: "row",
      onmousemove: () => preview(row), // not mouseenter, which comes as well when the page moves under the mouse
      onmouseleave: () => preview(undefined),
    },
    head,
    row === null
      ? make("td", { role: "cell", class: "muted" }, `attention of ${EVERY}, averaged`)
      : make("td", { role: "cell", "data-head": "decodes to (probability)" }, words(problem, lastLayer, row)),
    make("td", { role: "cell", "data-head": "attends to (mass)" }, attendedChips(problem, row)),
  );
  const own = { row, line, button, received };
  if (row !== null && data.layers.length > 1) {
    own.more = make("button", { type: "button", class: "more", onclick: () => openLayers(row) }, "layers");
    own.more.append(make("span", { class: "hidden" }, ` of ${name}`));
    own.lens = make("td", { role: "cell", class: "lens scroll" });
    head.append(own.more);
    line.append(own.lens);
  }
  head.append(received);
  parts.rows.push(own);
  paintLens(problem, own);
  return line;
}

function words(problem, layer, row) {
  const chips = lensOf(problem, layer, row).map(([word, probability]) => {
    const what = meaning(problem, word);
    return chip(word, share(probability), what, probability, what !== "");
  });
  return make("ul", { class: "chips" }, ...chips);
}

function chip(text, number, tag, thousandths, hit = false) {
  return make(
    "li",
    { class: hit ? "chip hit" : "chip", "--p": thousandths / 1000 },
    make("bdi", { class: "word" }, shown(text)),
    make("small", {}, tag ? `${number} ${tag}` : number),
  );
}

// Drawn when it is opened: most never are.
function paintLens(problem, { row, more, lens }) {
  if (!more) return;
  const open = state.open.has(row);
  more.setAttribute("aria-expanded", String(open));
  lens.hidden = !open;
  lens.replaceChildren(...(open ? [lensTable(problem, row)] : []));
}

function openLayers(row) {
  if (!state.open.delete(row)) state.open.add(row);
  for (const { problem, rows } of panels) for (const line of rows) if (line.row === row) paintLens(problem, line);
  align();
}

// Twins side by side have every state in line.
function align() {
  const [left, right] = panels;
  if (!right) return;
  for (const line of [...left.lines, ...right.lines]) line.style.minHeight = "";
  if (left.element.offsetTop !== right.element.offsetTop) return;
  left.lines.forEach((line, i) => {
    const height = Math.max(line.offsetHeight, right.lines[i].offsetHeight);
    line.style.minHeight = right.lines[i].style.minHeight = `${height}px`;
  });
}

function lensTable(problem, row) {
  const lines = data.layers.map((layer, i) =>
    make("tr", {}, make("th", { scope: "row" }, `layer ${layer}`), make("td", {}, words(problem, i, row))),
  );
  return make("table", {}, make("tbody", {}, ...lines));
}

function treeItem(parts, node) {
  const { problem } = parts;
  if ("at" in node) {
    const mass = make("small", {});
    const pill = make("span", { class: "pill" }, node.value, mass);
    parts.leaves.push({ node, pill, mass });
    const note = node.at.length ? "in the question" : "not in the question";
    return make("li", {}, pill, make("span", { class: "hidden" }, note));
  }
  const pill = make("span", { class: "pill" }, node.value);
  if (!("of" in node)) return make("li", {}, pill, make("span", { class: "note" }, `of step ${node.step + 1}, again`));
  const decoded = thoughts.filter((row) => lensOf(problem, lastLayer, row)[0][0].trim() === node.value);
  const names = decoded.map((row) => rows[row].name).join(", ");
  const by = names ? `top word of ${names}` : "no thought's top word";
  return make(
    "li",
    {},
    pill,
    " = ",
    quote(node.text),
    make("span", { class: "note" }, `step ${node.step + 1}: ${by}`),
    make("ul", {}, ...node.of.map((child) => treeItem(parts, child))),
  );
}

// -- what is chosen -----------------------------------------------------------------------------------

let panels = [];

function paint() {
  const row = state.preview === undefined ? state.row : state.preview;
  const readings = panels.map(({ problem }) => attentionOf(problem, row));
  const full = Math.max(1, ...readings.flatMap(({ masses }) => masses)); // one scale for both
  panels.forEach((parts, i) => paintPanel(parts, row, readings[i], full));
}

function paintPanel(parts, row, { masses, sink }, full) {
  const { problem } = parts;
  const top = topTokens(problem, row, masses);
  parts.tokens.forEach(({ token, mass }, position) => {
    const kind = kindOf(problem, row, position);
    const out = position === 0 && !state.sink;
    const seen = position < masses.length && !out;
    const mark = MARKS[kind] ?? "";
    token.className = `${token.dataset.base} ${mark} ${out ? "out" : seen ? "" : "unseen"}`;
    token.style.setProperty("--m", seen ? masses[position] / full : 0);
    mass.textContent = seen && top.includes(position) ? share(masses[position]) : out ? "sink" : "";
    const says = out ? "left out" : seen ? `mass ${share(masses[position], 3)}` : "comes later";
    const label = `${kind ?? "later"}, ${says}: ${shown(problem.tokens[position])}`;
    token.setAttribute("aria-label", label);
    token.title = label;
  });
  const received = receivedBy(parts, row);
  for (const line of parts.rows) {
    line.line.classList.toggle("active", line.row === row);
    line.button.setAttribute("aria-pressed", String(line.row === state.row));
    line.received.textContent = received(line.row);
  }
  for (const { node, pill, mass } of parts.leaves) {
    const total = node.at.reduce((sum, position) => sum + (masses[position] ?? 0), 0);
    pill.style.setProperty("--m", Math.min(1, total / full));
    mass.textContent = node.at.length ? share(total) : "not in the question";
  }
  const name = row === null ? `The mean of ${EVERY}` : rows[row].name;
  const sinkText = state.sink
    ? `${share(sink, 3)} of it on the first token (sink)`
    : `the first token (sink), ${share(sink, 3)}, left out and the rest scaled to 1`;
  const says = [`${name}: full colour is ${share(full, 3)}; ${sinkText}.`];
  parts.readout.replaceChildren(...(pointedAt(parts) ?? says));
}

function attendedChips(problem, row) {
  const { masses } = attentionOf(problem, row);
  const chips = topTokens(problem, row, masses).map((position) => {
    const text = problem.tokens[position];
    const kind = kindOf(problem, row, position);
    const tag = ["text", text, row === null ? "self" : ""].includes(kind) ? "" : kind;
    return chip(text, share(masses[position]), tag, masses[position]);
  });
  return make("ul", { class: "chips" }, ...chips);
}

// Beside each state: how much of the chosen state's attention its token gets, or what it gives the token
// that is pointed at.
function receivedBy(parts, row) {
  const { problem } = parts;
  if (state.token && state.token.side === parts.side) {
    const { position } = state.token;
    return (i) => {
      const mass = attentionOf(problem, i).masses[position];
      return mass === undefined ? "" : `→ ${share(mass, 3)}`;
    };
  }
  if (row === null) return () => "";
  const { masses } = attentionOf(problem, row);
  return (i) => {
    if (i === null || i > row) return "";
    return `${i === row ? "itself" : "attended"} ${share(masses[problem.attention[i].length - 1], 3)}`;
  };
}

function pointedAt(parts) {
  if (!state.token || state.token.side !== parts.side) return null;
  const { position } = state.token;
  const { problem } = parts;
  const masses = rows.map((row, i) => [row.name, attentionOf(problem, i).masses[position]]);
  const given = masses.filter(([, mass]) => mass !== undefined).map(([name, mass]) => `${name} ${share(mass, 3)}`);
  return ["“", quote(shown(problem.tokens[position])), `” (token ${position}) gets ${given.join(", ")}.`];
}

function choose(row) {
  state.row = row;
  state.preview = undefined; // whichever moved last, mouse or focus
  state.token = null;
  paint();
}

function preview(row) {
  if (state.preview === row) return;
  state.preview = row;
  paint();
}

function point(token) {
  const { side, position } = state.token ?? {};
  if (side === token?.side && position === token?.position) return;
  state.token = token;
  paint();
}

// -- which problem ------------------------------------------------------------------------------------

function matching() {
  const all = data.alone ? [0] : data.problems.map((_, i) => i);
  return all.filter((i) => {
    const { correct, results } = data.problems[i];
    return (
      (state.answers === "all" || (state.answers === "correct") === correct) &&
      (state.steps === "all" || String(results.length) === state.steps)
    );
  });
}

const controls = {};

function drawControls() {
  controls.problem = make("select", { onchange: () => show(Number(controls.problem.value)) });
  const kinds = new Set(data.problems.map(({ correct }) => (correct ? "correct" : "incorrect")));
  controls.answers = select(["all", ...[...kinds].sort()], (value) => (state.answers = value));
  const numbers = [...new Set(data.problems.map(({ results }) => results.length))].sort((a, b) => a - b);
  controls.steps = select(["all", ...numbers.map(String)], (value) => (state.steps = value));
  controls.twin = make("input", { type: "checkbox", onchange: toggle });
  controls.sink = make("input", { type: "checkbox", onchange: toggle });
  controls.twinText = make("span", {}, "compare with twin");
  const walkers = [
    make("button", { type: "button", onclick: () => walk(-1) }, "← previous"),
    make("button", { type: "button", onclick: () => walk(1) }, "next →"),
  ];
  const choice = [
    make("label", { class: "wide" }, "problem", controls.problem),
    make("span", { class: "walk" }, ...walkers),
    kinds.size > 1 ? make("label", {}, "answers", controls.answers) : null, // nothing to choose
    make("label", {}, "steps", controls.steps),
  ];
  byId("controls").append(
    ...(data.alone ? [] : choice.filter((part) => part !== null)),
    make("label", {}, controls.twin, controls.twinText),
    make("label", {}, controls.sink, "leave out the first token (sink)"),
    make("button", { type: "button", id: "scheme", onclick: switchScheme }),
  );
}

function select(values, set) {
  const options = values.map((value) => make("option", { value }, value));
  const changed = (event) => {
    set(event.target.value);
    filter();
  };
  return make("select", { onchange: changed }, ...options);
}

function toggle() {
  state.twin = controls.twin.checked;
  state.sink = !controls.sink.checked;
  show(state.problem);
}

function filter() {
  const found = matching();
  controls.problem.replaceChildren(
    ...found.map((i) => make("option", { value: i }, data.problems[i].label)),
  );
  controls.problem.disabled = !found.length;
  show(found.includes(state.problem) ? state.problem : found[0]);
}

function walk(by) {
  const found = matching();
  if (found.length) show(found[(found.indexOf(state.problem) + by + found.length) % found.length]);
}

function show(index) {
  const place = matching();
  if (index === undefined) {
    panels = [];
    byId("panels").replaceChildren(make("p", {}, "No problem has this number of steps and this kind of answer."));
    byId("status").textContent = "No problem";
    return;
  }
  const focused = panels.flatMap((parts) => parts.rows).find(({ button }) => button === document.activeElement);
  const side = focused ? panels.findIndex((parts) => parts.rows.includes(focused)) : 0;
  const problem = data.problems[index];
  const hasTwin = problem.twin !== null;
  const twin = state.twin && hasTwin ? data.problems[problem.twin] : null;
  state.problem = index;
  state.preview = undefined;
  state.token = null;
  controls.problem.value = String(index);
  controls.twin.disabled = !hasTwin;
  controls.twinText.textContent = hasTwin ? "compare with twin" : "compare with twin (it has none here)";
  panels = [panel(problem, twin, 0), ...(twin ? [panel(twin, problem, 1)] : [])];
  byId("panels").className = twin ? "two" : "";
  byId("panels").replaceChildren(...panels.map(({ element }) => element));
  paint();
  align();
  const found = `Problem ${place.indexOf(index) + 1} of ${place.length}: ${problem.id}`;
  const verdict = problem.correct ? "correct" : "incorrect";
  byId("status").textContent = `${found}, ${verdict}, ${STEPS(problem.results.length)}`;
  if (focused) (panels[side] ?? panels[0]).rows.find(({ row }) => row === focused.row).button.focus();
}

// -- keyboard, colours, legend ------------------------------------------------------------------------

const ARROWS = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 };

document.addEventListener("keydown", (event) => {
  const by = ARROWS[event.key];
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select")) return;
  const sideways = event.key === "ArrowLeft" || event.key === "ArrowRight";
  const parts = panels.find(({ element }) => element.contains(event.target));
  const inStrip = parts && parts.strip.contains(event.target);
  const buttons = parts ? parts.rows.map(({ button }) => button) : [];
  if (by && inStrip && sideways) {
    const tokens = parts.tokens.map(({ token }) => token);
    const next = tokens[tokens.indexOf(event.target) + by];
    if (next) {
      event.target.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    }
  } else if (by && sideways) {
    walk(by);
  } else if (by && buttons.includes(event.target)) {
    buttons[buttons.indexOf(event.target) + by]?.focus();
  } else if (event.key === "Escape" && parts) {
    buttons[0].focus();
  } else {
    return;
  }
  event.preventDefault();
});

const systemIsDark = matchMedia("(prefers-color-scheme: dark)");

function isDark() {
  return (document.documentElement.dataset.scheme ?? (systemIsDark.matches ? "dark" : "light")) === "dark";
}

function switchScheme() {
  document.documentElement.dataset.scheme = isDark() ? "light" : "dark";
  nameScheme();
}

function nameScheme() {
  byId("scheme").textContent = isDark() ? "light colours" : "dark colours";
}

function drawLegend() {
  const marks = [
    ["operand", "operand of the step that the state is taken to work on; for the mean, of any step"],
    ["other", "operand of another step"],
    ["distractor", "number that no step takes"],
  ];
  const keys = marks.map(([name, text]) => make("li", {}, make("span", { class: `mark ${name}` }, "12"), ` ${text}`));
  const lines = thoughts.map((i) => {
    const at = i ? `thought ${i}` : "<bot>";
    const cells = [rows[i].name, at, rows[i].neverix, rows[i].goyal];
    return make("tr", {}, ...cells.map((text) => make("td", {}, text)));
  });
  const heads = ["here", "final state at", "neverix (2026)", "Goyal et al. (2025)"];
  const counting = make(
    "table",
    { class: "counting" },
    make("thead", {}, make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, ...lines),
  );
  byId("legend").append(
    make(
      "p",
      {},
      "Attention is the mean over all layers and heads; tint and bar are shares of the largest mass shown. ",
      "Point at a state, or move to it, to see what it attends to; point at a token to see which states ",
      "attend to it.",
    ),
    make("ul", { class: "keys" }, ...keys),
    make(
      "p",
      {},
      "Keys: ← → problems, Tab into the states and ↑ ↓ along them, Tab into the tokens and ← → along them, ",
      "Enter on “layers” opens them, Escape goes back to the mean.",
    ),
    make(
      "details",
      { open: true },
      make("summary", {}, "How the states are counted"),
      make("div", { class: "scroll" }, counting),
    ),
  );
}

const answered = data.problems.filter(({ correct }) => correct).length;
byId("about").textContent = data.alone
  ? data.model
  : `${data.model}: ${data.problems.length} problems, ${answered} answered correctly`;
drawControls();
drawLegend();
nameScheme();
systemIsDark.addEventListener("change", nameScheme);
addEventListener("resize", align);
filter();
