// A session's socket: opens it, opens it again where it breaks, numbers the controls, and takes pictures apart.

const RETRY_MS = [250, 500, 1000, 2000, 4000];
const GIVE_UP_MS = 60_000; // as long as the server keeps the place

export class Connection extends EventTarget {
  // Events: "message" (detail: a message of the server's), "pictures" (detail: {chunk, take, first, count, frames}),
  // "lost" and "closed" (detail: why it is not tried again).
  constructor(session, key) {
    super();
    this.session = session;
    this.key = key;
    this.number = 0;
    this.unanswered = new Map();
    this.ended = false;
    this.lastRefusal = "";
    this.open();
  }

  open() {
    const scheme = location.protocol === "https:" ? "wss" : "ws";
    const socket = new WebSocket(`${scheme}://${location.host}/v1/sessions/${this.session}?key=${encodeURIComponent(this.key)}`);
    this.socket = socket;
    socket.binaryType = "arraybuffer";
    socket.onmessage = ({ data }) => (typeof data === "string" ? this.hear(JSON.parse(data)) : this.see(data));
    socket.onclose = ({ code }) => this.lose(code);
  }

  hear(message) {
    if (message.type === "welcome") {
      this.tries = 0;
      this.lostAt = undefined;
      this.number = Math.max(this.number, message.last_number + 1);
      for (const control of this.unanswered.values()) this.socket.send(JSON.stringify(control)); // a retry does nothing twice
    }
    if (message.type === "refused" && message.number === null) this.lastRefusal = message.reason;
    if (["received", "applied", "refused", "withdrawn"].includes(message.type)) this.unanswered.delete(message.number);
    if (message.type === "state" && message.state === "ended") this.ended = true;
    this.dispatchEvent(new CustomEvent("message", { detail: message }));
  }

  see(buffer) {
    const view = new DataView(buffer);
    const [take, first, count, number] = [4, 6, 8, 10].map((at) => view.getUint16(at, true));
    const frames = [];
    for (let at = 12, i = 0; i < number; i++) {
      const length = view.getUint32(at, true);
      frames.push(new Uint8Array(buffer, at + 4, length));
      at += 4 + length;
    }
    this.dispatchEvent(new CustomEvent("pictures", { detail: { chunk: view.getUint32(0, true), take, first, count, frames } }));
  }

  lose(code) {
    if (this.ended) return;
    this.lostAt ??= performance.now();
    this.tries = (this.tries ?? 0) + 1;
    if (code === 1008 || performance.now() - this.lostAt > GIVE_UP_MS) {
      this.dispatchEvent(new CustomEvent("closed", { detail: this.lastRefusal || "the server does not answer" }));
      return;
    }
    this.dispatchEvent(new CustomEvent("lost"));
    setTimeout(() => this.open(), RETRY_MS[Math.min(this.tries, RETRY_MS.length) - 1]);
  }

  say(message) {
    if (this.socket.readyState === WebSocket.OPEN) this.socket.send(JSON.stringify(message));
  }

  // Sends a control, and returns its number.
  control(control) {
    const message = { number: this.number++, ...control };
    this.unanswered.set(message.number, message);
    this.say(message);
    return message.number;
  }
}
