// Draws frames in time, says which chunk is shown, and drops what belongs to a take that is over.

const SLACK_MS = 100; // a clock that is further behind starts anew instead of hurrying

export class Player {
  constructor(panels, shown) {
    this.panels = panels;
    this.shown = shown;
    this.canvases = [];
    this.frames = [];
    this.take = 0;
    this.fps = 16;
    this.next = 0;
    this.chunk = -1;
    this.drawn = 0;
    this.decoding = Promise.resolve();
    const draw = (now) => {
      this.draw(now);
      requestAnimationFrame(draw);
    };
    requestAnimationFrame(draw);
  }

  // A canvas for each panel of height × width pixels.
  layout(canvases, height, width, fps) {
    this.canvases = canvases;
    this.fps = fps;
    this.size = [height, width];
    for (const canvas of canvases) [canvas.width, canvas.height] = [width, height];
  }

  flush() {
    for (const { bitmap } of this.frames) bitmap.close();
    this.frames = [];
  }

  begin(take) {
    this.take = take;
    this.flush();
  }

  add({ chunk, take, first, frames }) {
    if (take < this.take) return;
    if (take > this.take) this.begin(take);
    frames.forEach((bytes, i) => {
      const decoded = createImageBitmap(new Blob([bytes]));
      this.decoding = this.decoding.then(async () => {
        const bitmap = await decoded;
        if (take < this.take) bitmap.close();
        else this.frames.push({ chunk, index: first + i, bitmap });
      });
    });
  }

  draw(now) {
    if (!this.frames.length || now < this.next) return;
    this.next = now - this.next > SLACK_MS ? now + 1000 / this.fps : this.next + 1000 / this.fps;
    const { chunk, bitmap } = this.frames.shift();
    const [height, width] = this.size;
    this.canvases.forEach((canvas, i) => {
      canvas.getContext("2d").drawImage(bitmap, i * width, 0, width, height, 0, 0, width, height);
    });
    bitmap.close();
    this.drawn++;
    if (chunk !== this.chunk) {
      this.chunk = chunk;
      this.shown(chunk);
    }
  }
}
