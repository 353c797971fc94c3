// The page: a file or the microphone in, text over the waveform out.

import { Peaks, int16, peaksOf, wav } from "./sound.js";
import { Live, srt, state, transcribe } from "./server.js";
import { Wave } from "./wave.js";

const $ = (id) => document.getElementById(id);
const audio = $("audio");
const wave = new Wave($("wave"), seek);
const UNSURE = 0.6;
let server = {};
let shown = { name: "", words: [], segments: [], maybe: [] };
let recording = null;
let cancel = null;

// ---- What is shown ----

function say(text) {
  $("status").textContent = text;
}

function fail(error) {
  $("error").textContent = error.message;
  $("error").hidden = false;
  say("");
}

function begin(name) {
  cancel?.abort();
  $("error").hidden = true;
  $("result").hidden = false;
  audio.removeAttribute("src");
  $("play").disabled = true;
  wave.clear();
  show({ name, words: [], segments: [], maybe: [] });
  moved(0);
}

// words and segments that are final, and `maybe`, the words that may still change.
function show(changes) {
  Object.assign(shown, changes);
  const all = [...shown.words, ...shown.maybe];
  wave.set({ words: all });
  $("text").replaceChildren(
    ...all.flatMap((word, i) => [element(word, i, i >= shown.words.length), " "]),
  );
  const first = $("text").firstElementChild;
  if (first) first.tabIndex = 0;
  const done = shown.segments.length > 0;
  $("copy").disabled = !done;
  $("srt").setAttribute("aria-disabled", String(!done));
  URL.revokeObjectURL($("srt").href);
  $("srt").removeAttribute("href");
  if (done) {
    $("srt").href = URL.createObjectURL(new Blob([srt(shown.segments)], { type: "application/x-subrip" }));
    $("srt").download = `${shown.name.replace(/\.[^.]*$/, "")}.srt`;
  }
}

function element(word, i, maybe) {
  const span = document.createElement("span");
  span.textContent = word.word;
  span.dataset.index = i;
  span.tabIndex = -1;
  span.setAttribute("role", "button");
  span.title = `${word.start.toFixed(2)} s, confidence ${Math.round(word.confidence * 100)} %`;
  span.classList.toggle("maybe", maybe);
  span.classList.toggle("unsure", word.confidence < UNSURE);
  return span;
}

function seek(time) {
  if (audio.src) audio.currentTime = Math.max(0, time);
  moved(Math.max(0, time));
}

function moved(time) {
  wave.set({ time });
  wave.show(time);
  $("time").textContent = `${Math.floor(time / 60)}:${(time % 60).toFixed(1).padStart(4, "0")}`;
  const now = shown.words.findIndex((word) => word.start <= time && time < word.end);
  const spans = $("text").children;
  if (spans[shown.now]) spans[shown.now].classList.remove("now");
  if (spans[now]) spans[now].classList.add("now");
  shown.now = now;
}

function listen(file, duration) {
  audio.src = URL.createObjectURL(file);
  $("play").disabled = false;
  if (duration) wave.set({ duration });
}

// ---- A file ----

async function open(file, name = file.name) {
  begin(name);
  listen(file);
  say(`Transcribing ${name} …`);
  peaksOf(file).then((peaks) => peaks && shown.name === name && wave.set({ peaks, duration: peaks.length / 100 }));
  cancel = new AbortController();
  const { signal } = cancel;
  const more = ({ words, maybe }) => !signal.aborted && show({ words: [...shown.words, ...words], maybe });
  try {
    finish(await transcribe(file, name, $("key").value, signal, more));
  } catch (error) {
    if (error.name !== "AbortError") fail(error);
  }
}

function finish(found) {
  wave.set({ duration: found.duration });
  show({ words: found.words, segments: found.segments, maybe: [] });
  say(found.text ? `${found.words.length} words in ${found.duration.toFixed(1)} s of audio.` : "No words were heard.");
}

// ---- The microphone ----

async function speak() {
  if (recording) return stop();
  if (!navigator.mediaDevices) {
    return fail(new Error("The browser gives the microphone to pages of https or localhost alone; open this one so."));
  }
  begin("speech.wav");
  recording = { blocks: [] };
  try {
    const plain = { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false };
    recording.source = await navigator.mediaDevices.getUserMedia({ audio: plain });
    await record();
  } catch (error) {
    release();
    fail(error.name === "NotAllowedError" ? new Error("The microphone was not allowed; allow it in the browser.") : error);
  }
}

async function record() {
  const session = recording;
  const context = (session.context = new AudioContext());
  await context.audioWorklet.addModule("/page/recorder.js");
  const node = (session.node = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0 }));
  const peaks = new Peaks(context.sampleRate);
  const live = server.streaming ? new Live(context.sampleRate, $("key").value, heard) : null;
  live?.done.catch((error) => recording === session && stop(error));
  session.live = live;
  session.ended = new Promise((resolve) => {
    node.port.onmessage = ({ data }) => {
      if (data === null) return resolve();
      peaks.push(data);
      session.blocks.push(int16(data));
      live?.send(session.blocks.at(-1).buffer);
      const duration = peaks.count / context.sampleRate;
      wave.set({ peaks: peaks.values, duration });
      wave.show(duration);
    };
  });
  context.createMediaStreamSource(session.source).connect(node);
  $("speak").setAttribute("aria-pressed", "true");
  $("speak").querySelector("strong").textContent = "Stop";
  say(live ? "Listening …" : "Recording; the text comes when you stop …");
}

function heard({ type, words }) {
  const found = words.map(({ text, ...rest }) => ({ word: text, ...rest }));
  if (type === "partial") return show({ maybe: found });
  const text = words.map((w) => w.text).join(" ");
  const segment = { text, start: words[0].start, end: words.at(-1).end };
  show({ words: [...shown.words, ...found], segments: [...shown.segments, segment], maybe: [] });
}

async function stop(broken) {
  const { node, live, ended, context, blocks } = recording;
  if (recording.stopping) return;
  recording.stopping = true;
  node.port.postMessage("end");
  await ended;
  const rate = context.sampleRate;
  const duration = blocks.reduce((sum, block) => sum + block.length, 0) / rate;
  const file = wav(blocks, rate);
  release();
  if (!live) return open(file, "speech.wav");
  listen(file, duration);
  try {
    if (broken) throw broken;
    await live.finish();
    show({ maybe: [] });
    say(shown.words.length ? `${shown.words.length} words in ${duration.toFixed(1)} s of audio.` : "No words were heard.");
  } catch (error) {
    fail(error);
  }
}

function release() {
  recording?.source?.getTracks().forEach((track) => track.stop());
  recording?.context?.close();
  recording = null;
  $("speak").setAttribute("aria-pressed", "false");
  $("speak").querySelector("strong").textContent = "Speak";
}

// ---- Hands ----

$("file").addEventListener("change", ({ target }) => {
  if (target.files.length) open(target.files[0]);
  target.value = "";
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    const file = kind === "drop" && event.dataTransfer.files[0];
    if (file) open(file);
  });
}
$("speak").addEventListener("click", () => speak());
$("key-form").addEventListener("submit", (event) => event.preventDefault());
$("play").addEventListener("click", toggle);
$("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(shown.segments.map((s) => s.text).join("\n"));
  say("Copied.");
});
$("text").addEventListener("click", ({ target }) => choose(target));
$("text").addEventListener("keydown", (event) => {
  const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  const next = step && event.target[step];
  if (next) choose(next);
  if (event.key === "Enter") audio.play();
  if (step || event.key === "Enter") event.preventDefault();
});
$("wave").addEventListener("keydown", (event) => {
  const goals = { ArrowRight: wave.time + 1, ArrowLeft: wave.time - 1, Home: 0, End: wave.duration };
  if (!(event.key in goals)) return;
  event.preventDefault();
  seek(Math.min(goals[event.key], wave.duration));
});
document.addEventListener("keydown", (event) => {
  if (event.target.matches("input:not([type=file]), button, a") || event.ctrlKey || event.metaKey || event.altKey) return;
  const action = { " ": toggle, o: () => $("file").click(), r: speak, Escape: () => cancel?.abort() }[event.key];
  if (!action) return;
  event.preventDefault();
  action();
});

function choose(span) {
  const word = shown.words[span.dataset?.index];
  if (!word) return;
  for (const other of $("text").children) other.tabIndex = -1;
  span.tabIndex = 0;
  span.focus();
  seek(word.start);
}

function toggle() {
  if (audio.src) audio.paused ? audio.play() : audio.pause();
}
for (const kind of ["play", "pause", "ended"]) {
  audio.addEventListener(kind, () => ($("play").textContent = audio.paused ? "Play" : "Pause"));
}
(function follow() {
  if (!audio.paused) moved(audio.currentTime);
  requestAnimationFrame(follow);
})();

// ---- The server ----

server = await state();
$("model").textContent = server.model;
$("key-form").hidden = !server.key;
if (!server.streaming) $("speak-hint").firstChild.textContent = "and read the text after";
if (!server.ready) say("The server is getting ready …");
document.documentElement.dataset.ready = "true";
