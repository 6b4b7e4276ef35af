"""The viewer on a long text: from the end of the forward pass to the first picture, and frames while panning.

    python benchmarks/viewer.py --tokens 32768

A headless Chromium (software rendering, no GPU) opens the page.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import threading
import time

import torch
from playwright.sync_api import Page, sync_playwright

from saccade import Attention, masks
from saccade.hosts.acts import Site
from saccade.viewer import Capture, Layer, Sequence, Server, Session

FRAMES = """() => { window.frames_ = []; let last = performance.now();
const tick = now => { window.frames_.push(now - last); last = now; requestAnimationFrame(tick); };
requestAnimationFrame(tick); }"""


def run(tokens: int, layers: int) -> Capture:
    """What is kept of a forward pass: here random queries and keys, for the pass itself is not what is measured."""
    torch.manual_seed(0)
    causal = Attention(mask=masks.Causal())
    kept = []
    for number in range(layers):
        site = Site(f"layers.{number}", number, frozenset({"self", "text"}), 8, torch.nn.Identity())
        q, k = torch.randn(1, 8, tokens, 64), torch.randn(1, 2, tokens, 64)
        kept.append(Layer(site, q, k, 0, [(None, causal)], "text", "text"))
    return Capture("random", kept, {"text": Sequence([f"w{i % 977} " for i in range(tokens)])})


class Clock:
    """Seconds of this process: those in which it was stopped (machines are shared) do not count."""

    def __init__(self) -> None:
        self.lost = 0.0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            before = time.perf_counter()
            time.sleep(0.05)
            stood = time.perf_counter() - before
            self.lost += stood if stood > 5 else 0.0

    def __call__(self) -> float:
        time.sleep(0.1)  # so that a stop that has just ended is known
        return time.perf_counter() - 0.1 - self.lost


def pan(page: Page, seconds: float) -> list[float]:
    """Milliseconds between frames while the map is dragged to and fro."""
    box = page.locator("#maps canvas").bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.evaluate(FRAMES)
    until, step = time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        step += 1
        page.mouse.move(x + 9 * (step % 20 - 10), y + 7 * (step % 20 - 10))
    page.mouse.up()
    return page.evaluate("window.frames_")


def told(name: str, frames: list[float]) -> None:
    late = sorted(frames)[int(0.95 * len(frames))]
    print(f"{name}: {len(frames)} frames, median {statistics.median(frames):.1f} ms, 95th percentile {late:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--wait", action="store_true", help="for the exact coarse map of the first layer, too")
    given = parser.parse_args()
    kept = run(given.tokens, given.layers)
    print(
        f"{given.tokens} tokens, {given.layers} layers of 8 heads of 64, {kept.bytes / 1e6:.0f} MB of queries and keys"
    )
    print(
        f"load of this machine's {os.cpu_count()} cores: {os.getloadavg()[0]:.1f}; torch uses {torch.get_num_threads()}"
    )
    chromium = shutil.which("chromium") or "chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        clock = Clock()
        over, work = clock(), time.process_time()
        server = Server(Session({"run": kept}))
        threading.Thread(target=server.run, daemon=True).start()
        page.goto(server.link)
        page.wait_for_selector("#level[data-whole=true]", timeout=900_000)
        print(f"first picture after {clock() - over:.2f} s: {page.inner_text('#level')}")
        print(f"this process worked {time.process_time() - work:.2f} s for it")
        page.wait_for_selector("#exact", timeout=900_000)
        page.wait_for_selector("#glance section[data-filled=true] >> nth=1", timeout=900_000)
        print(f"exact row and thumbnails after {clock() - over:.2f} s")
        told("panning while the engine works in the background", pan(page, 4))
        if given.wait:
            page.wait_for_selector("#level[data-whole=true][data-step='1']", timeout=900_000)
            print(f"exact map of the first layer after {clock() - over:.2f} s")
        page.locator("#maps canvas").focus()
        for presses, name in ((2, "zoomed 4 times"), (3, "zoomed 32 times")):
            for _ in range(presses):
                page.keyboard.press("+")
            page.wait_for_timeout(300)
            began = clock()
            page.wait_for_selector("#level[data-whole=true]", timeout=900_000)
            print(f"{name}: {page.inner_text('#level')}, all tiles after {clock() - began + 0.3:.2f} s")
            told(name, pan(page, 4))
        began = clock()
        page.keyboard.press("Enter")
        page.wait_for_selector("#level[data-whole=true][data-block='1']", timeout=900_000)
        print(f"to single tokens, exact, in {clock() - began:.2f} s")
        told("single tokens", pan(page, 4))
        print(f"this process was stopped for {clock.lost:.0f} s, which do not count")
        browser.close()
        server.stop()
    sys.stdout.flush()
    os._exit(0)  # the engine may still be at a layer, and nobody waits for it


if __name__ == "__main__":
    main()
