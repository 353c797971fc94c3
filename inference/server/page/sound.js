// Sound in the browser: loudness to draw, files to decode, wav files to write.

export const PEAKS = 100; // a second

// Samples as they come -> the loudest of every hundredth of a second.
export class Peaks {
  constructor(rate) {
    this.step = rate / PEAKS;
    this.values = [];
    this.count = 0;
  }

  push(samples) {
    for (const sample of samples) {
      const i = Math.floor(this.count++ / this.step);
      const loud = Math.abs(sample);
      if (!(this.values[i] >= loud)) this.values[i] = loud;
    }
  }
}

// The peaks of a file, or null when this browser does not know its kind.
export async function peaksOf(file) {
  const context = new OfflineAudioContext(1, 1, 16000);
  try {
    const decoded = await context.decodeAudioData(await file.arrayBuffer());
    const peaks = new Peaks(decoded.sampleRate);
    peaks.push(decoded.getChannelData(0));
    return peaks.values;
  } catch {
    return null;
  }
}

// Float32 samples -> 16 bit.
export function int16(samples) {
  const found = new Int16Array(samples.length);
  for (let i = 0; i < samples.length; i++) {
    found[i] = Math.max(-32768, Math.min(32767, Math.round(samples[i] * 32767)));
  }
  return found;
}

// Int16 blocks -> a wav file.
export function wav(blocks, rate) {
  const bytes = blocks.reduce((sum, block) => sum + block.byteLength, 0);
  const header = new DataView(new ArrayBuffer(44));
  const text = (at, letters) => [...letters].forEach((c, i) => header.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  header.setUint32(4, 36 + bytes, true);
  text(8, "WAVEfmt ");
  header.setUint32(16, 16, true);
  header.setUint16(20, 1, true); // PCM
  header.setUint16(22, 1, true); // channels
  header.setUint32(24, rate, true);
  header.setUint32(28, rate * 2, true);
  header.setUint16(32, 2, true);
  header.setUint16(34, 16, true);
  text(36, "data");
  header.setUint32(40, bytes, true);
  return new Blob([header, ...blocks], { type: "audio/wav" });
}
