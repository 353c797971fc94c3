// In the audio thread: the microphone's first channel, in blocks that are worth a message.
const BLOCK = 2048;

class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.block = new Float32Array(BLOCK);
    this.filled = 0;
    this.port.onmessage = () => {
      this.port.postMessage(this.block.slice(0, this.filled));
      this.port.postMessage(null); // all that there was
      this.ended = true;
    };
  }

  process([input]) {
    if (input.length) {
      for (const sample of input[0]) {
        this.block[this.filled++] = sample;
        if (this.filled === BLOCK) {
          this.port.postMessage(this.block);
          this.filled = 0;
        }
      }
    }
    return !this.ended;
  }
}

registerProcessor("recorder", Recorder);
