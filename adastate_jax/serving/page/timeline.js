// What was, what is, and what is coming: a list, the newest on top, of which what is coming can be changed.

const NAMES = { restart: "restart", pause: "pause", stop: "stop" };

export class Timeline {
  // list: the element; secondsOf: chunk → seconds of the stream; edit, withdraw: what its buttons do.
  constructor(list, secondsOf, edit, withdraw) {
    Object.assign(this, { list, secondsOf, edit, withdraw });
    this.entries = new Map();
  }

  clear() {
    this.entries.clear();
    this.render();
  }

  // An entry: {number, kind, text, transition, chunk, state: "sent" | "coming" | "applied" | "refused", note}.
  set(number, entry) {
    this.entries.set(number, { ...this.entries.get(number), ...entry, number });
    this.render();
  }

  remove(number) {
    this.entries.delete(number);
    this.render();
  }

  get(number) {
    return this.entries.get(number);
  }

  render() {
    const entries = [...this.entries.values()].sort((a, b) => b.chunk - a.chunk || b.number - a.number).slice(0, 200);
    const current = entries.find((entry) => entry.state === "applied" && entry.text);
    this.list.replaceChildren(...entries.map((entry) => this.row(entry, entry === current)));
  }

  row(entry, current) {
    const row = document.createElement("li");
    row.className = `${entry.state}${current ? " current" : ""}`;
    const cell = (name, text, kind = "span") => {
      const element = document.createElement(kind);
      element.className = name;
      element.textContent = text;
      row.append(element);
    };
    cell("", `${this.secondsOf(entry.chunk).toFixed(1)} s`, "time");
    cell("how", NAMES[entry.kind] ?? (entry.transition || entry.kind).replace("_", " "));
    cell("what", entry.text || (entry.kind === "prompt" ? "the same prompt" : ""));
    cell("state", entry.note ?? { sent: "sent", coming: `at chunk ${entry.chunk}`, applied: "", refused: "refused" }[entry.state]);
    if (entry.state === "coming" && entry.kind === "prompt" && this.edit) {
      for (const [name, act] of [["Edit", this.edit], ["Remove", this.withdraw]]) {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = name;
        button.setAttribute("aria-label", `${name} ${entry.text}`);
        button.onclick = () => act(entry);
        row.append(button);
      }
    }
    return row;
  }
}
