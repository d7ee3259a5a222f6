// Sparklines of what the server measures, and numbers with what they mean.

const KEPT = 160; // values
const METERS = {
  motion: ["motion", "Mean optical flow between frames, in % of the picture's height per second.", (x) => x.toFixed(1)],
  lock: ["scene lock", "Structural similarity to the take's first frame. 1 is the same picture: a frozen scene is locked.", (x) => x.toFixed(2)],
  drift: ["colour drift", "1 − similarity of the colours to those of the take's first frame. 0 is none.", (x) => x.toFixed(2)],
};
const NUMBERS = {
  network: ["network FPS", "Frames of a chunk over the seconds of the network alone: what papers quote. All panels together."],
  decoded: ["decoded FPS", "Frames of a chunk over the seconds of network and decoder, until there are pixels."],
  total: ["end-to-end FPS", "Frames of a chunk over the seconds from its beginning until its pictures are encoded for you."],
  chunk: ["ms per chunk", "Milliseconds from a chunk's beginning until its pictures are encoded."],
  lead: ["lead", "Chunks that are generated and not shown: what a new prompt has to wait behind. One at most."],
  latency: ["prompt latency", "From sending the last prompt to the first new frame on the screen."],
  dropped: ["dropped", "Frames that this viewer was too slow for."],
};

export class Meters {
  constructor(meters, numbers) {
    this.series = {};
    this.lines = {};
    this.cells = {};
    for (const [name, [label, tip]] of Object.entries(METERS)) {
      const box = document.createElement("div");
      box.className = "meter";
      const line = document.createElement("p");
      line.append(described("span", label, tip, "name"));
      const canvas = document.createElement("canvas");
      canvas.setAttribute("role", "img");
      box.append(line, canvas);
      meters.append(box);
      this.lines[name] = { line, canvas };
      this.series[name] = [];
    }
    for (const [name, [label, tip]] of Object.entries(NUMBERS)) {
      const cell = document.createElement("div");
      const value = document.createElement("dd");
      value.textContent = "–";
      value.id = `number-${name}`;
      const term = document.createElement("dt");
      term.append(described("span", label, tip));
      cell.append(term, value);
      numbers.append(cell);
      this.cells[name] = value;
    }
  }

  clear() {
    for (const name of Object.keys(METERS)) this.series[name] = [];
  }

  measure(message) {
    for (const [name, [label, , format]] of Object.entries(METERS)) {
      const series = this.series[name];
      if (series.length && series[0].length !== message[name].length) series.length = 0;
      series.push(message[name]);
      if (series.length > KEPT) series.shift();
      const { line, canvas } = this.lines[name];
      line.querySelectorAll(".value").forEach((element) => element.remove());
      for (const value of message[name]) {
        const element = document.createElement("span");
        element.className = "value";
        element.textContent = format(value);
        line.append(element);
      }
      canvas.setAttribute("aria-label", `${label}: ${message[name].map(format).join(" and ")}`);
      draw(canvas, series);
    }
  }

  chunk({ frames, network_ms, decoded_ms, total_ms, lead }) {
    const rate = (ms) => (1000 * frames / ms).toFixed(0);
    this.number("network", rate(network_ms));
    this.number("decoded", rate(decoded_ms));
    this.number("total", rate(total_ms));
    this.number("chunk", total_ms.toFixed(0));
    this.number("lead", `${lead} chunk${lead === 1 ? "" : "s"}`);
  }

  number(name, text) {
    this.cells[name].textContent = text;
  }
}

function described(kind, text, tip, name = "") {
  const element = document.createElement(kind);
  element.textContent = text;
  element.className = name;
  element.dataset.tip = tip;
  element.tabIndex = 0;
  element.setAttribute("aria-label", `${text}: ${tip}`);
  return element;
}

function draw(canvas, series) {
  const ratio = devicePixelRatio;
  const [width, height] = [canvas.clientWidth * ratio, canvas.clientHeight * ratio].map(Math.round);
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, width, height);
  const all = series.flat();
  const top = Math.max(...all, 1e-3), bottom = Math.min(...all, 0);
  const style = getComputedStyle(document.documentElement);
  const colours = series[0].length > 1 ? ["--left", "--right"] : ["--right"];
  context.lineWidth = 1.5 * ratio;
  context.lineJoin = "round";
  colours.forEach((colour, panel) => {
    context.strokeStyle = style.getPropertyValue(colour);
    context.beginPath();
    series.forEach((values, i) => {
      const x = (width * i) / (KEPT - 1);
      const y = height - ratio - ((values[panel] - bottom) / (top - bottom)) * (height - 3 * ratio);
      if (i) context.lineTo(x, y);
      else context.moveTo(x, y);
    });
    context.stroke();
  });
}
