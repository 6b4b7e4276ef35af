"""The page in a real Chromium: open, zoom to a row, compare with the exact weights, export, reopen."""

import json
import re
import shutil
import threading

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from playwright.sync_api import expect, sync_playwright

import saccade
from saccade import edits, zoo
from saccade.viewer import Capture, Sequence, Server, Session
from saccade.viewer.load import patches
from saccade.worlds.text import encode, heldout

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEAD = 3


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def runs():
    lm = tf.AutoModelForCausalLM.from_pretrained(zoo.path("lm"), dtype=torch.float32).eval()
    words = heldout()[:1199]
    text = {"text": Sequence(["<s>", *map(chr, words)])}
    inputs = {"input_ids": encode(words)[None]}
    before = Capture.of(lm, inputs, text, layers=[2, 3], name="lm")
    with saccade.edit(lm, edits.Zero(keys=slice(0, 200)), edits.Renormalize()):
        return {"before": before, "after": Capture.of(lm, inputs, text, layers=[2, 3])}


def served(session):
    server = Server(session)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield server
    server.stop()
    thread.join(10)


@pytest.fixture(scope="module")
def server(runs):
    yield from served(Session(runs))


@pytest.fixture
def open_page(browser):
    """Opens addresses; what a page complains about fails the test."""
    complaints, context = [], browser.new_context(viewport={"width": 1300, "height": 800}, accept_downloads=True)

    def open_page(address, ready="#level[data-whole=true]"):
        page = context.new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.goto(address)
        page.wait_for_selector(ready)
        return page

    yield open_page
    context.close()
    assert not complaints


def weights(layer, head):
    return saccade.weights(layer.q, layer.k, layer.program(head), offset=layer.offset)[0, head].numpy()


def chosen_weight(page, row, key):
    """What the page says of a place, once it speaks of it."""
    expect(page.locator("#exact")).to_contain_text(re.compile(rf"Query {row} .* key {key} "))
    return float(page.locator("#exact").get_attribute("data-value"))


def pixel(page, x, y):
    """The colour of the map at a place of its canvas, in CSS pixels."""
    read = "(c, [x, y]) => [...c.getContext('2d').getImageData(x * devicePixelRatio, y * devicePixelRatio, 1, 1).data]"
    return page.locator("#maps canvas").first.evaluate(read, [x, y])


def test_open_zoom_to_a_row_and_compare_with_the_exact_weights(server, runs, open_page):
    want = weights(runs["before"].layers[1], HEAD)
    page = open_page(f"{server.link}#layer=1&head={HEAD}&row=800&key=777")
    assert page.locator(".thumb").count() == 12
    expect(page.locator("#glance section[data-filled=true]")).to_have_count(2)
    page.locator("#maps canvas").focus()
    page.keyboard.press("Enter")  # to single tokens
    expect(page.locator("#level")).to_contain_text("exact weights")
    page.wait_for_selector("#level[data-whole=true][data-block='1']")
    assert chosen_weight(page, 800, 777) == pytest.approx(want[800, 777], abs=2e-6)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert chosen_weight(page, 801, 778) == pytest.approx(want[801, 778], abs=2e-6)
    expect(page.locator("#status")).to_contain_text("query 801")
    rows = page.locator("#panel tbody tr")
    order = want[801].argsort()[::-1]
    assert [int(rows.nth(i).get_attribute("data-key")) for i in range(5)] == order[:5].tolist()
    shown = [float(rows.nth(i).locator("td").nth(2).inner_text()) for i in range(5)]
    np.testing.assert_allclose(shown, want[801][order[:5]], rtol=2e-3)
    assert abs(float(re.search(r"sum to ([\d.]+)", page.inner_text("#exact"))[1]) - 1) < 1e-3


def test_the_map_s_colours_are_those_of_the_weights(server, runs, open_page):
    want = weights(runs["before"].layers[1], HEAD)
    row, key = map(int, np.unravel_index(np.argmax(np.tril(want, -30)), want.shape))
    page = open_page(f"{server.link}#layer=1&head={HEAD}&row={row}&key=0&x={key - 5}&y={row - 5}&scale=20")
    page.wait_for_selector("#level[data-block='1'][data-whole=true]")
    strong = pixel(page, 84 + 5.5 * 20, 64 + 5.5 * 20)
    weak = pixel(page, 84 + 40.5 * 20, 64 + 0.5 * 20)  # in the future: hidden
    if want.shape[0] > key + 40 > row:
        assert weak[:3] == [255, 255, 255]
    share = max(0.0, 1 + np.log10(want[row, key]) / 4)
    assert share > 0.25 and sum(strong[:3]) < 3 * 255 - 300 * share
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("getComputedStyle(document.body).backgroundColor === 'rgb(21, 23, 27)'")
    page.wait_for_timeout(300)
    assert sum(pixel(page, 84 + 5.5 * 20, 64 + 5.5 * 20)[:3]) > sum(pixel(page, 84 + 40.5 * 20, 64 + 0.5 * 20)[:3])


def test_the_address_opens_the_same_view_again(server, open_page):
    page = open_page(f"{server.link}#layer=1&head=2&row=300&key=250")
    canvas = page.locator("#maps canvas").bounding_box()
    x, y = canvas["x"] + 200, canvas["y"] + 200
    page.mouse.move(x, y)
    page.mouse.wheel(0, -500)
    page.mouse.down()
    page.mouse.move(x + 80, y + 50, steps=4)
    page.mouse.up()
    page.select_option("#stat", "most")
    page.locator("#tab-score").click()
    page.wait_for_timeout(400)
    state = "const {x, y, scale} = Object.fromEntries(new URLSearchParams(location.hash.slice(1))); [x, y, scale]"
    assert "panel=score" in page.url and "stat=most" in page.url
    again = open_page(page.url)
    again.wait_for_timeout(400)
    assert again.evaluate(state) == page.evaluate(state)
    assert again.input_value("#head") == "2" and again.input_value("#stat") == "most"
    pixels = "c => c.toDataURL()"
    assert page.locator("#maps canvas").evaluate(pixels) == again.locator("#maps canvas").evaluate(pixels)


def test_save_a_page_and_open_it_without_the_server(server, runs, open_page, tmp_path):
    want = weights(runs["after"].layers[1], HEAD)
    page = open_page(f"{server.link}#layer=1&head={HEAD}&row=800&key=790&side=1&x=760&y=780&scale=16")
    page.wait_for_selector("#level[data-block='1'][data-whole=true]")
    with page.expect_download() as download:
        page.locator("#share").click()
    file = tmp_path / "shared.html"
    download.value.save_as(file)
    assert file.stat().st_size < 8e6
    shared = open_page(file.as_uri())
    asked = []
    shared.on("request", lambda request: asked.append(request.url))
    assert chosen_weight(shared, 800, 790) == pytest.approx(want[800, 790], abs=2e-6)
    expect(shared.locator("#level")).to_contain_text("exact weights")
    expect(shared.locator("#glance section[data-filled=true]")).to_have_count(2)
    shared.locator("#maps canvas").focus()
    shared.keyboard.press("0")  # zoomed out: the coarse map is there too
    shared.wait_for_selector("#level[data-whole=true]:not([data-block='1'])")
    shared.keyboard.press("Shift+ArrowRight")
    shared.locator("#maps canvas").click(position={"x": 120, "y": 300})  # a row that the file does not hold
    expect(shared.locator("#panel [role=alert]")).to_contain_text("not in the file")
    expect(shared.locator("#share")).to_be_hidden()
    assert not [url for url in asked if url.startswith("http")]


def test_save_a_picture(server, open_page, tmp_path):
    page = open_page(server.link)
    with page.expect_download() as download:
        page.locator("#picture").click()
    download.value.save_as(tmp_path / "map.png")
    picture = Image.open(tmp_path / "map.png")
    size = page.locator("#maps canvas").evaluate("c => [c.width, c.height]")
    assert picture.format == "PNG" and picture.size == (size[0], size[1] + 28)
    assert len(picture.convert("RGB").getcolors(2**20)) > 20


def test_lines_between_tokens(server, runs, open_page, tmp_path):
    want = weights(runs["before"].layers[1], HEAD)
    page = open_page(f"{server.link}#layer=1&head={HEAD}&row=800&key=800&panel=lines")
    page.wait_for_selector(".lines")
    inside = want[784:816, 784:816]
    expect(page.locator(".lines line")).to_have_count(int((abs(inside) >= 0.01).sum()))
    found = page.locator(".lines g[data-query='800'] line").evaluate_all("x => x.map(l => Number(l.dataset.weight))")
    np.testing.assert_allclose(found, [w for w in want[800, 784:816] if abs(w) >= 0.01], atol=2e-6)
    page.locator(".lines .end.token").first.click()
    expect(page.locator(".lines .chosen .token")).to_contain_text("784")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save as SVG").click()
    download.value.save_as(tmp_path / "lines.svg")
    assert (tmp_path / "lines.svg").read_text().count("<line") > 10


def test_one_score_as_its_products(server, runs, open_page):
    page = open_page(f"{server.link}#layer=1&head={HEAD}&row=800&key=777&panel=score")
    page.wait_for_selector("#sum")
    told = page.locator("#sum").evaluate("p => ({...p.dataset})")
    assert float(told["sum"]) == pytest.approx(float(told["score"]), abs=1e-4)
    assert float(told["weight"]) == pytest.approx(weights(runs["before"].layers[1], HEAD)[800, 777], abs=2e-6)
    assert page.locator("#panel tbody tr").count() == 48


def test_before_and_after_side_by_side(server, runs, open_page):
    page = open_page(f"{server.link}#layer=1&head={HEAD}&row=800&key=100&side=both")
    expect(page.locator("#maps canvas")).to_have_count(2)
    chosen_weight(page, 800, 100)
    before = weights(runs["before"].layers[1], HEAD)[800, 100]
    text = page.inner_text("#exact")
    assert float(re.search(r"before ([\d.e-]+)", text)[1]) == pytest.approx(before, rel=2e-3) and before > 0
    assert re.search(r"after 0\.", text)
    page.select_option("#side", "difference")
    expect(page.locator("#maps canvas")).to_have_count(1)
    page.wait_for_selector("#level[data-whole=true]")


def test_find_words_and_go_through_them(server, open_page):
    words = heldout()[:1199].decode().lower()
    places = [m.start() + 1 for m in re.finditer("system", words)]  # after the first token, <s>
    page = open_page(server.link)
    page.keyboard.press("/")
    page.keyboard.type("SYSTEM")
    expect(page.locator("#matches")).to_have_text(f"{len(places)} found")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text(f"query {places[0]} ")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text(f"query {places[1]} ")
    page.select_option("#among", "keys")
    page.locator("#next").click()
    expect(page.locator("#status")).to_contain_text(f"key {places[0]} ")


def test_everything_has_a_name_and_works_by_keys(server, open_page):
    page = open_page(server.link)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll('button, select, input, canvas[tabindex], [role=tab]')].filter(e =>
        !(e.getAttribute('aria-label') || e.textContent.trim() || e.labels?.length)).map(e => e.outerHTML)"""
    )
    assert nameless == []
    page.locator(".thumb[aria-pressed=true]").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    assert page.input_value("#layer") == "1" and page.input_value("#head") == "1"
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").endswith("head 1")
    page.locator("#tab-row").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Lines")).to_have_attribute("aria-selected", "true")
    reached = set()
    page.locator("#find").focus()
    for _ in range(25):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"link", "picture", "share", "layer", "head", "stat", "floor", "CANVAS", "tab-lines", "panel"} <= reached


def test_the_policy_stops_what_does_not_belong(server, browser):
    page = browser.new_page()
    page.goto(server.link)
    page.wait_for_selector("#level[data-whole=true]")
    stopped = page.evaluate(
        """() => new Promise(done => {
          document.addEventListener('securitypolicyviolation', event => done(event.effectiveDirective));
          const script = document.createElement('script');
          script.textContent = 'window.broken = true';
          document.body.append(script);
        })"""
    )
    assert stopped.startswith("script-src") and page.evaluate("window.broken") is None
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', e => e.name)") == "TypeError"
    page.close()


def test_patches_over_an_image(open_page):
    torch.manual_seed(0)
    config = tf.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=64, patch_size=8
    )
    model = tf.ViTModel(config).eval()
    pixels = torch.rand(1, 3, 64, 64)
    run = Capture.of(model, {"pixel_values": pixels}, {"image": patches(pixels[0], (8, 8))})
    for server in served(Session({"run": run})):
        page = open_page(f"{server.link}#panel=image&row=0")
        overlay = page.locator(".patches")
        overlay.wait_for()
        assert "greatest weight of a patch" in page.inner_text("figcaption") and "token 0" in page.inner_text(
            "figcaption"
        )
        box = overlay.bounding_box()
        overlay.click(position={"x": box["width"] * 0.4, "y": box["height"] * 0.6})  # patch 4,3
        expect(page.locator("#status")).to_contain_text("patch 4,3")
        page.locator("#tab-row").click()
        assert chosen_weight(page, 1 + 4 * 8 + 3, 0) == pytest.approx(weights(run.layers[0], 0)[36, 0], abs=2e-6)


def test_encoder_decoder_and_cross_attention_have_their_own_words(open_page):
    torch.manual_seed(0)
    model = tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=2)
    ).eval()
    inputs = {"input_ids": torch.randint(3, 50, (1, 21)), "decoder_input_ids": torch.randint(3, 50, (1, 9))}
    names = {"source": Sequence([f"s{i}" for i in range(21)]), "target": Sequence([f"t{i}" for i in range(9)])}
    run = Capture.of(model, inputs, names)
    for server in served(Session({"run": run})):
        told = json.loads(server.session.session())["layers"]
        cross = next(i for i, layer in enumerate(told) if "cross" in layer["kinds"])
        page = open_page(f"{server.link}#layer={cross}&row=8&key=20")
        expect(page.locator("#exact")).to_contain_text(re.compile("Query 8 “t8” gives key 20 “s20”"))
        assert chosen_weight(page, 8, 20) == pytest.approx(weights(run.layers[cross], 0)[8, 20], abs=2e-6)
        page.select_option("#layer", "0")
        expect(page.locator("#exact")).to_contain_text("Query 8 “s8”")
