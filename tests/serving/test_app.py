"""The whole server in this process: routes, sockets, generator, recordings; a small random network makes pictures."""

import contextlib
import io
import json
import random
import time
from pathlib import Path

import anyio
import av
import cv2
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image
from serving.mutants import mutate
from serving.small_server import LOOPBACK, PROMPT, assemble
from small_run import small_config
from starlette.websockets import WebSocketDisconnect

import adastate_jax as ada
from adastate_jax.generation.provenance import recall
from adastate_jax.generation.takes import read_session, replay, session_takes
from adastate_jax.media import read_metadata
from adastate_jax.serving.app import MOST_PICTURE_BYTES, Allowed
from adastate_jax.serving.limits import Door
from adastate_jax.serving.live import Live
from adastate_jax.serving.protocol import unpack
from adastate_jax.serving.recording import Store
from adastate_jax.serving.session import RETURN_SECONDS

HOST, SOCKETS = "http://127.0.0.1", "ws://127.0.0.1"
MUTANTS = 2000


@pytest.fixture(scope="module")
def model():
    return ada.load(config=small_config(), random_weights=True)


class Server:
    """A server in this process, and clients of it."""

    def __init__(self, client: TestClient, live: Live, store: Store):
        self.client, self.live, self.store = client, live, store

    def begin(self, **wanted) -> dict:
        answer = self.client.post("/v1/sessions", json=wanted)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def open(self, session: dict, key: str = "key"):
        return self.client.websocket_connect(f"{SOCKETS}{session['socket']}?key={session[key]}")

    def recording(self, session: dict, file: str):
        return self.client.get(f"/v1/sessions/{session['id']}/{file}", params={"key": session["key"]})


@contextlib.contextmanager
def serving(model, folder, door: Door = LOOPBACK, allowed: Allowed | None = None, limit: float = 600.0):
    app, live, store = assemble(model, folder, door, allowed, limit)
    with TestClient(app, base_url=HOST) as client:
        yield Server(client, live, store)


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    with serving(model, tmp_path_factory.mktemp("live")) as server:
        assert server.client.get("/readyz").status_code in (200, 503)
        while server.client.get("/readyz").status_code == 503:
            assert not server.live.trouble
            time.sleep(0.1)
        assert server.client.get("/readyz").json() == {"ready": True, "percent": 100, "trouble": ""}
        yield server


def receive(socket):
    """The next message of a test client's socket, which by itself would wait for ever."""

    async def wait():
        with anyio.fail_after(60):
            return await socket._send_rx.receive()

    return socket.portal.call(wait)


class Socket:
    """A client's end of a socket, which shows what it gets."""

    def __init__(self, socket):
        self.socket, self.number = socket, -1
        self.chunk, self.messages = -1, []
        self.pictures = []

    def hear(self):
        received = receive(self.socket)
        if received["type"] == "websocket.close":
            raise WebSocketDisconnect(received["code"])
        if received.get("bytes") is not None:
            pictures = unpack(received["bytes"])
            self.pictures.append(pictures)
            self.chunk = max(self.chunk, pictures.chunk)
            self.say(type="shown", chunk=pictures.chunk)
            return pictures
        message = json.loads(received["text"])
        if message["type"] == "welcome":
            self.number = max(self.number, message["last_number"])
        self.messages.append(message)
        return message

    def say(self, **message):
        self.socket.send_text(json.dumps(message))

    def control(self, kind: str, **settings) -> int:
        self.number += 1
        self.say(type=kind, number=self.number, **settings)
        return self.number

    def until(self, kind: str, **fields) -> dict:
        """Hears until a message of this kind and with these fields comes; it may have come before."""
        heard = 0
        while True:
            for message in self.messages[heard:]:
                if message["type"] == kind and all(message.get(name) == value for name, value in fields.items()):
                    return message
            heard = len(self.messages)
            self.hear()

    def show(self, chunks: int) -> None:
        """Shows so many chunks more."""
        last = self.chunk + chunks
        while self.chunk < last:
            self.hear()


@contextlib.contextmanager
def steered(server: Server, **wanted):
    session = server.begin(**wanted)
    with server.open(session) as socket:
        steering = Socket(socket)
        yield session, steering
    server.client.delete(f"/v1/sessions/{session['id']}", params={"key": session["key"]})


def ended(server: Server, session: dict) -> dict:
    """The session's file once it is complete."""
    for _ in range(200):
        answer = server.recording(session, "session.json")
        if answer.status_code == 200 and answer.json()["ended"] is not None:
            return answer.json()
        time.sleep(0.05)
    raise AssertionError("the recording does not end")


def test_a_session_from_its_first_picture_to_its_replay(server, model, tmp_path):
    with steered(server, seed=3) as (session, socket):
        socket.until("state", state="running")
        socket.show(5)
        prompt = socket.control("prompt", text="a red ball", transition="recache")
        received, applied = socket.until("received", number=prompt), socket.until("applied", number=prompt)
        assert received["chunk"] <= applied["chunk"] <= socket.chunk + 2
        socket.show(3)
        coming = socket.control("prompt", text="sand dunes", at=socket.chunk + 5)
        edited = socket.control("prompt", text="never shown", at=socket.chunk + 4)
        socket.control("withdraw", target=edited)
        socket.until("withdrawn", target=edited)
        pause = socket.control("pause")
        socket.until("state", state="paused")
        still = socket.until("applied", number=pause)["chunk"]
        assert server.live.sessions[session["id"]].chunk <= still + 1  # one may have been under way
        socket.control("resume")
        socket.until("applied", number=coming)
        restart = socket.control("restart", seed=9, anchors=["adastate"])
        begun = socket.until("applied", number=restart)["chunk"]
        socket.show(4)
        assert {pictures.take for pictures in socket.pictures if pictures.chunk >= begun} == {1}
        socket.control("stop")
        assert "stopped" in socket.until("state", state="ended")["reason"]
    found = ended(server, session)
    path = tmp_path / "session.json"
    path.write_text(json.dumps(found))
    takes = read_session(path, model)
    assert [take.seed for take in takes] == [3, 9]
    assert [cue.prompt for cue in takes[0].panels[0].cues] == [PROMPT, "a red ball", "sand dunes"]
    assert sum(take.chunks for take in takes) == server.live.sessions[session["id"]].chunk
    steps = list(replay(model, takes))
    assert [step.checksum for step in steps] == [checksum for take in takes for checksum in take.checksums]
    for pictures in socket.pictures:  # what was seen is what is replayed, but for JPEG
        frame = cv2.imdecode(np.frombuffer(pictures.frames[0], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
        assert np.abs(frame.astype(int) - steps[pictures.chunk].frames[pictures.first]).mean() < 8
    video = server.recording(session, "video.mp4").content
    with av.open(io.BytesIO(video)) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        assert sum(1 for _ in container.decode(video=0)) == sum(len(step.frames) for step in steps)
    (tmp_path / "video.mp4").write_bytes(video)
    said = recall(tmp_path / "video.mp4", read_metadata(tmp_path / "video.mp4"))
    assert (said["checkpoint"], said["scale"]) == (Path(model.name), 192 // model.config.data.size[0])
    assert session_takes({**said, "takes": json.loads(said["takes"])}, "video.mp4", model) == takes


def test_a_video_that_is_not_complete_says_less(server, tmp_path):
    with steered(server, seed=3) as (session, socket):
        socket.until("state", state="running")
        socket.show(3)
        (tmp_path / "video.mp4").write_bytes(server.recording(session, "video.mp4").content)
        said = read_metadata(tmp_path / "video.mp4")
        assert said["model"] == json.loads(server.recording(session, "session.json").content)["model"]
        with pytest.raises(ada.UserError, match=r"does not say how it was made; .* its session.json with --session"):
            recall(tmp_path / "video.mp4", said)
        socket.control("stop")


def test_the_picture_leads_its_viewer_by_one_chunk(server):
    session = server.begin()
    with server.open(session) as raw:
        socket = Socket(raw)
        socket.until("state", state="running")
        socket.show(6)
        shown = socket.chunk
        time.sleep(1.0)  # six chunks long
        assert server.live.sessions[session["id"]].chunk <= shown + 2
        socket.control("stop")


def test_a_second_session_waits_for_its_turn_and_watchers_only_watch(server):
    with steered(server) as (session, socket):
        socket.until("state", state="running")
        second = server.begin()
        assert second["position"] == 1
        with server.open(second) as raw, server.open(session, "watch_key") as raw_watch:
            waiting, watcher = Socket(raw), Socket(raw_watch)
            assert waiting.until("queued")["position"] == 1
            assert waiting.until("queued")["seconds"] > 0
            assert watcher.until("welcome")["role"] == "watch"
            socket.show(3)
            watcher.show(1)
            watcher.say(type="stop", number=0)
            assert "does not steer" in watcher.until("refused")["reason"]
            third = server.begin()
            full = server.client.post("/v1/sessions", json={})
            assert (full.status_code, "queue is full" in full.json()["detail"]) == (503, True)
            server.client.delete(f"/v1/sessions/{third['id']}", params={"key": third["key"]})
            socket.control("stop")
            watcher.until("state", state="ended")
            waiting.until("state", state="running")
            waiting.show(1)
            waiting.control("stop")
            waiting.until("state", state="ended")


def test_who_comes_back_finds_the_session_as_it_was(server):
    session = server.begin()
    with server.open(session) as raw:
        socket = Socket(raw)
        socket.until("state", state="running")
        socket.show(3)
        number = socket.control("prompt", text="a red ball")
        socket.until("applied", number=number)
    stopped_at = server.live.sessions[session["id"]].chunk
    time.sleep(0.5)
    assert server.live.sessions[session["id"]].chunk <= stopped_at + 1  # nobody watches: it waits
    with server.open(session) as raw:
        socket = Socket(raw)
        assert socket.until("welcome")["last_number"] == number
        assert socket.until("welcome")["prompt"] == "a red ball"
        assert socket.until("entry", number=number)["applied"]
        socket.say(type="prompt", number=number, text="a red ball")  # a retry
        socket.until("applied", number=number)
        socket.show(2)
        assert socket.chunk >= stopped_at
        socket.control("stop")
        socket.until("state", state="ended")
    assert len(ended(server, session)["controls"]) == 2


def test_a_session_ends_when_its_time_is_up(model, tmp_path, server):
    before, server.live.queue.limit = server.live.queue.limit, 1.0
    try:
        with steered(server) as (_, socket):
            assert "1 seconds" in socket.until("state", state="ended")["reason"]
    finally:
        server.live.queue.limit = before


def test_a_session_is_stopped_once_and_what_waits_is_refused(server):
    """Two stops at one chunk: the second one, and a prompt for later, have the end as their answer."""
    with steered(server) as (session, socket):
        socket.until("state", state="running")
        late = socket.control("prompt", text="later", at=10**6)
        first, second = (socket.control("stop", at=socket.chunk + 6) for _ in range(2))
        reason = socket.until("state", state="ended")["reason"]
        socket.until("applied", number=first)
        for number in (second, late):
            assert socket.until("refused", number=number)["reason"] == f"the session has ended: {reason}"
    assert ended(server, session)["ended"] == reason
    assert not server.live.trouble


def test_a_take_without_a_chunk_is_no_part_of_the_session(server):
    """Restarts before the first chunk, and one that is followed by another: the file has the chunks that were made."""
    with steered(server) as (session, socket):
        socket.control("restart", seed=5)
        socket.until("state", state="running")
        socket.show(2)
        at = socket.chunk + 4
        socket.control("restart", seed=6, at=at)
        socket.control("pause", at=at)
        socket.until("state", state="paused")
        socket.control("restart", seed=7)
        socket.control("resume")
        socket.until("welcome", seed=7)
        socket.show(4)
        socket.control("pause")
        socket.until("state", state="paused")
        server.client.delete(f"/v1/sessions/{session['id']}", params={"key": session["key"]})
        found = ended(server, session)  # also of a session that was paused
    seeds, chunks = zip(*((take["seed"], take["chunks"]) for take in found["takes"]), strict=True)
    assert seeds == (5, 7)
    assert sum(chunks) == len(found["timings_ms"]["network"])


def test_a_stream_starts_from_a_picture_that_was_sent(server):
    with steered(server) as (session, socket):
        socket.until("state", state="running")
        path = f"/v1/sessions/{session['id']}/picture"
        keys = {"key": session["key"]}
        long = b"x" * (MOST_PICTURE_BYTES + 1)
        for wrong, status in ((b"no picture", 422), (b"GIF89a" + b"\0" * 40, 422), (long, 413)):
            answer = server.client.post(path, params=keys, content=wrong)
            assert answer.status_code == status
            assert "/tmp" not in answer.text
        bomb = io.BytesIO()
        Image.new("1", (9000, 9000)).save(bomb, "PNG")
        assert "million pixels" in server.client.post(path, params=keys, content=bomb.getvalue()).json()["detail"]
        deep = io.BytesIO()
        Image.new("I;16", (300, 200)).save(deep, "PNG")
        assert "8 bits" in server.client.post(path, params=keys, content=deep.getvalue()).json()["detail"]
        body = io.BytesIO()
        Image.new("RGB", (300, 200), (200, 30, 30)).save(body, "JPEG")
        watching = {"key": session["watch_key"]}
        assert server.client.post(path, params=watching, content=body.getvalue()).status_code == 403
        name = server.client.post(path, params=keys, content=body.getvalue()).json()["picture"]
        refused = socket.control("restart", picture="0" * 16)
        assert "send it again" in socket.until("refused", number=refused)["reason"]
        number = socket.control("restart", picture=name)
        socket.until("applied", number=number)
        socket.show(3)
        socket.control("stop")
    takes = ended(server, session)["takes"]
    assert [take["picture"] is not None for take in takes] == [False, True]
    clock, server.live.clock = server.live.clock, lambda: time.monotonic() + RETURN_SECONDS
    while session["id"] in server.live.sessions:
        time.sleep(0.05)
    server.live.clock = clock
    with steered(server) as (session, _):
        path, keys = f"/v1/sessions/{session['id']}/picture", {"key": session["key"]}
        kept = server.client.post(path, params=keys, content=body.getvalue()).json()["picture"]
        assert [file.name for file in server.client.app.state.pictures.iterdir()] == [kept]


def test_mutated_messages_harm_nobody(server, capfd):
    session = server.begin()
    watch = {**session, "key": session["watch_key"]}
    rng, sent = random.Random(1), 0
    with server.open(session) as raw:
        socket = Socket(raw)
        socket.until("state", state="running")
        while sent < MUTANTS:
            with server.open(watch) as other, contextlib.suppress(WebSocketDisconnect):
                for _ in range(150):
                    other.send_text(mutate(rng))
                    sent += 1
                Socket(other).until("never")
            socket.show(1)
        for _ in range(60):  # and from who steers: the session may be stopped or restarted, the server may not
            text = mutate(rng)
            if '"stop"' not in text:
                raw.send_text(text)
        socket.show(2)
    assert not server.live.trouble
    assert "Traceback" not in capfd.readouterr().err
    server.client.delete(f"/v1/sessions/{session['id']}", params={"key": session["key"]})
    with steered(server) as (_, socket):
        socket.until("state", state="running")
        socket.show(1)


@pytest.fixture(scope="module")
def guarded(model, server, tmp_path_factory):
    """A server that listens beyond loopback, and allows little; its programs are compiled already."""
    door, allowed = Door("0.0.0.0", "secret-token"), Allowed(sessions=(0.001, 3), sockets=(0.001, 6), messages=(0.5, 5))
    with serving(model, tmp_path_factory.mktemp("guarded"), door, allowed) as guarded:
        yield guarded


BEARER = {"authorization": "Bearer secret-token"}


def test_too_much_of_anything_is_refused_in_words(guarded):
    sessions = [guarded.client.post("/v1/sessions", json={}, headers=BEARER) for _ in range(4)]
    assert [answer.status_code for answer in sessions] == [201, 201, 201, 429]
    assert "too many sessions" in sessions[3].json()["detail"]
    with guarded.open(sessions[0].json()) as raw:
        socket = Socket(raw)
        for number in range(120):
            socket.say(type="ping", number=number)
        with pytest.raises(WebSocketDisconnect) as closed:
            socket.until("never")
    assert closed.value.code == 1008
    assert sum(message["type"] == "pong" for message in socket.messages) <= 10
    assert "too many messages" in socket.until("refused")["reason"]
    for _ in range(5):
        with guarded.open(sessions[0].json()):
            pass
    with guarded.open(sessions[0].json()) as raw:
        socket = Socket(raw)
        with pytest.raises(WebSocketDisconnect):
            socket.until("never")
    assert "too many sockets" in socket.messages[0]["reason"]


def test_beyond_loopback_the_token_is_needed(guarded):
    assert guarded.client.get("/v1/model").status_code == 200  # a watch link's page asks for it, and has no token
    for path in ("/metrics", "/openapi.json", "/asyncapi.json"):
        assert guarded.client.get(path).status_code == 403
        assert guarded.client.get(path, headers=BEARER).status_code == 200
    for path in ("/", "/healthz", "/readyz", "/page/main.js", "/docs"):
        assert guarded.client.get(path).status_code in (200, 503)


def test_other_sites_are_kept_out(server):
    for headers in ({"host": "evil.example"}, {"origin": "http://evil.example"}, {"origin": "http://["}):
        for path in ("/", "/v1/model", "/healthz", "/page/main.js"):
            assert server.client.get(path, headers=headers).status_code == 403
        with (
            pytest.raises(WebSocketDisconnect),
            server.client.websocket_connect("/v1/sessions/x?key=y", headers=headers),
        ):
            pass


def test_nothing_is_found_without_its_key(server):
    with steered(server) as (session, socket):
        socket.until("state", state="running")
        socket.show(1)
        for name, key in ((session["id"], "x"), ("0" * 16, session["key"]), ("..%2f..", session["key"])):
            for file in ("video.mp4", "session.json"):
                answer = server.client.get(f"/v1/sessions/{name}/{file}", params={"key": key})
                assert answer.status_code == 404
            assert server.client.delete(f"/v1/sessions/{name}", params={"key": key}).status_code == 404
        path = f"/v1/sessions/{session['id']}"
        assert server.client.delete(path, params={"key": session["watch_key"]}).status_code == 403
        with server.client.websocket_connect(f"{SOCKETS}{path}?key=wrong") as raw:
            stranger = Socket(raw)
            with pytest.raises(WebSocketDisconnect):
                stranger.until("never")
        assert "no session" in stranger.messages[0]["reason"]
    assert server.store.find("../secret", "k", "session.json") is None
    assert server.store.find(session["id"], session["key"], "access.json") is None


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"[", 422),
        (b'{"prompt": ""}', 422),
        (b'{"seed": -1}', 422),
        (b'{"anchors": ["nowhere"]}', 422),
        (b'{"anchors": []}', 422),
        (b'{"anchors": ["static", "self_forcing_frame"]}', 422),
        (b'{"other": 1}', 422),
        (b'{"prompt": "' + b"x" * 1000 + b'"}', 422),  # more tokens than the encoder takes
        (b" " * 20_000, 413),
    ],
)
def test_a_session_that_cannot_be_is_refused(server, body, status):
    answer = server.client.post("/v1/sessions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["detail"]


def test_the_page_needs_nothing_from_outside(server):
    answer = server.client.get("/")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    served = [answer.text]
    for name in (
        "style.css",
        "main.js",
        "connection.js",
        "player.js",
        "timeline.js",
        "meters.js",
        "stage.js",
        "session.js",
    ):
        found = server.client.get(f"/page/{name}")
        assert found.status_code == 200
        assert len(found.text.splitlines()) < 400
        served.append(found.text)
    assert not any("https://" in text or "@import" in text for text in served)
    assert "<script>" not in answer.text
    assert "style=" not in answer.text


def test_interface_and_metrics_are_published(server):
    paths = server.client.get("/openapi.json").json()["paths"]
    assert {"/v1/sessions", "/v1/sessions/{name}/video.mp4", "/readyz", "/metrics"} <= paths.keys()
    assert server.client.get("/asyncapi.json").json()["asyncapi"] == "3.0.0"
    text = server.client.get("/metrics").text
    assert "adastate_ready 1.0" in text
    assert 'adastate_controls_total{answer="applied"}' in text
    count = next(line for line in text.splitlines() if line.startswith("adastate_chunk_network_seconds_count"))
    assert float(count.split()[1]) > 10


def test_a_generator_that_breaks_says_so(model, server, tmp_path, monkeypatch, capfd):
    with serving(model, tmp_path) as broken:
        while broken.client.get("/readyz").status_code == 503:
            time.sleep(0.05)
        with steered(broken) as (_, socket):
            socket.until("state", state="running")
            monkeypatch.setattr("adastate_jax.generation.takes.RunningTake.step", lambda take: 1 / 0)
            assert "ZeroDivisionError" in socket.until("state", state="ended")["reason"]
        for trouble in (False, True):  # one session's fault ends that session; the third one's in a row is the server's
            assert bool(broken.client.get("/readyz").json()["trouble"]) is False
            with steered(broken) as (_, socket):
                assert "ZeroDivisionError" in socket.until("state", state="ended")["reason"]
            assert bool(broken.client.get("/readyz").json()["trouble"]) is trouble
        assert broken.client.post("/v1/sessions", json={}).status_code == 503
    assert "ZeroDivisionError" in capfd.readouterr().err
