// What the page asks of the server.

// A file -> its transcript with words and segments; Error with the server's reason. While it is
// heard, `heard` gets the words that are new and stay, and those after them that may still change.
export async function transcribe(file, name, key, signal, heard) {
  const form = new FormData();
  form.append("file", file, name);
  form.append("stream", "true");
  form.append("response_format", "verbose_json");
  form.append("timestamp_granularities[]", "word");
  form.append("timestamp_granularities[]", "segment");
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const answer = await fetch("/v1/audio/transcriptions", { method: "POST", body: form, headers, signal });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  for await (const event of events(answer.body)) {
    if (event.error) throw new Error(event.error.message);
    if (event.type === "transcript.text.done") return event;
    heard(event);
  }
  throw new Error("the connection broke off");
}

// Server-sent events, one JSON object each.
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) yield JSON.parse(part.replace(/^data: /, ""));
  }
}

// A live stream: send blocks of Int16 samples; `heard` gets partial and final results.
export class Live {
  constructor(rate, key, heard) {
    this.waiting = [];
    this.socket = new WebSocket(`${location.origin.replace(/^http/, "ws")}/v1/stream`);
    this.socket.binaryType = "arraybuffer";
    this.done = new Promise((resolve, reject) => {
      let reason = "the connection broke off";
      this.socket.onclose = () => reject(new Error(reason));
      this.socket.onmessage = ({ data }) => {
        const message = JSON.parse(data);
        if (message.type === "ready") this.open();
        else if (message.type === "done") resolve();
        else if (message.type === "error") reason = message.message;
        else heard(message);
      };
    });
    this.socket.onopen = () =>
      this.socket.send(JSON.stringify({ type: "start", sample_rate: rate, format: "s16le", api_key: key }));
  }

  open() {
    this.ready = true;
    this.waiting.splice(0).forEach((data) => this.socket.send(data));
  }

  send(data) {
    if (!this.ready) this.waiting.push(data);
    else if (this.socket.readyState === WebSocket.OPEN) this.socket.send(data);
  }

  finish() {
    this.send(JSON.stringify({ type: "finish" }));
    return this.done;
  }
}

export async function state() {
  return (await fetch("/ready")).json();
}

// Segments -> the text of an srt file.
export function srt(segments) {
  const clock = (seconds) => {
    const ms = Math.round(seconds * 1000);
    const two = (n) => String(Math.floor(n)).padStart(2, "0");
    const rest = String(ms % 1000).padStart(3, "0");
    return `${two(ms / 3600000)}:${two((ms / 60000) % 60)}:${two((ms / 1000) % 60)},${rest}`;
  };
  return segments
    .map((s, i) => `${i + 1}\n${clock(s.start)} --> ${clock(s.end)}\n${s.text}\n`)
    .join("\n");
}
