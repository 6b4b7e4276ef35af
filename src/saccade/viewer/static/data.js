// What the page asks for: from the server that it came from, or from the data that its own file holds.

const MOST = 96 * 2 ** 20; // bytes of answers that are kept
const AT_ONCE = 3; // requests for tiles that are under way
const STALE = 1500; // ms after which a map made from some queries is asked for again

export const query = (name, parts) => `${name}?${Object.entries(parts).map(([k, v]) => `${k}=${v}`).join("&")}`;

/** Header and values of an answer as the server packs it. */
function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  return { ...header, values: new Float32Array(buffer, 4 + length), size: buffer.byteLength, at: performance.now() };
}

async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

export class Source {
  constructor(changed) {
    const held = document.getElementById("held");
    this.held = held && JSON.parse(held.textContent); // a file to share; else there is a server
    this.changed = changed; // called when a tile has come
    this.kept = new Map();
    this.size = 0;
    this.waiting = [];
    this.tiles = 0; // of those asked for, under way
    this.underway = new Map();
    this.idle = []; // what can wait until no tile is asked for
    this.missing = new Set(); // asked for and not to be had
  }

  get alone() {
    return this.held !== null;
  }

  async bytes(key) {
    if (this.alone) {
      if (!(key in this.held)) throw new Error("this is not in the file; the page it was saved from has it");
      return inflate(this.held[key]);
    }
    const answer = await fetch(`data/${key}`);
    if (!answer.ok) throw new Error(await answer.text());
    return answer.arrayBuffer();
  }

  async json(key) {
    return JSON.parse(new TextDecoder().decode(await this.bytes(key)));
  }

  /** An answer with values, kept for the next time. */
  load(key) {
    const there = this.find(key);
    if (there && !this.stale(there)) return Promise.resolve(there);
    if (!this.underway.has(key)) {
      const coming = this.bytes(key).then(unpack).then(found => this.keep(key, found));
      this.underway.set(key, coming.finally(() => this.underway.delete(key)));
    }
    return this.underway.get(key);
  }

  keep(key, found) {
    this.size += found.size - (this.kept.get(key)?.size ?? 0);
    this.kept.delete(key);
    this.kept.set(key, found);
    for (const [oldest, { size }] of this.kept) {
      if (this.size <= MOST) break;
      this.kept.delete(oldest);
      this.size -= size;
    }
    return found;
  }

  find(key) {
    const found = this.kept.get(key);
    if (found) {
      this.kept.delete(key); // to the end: the last used
      this.kept.set(key, found);
    }
    return found;
  }

  stale(found) {
    return !this.alone && found.step > 1 && performance.now() - found.at > STALE;
  }

  /** Ask for tiles, the first ones first; those asked for before and not yet under way are forgotten. */
  want(keys) {
    this.waiting = keys.filter(key => !this.underway.has(key) && !this.missing.has(key));
    this.next();
  }

  next() {
    while (this.tiles < AT_ONCE && this.waiting.length) {
      const key = this.waiting.shift();
      this.tiles++;
      this.load(key).catch(() => this.missing.add(key)).finally(() => {
        this.tiles--;
        this.changed();
        this.next();
      });
    }
    if (!this.tiles) this.idle.shift()?.();
  }

  /** An answer that can wait until no tile is asked for; one after the other. */
  whenIdle(key) {
    const before = this.last?.catch(() => {});
    return (this.last = (async () => {
      await before;
      await new Promise(frame => requestAnimationFrame(() => requestAnimationFrame(frame))); // what is drawn asks first
      while (this.tiles) await new Promise(turn => this.idle.push(turn));
      return this.load(key);
    })());
  }
}
