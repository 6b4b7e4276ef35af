// What is said of the chosen query: its exact row, lines between tokens, one score taken apart, patches of an image.

import { query } from "./data.js";

const LINES = 32; // queries and keys between which lines are drawn
const TOLD = 20; // keys that the row's table names
const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes and children. */
export function make(name, attributes = {}, ...children) {
  const svg = ["svg", "line", "text", "g", "title", "rect"].includes(name);
  const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value);
  }
  element.append(...children.filter(c => c !== undefined));
  return element;
}

export const number = value =>
  value === 0 ? "0" : Math.abs(value) < 1e-3 ? value.toExponential(2) : Number(value.toPrecision(4)).toString();

const shown = token => (token.trim() ? token : JSON.stringify(token).slice(1, -1).replace(/ /g, "␣"));

function cells(row, name = "td") {
  return make("tr", {}, ...row.map(cell => make(name, name === "th" ? { scope: "col" } : {}, cell)));
}

function table(caption, head, rows) {
  return make("table", {}, make("caption", {}, caption), make("thead", {}, cells(head, "th")), make("tbody", {}, ...rows));
}

function bar(value, most, palette) {
  const box = make("span", { class: "bar", "aria-hidden": "true" });
  box.style.width = `${Math.round(Math.min(1, Math.abs(value) / (most || 1)) * 100)}%`;
  box.style.backgroundColor = palette.css(value < 0 ? -0.1 : 0.1);
  return box;
}

export class Panels {
  constructor(app, element) {
    Object.assign(this, { app, element, asked: 0 });
  }

  sideOfRows() {
    const { side } = this.app.state;
    return side === "both" || side === "difference" ? [0, 1] : [Number(side)];
  }

  /** Show the chosen panel; an answer that comes after another choice is dropped. */
  async show() {
    const mine = ++this.asked, { state } = this.app;
    try {
      const content = await this[state.panel]();
      if (mine === this.asked) this.element.replaceChildren(...content);
    } catch (error) {
      if (mine === this.asked) this.element.replaceChildren(make("p", { role: "alert" }, error.message));
    }
  }

  rowKey(side) {
    const { layer, head, row } = this.app.state;
    return query("row", { side, layer, head, row });
  }

  scoreKey(side) {
    const { layer, head, row, key } = this.app.state;
    return query("score", { side, layer, head, row, key });
  }

  tokens() {
    const { layer, sequences } = this.app;
    return { queries: sequences[layer.queries].tokens, keys: sequences[layer.keys].tokens };
  }

  /** The exact weights of the query: the greatest in a table, and the keys in sight as coloured text. */
  async row() {
    const { app } = this, { state, layer, palette } = app, { queries, keys } = this.tokens();
    const sides = this.sideOfRows();
    const rows = await Promise.all(sides.map(side => app.source.load(this.rowKey(side))));
    const last = rows.at(-1).values, size = i => Math.max(...rows.map(r => Math.abs(r.values[i])));
    const order = Array.from(last.keys()).sort((a, b) => size(b) - size(a)).slice(0, TOLD).filter(i => size(i) > 0);
    const most = order.length ? size(order[0]) : 1;
    const total = last.reduce((sum, value) => sum + value, 0);
    const head = ["key", "token", ...sides.map(side => (sides.length > 1 ? `weight ${app.sides[side]}` : "weight")), ""];
    const lines = order.map(i => {
      const line = cells([
        make("button", { class: "plain", onclick: () => app.choose({ key: i }), "aria-label": `go to key ${i}` }, String(i)),
        shown(keys[i]), ...rows.map(r => number(r.values[i])), bar(last[i], most, palette),
      ]);
      line.dataset.key = i;
      return line;
    });
    const middle = Math.min(Math.max(0, state.key - 100), Math.max(0, layer.m - 200));
    const text = make("p", { class: "text", "aria-hidden": "true" });
    for (let i = middle; i < Math.min(layer.m, middle + 200); i++) {
      const token = make("span", { title: `${i}: ${number(last[i])}`, onclick: () => app.choose({ key: i }) }, keys[i]);
      token.style.backgroundColor = palette.css(last[i]);
      const share = palette.color(last[i]);
      token.style.color = share[0] + share[1] + share[2] > 380 ? "#111" : "#fff";
      if (i === state.key) token.className = "chosen";
      text.append(token);
    }
    const chosen = rows.map((r, i) => `${sides.length > 1 ? `${app.sides[sides[i]]} ` : ""}${number(r.values[state.key])}`);
    return [
      make("p", { id: "exact", "data-value": last[state.key] },
        `Query ${state.row} “${shown(queries[state.row])}” gives key ${state.key} “${shown(keys[state.key])}” the weight `
        + `${chosen.join(", ")}. All its weights sum to ${number(total)}.`),
      table(`Greatest weights of query ${state.row}, exact`, head, lines),
      make("h3", {}, `Keys ${middle} to ${Math.min(layer.m, middle + 200) - 1}`), text,
    ];
  }

  /** Lines from the queries around the chosen one to the keys around the chosen one, as wide as their weights. */
  async lines() {
    const { app } = this, { state, layer, palette, tileShape: [high, wide] } = app, { queries, keys } = this.tokens();
    const around = (at, length) => Math.max(0, Math.min(at - LINES / 2, length - LINES));
    const q0 = around(state.row, layer.n), k0 = around(state.key, layer.m);
    const q1 = Math.min(layer.n, q0 + LINES), k1 = Math.min(layer.m, k0 + LINES);
    const side = this.sideOfRows().at(-1), { layer: index, head } = state;
    const tiles = new Map();
    const at = (q, k) => `${Math.floor(q / high)},${Math.floor(k / wide)}`;
    for (const q of [q0, q1 - 1]) for (const k of [k0, k1 - 1]) {
      const [row, column] = at(q, k).split(",");
      tiles.set(at(q, k), app.source.load(
        query("tile", { side, layer: index, head, stat: state.stat, block: 1, row, column })));
    }
    for (const [place, coming] of tiles) tiles.set(place, await coming);
    const weight = (q, k) => {
      const tile = tiles.get(at(q, k));
      return tile.values[(q % high) * tile.shape[1] + (k % wide)];
    };
    const step = 16, left = 150, right = 330;
    const picture = make("svg", {
      viewBox: `0 0 480 ${LINES * step + 28}`, role: "img", class: "lines",
      "aria-label": `Lines from queries ${q0} to ${q1 - 1} to keys ${k0} to ${k1 - 1}; the row's table says the same in words`,
    });
    const group = make("g");
    picture.append(make("text", { x: left - 6, y: 12, class: "end" }, `${layer.queries} →`),
      make("text", { x: right + 6, y: 12 }, layer.keys), group);
    for (let q = q0; q < q1; q++) {
      let inside = 0;
      const own = make("g", { class: q === state.row ? "chosen" : "other", "data-query": q });
      for (let k = k0; k < k1; k++) {
        const w = weight(q, k);
        inside += w;
        if (Math.abs(w) < 0.01) continue;
        const line = make("line", {
          x1: left, y1: 24 + (q - q0) * step, x2: right, y2: 24 + (k - k0) * step, "stroke-width": 0.5 + 4 * Math.min(1, Math.abs(w)),
          stroke: palette.css(w < 0 ? -0.2 : 0.2), "stroke-opacity": Math.min(1, 0.15 + Math.abs(w)), "data-weight": w,
        });
        own.append(line);
      }
      const name = make("text", { x: left - 6, y: 28 + (q - q0) * step, class: "end token", onclick: () => app.choose({ row: q }) },
        `${shown(queries[q])} ${q}`, make("title", {}, `${Math.round(100 * inside)}% of this query's attention is among these keys`));
      own.append(name);
      group.append(own);
    }
    for (let k = k0; k < k1; k++) {
      picture.append(make("text", {
        x: right + 6, y: 28 + (k - k0) * step, class: k === state.key ? "token chosen" : "token", onclick: () => app.choose({ key: k }),
      }, `${k} ${shown(keys[k])}`));
    }
    const save = make("button", { onclick: () => app.save(this.vector(picture), "lines.svg") }, "Save as SVG");
    const words = "Weights of at least 0.01 are drawn; choose a query or key by its name to move. Other queries are paler.";
    return [make("p", {}, words), picture, save];
  }

  /** A picture of lines as a file of its own. */
  vector(picture) {
    const copy = picture.cloneNode(true), style = getComputedStyle(document.body);
    copy.setAttribute("xmlns", SVG);
    copy.prepend(make("rect", { width: "100%", height: "100%", fill: style.backgroundColor }));
    for (const text of copy.querySelectorAll("text")) {
      text.setAttribute("fill", style.color);
      text.setAttribute("font", "12px sans-serif");
      text.setAttribute("font-size", "12");
      text.setAttribute("font-family", "sans-serif");
      if (text.classList.contains("end")) text.setAttribute("text-anchor", "end");
    }
    return new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" });
  }

  /** One score: the products of query and key, and how their sum becomes a weight. */
  async score() {
    const { app } = this, { state, palette } = app, { queries, keys } = this.tokens();
    const side = this.sideOfRows().at(-1), told = await app.source.json(this.scoreKey(side));
    const parts = told.parts.join(" → ");
    const title = `Query ${state.row} “${shown(queries[state.row])}”, key ${state.key} “${shown(keys[state.key])}”`;
    if (!told.q) {
      return [make("p", {}, `${title}: score ${number(told.score)}, weight ${number(told.weight)} (${parts}).`
        + " This score is no sum of products of the query's and the key's numbers.")];
    }
    const products = told.q.map((x, i) => x * told.k[i] * told.scale);
    const sum = products.reduce((a, b) => a + b, 0);
    const order = products.map((_, i) => i).sort((a, b) => Math.abs(products[b]) - Math.abs(products[a]));
    const most = Math.abs(products[order[0]]);
    const lines = order.map(i =>
      cells([String(i), number(told.q[i]), number(told.k[i]), number(products[i]), bar(products[i], most, palette)]));
    return [
      make("p", { id: "sum", "data-sum": sum, "data-score": told.score, "data-weight": told.weight },
        `${title}: ${products.length} products, times ${number(told.scale)}, sum to ${number(sum)}. `
        + `After the program's parts (${parts}) the score is ${number(told.score)} and the weight ${number(told.weight)}.`),
      table("Products, the greatest first", ["number", "query", "key", "query × key × scale", ""], lines),
    ];
  }

  /** The row over the patches that it looks at. */
  async image() {
    const { app } = this, { state, layer, sequences, palette } = app, keys = sequences[layer.keys];
    if (!keys.image) return [make("p", {}, "The keys of this layer are no patches of an image.")];
    const rows = await Promise.all(this.sideOfRows().map(side => app.source.load(this.rowKey(side))));
    const [down, across] = keys.grid, picture = make("img", { src: keys.image, alt: "the model's image" });
    await picture.decode();
    const figures = rows.map((row, index) => {
      const overlay = make("canvas", {
        width: picture.naturalWidth, height: picture.naturalHeight, class: "patches", tabindex: "0", role: "img",
        "aria-label": `Image with the weights of query ${state.row} over its ${down} by ${across} patches`,
      });
      const context = overlay.getContext("2d"), [wide, high] = [overlay.width / across, overlay.height / down];
      context.drawImage(picture, 0, 0);
      const values = row.values.subarray(keys.prefix), most = values.reduce((a, b) => Math.max(a, b), 0);
      values.forEach((value, i) => {
        context.fillStyle = palette.css(1);
        context.globalAlpha = 0.85 * Math.max(0, value) / (most || 1);
        context.fillRect((i % across) * wide, Math.floor(i / across) * high, wide, high);
      });
      context.globalAlpha = 1;
      const own = layer.queries === layer.keys ? state.row - keys.prefix : -1;
      if (own >= 0) {
        context.strokeStyle = getComputedStyle(app.stage).getPropertyValue("--mark");
        context.lineWidth = 2;
        context.strokeRect((own % across) * wide, Math.floor(own / across) * high, wide, high);
      }
      overlay.addEventListener("click", event => {
        const box = overlay.getBoundingClientRect();
        const patch = keys.prefix + Math.floor((event.clientY - box.top) / box.height * down) * across
          + Math.floor((event.clientX - box.left) / box.width * across);
        app.choose(layer.queries === layer.keys && !event.shiftKey ? { row: patch } : { key: patch });
      });
      const before = keys.tokens.slice(0, keys.prefix).map((token, i) => `${token} ${number(row.values[i])}`);
      const name = rows.length > 1 ? `${app.sides[index]}: ` : "";
      const outside = before.length ? ` Beside the patches: ${before.join(", ")}.` : "";
      return make("figure", {}, overlay, make("figcaption", {}, `${name}greatest weight of a patch ${number(most)}.${outside}`));
    });
    return [make("p", {}, "Query " + state.row + ". Click a patch to make it the query, with Shift the key."), ...figures];
  }
}
