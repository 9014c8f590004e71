// The body of a function with `element`, `props` and `watch`, before the script of a field of pictures: sends files to the
// server's own upload route, which answers with tokens.
const find = (selector) => element.querySelector(selector);
const button = (does) => find(`[data-does=${does}]`);
const message = find(".sds-upload-message");
const say = (text) => { message.textContent = text; };

const transmit = async (blob, instead) => {
  const url = new URL("pictures", document.baseURI);
  if (instead) url.searchParams.set("instead", instead);
  const answer = await fetch(url, { method: "POST", body: blob, headers: { "Content-Type": "application/octet-stream" } });
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(body.detail ?? `The server answered ${answer.status}.`);
  return body.token;
};

const paste = async (take) => {
  try {
    for (const item of await navigator.clipboard.read()) {
      const kind = item.types.find((type) => type.startsWith("image/"));
      if (kind) return take(await item.getType(kind));
    }
    say("There is no picture in the clipboard.");
  } catch {
    say("This page may not read the clipboard: press Ctrl+V here instead.");
  }
};

// Calls `take` with the pictures that are pasted into the field, and with the files that are dropped on it.
const onGiven = (take) => {
  element.addEventListener("paste", (event) => {
    take([...event.clipboardData.files].filter((given) => given.type.startsWith("image/")));
  });
  element.addEventListener("dragover", (event) => { event.preventDefault(); });
  element.addEventListener("drop", (event) => {
    event.preventDefault();
    take([...event.dataTransfer.files]);
  });
};

