// The WebSocket of one session: messages out, events and chunks in, and taking up a lost connection.

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
    this.sent = 0;
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
      if (this.session) this.send({ type: "resume", token: this.session, received: this.received, format: this.format });
      else this.send(this.first[0], this.first[1]);
    } else if (message.type === "session") {
      this.session = message.token;
      this.tries = 0;
      this.handlers.event(message);
    } else this.handlers.event(message);
  }

  lose(close) {
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

  send(message, payload) {
    if (this.socket.readyState !== WebSocket.OPEN) return false;
    if (message.format) this.format = message.format;
    const text = JSON.stringify(message);
    if (!payload) {
      this.socket.send(text);
      return true;
    }
    const header = new TextEncoder().encode(text);
    const data = new Uint8Array(4 + header.length + payload.length);
    new DataView(data.buffer).setUint32(0, header.length);
    data.set(header, 4);
    data.set(payload, 4 + header.length);
    this.socket.send(data);
    return true;
  }

  close() {
    this.over = true;
    this.send({ type: "stop" });
    this.socket.close();
  }
}
