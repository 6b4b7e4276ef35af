"""What the viewer's server answers, to whom, and what it never does."""

import dataclasses
import http.client
import json
import struct
import threading
import time
from urllib.parse import urlparse

import numpy as np
import pytest
import torch
import transformers as tf

import saccade
from saccade import SpecError, edits, zoo
from saccade.viewer import Capture, Server, Session, page


@pytest.fixture(scope="module")
def runs():
    lm = tf.AutoModelForCausalLM.from_pretrained(zoo.path("lm"), dtype=torch.float32).eval()
    ids = torch.randint(0, 256, (1, 1100), generator=torch.Generator().manual_seed(0))
    before = Capture.of(lm, {"input_ids": ids}, layers=[1, 2], name="lm")
    with saccade.edit(lm, edits.Zero(keys=0)):
        return {"before": before, "after": Capture.of(lm, {"input_ids": ids}, layers=[1, 2])}


@pytest.fixture(scope="module")
def server(runs):
    server = Server(Session(runs))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield server
    server.stop()
    thread.join(10)
    assert not thread.is_alive()


def ask(server, path, method="GET", token=None, headers=None, body=None):
    """A request exactly as written: no client that tidies the path."""
    link = urlparse(server.link)
    connection = http.client.HTTPConnection(link.hostname, link.port, timeout=30)
    connection.putrequest(
        method, f"/{server.token if token is None else token}/{path}", skip_host="Host" in (headers or {})
    )
    for name, value in (headers or {}).items():
        connection.putheader(name, value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(body)
    answer = connection.getresponse()
    return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


def unpack(answer):
    length = struct.unpack("<I", answer[:4])[0]
    header = json.loads(answer[4 : 4 + length])
    return header, np.frombuffer(answer[4 + length :], dtype="<f4").reshape(header["shape"])


ADDRESSES = ["", "static/viewer.js", "data/session", "data/row?side=0&layer=0&head=0&row=5", "docs", "openapi.json"]


@pytest.mark.parametrize("path", ADDRESSES)
@pytest.mark.parametrize("token", ["", "x", "static"])
def test_nothing_is_answered_without_the_token(server, path, token):
    status, headers, body = ask(server, path, token=token)
    assert status == 403 and b"token" in body
    assert "default-src 'none'" in headers["content-security-policy"]
    assert ask(server, "export", "POST", token=token, body=b"session")[0] == 403


def test_a_token_that_is_right_but_for_its_last_letter(server):
    wrong = server.token[:-1] + ("A" if server.token[-1] != "A" else "B")
    assert ask(server, "", token=wrong)[0] == 403
    assert ask(server, "")[0] == 200 and len(server.token) >= 32


@pytest.mark.parametrize(
    "path",
    ["static/../server.py", "static/..%2fserver.py", "static/%2e%2e/session.py", "static//etc/passwd",
     "static/%2fetc%2fpasswd", "data/..%2f..%2fetc%2fpasswd", "static/viewer.js%00.css", "docs",
     "openapi.json", "redoc"],
)  # fmt: skip
def test_no_path_reaches_a_file(server, path):
    status, _, body = ask(server, path)
    assert status in (404, 422) and b"import" not in body and b"root:" not in body


@pytest.mark.parametrize(
    "query",
    ["row", "row?side=0&layer=0&head=0&row=5000", "row?side=0&layer=9&head=0&row=5", "row?side=2&layer=0&head=0&row=5",
     "row?side=0&layer=0&head=-1&row=5", "row?side=0&layer=0&head=x&row=5", "row?side=0&layer=0&head=0&row=5&more=1",
     "tile?side=0&layer=0&head=0&stat=mass&block=3&row=0&column=0",
     "tile?side=0&layer=0&head=0&stat=open&block=1&row=0&column=0",
     "tile?side=0&layer=0&head=0&stat=mass&block=1&row=900&column=0", "answers?", "close"],
)  # fmt: skip
def test_what_is_not_there_is_refused(server, query):
    status, _, body = ask(server, f"data/{query}")
    assert status == 422 and body


def test_every_answer_is_under_the_policy(server):
    for path in (*ADDRESSES, "nothing"):
        _, headers, _ = ask(server, path)
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"


def test_other_names_of_this_machine_are_refused(server):
    assert ask(server, "", headers={"Host": "attacker.example"})[0] == 400


def test_it_listens_on_loopback_alone(server):
    port = f"{urlparse(server.link).port:04X}"
    listening = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            listening += [x.split()[1] for x in lines if x.split()[3] == "0A" and x.split()[1].endswith(f":{port}")]
    assert listening == [f"0100007F:{port}"]


def test_too_large_a_request_to_export_is_refused(server):
    assert ask(server, "export", "POST", body=b"x" * (2**20 + 1))[0] == 413
    assert ask(server, "export", "POST", body=b"../../etc/passwd")[0] == 422
    assert ask(server, "export", "POST", body=b"\xff\xfe")[0] == 422


def test_rows_tiles_and_thumbnails_are_the_exact_weights(server, runs):
    layer = runs["after"].layers[1]
    want = saccade.weights(layer.q, layer.k, layer.program(3), offset=layer.offset)[0, 3].numpy()
    header, row = unpack(ask(server, "data/row?side=1&layer=1&head=3&row=777")[2])
    np.testing.assert_allclose(row, want[777], atol=2e-6)
    assert row[0] == 0  # the edit
    for stat in ("mass", "most"):  # blocks of one token: rows 64 to 127, keys 0 to 255
        header, tile = unpack(ask(server, f"data/tile?side=1&layer=1&head=3&stat={stat}&block=1&row=1&column=0")[2])
        assert header["step"] == 1
        np.testing.assert_allclose(tile, want[64:128, :256], atol=2e-6)
    header, tile = unpack(ask(server, "data/tile?side=1&layer=1&head=3&stat=mass&block=4&row=4&column=1")[2])
    padded = want.reshape(275, 4, 275, 4).sum(3).mean(1)
    np.testing.assert_allclose(tile, padded[256:, 256:], atol=4e-6)
    header, small = unpack(ask(server, "data/glance?side=1&layer=1&stat=most")[2])
    assert header["shape"] == [6, 35, 35] and header["block"] == 32
    np.testing.assert_allclose(small[3, 20, 3], want[640:672, 96:128].max(), atol=2e-6)


def test_a_score_taken_apart(server, runs):
    layer = runs["before"].layers[0]
    told = json.loads(ask(server, "data/score?side=0&layer=0&head=4&row=900&key=17")[2])
    products = np.array(told["q"]) * np.array(told["k"]) * told["scale"]
    assert products.sum() == pytest.approx(told["score"], abs=1e-4)
    assert told["weight"] == pytest.approx(float(layer.rows(4, torch.tensor([900]))[0, 17]))
    assert told["parts"] == ["Dot", "Causal", "Softmax"]


def test_a_map_of_some_queries_becomes_exact(runs, monkeypatch):
    monkeypatch.setattr("saccade.viewer.session.LOOK", 2**16)
    session = Session(runs)
    key = "tile?side=0&layer=1&head=0&stat=mass&block=4&row=2&column=0"
    header, some = unpack(session.answer(key))
    layer = runs["before"].layers[1]
    want = layer.pooled([0], 512, 768, 4).mass[0, :, :256].numpy()
    assert header["step"] == 4
    np.testing.assert_allclose(some, layer.pooled([0], 512, 768, 4, 4).mass[0, :, :256].numpy(), atol=2e-6)
    assert abs(some - want).max() > 1e-3
    glance, _ = unpack(session.answer("glance?side=0&layer=1&stat=mass"))
    assert glance["step"] > 1
    session.settle(0, 1)
    header, exact = unpack(session.answer(key))
    assert header["step"] == 1
    np.testing.assert_allclose(exact, want, atol=2e-6)
    assert unpack(session.answer("glance?side=0&layer=1&stat=mass"))[0]["step"] == 1


def test_the_background_makes_exact_what_is_looked_at_first(runs, monkeypatch):
    monkeypatch.setattr("saccade.viewer.session.LOOK", 2**12)
    session, seen, done = Session(runs), [], threading.Event()
    key = "tile?side=1&layer=1&head=0&stat=mass&block=4&row=3&column=0"
    assert unpack(session.answer(key))[0]["step"] == 4
    put = session._kept.put

    def watched(key, found):
        put(key, found)
        seen.append(key)
        if len(seen) == 4:
            done.set()

    session._kept.put = watched
    session.start()
    assert done.wait(30)
    session.close()
    assert seen[0] == ("overview", 1, 1) and sorted(seen) == [("overview", i, j) for i in (0, 1) for j in (0, 1)]
    assert unpack(session.answer(key))[0]["step"] == 1


def test_a_strip_of_some_queries_becomes_exact(runs, monkeypatch):
    monkeypatch.setattr("saccade.viewer.session.LOOK", 2**12)
    monkeypatch.setattr("saccade.viewer.capture.SIDE", 64)
    layer = dataclasses.replace(runs["before"].layers[0])  # with levels of its own
    session = Session({"run": Capture("lm", [layer], runs["before"].sequences)})
    key = "tile?side=0&layer=0&head=2&stat=most&block=8&row=1&column=0"
    assert layer.block == 32 and unpack(session.answer(key))[0]["step"] == 8
    session.start()
    until = time.monotonic() + 30
    while unpack(session.answer(key))[0]["step"] > 1:
        assert time.monotonic() < until
        time.sleep(0.8)
    session.close()
    np.testing.assert_allclose(unpack(session.answer(key))[1], layer.pooled([2], 512, 1024, 8).most[0], atol=2e-6)


def test_maps_beyond_what_is_kept_are_dropped_the_oldest_first(runs, monkeypatch):
    monkeypatch.setattr("saccade.viewer.session.KEPT", 3 * 2 * 64 * 275 * 4)
    session = Session(runs)
    for row in range(4):
        session.answer(f"tile?side=0&layer=0&head=0&stat=mass&block=4&row={row}&column=0")
    assert len(session._kept._maps) == 3 and session._kept.held == 3 * 2 * 64 * 275 * 4
    assert session._kept.find((0, 0, 0, 4, 0)) is None and session._kept.find((0, 0, 0, 4, 3)) is not None


def test_runs_that_cannot_stand_side_by_side(runs):
    short = Capture("short", runs["before"].layers[:1], runs["before"].sequences)
    with pytest.raises(SpecError, match="same layers"):
        Session({"before": runs["before"], "after": short})


def test_a_page_for_sharing_holds_no_address_and_no_loose_script(runs):
    html = page(Session(runs), ["row?side=0&layer=0&head=0&row=5"])
    assert "http://" not in html.replace("http://www.w3.org/2000/svg", "") and "https://" not in html
    assert "unsafe" not in html and "src=" not in html.split("<script")[0]
    with pytest.raises(SpecError, match="row"):
        page(Session(runs), ["row?side=0&layer=0&head=0&row=5000"])
