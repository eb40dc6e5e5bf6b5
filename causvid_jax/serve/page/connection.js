// The WebSocket of one session: messages out, events and chunks in, and taking up a lost connection. What is asked for
// while the connection is lost is sent when it is taken up.

const RETRY = [250, 500, 1000, 2000, 4000, 8000];

export class Connection {
  // handlers: { hello, event(message), chunk(header, bytes), lost(text), closed(sentence) }
  constructor(token, handlers) {
    this.token = token;
    this.handlers = handlers;
    this.session = null; // its token, once there is one
    this.received = 0;
    this.tries = 0;
    this.over = false;
    this.sent = 0; // id of the latest change of prompt
    this.change = null; // that message, until the server answers it
    this.live = false; // whether the server has opened or resumed the session
    this.waiting = []; // messages, with payloads, that could not be sent
  }

  open(start, payload) {
    this.first = [start, payload];
    this.connect();
  }

  connect() {
    const protocols = ["causvid.v1"];
    if (this.token) protocols.push("token." + this.token);
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    this.socket = new WebSocket(`${scheme}//${location.host}/v1/stream`, protocols);
    this.socket.binaryType = "arraybuffer";
    this.socket.onmessage = (message) => this.take(message.data);
    this.socket.onclose = (close) => this.lose(close);
  }

  take(data) {
    if (typeof data !== "string") {
      const size = new DataView(data).getUint32(0);
      const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, size)));
      this.received = header.index + 1;
      this.handlers.chunk(header, new Uint8Array(data, 4 + size));
      return;
    }
    const message = JSON.parse(data);
    if (message.type === "chunk") this.received = message.index + 1; // its frames come by WebRTC
    if (message.type === "hello") {
      this.handlers.hello(message);
      if (this.session) this.write({ type: "resume", token: this.session, received: this.received, format: this.format });
      else this.write(...this.first);
    } else if (message.type === "session") {
      this.session = message.token;
      this.tries = 0;
      this.live = true;
      for (const each of this.waiting.splice(0)) this.write(...each);
      if (this.change) this.write(this.change); // also one that was sent into a connection that was lost already
      this.handlers.event(message);
    } else {
      if (message.type === "error" || (message.type === "changed" && message.id === this.sent)) this.change = null;
      this.handlers.event(message);
    }
  }

  lose(close) {
    this.live = false;
    if (this.over) return;
    const refused = close.code >= 4000 || close.code === 1000 || close.code === 1009;
    if (refused || this.tries >= RETRY.length) {
      this.over = true;
      const reason = close.reason || (refused ? "the server closed the connection" : "the server cannot be reached");
      this.handlers.closed(reason);
      return;
    }
    this.handlers.lost("The connection is lost; trying again …");
    setTimeout(() => this.connect(), RETRY[this.tries++]);
  }

  // Return whether it is sent now. Requests and frames of a video are of the moment, so they do not wait.
  send(message, payload) {
    if (message.type === "start") this.change = null;
    if (message.type === "prompt") this.change = message;
    if (this.live && this.socket.readyState === WebSocket.OPEN) {
      this.write(message, payload);
      return true;
    }
    const momentary = message.type === "pull" || message === this.change || (message.type === "input" && payload);
    if (!momentary) this.waiting.push([message, payload]);
    return false;
  }

  write(message, payload) {
    if (message.format) this.format = message.format;
    const text = JSON.stringify(message);
    if (!payload) {
      this.socket.send(text);
      return;
    }
    const header = new TextEncoder().encode(text);
    const data = new Uint8Array(4 + header.length + payload.length);
    new DataView(data.buffer).setUint32(0, header.length);
    data.set(header, 4);
    data.set(payload, 4 + header.length);
    this.socket.send(data);
  }

  close() {
    this.over = true;
    this.send({ type: "stop" });
    this.socket.close();
  }
}
