// The map of one head: tiles at the level of detail that fits, panned and zoomed by pointer, wheel and keys.

import { query } from "./data.js";

export const LEFT = 84, TOP = 64; // room for the tokens' names, in CSS pixels
const LARGEST = 48; // CSS pixels of a token at most
const NAMED = 11; // CSS pixels of a token from which on it is named

const STOPS = {
  light: [[255, 255, 255], [199, 221, 240], [104, 161, 206], [33, 94, 157], [8, 29, 74]],
  dark: [[21, 23, 27], [38, 58, 92], [52, 112, 168], [124, 190, 222], [246, 250, 220]],
  less: { light: [[255, 255, 255], [253, 205, 160], [240, 130, 60], [180, 70, 15], [95, 30, 0]],
    dark: [[21, 23, 27], [84, 48, 26], [160, 84, 34], [232, 142, 70], [255, 226, 190]] },
};

const blend = (a, b, t) => a.map((x, i) => Math.round(x + (b[i] - x) * t));

function ramp(stops) {
  return Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2);
    return blend(stops[low], stops[low + 1], at - low);
  });
}

const dark = matchMedia("(prefers-color-scheme: dark)");

/** From weights to colours, on a logarithmic scale of some powers of ten; below zero in another hue. */
export class Palette {
  constructor(decades) {
    const theme = dark.matches ? "dark" : "light";
    this.name = `${theme} ${decades}`;
    this.decades = decades;
    this.more = ramp(STOPS[theme]);
    this.less = ramp(STOPS.less[theme]);
  }

  static onChange(call) {
    dark.addEventListener("change", call);
  }

  color(value) {
    const size = Math.abs(value);
    const share = size > 0 ? Math.min(1, Math.max(0, 1 + Math.log10(size) / this.decades)) : 0;
    return (value < 0 ? this.less : this.more)[Math.round(share * 255)];
  }

  css(value) {
    return `rgb(${this.color(value).join(" ")})`;
  }

  /** Values ``[rows, columns]`` as a canvas of one pixel each. */
  paint(values, rows, columns, first = 0) {
    const picture = document.createElement("canvas");
    picture.width = columns;
    picture.height = rows;
    const context = picture.getContext("2d"), image = context.createImageData(columns, rows);
    for (let i = 0; i < rows * columns; i++) {
      const color = this.color(values[first + i]);
      image.data[4 * i] = color[0];
      image.data[4 * i + 1] = color[1];
      image.data[4 * i + 2] = color[2];
      image.data[4 * i + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    return picture;
  }
}

/** What of the matrix is shown: key ``x`` at the left, query ``y`` at the top, CSS pixels per token. */
export class View {
  constructor() {
    Object.assign(this, { x: 0, y: 0, scale: 0 });
  }

  fit(layer, width, height) {
    this.scale = Math.min(LARGEST, width / layer.m, height / layer.n);
    this.x = this.y = 0;
    this.round();
  }

  zoom(times, atX, atY, layer, width, height) {
    const least = Math.min(LARGEST, width / layer.m, height / layer.n) / 1.5;
    const scale = Math.min(LARGEST, Math.max(least, this.scale * times));
    this.x += atX / this.scale - atX / scale;
    this.y += atY / this.scale - atY / scale;
    this.scale = scale;
    this.clamp(layer, width, height);
  }

  pan(dx, dy, layer, width, height) {
    this.x -= dx / this.scale;
    this.y -= dy / this.scale;
    this.clamp(layer, width, height);
  }

  /** Keep at least half of the room, or the whole matrix, in sight. */
  clamp(layer, width, height) {
    const held = (at, size, room) => Math.max(Math.min(0, size - room), Math.min(at, Math.max(0, size - room / 2)));
    this.x = held(this.x, layer.m, width / this.scale);
    this.y = held(this.y, layer.n, height / this.scale);
    this.round();
  }

  /** What an address says is what is drawn. */
  round() {
    for (const name of ["x", "y", "scale"]) this[name] = Number(this[name].toPrecision(9));
  }

  /** Bring a place into sight, and to the middle if it was not. */
  show(row, key, layer, width, height) {
    const wide = width / this.scale, high = height / this.scale;
    if (key < this.x || key + 1 > this.x + wide) this.x = key - wide / 2;
    if (row < this.y || row + 1 > this.y + high) this.y = row - high / 2;
    this.clamp(layer, width, height);
  }
}

export class AttentionMap {
  /** ``app`` holds what all maps share: source, view, palette, layer, state, sequences; ``side``: number, or "difference". */
  constructor(canvas, app, side) {
    Object.assign(this, { canvas, app, side, painted: new Map() });
    this.listen();
  }

  get width() {
    return this.canvas.clientWidth - LEFT;
  }

  get height() {
    return this.canvas.clientHeight - TOP;
  }

  key(block, row, column, side = this.side) {
    const { layer, head, stat } = this.app.state;
    return query("tile", { side, layer, head, stat, block, row, column });
  }

  /** A tile's values, if they are here; asks for what is missing or old. */
  tile(block, row, column, wanted) {
    const sides = this.side === "difference" ? [1, 0] : [this.side];
    const keys = sides.map(side => this.key(block, row, column, side));
    const parts = keys.map(key => this.app.source.find(key));
    keys.forEach((key, i) => {
      if (!parts[i] || this.app.source.stale(parts[i])) wanted?.push(key);
    });
    if (parts.includes(undefined)) return undefined;
    if (parts.length === 1) return parts[0];
    const [after, before] = parts;
    after.difference ??= new Map();
    if (!after.difference.has(before)) {
      const values = after.values.map((value, i) => value - before.values[i]);
      after.difference = new Map([[before, { ...after, values, step: Math.max(after.step, before.step), difference: undefined }]]);
    }
    return after.difference.get(before);
  }

  level() {
    const { layer, view } = this.app;
    const fine = layer.levels.filter(block => block * view.scale * devicePixelRatio >= 1);
    return fine.at(-1) ?? layer.levels[0];
  }

  /** Tiles of a level that are in sight: row and column, those nearest to the middle first. */
  inSight(block) {
    const { layer, view, tileShape: [high, wide] } = this.app;
    const range = (at, room, size, length) => {
      const first = Math.max(0, Math.floor(at / size));
      const last = Math.min(Math.ceil(length / size), Math.ceil((at + room) / size));
      return Array.from({ length: Math.max(0, last - first) }, (_, i) => first + i);
    };
    const rows = range(view.y, this.height / view.scale, high * block, layer.n);
    const columns = range(view.x, this.width / view.scale, wide * block, layer.m);
    const middle = (all, i) => Math.abs(i - (all[0] + all.at(-1)) / 2);
    const causalEnd = row => (row + 1) * high * block + layer.offset; // only to ask for what is likely first
    return rows.flatMap(row => columns.map(column => [row, column]))
      .sort((a, b) => (a[1] * wide * block > causalEnd(a[0])) - (b[1] * wide * block > causalEnd(b[0]))
        || middle(rows, a[0]) - middle(rows, b[0]) || middle(columns, a[1]) - middle(columns, b[1]));
  }

  draw(wanted) {
    const { canvas, app } = this, { view, layer, palette } = app;
    const ratio = devicePixelRatio;
    const size = [Math.round(canvas.clientWidth * ratio), Math.round(canvas.clientHeight * ratio)];
    if (canvas.width !== size[0] || canvas.height !== size[1]) [canvas.width, canvas.height] = size;
    const context = canvas.getContext("2d");
    const style = getComputedStyle(canvas);
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.fillStyle = style.backgroundColor;
    context.fillRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    context.save();
    const place = (x, y) => [LEFT + (x - view.x) * view.scale, TOP + (y - view.y) * view.scale];
    const [x0, y0] = place(0, 0), [x1, y1] = place(layer.m, layer.n);
    context.beginPath();
    context.rect(LEFT, TOP, this.width, this.height);
    context.clip();
    context.beginPath();
    context.rect(x0, y0, x1 - x0, y1 - y0);
    context.clip();
    context.fillStyle = palette.css(0);
    context.fillRect(LEFT, TOP, this.width, this.height);
    const finest = this.level();
    const [high, wide] = app.tileShape;
    this.step = 1;
    this.whole = true;
    const snap = value => Math.round(value * ratio) / ratio;
    for (const block of layer.levels) {
      if (block < finest) break;
      const asked = block === finest || block === layer.levels[0] ? wanted : null;
      context.imageSmoothingEnabled = block * view.scale * ratio < 1;
      for (const [row, column] of this.inSight(block)) {
        const tile = this.tile(block, row, column, asked);
        if (!tile) {
          if (block === finest) this.whole = false;
          continue;
        }
        if (block === finest) this.step = Math.max(this.step, tile.step);
        if (tile.palette !== palette.name) {
          tile.palette = palette.name;
          tile.picture = palette.paint(tile.values, tile.shape[0], tile.shape[1]);
        }
        const [left, top] = place(column * wide * block, row * high * block).map(snap);
        const [right, bottom] = place(
          (column * wide + tile.shape[1]) * block, (row * high + tile.shape[0]) * block).map(snap);
        context.drawImage(tile.picture, left, top, right - left, bottom - top);
      }
    }
    this.mark(context, place, style);
    context.restore();
    this.name(context, place, style);
  }

  /** The chosen query and key. */
  mark(context, place, style) {
    const { state, view } = this.app;
    const [x, y] = place(state.key, state.row), size = Math.max(view.scale, 1);
    context.strokeStyle = style.getPropertyValue("--mark");
    context.globalAlpha = 0.75;
    context.strokeRect(LEFT - 1, y, this.width + 2, size);
    context.globalAlpha = 0.35;
    context.strokeRect(x, TOP - 1, size, this.height + 2);
    context.globalAlpha = 1;
    context.strokeRect(x, y, size, size);
  }

  /** Names of tokens, or numbers where there is no room; found tokens are marked. */
  name(context, place, style) {
    const { view, layer, sequences, state, found } = this.app;
    context.fillStyle = style.color;
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    const every = view.scale >= NAMED ? 1 : 10 ** Math.ceil(Math.log10(56 / view.scale));
    const labelled = (axis, length, room, tokens, matches, put) => {
      const first = Math.max(0, Math.ceil(axis / every) * every - every), last = Math.min(length, axis + room / view.scale);
      for (let i = first; i < last; i += every) {
        if (i + 0.5 >= axis) put(i, every === 1 ? `${tokens[i].trim() || "·"} ${i}` : String(i));
      }
      const mark = style.getPropertyValue("--mark");
      context.save();
      context.fillStyle = mark;
      for (const i of matches) if (i >= axis && i < last) put(i, "", true);
      context.restore();
    };
    labelled(view.y, layer.n, this.height, sequences[layer.queries].tokens, found.queries, (i, text, match) => {
      const y = place(0, i + 0.5)[1];
      if (match) context.fillRect(LEFT - 6, y - 2, 4, 4);
      else {
        context.textAlign = "right";
        context.fillText(text, LEFT - 8, y, LEFT - 10);
      }
    });
    labelled(view.x, layer.m, this.width, sequences[layer.keys].tokens, found.keys, (i, text, match) => {
      const x = place(i + 0.5, 0)[0];
      if (match) return context.fillRect(x - 2, TOP - 6, 4, 4);
      context.save();
      context.translate(x, TOP - 8);
      context.rotate(-Math.PI / 3);
      context.textAlign = "left";
      context.fillText(text, 0, 0, TOP);
      context.restore();
    });
    context.textAlign = "left";
    context.fillText(`↓ ${layer.queries} (queries)`, 4, 10, LEFT - 4);
    context.fillText(`→ ${layer.keys} (keys)`, 4, 26, LEFT - 4);
    if (state.side === "both" || this.side === "difference") {
      context.fillText(this.side === "difference" ? "after − before" : this.app.sides[this.side], 4, 42, LEFT - 4);
    }
  }

  /** Query and key under a place of the canvas; undefined outside of the matrix. */
  under(event) {
    const box = this.canvas.getBoundingClientRect(), { view, layer } = this.app;
    const key = Math.floor(view.x + (event.clientX - box.left - LEFT) / view.scale);
    const row = Math.floor(view.y + (event.clientY - box.top - TOP) / view.scale);
    const inside = event.clientX - box.left >= LEFT && event.clientY - box.top >= TOP;
    return inside && row >= 0 && key >= 0 && row < layer.n && key < layer.m ? { row, key } : undefined;
  }

  /** What the finest tile at hand says of a place: its value and tokens per block. */
  read(row, key) {
    const { layer, tileShape: [high, wide] } = this.app;
    for (const block of [...layer.levels].reverse()) {
      const [i, j] = [Math.floor(row / block), Math.floor(key / block)];
      const tile = this.tile(block, Math.floor(i / high), Math.floor(j / wide));
      if (tile) return { block, step: tile.step, value: tile.values[(i % high) * tile.shape[1] + (j % wide)] };
    }
    return undefined;
  }

  listen() {
    const { canvas, app } = this;
    const room = () => [app.layer, this.width, this.height];
    const pointers = new Map();
    let moved = 0;
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId);
      pointers.set(event.pointerId, event);
      moved = 0;
    });
    canvas.addEventListener("pointermove", event => {
      const before = pointers.get(event.pointerId);
      if (!before) return app.hover(this, this.under(event));
      const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY];
      moved += Math.abs(dx) + Math.abs(dy);
      if (pointers.size === 2) {
        const other = [...pointers.values()].find(p => p.pointerId !== event.pointerId);
        const apart = p => Math.hypot(p.clientX - other.clientX, p.clientY - other.clientY);
        const box = canvas.getBoundingClientRect();
        app.view.zoom(apart(event) / Math.max(1, apart(before)),
          (event.clientX + other.clientX) / 2 - box.left - LEFT, (event.clientY + other.clientY) / 2 - box.top - TOP, ...room());
      } else app.view.pan(dx, dy, ...room());
      pointers.set(event.pointerId, event);
      app.redraw();
    });
    const up = event => {
      const there = pointers.delete(event.pointerId) && moved < 4 && event.type === "pointerup" && this.under(event);
      if (there) app.choose(there);
      app.settled();
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
    canvas.addEventListener("wheel", event => {
      event.preventDefault();
      const box = canvas.getBoundingClientRect();
      const pixels = event.deltaMode === 1 ? 16 * event.deltaY : event.deltaY;
      app.view.zoom(Math.exp(-pixels / 240), event.clientX - box.left - LEFT, event.clientY - box.top - TOP, ...room());
      app.redraw();
      app.settled();
    }, { passive: false });
    canvas.addEventListener("keydown", event => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const arrows = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      const { state, view } = app, at = [(state.key + 0.5 - view.x) * view.scale, (state.row + 0.5 - view.y) * view.scale];
      if (arrows && event.shiftKey) view.pan(-arrows[1] * this.width / 4, -arrows[0] * this.height / 4, ...room());
      else if (arrows) {
        const stride = this.level();
        app.choose({ row: state.row + arrows[0] * stride, key: state.key + arrows[1] * stride });
      } else if (event.key === "+" || event.key === "=") view.zoom(2, ...at, ...room());
      else if (event.key === "-") view.zoom(0.5, ...at, ...room());
      else if (event.key === "0") view.fit(...room());
      else if (event.key === "Enter") {
        view.zoom(16 / view.scale, ...at, ...room());
        view.show(state.row, state.key, ...room());
      } else return;
      event.preventDefault();
      app.redraw();
      app.settled();
    });
  }
}
