// Browsers refuse workers to pages that are opened as files. The search of the site then
// runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      this.frame = frame;
      this.ready = new Promise((done) => frame.addEventListener("load", done));
      frame.hidden = true;
      frame.reply = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      frame.srcdoc =
        "<script>self.postMessage = (data) => frameElement.reply(data)</script>" +
        `<script src="${url}"></script>`;
      document.body.append(frame);
    }

    postMessage(data) {
      this.ready.then(() =>
        this.frame.contentWindow.dispatchEvent(new MessageEvent("message", { data })),
      );
    }
  };
}
