// The tree as bars that hang below one another. `layout` is arithmetic alone; `TreeView` draws what it says, and lets a
// keyboard walk through it: one bar is in the order of tabs, arrows go to its parent, children and siblings.

import { colour, ink, line, name } from "./colours.js";

const SVG = "http://www.w3.org/2000/svg";
const ROW = 34;
const BAR = 26;
const STRIP = 6;
const MIN_TEXT = 34;
const CHAR = 6.6;

export const count = (n) => n.toLocaleString("en-US");
export const tokens = (n) => `${count(n)} token${n === 1 ? "" : "s"}`;

// From a worker's description: nodes with their children, weights (tokens in them and below) and depths.
export function grow(tree) {
  const nodes = new Map(tree.nodes.map((node) => [node.id, { ...node, children: [], weight: node.tokens, depth: 0 }]));
  const roots = [];
  for (const node of nodes.values()) {
    const parent = nodes.get(node.parent);
    if (parent && parent !== node) parent.children.push(node);
    else roots.push(node);
  }
  const ordered = [];
  const open = [...roots];
  while (open.length) {
    const node = open.pop();
    ordered.push(node);
    for (const child of node.children) {
      child.depth = node.depth + 1;
      open.push(child);
    }
  }
  for (const node of ordered.reverse()) {
    const parent = nodes.get(node.parent);
    if (parent && parent !== node) parent.weight += node.weight;
    node.children.sort((a, b) => b.weight - a.weight || a.id - b.id);
  }
  roots.sort((a, b) => b.weight - a.weight || a.id - b.id);
  return { nodes, roots };
}

// Where each bar is, for `width` pixels: the whole forest, or `zoomed` with its ancestors above it at full width.
export function layout({ nodes, roots }, rest, width, zoomed) {
  const places = [];
  const top = zoomed === null ? undefined : nodes.get(zoomed);
  const place = (node, x, perToken) => {
    const open = [[node, x]];
    while (open.length) {
      const [one, left] = open.pop();
      places.push({ node: one, x: left, y: one.depth * ROW, width: Math.max(one.weight * perToken, 1) });
      let next = left;
      for (const child of one.children) {
        open.push([child, next]);
        next += child.weight * perToken;
      }
    }
    return x + node.weight * perToken;
  };
  if (top) {
    for (let above = nodes.get(top.parent); above; above = nodes.get(above.parent)) {
      places.push({ node: above, x: 0, y: above.depth * ROW, width, above: true });
    }
    place(top, 0, width / Math.max(top.weight, 1));
    return { places, restX: width };
  }
  const all = roots.reduce((sum, root) => sum + root.weight, rest);
  let x = 0;
  for (const root of roots) x = place(root, x, width / Math.max(all, 1));
  return { places, restX: x };
}

export function describe(node, modules) {
  const owner = node.computed_for === null ? "computed before anybody looked" : `first computed for ${name(modules[node.computed_for])}`;
  const readers = node.read_by.map((index) => name(modules[index]));
  const parts = [tokens(node.tokens), owner, readers.length ? `read since by ${readers.join(", ")}` : "read by nobody since"];
  if (node.children.length) parts.push(`${tokens(node.weight - node.tokens)} below it`);
  if (node.leased) parts.push("on loan to a decode worker");
  else if (node.locked) parts.push("held by a request");
  parts.push(`last used ${ago(node.idle_s)}`);
  return parts.join("; ");
}

function ago(seconds) {
  if (seconds < 2) return "just now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min ago` : `${Math.round(seconds / 3600)} h ago`;
}

function make(kind, parent, attributes = {}) {
  const element = document.createElementNS(SVG, kind);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  parent.append(element);
  return element;
}

export class TreeView {
  constructor(box, { detail, zoomOut }) {
    this.box = box;
    this.detail = detail;
    this.zoomOut = zoomOut;
    this.drawn = new Map();
    this.at = null; // the node that a keyboard is at
    this.zoomed = null;
    this.svg = make("svg", box, { role: "tree", "aria-label": "The shared tree" });
    const defs = make("defs", this.svg);
    const hatch = make("pattern", defs, { id: "hatch", width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
    make("line", hatch, { class: "hatch", x1: 0, y1: 0, x2: 0, y2: 7, "stroke-width": 2 });
    this.restGroup = make("g", this.svg, { role: "none" });
    this.svg.addEventListener("keydown", (event) => this.key(event));
    // Not on the drawing itself, which Chromium would take for something that wants the focus.
    box.addEventListener("focusin", (event) => this.focused(event.target.closest(".node")));
    this.svg.addEventListener("pointerover", (event) => this.hovered(event.target.closest(".node")));
    this.svg.addEventListener("pointerleave", () => this.tell(this.at));
    this.svg.addEventListener("click", (event) => {
      const group = event.target.closest(".node");
      if (!group) return;
      group.focus();
      this.zoom(Number(group.dataset.id));
    });
    zoomOut.addEventListener("click", () => this.zoom(null));
    new ResizeObserver(() => this.draw()).observe(box);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // `whose` names the tree: another one begins without zoom and place.
  show(tree, whose) {
    if (whose !== this.whose) {
      this.whose = whose;
      this.at = this.zoomed = null;
      this.isNew = true;
    }
    this.tree = tree;
    this.grown = grow(tree);
    if (this.zoomed !== null && !this.grown.nodes.has(this.zoomed)) this.zoomed = null;
    this.draw();
    this.isNew = false;
  }

  hide() {
    this.tree = undefined;
    this.whose = undefined;
    this.box.hidden = true;
    this.zoomOut.hidden = true;
    this.detail.textContent = "";
  }

  draw() {
    if (!this.tree) return;
    this.box.hidden = false;
    const width = Math.max(Math.floor(this.box.clientWidth), 60);
    const rest = this.tree.other.tokens + this.tree.unseen_tokens;
    const { places, restX } = layout(this.grown, rest, width, this.zoomed);
    const height = Math.max(...places.map((place) => place.y), 0) + ROW;
    this.svg.setAttribute("width", width);
    this.svg.setAttribute("height", height);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const had = document.activeElement && this.svg.contains(document.activeElement);
    const visible = new Set(places.map(({ node }) => node.id));
    if (this.at === null || !visible.has(this.at)) this.at = this.instead(visible, places);
    for (const [id, group] of this.drawn) {
      if (!visible.has(id)) {
        group.remove();
        this.drawn.delete(id);
      }
    }
    for (const place of places) this.bar(place);
    this.places = visible;
    this.rest(restX, width, rest);
    this.zoomOut.hidden = this.zoomed === null;
    if (had && !this.svg.contains(document.activeElement) && this.at !== null) this.drawn.get(this.at).focus();
    this.tell(this.hover !== undefined && visible.has(this.hover) ? this.hover : this.at);
  }

  // Where a keyboard is when its node is gone: at the nearest ancestor that is left, or at the first one.
  instead(visible, places) {
    let node = this.gone && this.at !== null ? this.gone.get(this.at) : undefined;
    while (node && !visible.has(node.id)) node = this.gone.get(node.parent);
    return node ? node.id : this.zoomed !== null ? this.zoomed : places.length ? this.grown.roots[0].id : null;
  }

  bar({ node, x, y, width, above }) {
    let group = this.drawn.get(node.id);
    if (!group) {
      group = make("g", this.svg, { class: "node", role: "treeitem" });
      group.dataset.id = node.id;
      make("rect", group, { class: "span", y: 1, height: BAR, rx: 3 });
      make("g", group, { class: "strip" });
      make("text", group, { x: 7, y: 18, "aria-hidden": "true" });
      make("rect", group, { class: "mark", x: 1.5, y: 2.5, rx: 2 });
      this.drawn.set(node.id, group);
      if (!this.isNew) group.classList.add("new");
    }
    const [span, strip, text, mark] = group.children;
    const modules = this.tree.modules;
    const fill = colour(node.computed_for === null ? undefined : modules[node.computed_for]);
    const inner = Math.max(width - 1.5, 0.8);
    group.setAttribute("transform", `translate(${(x + 0.5).toFixed(2)} ${y})`);
    group.classList.toggle("leased", node.leased);
    group.classList.toggle("locked", node.locked && !node.leased);
    group.setAttribute("tabindex", node.id === this.at ? 0 : -1);
    group.setAttribute("aria-level", node.depth + 1);
    const siblings = this.siblings(node);
    group.setAttribute("aria-setsize", siblings.length);
    group.setAttribute("aria-posinset", siblings.indexOf(node) + 1);
    group.setAttribute("aria-label", describe(node, modules));
    if (node.children.length) group.setAttribute("aria-expanded", "true");
    else group.removeAttribute("aria-expanded");
    span.setAttribute("width", inner.toFixed(2));
    span.setAttribute("fill", fill);
    span.setAttribute("stroke", line(fill));
    mark.setAttribute("width", Math.max(inner - 3, 0.5).toFixed(2));
    mark.setAttribute("height", BAR - 3);
    strip.replaceChildren();
    node.read_by.forEach((index, place, all) => {
      const part = inner / all.length;
      make("rect", strip, { class: "read", x: (place * part).toFixed(2), y: BAR + 2, width: Math.max(part - 0.5, 0.4).toFixed(2), height: STRIP - 1, fill: colour(modules[index]) });
    });
    text.textContent = label(node, modules, width, above);
    text.setAttribute("fill", ink(fill));
  }

  rest(x, width, rest) {
    this.restGroup.replaceChildren();
    if (!rest || this.zoomed !== null || width - x < 1) return;
    const { nodes, tokens: of } = this.tree.other;
    const what = nodes ? `${count(nodes)} smaller nodes and what nobody saw begin` : "not under the base's name, or not seen to begin";
    const box = make("rect", this.restGroup, { class: "rest", x: (x + 1).toFixed(2), y: 1, width: (width - x - 1).toFixed(2), height: BAR, rx: 3 });
    make("title", box).textContent = `${tokens(rest)}: ${what}`;
    const words = nodes ? `${count(nodes)} more · ${count(of)}` : count(rest);
    if (width - x > words.length * CHAR + 12) make("text", this.restGroup, { class: "rest-name", x: (x + 8).toFixed(2), y: 18 }).textContent = words;
  }

  siblings(node) {
    const parent = this.grown.nodes.get(node.parent);
    return parent ? parent.children : this.grown.roots;
  }

  tell(id) {
    const node = id === null || id === undefined || !this.grown ? undefined : this.grown.nodes.get(id);
    this.detail.textContent = node ? `${describe(node, this.tree.modules)}.` : "";
    this.gone = this.grown ? this.grown.nodes : undefined;
  }

  hovered(group) {
    this.hover = group ? Number(group.dataset.id) : undefined;
    this.tell(group ? this.hover : this.at);
  }

  focused(group) {
    if (group) this.go(Number(group.dataset.id), false);
  }

  go(id, focus = true) {
    const before = this.drawn.get(this.at);
    if (before) before.setAttribute("tabindex", -1);
    this.at = id;
    const group = this.drawn.get(id);
    group.setAttribute("tabindex", 0);
    if (focus) {
      group.focus();
      group.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
    this.hover = undefined;
    this.tell(id);
  }

  zoom(id) {
    this.zoomed = id !== null && this.zoomed === id ? null : id;
    const wasOnButton = document.activeElement === this.zoomOut;
    this.draw();
    if (this.at !== null) this.go(this.at, wasOnButton || this.svg.contains(document.activeElement));
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey || this.at === null) return;
    const node = this.grown.nodes.get(this.at);
    const siblings = this.siblings(node);
    const place = siblings.indexOf(node);
    const parent = this.grown.nodes.get(node.parent);
    const steps = {
      ArrowDown: () => node.children[0],
      ArrowUp: () => parent,
      ArrowLeft: () => siblings[place - 1],
      ArrowRight: () => siblings[place + 1],
      Home: () => this.grown.roots[0],
      End: () => this.grown.roots[this.grown.roots.length - 1],
    };
    if (event.key === "Enter" || event.key === " ") this.zoom(this.at);
    else if (event.key === "Escape") this.zoom(null);
    else if (Object.hasOwn(steps, event.key)) {
      const next = steps[event.key]();
      if (next) {
        if (!this.places.has(next.id)) {
          this.zoomed = null;
          this.draw();
        }
        this.go(next.id);
      }
    } else return;
    event.preventDefault();
  }
}

function label(node, modules, width, above) {
  if (width < MIN_TEXT) return "";
  const room = Math.floor((width - 12) / CHAR);
  const owner = `${above ? "↑ " : ""}${node.computed_for === null ? "?" : name(modules[node.computed_for])}`;
  for (const text of [`${owner} · ${count(node.tokens)}`, count(node.tokens)]) if (text.length <= room) return text;
  return "";
}
