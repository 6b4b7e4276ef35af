// The page: what is chosen, its address, the thumbnails of all heads, search, saving and sharing.

import { Source, query } from "./data.js";
import { AttentionMap, Palette, View } from "./map.js";
import { Panels, make, number } from "./panels.js";

const $ = id => document.getElementById(id);
const PANELS = { row: "Row", lines: "Lines", score: "Score", image: "Image" };
const FIRST = { layer: 0, head: 0, side: "0", stat: "mass", floor: 4, row: -1, key: -1, panel: "row", find: "" };

class App {
  async open() {
    this.source = new Source(() => this.redraw());
    this.state = { ...FIRST };
    this.view = new View();
    this.found = { queries: [], keys: [], at: -1 };
    this.maps = [];
    this.stage = $("maps");
    const told = await this.source.json("session");
    Object.assign(this, { name: told.name, sides: told.sides, layers: told.layers, sequences: told.sequences, tileShape: told.tile });
    $("title").textContent = document.title = `saccade: ${told.name}`;
    this.panels = new Panels(this, $("panel"));
    this.controls();
    this.thumbnails();
    this.restore(location.hash.slice(1) || decodeURIComponent(document.documentElement.dataset.view ?? ""));
    addEventListener("hashchange", () => this.restore(location.hash.slice(1)));
    new ResizeObserver(() => this.redraw()).observe(this.stage);
    Palette.onChange(() => this.apply({}));
  }

  get layer() {
    return this.layers[this.state.layer];
  }

  // Choosing

  /** Take a state from an address. */
  restore(text) {
    const given = Object.fromEntries(new URLSearchParams(text));
    const state = { ...FIRST };
    for (const [name, value] of Object.entries(given)) {
      if (name in FIRST) state[name] = typeof FIRST[name] === "number" ? Number(value) || 0 : value;
    }
    this.view.scale = 0; // fits when it is first drawn
    const asked = ["x", "y", "scale"].map(name => Number(given[name]));
    this.apply(state);
    if (asked.every(Number.isFinite) && asked[2] > 0) Object.assign(this.view, { x: asked[0], y: asked[1], scale: asked[2] });
    $("find").value = this.state.find;
    this.search(0);
  }

  /** Change what is chosen, and show it. */
  apply(change) {
    const before = this.state, state = (this.state = { ...before, ...change });
    const within = (value, length) => Math.max(0, Math.min(length - 1, Math.trunc(value)));
    state.layer = within(state.layer, this.layers.length);
    state.head = within(state.head, this.layer.heads);
    state.row = state.row < 0 ? this.layer.n - 1 : within(state.row, this.layer.n);
    state.key = state.key >= 0 ? within(state.key, this.layer.m) : this.layer.queries === this.layer.keys ? state.row : 0;
    if (!(state.panel in PANELS)) state.panel = "row";
    if (!["0", "both", "difference"].slice(0, this.sides.length > 1 ? 3 : 1).includes(state.side) && !this.sides[state.side]) state.side = "0";
    if (!["mass", "most"].includes(state.stat)) state.stat = "mass";
    state.floor = Math.max(1, Math.min(8, state.floor));
    this.palette = new Palette(state.floor);
    const old = this.layers[before.layer];
    if (!old || old.n !== this.layer.n || old.m !== this.layer.m) this.view.scale = 0;
    if (this.shownSides !== state.side) this.arrange();
    for (const name of ["layer", "stat", "side", "floor"]) $(name).value = state[name];
    if ($("head").length !== this.layer.heads) $("head").replaceChildren(...Array.from({ length: this.layer.heads }, (_, i) => make("option", { value: i }, i)));
    $("head").value = state.head;
    for (const name of Object.keys(PANELS)) {
      $(`tab-${name}`).setAttribute("aria-selected", state.panel === name);
      $(`tab-${name}`).tabIndex = state.panel === name ? 0 : -1;
    }
    $("tab-image").hidden = !this.sequences[this.layer.keys].image;
    $("panel").setAttribute("aria-labelledby", `tab-${state.panel}`);
    this.glance();
    this.panels.show();
    this.redraw();
    this.settled();
  }

  /** Choose a query, a key or both; the map follows. */
  choose(place) {
    this.apply(place);
    const map = this.maps[0];
    if (this.view.scale) this.view.show(this.state.row, this.state.key, this.layer, map.width, map.height);
    this.tell(this.state.row, this.state.key);
  }

  /** Say what a place of the map holds. */
  tell(row, key) {
    const { queries, keys } = this.layer, read = this.maps[0].read(row, key);
    const name = (sequence, i) => `${i} “${this.sequences[sequence].tokens[i]}”`;
    const value = read && `${{ mass: "mass", most: "greatest weight" }[this.state.stat]} ${number(read.value)}`
      + (read.block > 1 ? ` in a block of ${read.block} by ${read.block}` : "") + (read.step > 1 ? `, from one query in ${read.step}` : "");
    $("status").textContent = `query ${name(queries, row)}, key ${name(keys, key)}${value ? `: ${value}` : ""}`;
  }

  hover(map, place) {
    const read = place && map.read(place.row, place.key);
    const name = (sequence, i) => `${i} “${this.sequences[sequence].tokens[i].trim()}”`;
    $("hover").textContent = read
      ? `${name(this.layer.queries, place.row)} → ${name(this.layer.keys, place.key)}: ${number(read.value)}${read.block > 1 ? ` / ${read.block}²` : ""}`
      : "";
  }

  /** Write the address once the hand rests. */
  settled() {
    clearTimeout(this.resting);
    this.resting = setTimeout(() => {
      const all = { ...this.state, ...(this.view.scale ? this.view : {}) };
      history.replaceState(null, "", `#${new URLSearchParams(all)}`);
    }, 150);
  }

  // Drawing

  /** One map, or two side by side. */
  arrange() {
    const { side } = this.state;
    this.shownSides = side;
    const sides = side === "both" ? [0, 1] : [side === "difference" ? side : Number(side)];
    this.maps = sides.map(shown => {
      const canvas = make("canvas", {
        tabindex: "0", role: "application", "aria-roledescription": "attention map", "aria-describedby": "help",
        "aria-label": `Attention ${this.sides.length > 1 ? (this.sides[shown] ?? shown) : ""}: queries downwards, keys to the right`,
      });
      return new AttentionMap(canvas, this, shown);
    });
    this.stage.replaceChildren(...this.maps.map(map => map.canvas));
  }

  redraw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      const [map] = this.maps;
      if (map.width <= 0) return;
      if (!this.view.scale) this.view.fit(this.layer, map.width, map.height);
      const wanted = [];
      for (const each of this.maps) each.draw(wanted);
      this.source.want(wanted.filter((key, i) => wanted.indexOf(key) === i));
      const step = Math.max(...this.maps.map(each => each.step)), block = map.level();
      const made = step > 1 ? `from one query in ${step}` : block > 1 ? "exact, all queries" : "exact weights";
      $("level").textContent = `${block > 1 ? `blocks of ${block} by ${block} tokens, ` : ""}${made}${this.maps.every(m => m.whole) ? "" : ", more is on its way"}`;
      $("level").dataset.whole = this.maps.every(m => m.whole);
      $("level").dataset.step = step;
      $("level").dataset.block = block;
      if (step > 1 && !this.source.alone) {
        clearTimeout(this.later);
        this.later = setTimeout(() => this.redraw(), 1600); // the exact map may be there by then
      }
    });
  }

  // Thumbnails

  thumbnails() {
    const watcher = new IntersectionObserver(seen => {
      for (const { isIntersecting, target } of seen) if (isIntersecting) this.fill(target);
    });
    $("glance").append(...this.layers.map((layer, index) => {
      const heads = Array.from({ length: layer.heads }, (_, head) => make("button", {
        class: "thumb", "data-layer": index, "data-head": head, tabindex: "-1", title: `layer ${layer.number}, head ${head}`,
        "aria-label": `${layer.path}, head ${head}`, onclick: () => this.apply({ layer: index, head }),
      }, make("canvas", { width: 1, height: 1 })));
      const row = make("section", { "data-layer": index }, make("h3", { title: layer.path }, `${layer.number} ${layer.kinds.join(" ")}`), ...heads);
      watcher.observe(row);
      return row;
    }));
    $("glance").addEventListener("keydown", event => {
      const change = {
        ArrowLeft: { head: this.state.head - 1 }, ArrowRight: { head: this.state.head + 1 },
        ArrowUp: { layer: this.state.layer - 1 }, ArrowDown: { layer: this.state.layer + 1 },
      }[event.key];
      if (!change) return;
      event.preventDefault();
      this.apply(change);
      document.querySelector(".thumb[aria-pressed=true]").focus();
    });
  }

  /** Draw the thumbnails of a layer. */
  async fill(row) {
    const { state, palette } = this, layer = Number(row.dataset.layer);
    const sides = state.side === "difference" ? [1, 0] : [state.side === "both" ? this.sides.length - 1 : state.side];
    const style = [state.side, state.stat, palette.name].join(" ");
    if (row.dataset.style === style) return;
    row.dataset.style = style;
    try {
      const found = await Promise.all(sides.map(side => this.source.whenIdle(query("glance", { side, layer, stat: state.stat }))));
      const values = sides.length > 1 ? found[0].values.map((value, i) => value - found[1].values[i]) : found[0].values;
      const [, high, wide] = found[0].shape;
      for (const button of row.querySelectorAll(".thumb")) {
        button.firstChild.replaceWith(palette.paint(values, high, wide, Number(button.dataset.head) * high * wide));
      }
      row.dataset.filled = "true";
      if (found.some(f => this.source.stale({ ...f, at: -Infinity }))) {
        setTimeout(() => { if (row.dataset.style === style) delete row.dataset.style, this.glance(); }, 4000);
      }
    } catch (error) {
      delete row.dataset.style;
      $("status").textContent = error.message;
    }
  }

  /** Show which head is chosen, and draw what is in sight again if its look has changed. */
  glance() {
    for (const button of document.querySelectorAll(".thumb")) {
      const chosen = Number(button.dataset.layer) === this.state.layer && Number(button.dataset.head) === this.state.head;
      button.setAttribute("aria-pressed", chosen);
      button.tabIndex = chosen ? 0 : -1;
    }
    const box = $("glance").getBoundingClientRect();
    for (const row of $("glance").children) {
      const { top, bottom } = row.getBoundingClientRect();
      if (bottom >= box.top && top <= box.bottom) this.fill(row);
    }
  }

  // Searching

  /** Find the words in queries or keys; go on by ``step`` matches. */
  search(step) {
    const words = $("find").value, among = $("among").value;
    if (words !== this.searched?.words || among !== this.searched?.among || this.layer !== this.searched?.layer) {
      this.searched = { words, among, layer: this.layer };
      this.found = { queries: [], keys: [], at: -1 };
      this.found[among] = words ? places(this.sequences[this.layer[among]].tokens, words) : [];
      step = Math.max(step, 0);
    }
    const matches = this.found[among];
    if (matches.length && step) {
      this.found.at = (this.found.at + step + matches.length) % matches.length;
      this.choose({ [among === "keys" ? "key" : "row"]: matches[this.found.at], find: words });
    }
    $("matches").textContent = words && `${this.found.at < 0 ? "" : `${this.found.at + 1} of `}${matches.length} found`;
    this.redraw();
  }

  // Saving

  save(blob, name) {
    const link = make("a", { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  }

  picture() {
    const { maps } = this, [first] = maps, space = 28 * devicePixelRatio;
    const whole = make("canvas", { width: maps.reduce((sum, map) => sum + map.canvas.width, 0), height: first.canvas.height + space });
    const context = whole.getContext("2d"), style = getComputedStyle(first.canvas);
    context.fillStyle = style.backgroundColor;
    context.fillRect(0, 0, whole.width, whole.height);
    context.fillStyle = style.color;
    context.font = `${14 * devicePixelRatio}px system-ui, sans-serif`;
    const { layer, state } = this;
    context.fillText(`${this.name}: ${layer.path}, head ${state.head}, ${{ mass: "mass", most: "greatest weight" }[state.stat]}, ${$("level").textContent}`, 8, space * 0.7);
    maps.reduce((x, { canvas }) => (context.drawImage(canvas, x, space), x + canvas.width), 0);
    whole.toBlob(blob => this.save(blob, `attention-${state.layer}-${state.head}.png`));
  }

  /** One file that opens without a server: this view, what of this head was looked at, and thumbnails of all. */
  async share() {
    const { layer, head } = this.state, sides = this.sides.map((_, i) => i);
    const own = `layer=${layer}&head=${head}&`;
    const keys = [...this.source.kept.keys()].filter(key => key.includes(own));
    for (const side of sides) {
      keys.push(this.panels.rowKey(side), this.panels.scoreKey(side));
      const heads = $("all").checked ? this.layers.flatMap((each, i) => Array.from({ length: each.heads }, (_, h) => [i, h])) : [[layer, head]];
      for (const [i, h] of heads) keys.push(...this.coarsest(side, i, h));
    }
    $("status").textContent = "making the file …";
    const answer = await fetch("export", { method: "POST", body: keys.join("\n") });
    const text = await answer.text();
    if (!answer.ok) return ($("status").textContent = text);
    const view = encodeURIComponent(location.hash.slice(1));
    this.save(new Blob([text.replace("<html ", `<html data-view="${view}" `)], { type: "text/html" }), `attention-${layer}-${head}.html`);
    $("status").textContent = `saved: ${(text.length / 1e6).toFixed(1)} MB`;
  }

  coarsest(side, layer, head) {
    const { n, m, levels: [block] } = this.layers[layer], [high, wide] = this.tileShape, keys = [];
    for (const stat of ["mass", "most"]) {
      for (let row = 0; row * high * block < n; row++) {
        for (let column = 0; column * wide * block < m; column++) keys.push(query("tile", { side, layer, head, stat, block, row, column }));
      }
    }
    return keys;
  }

  controls() {
    $("layer").append(...this.layers.map((layer, i) => make("option", { value: i }, `${layer.number}: ${layer.path}`)));
    const sides = this.sides.map((name, i) => [i, name]);
    if (sides.length > 1) sides.push(["both", "side by side"], ["difference", `${this.sides[1]} − ${this.sides[0]}`]);
    $("side").append(...sides.map(([value, name]) => make("option", { value }, name)));
    $("side").parentElement.hidden = sides.length < 2;
    for (const name of ["layer", "head", "stat", "side", "floor"]) {
      $(name).addEventListener("input", () => this.apply({ [name]: typeof FIRST[name] === "number" ? Number($(name).value) : $(name).value }));
    }
    $("tabs").append(...Object.entries(PANELS).map(([name, title]) => make("button", {
      id: `tab-${name}`, role: "tab", "aria-controls": "panel", onclick: () => this.apply({ panel: name }),
    }, title)));
    $("tabs").addEventListener("keydown", event => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!step) return;
      const there = [...$("tabs").children].filter(tab => !tab.hidden);
      const next = there.at((there.findIndex(tab => tab.tabIndex === 0) + step) % there.length);
      next.click();
      next.focus();
    });
    $("search").addEventListener("submit", event => event.preventDefault());
    $("find").addEventListener("input", () => this.search(0));
    $("among").addEventListener("input", () => this.search(0));
    $("find").addEventListener("keydown", event => {
      if (event.key === "Enter") this.search(event.shiftKey ? -1 : 1);
    });
    $("next").addEventListener("click", () => this.search(1));
    $("previous").addEventListener("click", () => this.search(-1));
    $("picture").addEventListener("click", () => this.picture());
    $("share").addEventListener("click", () => this.share());
    $("link").addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(location.href);
        $("status").textContent = "the link is copied; it opens this view while this session runs";
      } catch {
        $("status").textContent = location.href;
      }
    });
    if (this.source.alone) for (const name of ["share", "all"]) $(name).closest("button, label").hidden = true;
    document.addEventListener("keydown", event => {
      if (event.key === "/" && !/INPUT|SELECT/.test(document.activeElement.tagName)) {
        event.preventDefault();
        $("find").focus();
      }
    });
  }
}

/** Tokens at which some words begin, in any case; words may run over several tokens. */
function places(tokens, words) {
  const starts = [];
  let length = 0;
  for (const token of tokens) {
    starts.push(length);
    length += token.length;
  }
  const text = tokens.join("").toLowerCase(), wanted = words.toLowerCase(), found = [];
  let token = 0;
  if (text.length !== length) return tokens.flatMap((t, i) => (t.toLowerCase().includes(wanted) ? [i] : []));
  for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + 1)) {
    while (token + 1 < starts.length && starts[token + 1] <= at) token++;
    if (found.at(-1) !== token) found.push(token);
  }
  return found;
}

const app = new App();
app.open().catch(error => { $("status").textContent = error.message; });
