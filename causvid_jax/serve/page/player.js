// Shows one film at its own pace, and asks for the next block just before it is needed: so a change of prompt is seen
// as soon as it can be, and a page that does not look asks for nothing.

import { Connection } from "./connection.js";

const LEAST_LEAD = 0.12; // seconds of film left when the next block is asked for, at least

export class Player {
  // report: { hello, event(player, message), shown(player, prompt), error(sentence), chosen(player) }
  constructor(token, place, report, closable) {
    this.report = report;
    this.element = document.createElement("div");
    this.element.className = "film";
    this.canvas = document.createElement("canvas");
    this.video = document.createElement("video");
    this.video.muted = this.video.playsInline = true;
    this.video.hidden = true;
    this.caption = document.createElement("div");
    this.caption.className = "caption";
    this.element.append(this.canvas, this.video, this.caption);
    if (closable) {
      const close = document.createElement("button");
      close.className = "close";
      close.textContent = "Close";
      close.onclick = (event) => { event.stopPropagation(); this.close(); };
      this.element.append(close);
    }
    this.element.addEventListener("click", () => report.chosen(this));
    place.append(this.element);
    this.context = this.canvas.getContext("2d", { willReadFrequently: true });
    this.connection = new Connection(token, {
      hello: (hello) => this.greet(hello),
      event: (message) => this.event(message),
      chunk: (header, data) => this.chunk(header, data),
      lost: (sentence) => report.error(sentence, true),
      closed: (sentence) => this.end(sentence),
    });
    this.reset();
    this.take = 0;
    this.credit = 0;
    this.peer = null;
    this.counted = 0; // frames that the element has shown by WebRTC
    this.delays = []; // seconds from asking to having
    this.keys = new Map(); // id of a change to when its key was pressed
    this.numbers = { generated: 0, shown: 0, first: 0, delay: 0, dropped: 0, lead: 0 };
    this.marks = [];
    this.timeline = [];
    this.tick = this.tick.bind(this);
    requestAnimationFrame(this.tick);
  }

  reset() {
    this.queue = []; // frames that wait: { image, index, chunk }
    this.clock = null; // when the next frame is due
    this.paused = false;
    this.asked = null;
    this.frames = 0; // shown of this film
    this.buffered = 0;
    if (this.buffer) {
      this.buffer = null;
      this.pending = [];
      this.video.removeAttribute("src");
      this.video.load();
    }
  }

  start(message, payload) {
    this.started = performance.now();
    this.starting = true; // what is shown until then is of the film before
    this.numbers.first = 0;
    this.message = { type: "start", format: this.format, ...message };
    if (!this.connection.socket) this.connection.open(this.message, payload);
    else this.connection.send(this.message, payload);
  }

  greet(hello) {
    this.fps = hello.fps;
    this.hello = hello;
    this.format ||= hello.format;
    this.canvas.width = hello.width;
    this.canvas.height = hello.height;
    this.element.style.setProperty("--ratio", `${hello.width} / ${hello.height}`);
    this.report.hello(hello);
    this.report.error("");
  }

  event(message) {
    if (message.type === "chunk") {
      this.chunk(message);
      return;
    }
    if (message.type === "session") {
      this.asked = null;
      this.hangUp(); // a new connection needs a new peer
    }
    if (message.type === "started" && this.format !== "webrtc") this.hangUp();
    if (["session", "started"].includes(message.type) && this.format === "webrtc" && !this.peer) this.call();
    if (message.type === "started") {
      this.starting = false;
      this.reset();
      this.take = message.take;
      this.asked = performance.now();
    }
    this.report.event(this, message);
  }

  send(message, payload) {
    return this.connection.send(message, payload);
  }

  change(prompt, context, blend) {
    const id = ++this.connection.sent;
    this.keys.set(id, performance.now());
    if (this.keys.size > 50) this.keys.delete(this.keys.keys().next().value);
    this.send({ type: "prompt", prompt, context, blend, id });
  }

  pause(paused) {
    this.paused = paused;
    this.clock = null;
    if (paused) this.video.pause();
    this.send({ type: "pause", paused });
  }

  async chunk(header, data) {
    if (header.take !== this.take) return;
    this.numbers.generated = header.count / Math.max(header.seconds, 1e-6);
    if (header.format === "webrtc") {
      this.show(header, performance.now());
      return;
    }
    if (this.asked !== null) {
      this.delays.push((performance.now() - this.asked) / 1000);
      if (this.delays.length > 20) this.delays.shift();
      this.asked = null;
    }
    this.credit = header.index + 1;
    if (header.format === "mp4") {
      this.append(header, data);
      return;
    }
    this.canvas.hidden = false;
    this.video.hidden = true;
    const strip = await createImageBitmap(new Blob([data], { type: "image/webp" }));
    if (header.take !== this.take) return;
    for (let i = 0; i < header.count; i++) this.queue.push({ strip, row: i, header, last: i === header.count - 1 });
  }

  // ---- WebRTC: the server sets the pace, and sends the header of a block as its first frame leaves ----

  async call() {
    const peer = this.peer = new RTCPeerConnection();
    this.canvas.hidden = true;
    this.video.hidden = false;
    peer.ontrack = (event) => (this.video.srcObject = new MediaStream([event.track]));
    peer.onconnectionstatechange = () => peer.connectionState === "failed" && this.giveUp(peer, "its connection is lost");
    peer.addTransceiver("video", { direction: "recvonly" });
    try {
      await peer.setLocalDescription();
      const headers = { "content-type": "application/json" };
      if (this.connection.token) headers.authorization = `Bearer ${this.connection.token}`;
      const body = JSON.stringify({ session: this.connection.session, sdp: peer.localDescription.sdp });
      const answer = await fetch("/v1/webrtc", { method: "POST", headers, body });
      const content = await answer.json();
      if (!answer.ok) throw new Error(content.error.message);
      if (peer === this.peer) await peer.setRemoteDescription(content);
    } catch (error) {
      this.giveUp(peer, error.message);
    }
  }

  giveUp(peer, reason) {
    if (peer !== this.peer) return;
    this.hangUp();
    this.report.error(`WebRTC failed: ${reason} — Restart tries again.`);
  }

  hangUp() {
    if (!this.peer) return;
    this.peer.close();
    this.peer = null;
    this.video.srcObject = null;
  }

  tickPeer(now) {
    if (this.video.paused && this.video.srcObject) this.video.play().catch(() => {});
    const quality = this.video.getVideoPlaybackQuality();
    if (quality.totalVideoFrames > this.counted) this.marks.push(now);
    this.counted = quality.totalVideoFrames;
    this.numbers.dropped = quality.droppedVideoFrames;
    this.numbers.lead = 0;
  }

  // ---- H.264 by Media Source Extensions ----

  append(header, data) {
    this.canvas.hidden = true;
    this.video.hidden = false;
    if (!this.buffer) {
      if (!window.MediaSource || !MediaSource.isTypeSupported(`video/mp4; codecs="${this.hello.codec}"`)) {
        this.report.error("This browser has no H.264; the film is sent as WebP frames.");
        this.format = "webp";
        this.start({ ...this.message, format: "webp" });
        return;
      }
      const source = new MediaSource();
      this.buffer = { source, chunks: [] };
      this.pending = [];
      this.video.src = URL.createObjectURL(source);
      source.addEventListener("sourceopen", () => {
        const buffer = source.addSourceBuffer(`video/mp4; codecs="${this.hello.codec}"`);
        buffer.addEventListener("updateend", () => this.flush());
        this.buffer.track = buffer;
        this.flush();
      }, { once: true });
      this.pending.push(data);
    } else this.pending.push(data.subarray(header.init));
    this.buffer.chunks.push(header);
    this.flush();
  }

  flush() {
    const track = this.buffer && this.buffer.track;
    if (!track || track.updating) return;
    const old = this.video.currentTime - 10;
    if (this.pending.length) track.appendBuffer(this.pending.shift());
    else if (track.buffered.length && track.buffered.start(0) < old - 5) track.remove(0, old);
    if (!this.paused && this.video.paused) this.video.play().catch(() => {});
  }

  tickVideo(now) {
    const { currentTime, buffered } = this.video;
    const end = buffered.length ? buffered.end(buffered.length - 1) : 0;
    this.buffered = end - currentTime;
    if (!this.paused && this.video.paused && this.buffered > 0) this.video.play().catch(() => {});
    const frame = Math.floor(currentTime * this.fps + 1e-3);
    const chunks = this.buffer.chunks;
    while (chunks.length > 1 && chunks[1].start <= frame) chunks.shift();
    if (buffered.length && chunks[0] && chunks[0].start <= frame) this.show(chunks[0], now);
    const quality = this.video.getVideoPlaybackQuality();
    this.numbers.dropped = quality.droppedVideoFrames;
    if (frame !== this.frames) this.marks.push(now);
    this.frames = frame;
  }

  // ---- frames ----

  tickFrames(now) {
    const step = 1000 / this.fps;
    if (this.clock === null && this.queue.length) this.clock = now;
    while (this.clock !== null && this.queue.length && now >= this.clock) {
      const frame = this.queue.shift();
      this.clock += step;
      if (this.queue.length && now >= this.clock) {
        this.numbers.dropped++; // its time was over before it could be shown
      } else {
        const { width, height } = this.canvas;
        this.context.drawImage(frame.strip, 0, frame.row * height, width, height, 0, 0, width, height);
        this.marks.push(now);
        this.show(frame.header, now);
      }
      if (frame.last) frame.strip.close();
      this.frames++;
    }
    this.buffered = this.queue.length / this.fps;
    if (!this.queue.length && this.clock !== null && now > this.clock + step) this.clock = null; // it ran dry
  }

  show(header, now) {
    if (!this.numbers.first && !this.starting) this.numbers.first = (now - this.started) / 1000;
    for (const [id, pressed] of this.keys) {
      if (id > header.knows) continue;
      if (id === header.knows) this.numbers.delay = (now - pressed) / 1000;
      this.keys.delete(id);
    }
    if (this.caption.textContent !== header.prompt) {
      this.caption.textContent = header.prompt;
    }
    this.header = header;
    this.report.shown(this, header);
  }

  tick(now) {
    if (this.closed) return;
    requestAnimationFrame(this.tick);
    if (!this.hello || this.paused) return;
    if (this.peer) this.tickPeer(now);
    else if (this.buffer) this.tickVideo(now);
    else this.tickFrames(now);
    while (this.marks.length && this.marks[0] < now - 2000) this.marks.shift();
    this.numbers.shown = this.marks.length / 2;
    if (this.format !== "webrtc") this.pull(now);
  }

  // Ask for the next block when as little is left as the last ones took to come, and half as much again.
  pull(now) {
    const slowest = this.delays.length ? Math.max(...this.delays.slice(-5)) : 0.2;
    const extra = this.buffer ? 0.15 : 0.04; // Media Source Extensions need a reserve
    this.numbers.lead = Math.max(LEAST_LEAD, 1.5 * slowest + extra);
    if (this.asked !== null && now - this.asked < 5000) return;
    if (!this.credit || this.buffered > this.numbers.lead) return;
    if (this.send({ type: "pull", upto: this.credit, received: this.connection.received })) this.asked = now;
  }

  end(sentence) {
    this.closed = true;
    this.hangUp();
    this.report.closed(this, sentence);
  }

  close() {
    this.closed = true;
    this.hangUp();
    this.connection.close();
    this.element.remove();
    this.report.closed(this, "");
  }
}
