// The page: joins the session's socket with what is shown and with what a person does.

import { Connection } from "/page/connection.js";
import { Meters } from "/page/meters.js";
import { Player } from "/page/player.js";
import { begin, forget, fragment, links, model, obtain, upload } from "/page/session.js";
import { Stage } from "/page/stage.js";
import { Timeline } from "/page/timeline.js";

const TRANSITIONS = {
  switch: "The new prompt from the next chunk on; anchor and window still speak of the old one, which gives it inertia.",
  blend: "From the old prompt to the new one in equal steps, over so many chunks.",
  cut: "A new scene: the next chunk stands far in time from all before it.",
  recache: "The last frames are read again under the new prompt, so that the scene follows sooner.",
  renew: "The stream begins anew from its last frames.",
  flush: "All but the last two frames of the window is forgotten.",
  keep_state: "Like switch; says that the adaptive state goes on.",
  reset_state: "The adaptive state begins again from the newest frames.",
};
const $ = (id) => document.getElementById(id);
const watching = fragment().has("watch");
const stage = new Stage($("panels"), $("overlay"));
const meters = new Meters($("meters"), $("numbers"));
let facts, session, connection, player, timeline;
let state = "", chunk = 0, take = 0, deadline, anchors = [], sentAt, waitsFor;

const seconds = (at) => at * facts.chunk_seconds;
const status = (text) => { $("status").textContent = text; };
const control = (what) => connection.control(what);

async function start() {
  try {
    facts = await model();
    session = await obtain();
  } catch (error) {
    stage.say("This page cannot begin", error.message, { again: true });
    status("not connected");
    return;
  }
  player = new Player([], shown);
  timeline = new Timeline($("timeline"), seconds, watching ? null : edit, watching ? null : withdraw);
  offer();
  connect();
}

function connect() {
  const { video, session: file, watch } = links(session);
  $("video").href = video;
  $("session").href = file;
  $("share").hidden = !watch;
  $("share").onclick = async () => {
    await navigator.clipboard.writeText(watch).then(() => { $("share").textContent = "Copied"; }, () => prompt("Watch link", watch));
    setTimeout(() => { $("share").textContent = "Copy watch link"; }, 2000);
  };
  $("share").dataset.link = watch ?? "";
  connection = new Connection(session.id, session.key);
  connection.addEventListener("message", ({ detail }) => hear[detail.type]?.(detail));
  connection.addEventListener("pictures", ({ detail }) => player.add(detail));
  connection.addEventListener("lost", () => status("connection lost, trying again"));
  connection.addEventListener("closed", ({ detail }) => {
    forget();
    stage.say("The session is gone", `${detail[0].toUpperCase()}${detail.slice(1)}.`, { again: true });
    status("ended");
  });
}

function shown(number) {
  connection.say({ type: "shown", chunk: number });
  if (waitsFor !== undefined && number >= waitsFor) {
    meters.number("latency", `${((performance.now() - sentAt) / 1000).toFixed(2)} s`);
    waitsFor = undefined;
  }
}

// --- what the server says

const hear = {
  welcome(message) {
    anchors = message.anchors;
    const changed = message.role === "steer" ? (names) => restart({ anchors: names }) : undefined;
    player.layout(stage.layout(anchors, facts.all_anchors, message.height, message.width, changed), message.height, message.width, message.fps);
    $("seed").value = message.seed;
    timeline.set(-1, { kind: "start", text: timeline.get(-1)?.text ?? message.prompt, chunk: 0, state: "applied" });
    document.body.dataset.role = message.role;
    for (const id of ["steer"]) $(id).hidden = message.role !== "steer";
  },
  queued({ position, waiting, seconds: wait }) {
    const before = position === 1 ? "One session is before yours" : `${position} sessions are before yours`;
    stage.say(`You are number ${position} in the queue`, `${before}; your turn comes within ${duration(wait)}. This page can stay open.`);
    status(`waiting, ${waiting} in the queue`);
  },
  compiling({ percent }) {
    facts.percent = percent;
    if (percent < 100 && !player.drawn) preparing();
  },
  state(message) {
    state = message.state;
    document.body.dataset.state = state;
    chunk = message.chunk;
    deadline = message.seconds_left ? performance.now() + 1000 * message.seconds_left : undefined;
    $("pause").firstChild.textContent = state === "paused" ? "Resume " : "Pause ";
    const steerable = state === "running" || state === "paused";
    for (const element of $("steer").querySelectorAll("button, textarea, select, input")) element.disabled = !steerable;
    if (state === "starting") preparing();
    if (state === "running") stage.clear();
    if (state === "paused") stage.say("Paused", watching ? "Who steers has paused it." : "Space goes on.");
    if (state === "ended") {
      forget();
      const reason = message.reason || "it was stopped";
      stage.say("The session has ended", `${reason[0].toUpperCase()}${reason.slice(1)}.`, { again: true });
    }
    status(watching && steerable ? `${state}, you watch` : state);
  },
  received({ number, chunk: at }) {
    if (timeline.get(number)) timeline.set(number, { state: "coming", chunk: at });
    if (number === pending) waitsFor = at;
  },
  applied({ number, chunk: at }) {
    if (timeline.get(number)) timeline.set(number, { state: "applied", chunk: at });
    if (number === pending) waitsFor = at;
  },
  refused({ number, reason }) {
    if (number !== null && timeline.get(number)) timeline.set(number, { state: "refused", note: `refused: ${reason}` });
    else status(`refused: ${reason}`);
  },
  withdrawn({ target }) {
    timeline.remove(target);
  },
  entry({ number, kind, text, transition, chunk: at, applied }) {
    if (["prompt", "restart"].includes(kind)) timeline.set(number, { kind, text, transition, chunk: at, state: applied ? "applied" : "coming" });
  },
  chunk(message) {
    chunk = message.chunk + 1;
    if (message.take !== take) {
      take = message.take;
      meters.clear();
    }
    meters.chunk(message);
  },
  dropped({ frames }) {
    meters.number("dropped", String(frames));
  },
  meters(message) {
    meters.measure(message);
    document.body.dataset.hue = message.hue.join(" ");
    document.body.dataset.motion = message.motion.join(" ");
  },
};

function preparing() {
  if (facts.percent < 100) stage.say("Compiling", `Once for this device; the next start finds the programs. ${facts.percent} %`, { percent: facts.percent });
  else stage.say("Starting", "The first chunk is on its way. Other anchors than those of the first view are compiled now.");
}

// --- what a person does

let pending; // number of the last prompt that was to come at once
let replaces; // number of the coming prompt that is edited

function offer() {
  $("transition").append(...facts.transitions.map((name) => new Option(name.replace("_", " "), name)));
  const choose = () => {
    $("transition-tip").textContent = TRANSITIONS[$("transition").value];
    $("blend-label").hidden = $("transition").value !== "blend";
  };
  $("transition").onchange = choose;
  choose();
  $("cut").hidden = !facts.transitions.includes("cut");
  $("reset").hidden = !facts.transitions.includes("reset_state");
  $("suggestions").append(...facts.prompts.map((text) => {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.textContent = text.replace("a camera ", "");
    chip.title = text;
    chip.onclick = () => {
      $("prompt").value = text;
      $("prompt").focus();
    };
    return chip;
  }));
  if (facts.vocabulary) $("prompt").placeholder = `What comes next?  This model knows: ${facts.vocabulary}`;
}

function send(what, text) {
  const later = Number($("when").value);
  const at = later ? chunk + Math.round(later / facts.chunk_seconds) : undefined;
  const number = control({ type: "prompt", ...what, ...(at === undefined ? {} : { at }) });
  if (!later) [pending, sentAt, waitsFor] = [number, performance.now(), undefined];
  timeline.set(number, { kind: "prompt", text, transition: what.transition, chunk: at ?? chunk + 1, state: "sent" });
}

function submit(event) {
  event?.preventDefault();
  const text = $("prompt").value.trim();
  if (!text) return;
  if (replaces !== undefined) control({ type: "withdraw", target: replaces });
  replaces = undefined;
  $("send").textContent = "Send";
  send({ text, transition: $("transition").value, chunks: Number($("blend").value) || 4 }, text);
  $("prompt").select();
}

function edit(entry) {
  replaces = entry.number;
  $("prompt").value = entry.text;
  $("transition").value = entry.transition;
  $("transition").onchange();
  $("send").textContent = "Replace";
  $("prompt").focus();
}

function withdraw(entry) {
  control({ type: "withdraw", target: entry.number });
}

function restart(what = {}) {
  const number = control({ type: "restart", seed: Number($("seed").value) || 0, ...what });
  timeline.set(number, { kind: "restart", text: `seed ${$("seed").value}${what.anchors ? `, ${what.anchors.join(" beside ")}` : ""}${what.picture ? ", from a picture" : ""}`, chunk, state: "sent" });
}

const acts = {
  pause: () => control({ type: state === "paused" ? "resume" : "pause" }),
  cut: () => send({ transition: "cut" }, ""),
  reset: () => send({ transition: "reset_state" }, ""),
  restart: () => restart(),
  stop: () => control({ type: "stop" }),
};

$("prompt-form").onsubmit = submit;
$("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey) submit(event);
  if (event.key === "Escape") $("prompt").blur();
};
for (const [id, act] of Object.entries(acts)) $(id).onclick = act;
$("picture").onchange = async ({ target }) => {
  try {
    restart({ picture: await upload(session, target.files[0]) });
  } catch (error) {
    status(`refused: ${error.message}`);
  }
  target.value = "";
};
$("again").onclick = async () => {
  forget();
  if (watching || !facts) {
    location.href = location.pathname;
    return;
  }
  $("again").hidden = true;
  try {
    session = await begin({ anchors, seed: Number($("seed").value) || 0 });
  } catch (error) {
    stage.say("No session could begin", error.message, { again: true });
    return;
  }
  timeline.clear();
  meters.clear();
  player.begin(0);
  player.drawn = 0;
  player.chunk = -1;
  connect();
};
document.onkeydown = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, textarea, select")) return;
  if (event.key === " " && event.target.closest("button, a")) return;
  const act = { " ": "pause", c: "cut", r: "reset", n: "next", "/": "focus" }[event.key];
  if (!act || watching) return;
  event.preventDefault();
  if (act === "focus") $("prompt").focus();
  else if (act === "next") {
    $("seed").value = (Number($("seed").value) + 1) % 2 ** 32;
    restart();
  } else if (!$(act).disabled && !$(act).hidden) acts[act]();
};

function duration(time) {
  if (time < 90) return `${Math.max(1, Math.round(time))} seconds`;
  return `${Math.round(time / 60)} minutes`;
}

setInterval(() => {
  const rest = deadline === undefined ? 0 : Math.max(0, Math.round((deadline - performance.now()) / 1000));
  $("left").textContent = deadline === undefined ? "" : `${Math.floor(rest / 60)}:${String(rest % 60).padStart(2, "0")} left`;
}, 500);

start();
