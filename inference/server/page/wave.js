// The waveform with words over it. Only what is in view is drawn, so that hours fit.

import { PEAKS } from "./sound.js";

const WIDTH = 120; // pixels of a second, at least

export class Wave {
  constructor(element, onSeek) {
    this.element = element;
    this.track = element.querySelector(".track");
    this.canvas = element.querySelector("canvas");
    this.layer = element.querySelector(".words");
    this.onSeek = onSeek;
    this.clear();
    element.addEventListener("scroll", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(element);
    this.canvas.addEventListener("click", (event) => {
      const x = event.clientX - this.track.getBoundingClientRect().left;
      this.onSeek(Math.min(x / this.scale, this.duration));
    });
  }

  clear() {
    this.set({ peaks: [], words: [], duration: 0, time: 0 });
  }

  // peaks, words, duration, time: what changed.
  set(changes) {
    Object.assign(this, changes);
    this.element.setAttribute("aria-valuemax", this.duration.toFixed(1));
    this.element.setAttribute("aria-valuenow", this.time.toFixed(1));
    this.element.setAttribute("aria-valuetext", `${this.time.toFixed(1)} seconds`);
    this.draw();
  }

  get scale() {
    return Math.max(WIDTH, this.element.clientWidth / Math.max(this.duration, 0.1));
  }

  // Scroll so that a time is in view.
  show(time) {
    const x = time * this.scale;
    const { scrollLeft, clientWidth } = this.element;
    if (x < scrollLeft || x > scrollLeft + clientWidth - 60) {
      this.element.scrollLeft = x - clientWidth / 4;
    }
  }

  draw() {
    const { clientWidth: width, scrollLeft } = this.element;
    if (!width) return;
    const height = this.canvas.clientHeight;
    const ratio = window.devicePixelRatio || 1;
    this.track.style.width = `${Math.ceil(Math.max(width, this.duration * this.scale))}px`;
    this.canvas.style.width = `${width}px`;
    this.canvas.width = width * ratio;
    this.canvas.height = height * ratio;
    const context = this.canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(this.element);
    const [played, coming] = [style.getPropertyValue("--accent"), style.getPropertyValue("--soft")];
    const now = this.time * this.scale - scrollLeft;
    const middle = height * 0.6;
    const loudest = this.peaks.reduce((a, b) => Math.max(a, b), 0.05);
    for (let x = 0; x < width; x += 3) {
      const from = Math.floor(((scrollLeft + x) / this.scale) * PEAKS);
      const to = Math.max(from + 1, Math.floor(((scrollLeft + x + 3) / this.scale) * PEAKS));
      if (from >= this.peaks.length) break;
      const size = Math.max(1, (Math.max(...this.peaks.slice(from, to)) / loudest) * height * 0.6);
      context.fillStyle = x < now ? played : coming;
      context.fillRect(x, middle - size / 2, 2, size);
    }
    if (now >= 0 && now <= width && this.duration) {
      context.fillStyle = played;
      context.fillRect(now, 0, 2, height);
    }
    this.place(scrollLeft, width);
  }

  // Labels of the words in view; a second row where two would cover each other.
  place(scrollLeft, width) {
    const labels = [];
    const free = [-Infinity, -Infinity];
    for (const word of this.words) {
      const left = word.start * this.scale;
      if (word.end * this.scale < scrollLeft - 100) continue;
      if (left > scrollLeft + width) break;
      const label = document.createElement("span");
      label.textContent = word.word;
      label.style.left = `${left}px`;
      label.style.minWidth = `${(word.end - word.start) * this.scale}px`;
      label.classList.toggle("now", word.start <= this.time && this.time < word.end);
      const size = Math.max((word.end - word.start) * this.scale, 9 * word.word.length + 12);
      const row = left >= free[0] ? 0 : 1;
      free[row] = left + size;
      label.style.top = `${0.3 + 1.6 * row}rem`;
      labels.push(label);
    }
    this.layer.replaceChildren(...labels);
  }
}
