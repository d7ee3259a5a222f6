// The panels with their anchors, and what lies over them while there is nothing to see.

const WHAT = {
  "": "the model's own anchor",
  static: "the first frame stays the anchor, for ever",
  none: "no anchor: a sliding window",
  self_forcing: "no anchor: a sliding window",
  adastate: "a state that is renewed with every chunk",
  adaptive: "a state that is renewed with every chunk",
  longlive: "the first frames stay, for ever",
  infinity_rope: "the first frames stay, for ever",
  reward_forcing: "a running mean of what was",
  memrope: "running means of what was",
  rolling_sink: "the first frames, walked to and fro",
  causvid: "restarts with an overlap",
};
const MOST = 2;

export class Stage {
  constructor(panels, overlay) {
    this.panels = panels;
    this.overlay = overlay;
    this.shown = "";
  }

  // Makes a figure for each anchor, and returns their canvases.
  layout(anchors, all, height, width, changed) {
    const wanted = `${anchors} ${height} ${width} ${Boolean(changed)}`;
    if (this.shown === wanted) return [...this.panels.querySelectorAll("canvas")];
    this.shown = wanted;
    const selects = [];
    const choose = () => changed(selects.map((select) => select.value).filter((value) => value !== "-"));
    const figures = anchors.map((anchor, i) => {
      const figure = document.createElement("figure");
      const canvas = document.createElement("canvas");
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `stream with the anchor ${anchor || "of the model"}`);
      const caption = document.createElement("figcaption");
      const select = document.createElement("select");
      select.setAttribute("aria-label", `anchor of panel ${i + 1}`);
      const options = ["", ...all].map((name) => new Option(name.replaceAll("_", " ") || "model's own", name));
      if (anchors.length > 1) options.push(new Option("— close —", "-"));
      select.append(...options);
      select.value = anchor;
      select.disabled = !changed;
      select.onchange = choose;
      selects.push(select);
      const text = document.createElement("span");
      text.textContent = WHAT[anchor] ?? "";
      caption.append(select, text);
      if (anchors.length < MOST && changed) {
        const add = document.createElement("button");
        add.type = "button";
        add.textContent = "Compare";
        add.setAttribute("aria-label", "show another anchor beside it");
        add.onclick = () => changed([anchor === "static" ? "adastate" : "static", anchor]);
        caption.append(add);
      }
      figure.append(canvas, caption);
      return figure;
    });
    this.panels.replaceChildren(...figures);
    return figures.map((figure) => figure.querySelector("canvas"));
  }

  // Says why there is no picture, or that it stands still; percent is of a progress bar, again whether to offer another session.
  say(title, text = "", { percent, again = false } = {}) {
    const part = (name) => this.overlay.querySelector(`#${name}`);
    part("overlay-title").textContent = title;
    part("overlay-text").textContent = text;
    const bar = part("overlay-progress");
    bar.hidden = percent === undefined;
    if (percent !== undefined) bar.value = percent;
    part("again").hidden = !again;
    this.overlay.hidden = false;
  }

  clear() {
    this.overlay.hidden = true;
  }
}
