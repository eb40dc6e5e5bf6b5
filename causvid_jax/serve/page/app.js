// The page: prompt box, steering, pictures and video, snapshots, recordings, replay links and figures.

import { Player } from "./player.js";

const $ = (id) => document.getElementById(id);
const options = new URLSearchParams(location.hash.slice(1));
const token = options.get("token") || "";
const ARROWS = { ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left", ArrowRight: "right" };
const COMPASS = [["up left", "↖"], ["up", "↑"], ["up right", "↗"], ["left", "←"], null, ["right", "→"],
  ["down left", "↙"], ["down", "↓"], ["down right", "↘"]];
const CAPTION = /^a (\S+) (\d) moving (.+)$/;

let player = null; // the film that is steered; others beside it are forks
let players = [];
let hello = null;
let prompt = options.get("prompt") || "";
let confirmed = prompt; // the latest that the server has taken
let held = new Set(); // arrow keys that are down
let following = null;
let firstPicture = null; // of a student with an image branch; every new film starts from it

// ---- films ----

const report = {
  hello(message) {
    if (hello) return;
    hello = message;
    $("about").textContent = `${message.recipe} · ${message.width} × ${message.height} · ${message.fps} frames/s`;
    if (message.webrtc) $("format").append(new Option("WebRTC", "webrtc"));
    $("format").value = message.format;
    $("prompt").maxLength = message.prompt_characters;
    $("pictures").hidden = !message.pictures;
    for (const each of document.querySelectorAll(".follow")) each.hidden = !message.videos;
    prepareDigits();
    if (!message.vocabulary) $("hint").textContent = "Type a prompt; Enter shows it from the next block on.";
  },
  event(from, message) {
    const act = EVENTS[message.type];
    if (act) act(from, message);
  },
  shown(from, header) {
    const mark = header.take + header.prompt;
    if (from.lastMark === mark) return;
    from.lastMark = mark;
    from.timeline = [...from.timeline, { at: header.frame / from.fps, prompt: header.prompt }].slice(-50);
    if (from === player) drawTimeline();
  },
  error: say,
  closed(from, sentence) {
    players = players.filter((other) => other !== from);
    if (sentence) say(from === player ? sentence + " — Restart begins a new film." : sentence);
    if (from === player && players.length) choosePlayer(players[0]);
    outline();
  },
  chosen(from) {
    if (from !== player && !from.closed) choosePlayer(from);
  },
};

// Of films beside each other, steer the one that is clicked.
function choosePlayer(next) {
  player = next;
  if (next.header) prompt = confirmed = next.header.prompt;
  $("prompt").value = prompt;
  $("pause").textContent = player.paused ? "Go on" : "Pause";
  mark();
  outline();
  drawTimeline();
}

function outline() {
  $("films").classList.toggle("several", players.length > 1);
  for (const each of players) each.element.classList.toggle("steered", each === player);
}

const EVENTS = {
  queued: (_, m) => say(`All places are taken; you are number ${m.position} in the queue.`, true),
  started(from, m) {
    say("");
    from.timeline = [];
    from.lastMark = "";
    if (from !== player) return;
    prompt = confirmed = m.prompt;
    $("prompt").value = prompt;
    $("seed").value = m.seed;
    $("pause").textContent = "Pause";
    mark();
  },
  changed(from, m) {
    if (from === player) {
      confirmed = m.prompt;
      if (m.id === from.connection.sent) prompt = m.prompt; // an earlier refusal may have reset it
      mark();
    }
    say("");
  },
  error(from, m) {
    if (!from.take) from.refused = true; // there is no film whose prompt could change
    if (from === player) prompt = confirmed; // what was refused is not what is shown
    mark();
    say(m.message);
  },
  snapshot: (from, m) => addSnapshot(m, from),
  recording: () => setRecording(true),
  recorded(_, m) {
    setRecording(false);
    addRecording(m);
  },
  script: (_, m) => copyLink(m.script),
  replayed(from, m) {
    from.paused = true;
    $("pause").textContent = "Go on";
    const verdict = { true: "every frame is identical to the first film", false: "its frames differ" };
    say(`The replay is over: ${verdict[m.same] || "all blocks are shown"}.`, true);
  },
};

function newPlayer(closable) {
  const made = new Player(token, $("films"), report, closable);
  made.format = $("format").dataset.chosen;
  players.push(made);
  setTimeout(outline);
  return made;
}

function begin(message = {}, payload) {
  if (!player || player.closed) {
    if (player) player.element.remove();
    player = newPlayer(false);
  }
  if (hello && hello.needs_picture && !message.script) payload = firstPicture = payload || firstPicture;
  const asked = message.script ? message : { prompt: prompt || "a red 3 moving left", seed: seed() };
  player.start(asked, payload || undefined);
}

const seed = () => Math.min(2 ** 32 - 1, Math.max(0, Math.floor(Number($("seed").value)) || 0));

function say(sentence, quiet = false) {
  $("error").hidden = !sentence;
  $("error").textContent = sentence || "";
  $("error").setAttribute("role", quiet ? "status" : "alert");
}

// ---- prompts ----

function show(text) {
  text = text.trim();
  if (!text || !player) return;
  prompt = text;
  $("prompt").value = text;
  if (player.refused && !player.take) {
    player.refused = false;
    return begin();
  }
  if (player.paused) togglePause();
  player.change(text, $("context").value, Number($("blend").value) || 0);
  mark();
}

const numbers = () => hello.vocabulary.filter((word) => /^\d$/.test(word));
const colors = () => ["red", "green", "blue", "yellow", "cyan", "magenta", "white"].filter((c) => hello.vocabulary.includes(c));

function prepareDigits() {
  const words = new Set(hello.vocabulary || []);
  if (!["a", "moving", "up", "0", "red"].every((word) => words.has(word)) || words.has("and") && hello.width > hello.height)
    return;
  $("digits").hidden = false;
  for (const word of numbers()) button($("numbers"), word, () => steer({ digit: word })).dataset.word = word;
  for (const word of colors()) {
    const made = button($("colors"), word, () => steer({ color: word }));
    made.dataset.word = word;
    made.style.borderBottomColor = word === "white" ? "light-dark(#b9bbbe, #fff)" : word;
  }
  for (const entry of COMPASS) {
    if (!entry) $("directions").append(document.createElement("span"));
    else {
      const made = button($("directions"), entry[1], () => steer({ direction: entry[0] }));
      made.dataset.word = entry[0];
      made.setAttribute("aria-label", entry[0]);
    }
  }
  $("hint").textContent = "Arrow keys steer, 0 to 9 choose the digit; Enter shows the prompt from the next block on.";
}

function button(place, text, act) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.onclick = act;
  place.append(made);
  return made;
}

function steer(part) {
  const match = CAPTION.exec(prompt) || CAPTION.exec(confirmed) || [0, "red", "3", "left"];
  const now = { color: match[1], digit: match[2], direction: match[3], ...part };
  show(`a ${now.color} ${now.digit} moving ${now.direction}`);
}

function mark() {
  const match = CAPTION.exec(prompt) || [];
  for (const each of document.querySelectorAll("#digits button"))
    each.setAttribute("aria-pressed", match.slice(1).includes(each.dataset.word));
}

function suggest() {
  const list = $("suggestions");
  const box = $("prompt");
  const before = box.value.slice(0, box.selectionStart);
  const start = before.split(/\s+/).pop().toLowerCase();
  const words = (hello && hello.vocabulary) || [];
  const fit = start ? words.filter((word) => word.startsWith(start) && word !== start).slice(0, 8) : [];
  const unknown = box.value.trim().split(/\s+/).filter((w) => w && words.length && !words.some((v) => v.startsWith(w.toLowerCase())));
  if (unknown.length) say(`“${unknown[0]}” is no word of this model; it knows: ${words.join(", ")}.`);
  else if ($("error").textContent.includes("no word of this model")) say("");
  list.replaceChildren(...fit.map((word, i) => {
    const item = document.createElement("li");
    item.role = "option";
    item.textContent = word;
    item.setAttribute("aria-selected", i === 0);
    item.onmousedown = (event) => { event.preventDefault(); complete(word); };
    return item;
  }));
  list.hidden = !fit.length;
  box.setAttribute("aria-expanded", fit.length > 0);
}

function complete(word) {
  const box = $("prompt");
  const before = box.value.slice(0, box.selectionStart).replace(/\S*$/, word + " ");
  box.value = before + box.value.slice(box.selectionStart).replace(/^\s*/, "");
  box.setSelectionRange(before.length, before.length);
  suggest();
}

function choose(step) {
  const items = [...$("suggestions").children];
  const now = items.findIndex((item) => item.getAttribute("aria-selected") === "true");
  items.forEach((item, i) => item.setAttribute("aria-selected", i === (now + step + items.length) % items.length));
}

$("prompt").addEventListener("input", suggest);
$("prompt").addEventListener("blur", () => ($("suggestions").hidden = true));
$("prompt").addEventListener("keydown", (event) => {
  const open = !$("suggestions").hidden;
  if (event.key === "Escape") { $("suggestions").hidden = true; event.target.blur(); }
  else if (open && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    event.preventDefault();
    choose(event.key === "ArrowDown" ? 1 : -1);
  } else if (open && event.key === "Tab") {
    event.preventDefault();
    complete(document.querySelector("#suggestions [aria-selected=true]").textContent);
  }
});
$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  $("suggestions").hidden = true;
  show($("prompt").value);
});

// ---- keyboard ----

document.addEventListener("keydown", (event) => {
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  if (ARROWS[event.key] && !$("digits").hidden) {
    event.preventDefault();
    if (event.repeat) return;
    held.add(ARROWS[event.key]);
    const direction = ["up", "down", "left", "right"].filter((d) => held.has(d)).slice(0, 2).join(" ");
    steer({ direction: COMPASS.some((entry) => entry && entry[0] === direction) ? direction : ARROWS[event.key] });
  } else if (/^[0-9]$/.test(event.key) && !$("digits").hidden) steer({ digit: event.key });
  else if (event.key === " " && event.target.tagName !== "BUTTON") { event.preventDefault(); togglePause(); }
  else if (event.key === "r") begin();
  else if (event.key === "s") player.send({ type: "snapshot", name: Date.now() });
  else if (event.key === "/") { event.preventDefault(); $("prompt").focus(); $("prompt").select(); }
});
document.addEventListener("keyup", (event) => held.delete(ARROWS[event.key]));
window.addEventListener("blur", () => held.clear());

// ---- transport ----

function togglePause() {
  player.pause(!player.paused);
  $("pause").textContent = player.paused ? "Go on" : "Pause";
}
$("pause").onclick = togglePause;
$("restart").onclick = () => begin();
$("dice").onclick = () => { $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]; begin(); };
$("seed").onchange = () => begin();
$("format").onchange = () => {
  $("format").dataset.chosen = player.format = $("format").value;
  begin();
};

// ---- pictures and video ----

async function jpeg(source, width, height) {
  const canvas = document.createElement("canvas");
  const scale = Math.max(hello.width / width, hello.height / height);
  canvas.width = Math.max(hello.width, Math.round(width * scale));
  canvas.height = Math.max(hello.height, Math.round(height * scale));
  canvas.getContext("2d").drawImage(source, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
  return new Uint8Array(await blob.arrayBuffer());
}

const mebibytes = (bytes) => (bytes / 2 ** 20).toFixed(1);

async function fromPicture(file) {
  if (!file || !hello) return;
  const most = hello.message_bytes - 4096; // the rest is for the message with the picture
  if (!file.type.startsWith("video/") && file.size > most)
    return say(`The picture has ${mebibytes(file.size)} MiB; accepted: ${mebibytes(most)} MiB.`);
  if (file.type.startsWith("video/")) return hello.videos ? followFile(file) : say("This student cannot follow a video.");
  unfollow();
  begin({}, new Uint8Array(await file.arrayBuffer()));
}

const source = $("source");

async function follow(name) {
  await source.play();
  $("unfollow").hidden = false;
  $("camera").setAttribute("aria-pressed", name === "camera");
  clearInterval(following);
  following = setInterval(async () => {
    if (!source.videoWidth || player.paused) return;
    const frame = await jpeg(source, source.videoWidth, source.videoHeight);
    if (following) player.send({ type: "input", strength: Number($("strength").value) }, frame);
  }, 1000 / hello.fps);
}

function followFile(file) {
  unfollow();
  source.src = URL.createObjectURL(file);
  follow("file").catch(() => say("This browser cannot play the video."));
}

async function openCamera() {
  unfollow();
  try {
    source.srcObject = await navigator.mediaDevices.getUserMedia({ video: { width: 640 }, audio: false });
    await source.play();
    return true;
  } catch (error) {
    say(error.name === "NotAllowedError" ? "The camera is not permitted." : "There is no camera.");
    return false;
  }
}

function unfollow() {
  clearInterval(following);
  following = null;
  if (source.srcObject) for (const track of source.srcObject.getTracks()) track.stop();
  source.pause();
  source.srcObject = null;
  source.removeAttribute("src");
  $("unfollow").hidden = true;
  $("camera").setAttribute("aria-pressed", false);
  if (player && hello && hello.videos) player.send({ type: "input" });
}

$("picture").onchange = (event) => fromPicture(event.target.files[0]);
$("video").onchange = (event) => event.target.files[0] && followFile(event.target.files[0]);
$("camera").onclick = async () => { if (await openCamera()) follow("camera"); };
$("photo").onclick = async () => {
  if (!(await openCamera())) return;
  const picture = await jpeg(source, source.videoWidth, source.videoHeight);
  unfollow();
  begin({}, picture);
};
$("unfollow").onclick = unfollow;
$("strength").oninput = () => ($("strengthvalue").value = $("strength").value);
document.addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
document.addEventListener("dragleave", () => document.body.classList.remove("dropping"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dropping");
  fromPicture(event.dataTransfer.files[0]);
});
document.addEventListener("paste", (event) => event.clipboardData.files[0] && fromPicture(event.clipboardData.files[0]));

// ---- snapshots, recordings, links ----

const clock = (seconds) => `${Math.floor(seconds / 60)}:${(seconds % 60).toFixed(1).padStart(4, "0")}`;

function addSnapshot(m, from) {
  const item = document.createElement("li");
  item.append(`Snapshot at ${clock(m.frame / from.fps)}: ${m.prompt} `);
  button(item, "Continue from it", () => player.start({ snapshot: m.id }));
  button(item, "Beside it", () => newPlayer(true).start({ snapshot: m.id }));
  $("kept").prepend(item);
}

function addRecording(m) {
  const item = document.createElement("li");
  item.append(`Recording of ${clock(m.frames / hello.fps)} `);
  const save = button(item, "Download", async () => {
    const answer = await fetch(`/v1/recordings/${m.name}`, token ? { headers: { authorization: `Bearer ${token}` } } : {});
    if (!answer.ok) return say("The recording is no longer kept.");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(await answer.blob());
    link.download = m.name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  });
  save.className = "download";
  $("kept").prepend(item);
}

function setRecording(on) {
  $("record").setAttribute("aria-pressed", on);
  $("record").textContent = on ? "Stop recording" : "Record";
}
$("snapshot").onclick = () => player.send({ type: "snapshot", name: Date.now() });
$("record").onclick = () => player.send({ type: "record", on: $("record").getAttribute("aria-pressed") !== "true" });
$("link").onclick = () => player.send({ type: "script" });

async function copyLink(script) {
  const bytes = new TextEncoder().encode(script);
  const text = btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
  const link = `${location.origin}${location.pathname}#replay=${encodeURIComponent(text)}`;
  if (link.length > 60000) return say("The film is too long for a link; record it, the file can be replayed.");
  const item = document.createElement("li");
  const anchor = document.createElement("a");
  anchor.href = link;
  anchor.target = "_blank";
  anchor.className = "replay";
  anchor.textContent = "Replay link";
  item.append(anchor, ` of ${JSON.parse(script).blocks} blocks`);
  $("kept").prepend(item);
  try {
    await navigator.clipboard.writeText(link);
    item.append(" (copied)");
  } catch { /* the link is on the page */ }
}

function drawTimeline() {
  $("timeline").replaceChildren(...player.timeline.map(({ at, prompt }) => {
    const part = document.createElement("span");
    part.textContent = `${clock(at)} ${prompt}`;
    return part;
  }));
  $("timeline").scrollLeft = $("timeline").scrollWidth;
}

// ---- figures ----

const FIGURES = [
  ["generated", "Frames/s generated", (v) => v.toFixed(0)],
  ["shown", "Frames/s shown", (v) => v.toFixed(1)],
  ["first", "First frame", (v) => `${v.toFixed(2)} s`],
  ["delay", "Delay from key to frame", (v) => (v ? `${v.toFixed(2)} s` : "–")],
  ["lead", "Buffered film", (v) => `${v.toFixed(2)} s`],
  ["dropped", "Frames dropped", (v) => String(v)],
];
for (const [name, label] of FIGURES) {
  const [term, value] = [document.createElement("dt"), document.createElement("dd")];
  term.textContent = label;
  value.id = `figure-${name}`;
  const pair = document.createElement("div");
  pair.append(term, value);
  $("numbersheet").append(pair);
}
setInterval(() => {
  if (player) for (const [name, , format] of FIGURES) $(`figure-${name}`).textContent = format(player.numbers[name]);
}, 250);

// ---- begin ----

if (options.get("replay")) {
  try {
    const bytes = Uint8Array.from(atob(options.get("replay")), (c) => c.charCodeAt(0));
    begin({ script: JSON.parse(new TextDecoder().decode(bytes)) });
  } catch {
    say("The replay link is damaged.");
  }
} else begin();

window.film = { get player() { return player; } }; // for tests and the curious
