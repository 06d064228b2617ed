// Asks the router for its state and shows it. Every name here may be anybody's text: it goes into textContent, and
// nowhere else.

import { Chart } from "./charts.js";
import { colour, name, seat, seated } from "./colours.js";
import { TreeView, count, tokens } from "./tree.js";

const EVERY_MS = 1000;
const TIMEOUT_MS = 10000;
const LONGEST_WAIT_MS = 10000;
const VERSION = 1;

const $ = (id) => document.getElementById(id);
const view = new TreeView($("tree"), { detail: $("detail"), zoomOut: $("zoom-out") });
const ttft = new Chart($("ttft"), $("ttft-key"), { unit: "ms", title: $("ttft-title").textContent });
const ratio = new Chart($("ratio"), $("ratio-key"), { unit: "%", title: $("ratio-title").textContent });
let state;

function element(kind, { text, ...attributes } = {}, ...children) {
  const made = document.createElement(kind);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Replaces what is in `parent` only if it differs, so that nothing flickers and no selection is lost.
function fill(parent, ...children) {
  const next = element("div", {}, ...children);
  const same = parent.childNodes.length === next.childNodes.length && [...parent.childNodes].every((child, at) => child.isEqualNode(next.childNodes[at]));
  if (!same) parent.replaceChildren(...next.childNodes);
}

function swatch(module) {
  const made = element("span", { class: "swatch", "aria-hidden": "true" });
  made.style.background = colour(module);
  return made;
}

const percent = (share) => (share === null ? "–" : `${(share * 100).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`);
const ms = (value) => (value === null ? "–" : value < 10 ? `${value.toFixed(1)} ms` : value < 10000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(1)} s`);

function showTiles() {
  const all = state.figures.all;
  $("hit").textContent = percent(all.hit_ratio);
  $("cross").textContent = percent(all.cross_model_ratio);
  $("calls").textContent = count(all.calls);
  $("calls-note").textContent = all.failed ? `in the last five minutes, ${count(all.failed)} failed` : "in the last five minutes";
  $("inflight").textContent = count(state.workers.reduce((sum, worker) => sum + worker.inflight_requests, 0));
  const waiting = Object.values(state.queue).reduce((sum, n) => sum + n, 0);
  $("queue").textContent = `legs on all workers; ${count(waiting)} request${waiting === 1 ? " waits" : "s wait"}`;
}

function title(worker) {
  return worker.model ?? `a ${worker.role} worker`;
}

function showChoice() {
  const chosen = $("worker").value;
  const options = state.workers.map((worker) => {
    const alike = state.workers.filter((other) => title(other) === title(worker)).length > 1;
    return element("option", { value: worker.url, text: `${title(worker)} (${worker.role}${alike ? `, ${worker.url}` : ""})` });
  });
  fill($("worker"), ...options);
  if (state.workers.some((worker) => worker.url === chosen)) $("worker").value = chosen;
}

function showTree() {
  const worker = state.workers.find((one) => one.url === $("worker").value);
  const note = $("tree-note");
  const tree = worker && worker.tree;
  const isEmpty = tree && !tree.nodes.length && !tree.other.tokens;
  note.classList.toggle("bad", Boolean(worker && !tree));
  note.hidden = Boolean(tree && !isEmpty && !tree.failure);
  if (!worker) note.textContent = "The router has no worker.";
  else if (!tree) note.textContent = `There is no picture of this worker's tree: ${worker.problem ?? "it has not said anything yet"}.`;
  else if (tree.failure) note.textContent = `The picture of this tree is not whole: ${tree.failure}.`;
  else if (isEmpty) note.textContent = "The tree is empty. The first request puts its prompt here.";
  if (tree && !isEmpty) view.show(tree, worker.url);
  else view.hide();
  const used = tree ? new Set(tree.nodes.flatMap((node) => [node.computed_for, ...node.read_by].map((index) => (index === null ? undefined : tree.modules[index])))) : new Set();
  const shown = [...seated().filter((module) => used.has(module)), ...(used.has(undefined) || used.has(null) ? [undefined] : [])];
  const entries = shown.map((module) => [swatch(module), module === undefined ? "nobody's, or not known" : module]);
  const marks = tree ? [["leased", "on loan to a decode worker"], ["locked", "held by a request"]].filter(([kind]) => tree.nodes.some((node) => node[kind])) : [];
  for (const [kind, text] of marks) entries.push([element("span", { class: `swatch ${kind}`, "aria-hidden": "true" }), text]);
  fill($("legend"), ...entries.map(([sign, text]) => element("li", {}, sign, element("span", { text }))));
}

function showModules() {
  const rows = Object.entries(state.figures.modules).map(([module, figures]) => {
    const cells = [
      ["Calls", count(figures.calls)],
      ["Found", percent(figures.hit_ratio)],
      ["Across models", percent(figures.cross_model_ratio)],
      ["First token, p50", ms(figures.ttft_ms_p50)],
      ["p95", ms(figures.ttft_ms_p95)],
      ["Answer, p50", ms(figures.e2e_ms_p50)],
      ["p95", ms(figures.e2e_ms_p95)],
    ];
    const head = element("th", { scope: "row", role: "rowheader" }, swatch(module), element("span", { text: module }));
    return element("tr", { role: "row" }, head, ...cells.map(([of, text]) => element("td", { role: "cell", "data-name": of }, element("span", { text }))));
  });
  fill($("modules").tBodies[0], ...rows);
  const { times, ttft_ms_p50: byModule, hit_ratio: hit, cross_model_ratio: cross } = state.figures.series;
  ttft.show(times, Object.entries(byModule).map(([module, values]) => ({ name: module, colour: colour(module), values })));
  const share = (values) => values.map((value) => (value === null ? null : value * 100));
  ratio.show(times, [
    { name: "found in the tree", colour: "#6b7280", values: share(hit) },
    { name: "computed for another module", colour: "#d55e00", values: share(cross) },
  ]);
}

function showWorkers() {
  const items = state.workers.map((worker) => {
    const top = element("div", { class: "top" }, element("strong", { text: title(worker) }), element("span", { class: "badge", "data-status": worker.status, text: worker.status }));
    const parts = [top, element("p", { class: "where", text: `${worker.role} · ${worker.url}` })];
    const tree = worker.tree;
    if (tree) {
      const held = Math.max(tree.pool_tokens - tree.free_tokens - tree.evictable_tokens, 0);
      const room = element("div", { class: "room", "aria-hidden": "true" });
      for (const [kind, n] of [["used", held], ["keep", tree.evictable_tokens]]) {
        const part = element("span", { class: kind });
        part.style.width = `${(n / Math.max(tree.pool_tokens, 1)) * 100}%`;
        room.append(part);
      }
      parts.push(room, element("p", { class: "say", text: `${count(held)} in use, ${count(tree.evictable_tokens)} kept and can go, ${count(tree.free_tokens)} free of ${tokens(tree.pool_tokens)}` }));
    }
    const legs = `${count(worker.inflight_requests)} in flight${worker.inflight_prefill_tokens ? `, ${tokens(worker.inflight_prefill_tokens)} to compute` : ""}`;
    const waits = state.queue[worker.model] ?? 0;
    const waiting = worker.role === "prefill" || !waits ? "" : `; ${count(waits)} more wait`;
    parts.push(element("p", { class: "say", text: legs + waiting }));
    if (worker.reason ?? worker.problem) parts.push(element("p", { class: "why", text: worker.reason ?? worker.problem }));
    return element("li", {}, ...parts);
  });
  fill($("workers"), ...items);
}

function show() {
  seat(state.router.models);
  for (const worker of state.workers) if (worker.tree) seat(worker.tree.modules);
  showTiles();
  showChoice();
  showTree();
  showModules();
  showWorkers();
  $("about").textContent = `Router ${state.router.version}, up since ${new Date(state.router.started_at * 1000).toLocaleString()}. Base ${state.router.base_fingerprint ?? "not known yet"}.`;
}

function say(what, text) {
  $("main").dataset.state = what;
  $("status").dataset.state = what;
  const words = $("status").querySelector(".say");
  if (words.textContent !== text) words.textContent = text;
}

async function ask() {
  const response = await fetch("ui/state", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
  if (!response.ok) throw new Error(`it answered ${response.status}`);
  const next = await response.json();
  if (next.version !== VERSION) {
    say("gone", "The router has another version than this page. Load the page again.");
    return false;
  }
  state = next;
  show();
  say("live", "Live");
  return true;
}

const pause = (length) => new Promise((resolve) => setTimeout(resolve, length));

function visible() {
  return document.hidden ? new Promise((resolve) => document.addEventListener("visibilitychange", resolve, { once: true })).then(visible) : undefined;
}

async function run() {
  let wait = EVERY_MS;
  for (;;) {
    await visible();
    try {
      if (!(await ask())) return;
      wait = EVERY_MS;
    } catch (error) {
      if (!(error instanceof TypeError || error instanceof DOMException || /^it answered/.test(error.message))) console.error(error);
      const since = state ? ` What is shown is of ${new Date(state.at * 1000).toLocaleTimeString()}.` : "";
      say("gone", `The router does not answer; asking again every ${Math.round(wait / 1000)} s.${since}`);
      wait = Math.min(wait * 2, LONGEST_WAIT_MS);
    }
    await pause(wait);
  }
}

$("worker").addEventListener("change", showTree);
run();
